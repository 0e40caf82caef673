"""retain against a real broker, in child processes: every request comes to its state, whatever ends the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import Producer as LibrdkafkaProducer
from kafka import KafkaConsumer, KafkaProducer

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.manifest import BlobRef, LearnedExample
from perennial.storage.registry.quarantine import RequestOutcome, ensure_text_key, finish_entry, load_quarantine
from perennial.streams.events.adapter_events import AdapterActivated
from perennial.streams.events.cloudevents import decode, encode
from perennial.streams.events.dead_letter import decode_dead_letter
from perennial.streams.events.models import (
    Batch,
    ExampleAccepted,
    ExampleScored,
    ForgetRequested,
    Origin,
    RetentionRequested,
    RollbackRequested,
    Selector,
    UpdateRequested,
)
from perennial.streams.kafka.topics import provision
from perennial.streams.retain.request_store import load_request
from perennial.streams.retain.rules.jobs import job_id_of
from perennial.streams.retention.quarantine_filter import QuarantineFilter, text_hash
from perennial.streams.settings import Settings
from perennial.testing import small_weights
from tests import origins
from tests.versions import VersionPublisher

RUN = """
from perennial.streams.devstack.signals import event_on_stop_signals
from perennial.streams.faust_app import run_streams
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import load_settings
settings = load_settings()
with event_on_stop_signals() as stop:
    run_streams(settings, stop, Metrics("streams", settings))
"""
PATIENCE_S = 180
ADAPTER = "acme/support"


def ident(number: int) -> str:
    return f"{number:032x}"[::-1]  # curate tells ids apart by their beginning


def example(number: int, at_ms: int = 1000, **fields: object) -> ExampleAccepted:
    return ExampleAccepted(
        adapter=ADAPTER, example_id=ident(number), kind="document", document_id=f"d{number}", learn=True,
        text=f"text {number}",
        origin=Origin(
            cluster_id="c", topic="documents", topic_id="t", partition=0, offset=number, timestamp_ms=at_ms
        ),
        **fields,
    )  # fmt: skip


def erase(*numbers: int, request_id: str = "r1", kind: str = "erase", **fields: object) -> RetentionRequested:
    selector = Selector(document_ids=[f"d{n}" for n in numbers]) if numbers else None
    return RetentionRequested(
        request_id=request_id, kind=kind, adapter=ADAPTER, selector=selector, requested_by="ann", **fields
    )


@dataclass
class Bench:
    """One test's topics, store, versions and child processes."""

    settings: Settings
    log: Path
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(Path(self.settings.store.uri))

    def start(self, failpoint: str = "") -> subprocess.Popen[bytes]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("PERENNIAL_")}
        env |= self.settings.environment()
        if failpoint:
            env["PERENNIAL_FAILPOINT"] = failpoint
        with self.log.open("ab") as log:
            child = subprocess.Popen([sys.executable, "-c", RUN], env=env, stderr=log, stdout=log)
        self.children.append(child)
        return child

    def learn(self, *examples: ExampleAccepted) -> str:
        """A version that learned these examples, as a learner publishes it; the version."""
        versions = VersionPublisher(self.store, ADAPTER)
        head = versions.registry.head(ADAPTER)
        body = Batch(adapter=ADAPTER, cut=head.seq if head else 0, examples=list(examples), skipped=[])
        data = body.model_dump_json(by_alias=True).encode()
        weights = small_weights(head.seq + 1 if head else 1)
        learned = [
            LearnedExample(
                example_id=e.example_id, partition=e.origin.partition_key(), offset=e.origin.offset, tokens=3
            )
            for e in examples
        ]
        manifest = versions.manifest(weights).model_copy(
            update={"batch": BlobRef(digest=digest_of(data), size_bytes=len(data)), "learned": learned}
        )
        return versions.registry.publish(manifest, [weights, data], lambda _: None).version

    def publish(self, *events: object) -> None:
        producer = KafkaProducer(bootstrap_servers=self.settings.kafka.bootstrap, acks="all")
        for event in events:
            if isinstance(event, bytes):
                producer.send(self.settings.kafka.topic("retention"), key=ADAPTER.encode(), value=event)
                continue
            record = encode(event, event_id="x", source="test", occurred_at=datetime.now(UTC))
            topic = self.settings.kafka.topic(event.topic)
            producer.send(topic, key=record.key, value=record.value, headers=record.headers)
        producer.flush(30)
        producer.close()

    def read(self, name: str) -> list:
        consumer = KafkaConsumer(
            self.settings.kafka.topic(name), bootstrap_servers=self.settings.kafka.bootstrap, auto_offset_reset="earliest",
            enable_auto_commit=False, consumer_timeout_ms=700, group_id=None,
        )  # fmt: skip
        records = list(consumer)
        consumer.close()
        return records

    def events(self, name: str) -> list:
        return [decode(record.value, record.headers, name).event for record in self.read(name)]

    def states(self, request_id: str = "r1") -> list[str]:
        return [event.state for event in self.events("retention-status") if event.request_id == request_id]

    def wait_for(self, state: str, request_id: str = "r1") -> list[str]:
        deadline = time.monotonic() + PATIENCE_S
        states: list[str] = []
        while time.monotonic() < deadline:
            states = self.states(request_id)
            if states and states[-1] == state:
                return states
            time.sleep(0.2)
        raise AssertionError(f"{request_id} is {states}, not {state}\n{self.log.read_text()}")

    def stop(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait(120)


@pytest.fixture
def bench(broker, topic_prefix, tmp_path):
    made = Bench(
        Settings.of(
            kafka=broker.bootstrap, topic_prefix=topic_prefix, store=str(tmp_path / "store"), partitions=2,
            max_age_s=1.0,
        ),
        tmp_path / "streams.log",
    )  # fmt: skip
    provision(made.settings)
    yield made
    made.stop()


def ack(version: str, generation: int, replica: str = "host-1") -> AdapterActivated:
    now = datetime.now(UTC)
    return AdapterActivated(
        adapter=ADAPTER, replica=replica, generation=generation, version=version, published_at=now, at=now
    )


def test_an_erase_is_quarantined_handed_over_and_closed_when_no_replica_serves_a_version_trained_on_it(bench):
    before = bench.learn(example(1), example(2))
    bench.publish(ack(before, 1))
    child = bench.start()
    bench.publish(erase(1))
    assert bench.wait_for("quarantined") == ["accepted", "quarantined"]
    (job,) = bench.events("adapter-jobs")
    assert isinstance(job, ForgetRequested)
    assert (job.job_id, job.request_id, job.kind) == (job_id_of("r1", ADAPTER), "r1", "erase")
    assert job.matches(example(1))
    quarantine = load_quarantine(bench.store, ADAPTER)
    assert QuarantineFilter(quarantine, bench.store).blocks(example(1))
    assert quarantine.keyed == [text_hash(example(1), ensure_text_key(bench.store, ADAPTER))]

    # what the learner does: revoke, publish, note the end
    versions = VersionPublisher(bench.store, ADAPTER)
    versions.registry.revoke(ADAPTER, before, "learned d1")
    alias = versions.publish(kind="forget")
    done = RequestOutcome(at_ms=1, examples=1, version=alias.version, generation=alias.generation)
    finish_entry(bench.store, ADAPTER, "r1", done)
    bench.wait_for("published")
    bench.publish(ack(alias.version, alias.generation))
    bench.wait_for("closed")
    (last,) = [event for event in bench.events("retention-status") if event.state == "closed"]
    assert (last.examples, last.version) == (1, alias.version)
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == 0, bench.log.read_text()


def test_no_bytes_in_the_topic_end_the_role(bench):
    class Evil(str):
        __slots__ = ()

        def encode(self, *_: object) -> bytes:
            return b"\xff\xfe"

    bench.learn(example(1))
    child = bench.start()
    topic = bench.settings.kafka.topic("retention")
    for codec in ("none", "gzip", "snappy", "lz4", "zstd"):
        producer = LibrdkafkaProducer({"bootstrap.servers": bench.settings.kafka.bootstrap, "compression.type": codec})
        producer.produce(topic, b"x" * 2000, ADAPTER.encode(), headers=[("none", None)])
        producer.flush(30)
    evil = KafkaProducer(bootstrap_servers=bench.settings.kafka.bootstrap, acks="all")
    for value in (b"{}", erase(1).model_dump_json().encode()):
        evil.send(topic, key=ADAPTER.encode(), value=value, headers=[(Evil("x"), b"1")])
    evil.flush(30)
    evil.close()
    bench.wait_for("quarantined")
    dead = [decode_dead_letter(record.value, record.headers) for record in bench.read("dead-letters")]
    assert [one.reason for one in dead] == ["not-json"] * 5 + ["missing-field"]
    assert dead[-1].headers == [("\\xff\\xfe", b"1")]
    assert child.poll() is None


@pytest.mark.slow(15)
def test_a_hold_beats_an_erase_until_it_is_released_also_across_a_restart(bench):
    bench.learn(example(1, subjects=["ann"]))
    first = bench.start()
    held = Selector(subjects=["ann"])
    bench.publish(erase(request_id="h", kind="hold").model_copy(update={"selector": held}), erase(1))
    bench.wait_for("held")
    assert [hold.request_id for hold in load_quarantine(bench.store, ADAPTER).holds] == ["h"]
    first.kill()
    first.wait(120)
    bench.start()
    bench.publish(erase(request_id="x", kind="release").model_copy(update={"selector": held}))
    bench.wait_for("closed", "x")
    bench.wait_for("quarantined")
    assert [job.request_id for job in bench.events("adapter-jobs")] == ["r1"]
    assert load_quarantine(bench.store, ADAPTER).holds == []


def test_the_calendar_asks_for_what_fell_due_and_for_nothing_else(bench):
    now_ms = time.time_ns() // 1_000_000
    bench.learn(example(1, now_ms, retention_class="PT3S"), example(2, now_ms, retention_class="P9D"), example(3, 1000))
    bench.start()
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        # A role that starts before the hour also has the learner rebuild ahead of it.
        if jobs := [job for job in bench.events("adapter-jobs") if not job.prepare]:
            break
        time.sleep(0.2)
    assert [(job.kind, job.example_ids, job.suppress) for job in jobs] == [("expire", [ident(1)], False)]
    assert jobs[0].until_ms >= now_ms + 3000
    finish_entry(bench.store, ADAPTER, jobs[0].request_id, RequestOutcome(at_ms=1, examples=1))
    assert bench.wait_for("closed", jobs[0].request_id) == ["accepted", "quarantined", "closed"]


def test_what_is_under_way_when_it_is_erased_never_reaches_the_store(bench):
    bench.start()
    bench.publish(erase(1))
    bench.wait_for("quarantined")
    finish_entry(bench.store, ADAPTER, "r1", RequestOutcome(at_ms=1))
    scored = [ExampleScored(example=example(n), tokens=5, base_loss_nats=3.0, live_loss_nats=3.0) for n in (1, 2)]
    scored = [origins.adopt_scored(bench.settings, one) for one in scored]
    bench.publish(*scored)
    partition = scored[0].example.origin.partition_key()
    deadline = time.monotonic() + PATIENCE_S
    marks: dict[str, int] = {}
    while marks.get(partition) != 2 and time.monotonic() < deadline:
        updates = [job for job in bench.events("adapter-jobs") if isinstance(job, UpdateRequested)]
        marks = updates[-1].marks if updates else {}
    batches = [Batch.model_validate_json(get_blob(bench.store, job.batch.digest)) for job in updates]
    assert [e.document_id for batch in batches for e in batch.examples] == ["d2"], bench.log.read_text()
    skipped = [(skip.origin.offset, skip.reason) for batch in batches for skip in batch.skipped]
    assert skipped == [(scored[0].example.origin.offset, "quarantined")]
    assert load_quarantine(bench.store, ADAPTER).keyed == [text_hash(example(1), ensure_text_key(bench.store, ADAPTER))]


def test_bad_requests_are_told_apart_from_broken_ones(bench):
    bench.learn(example(1))
    bench.start()
    bench.publish(
        b"{not json", erase(kind="decay", half_life="P30D"), erase(request_id="r2"),
        erase(1, request_id="r3"), erase(2, request_id="r3"), erase(request_id="r4", kind="revoke"),
    )  # fmt: skip
    bench.wait_for("accepted", "r4")
    assert bench.states() == ["accepted", "failed"]
    assert bench.states("r2") == ["accepted", "failed"]
    dead = [decode_dead_letter(record.value, record.headers) for record in bench.read("dead-letters")]
    assert [(one.reason, one.stage) for one in dead] == [("not-json", "retain"), ("bad-field", "retain")]
    jobs = bench.events("adapter-jobs")
    assert [job.request_id for job in jobs if isinstance(job, ForgetRequested)] == ["r3"]
    (revoke,) = [job for job in jobs if isinstance(job, RollbackRequested)]
    assert (revoke.revoke, revoke.version) == (
        True,
        VersionPublisher(bench.store, ADAPTER).registry.alias(ADAPTER).version,
    )


@pytest.mark.slow(30)
@pytest.mark.timeout(900)
def test_a_request_over_a_pattern_waits_for_a_second_person_across_crashes(bench):
    """Each process is killed in the middle of a step: once it has published a state, and once it has stored one."""
    bench.learn(example(1))
    env = {key: value for key, value in os.environ.items() if not key.startswith("PERENNIAL_")}
    env |= bench.settings.environment()

    def forget(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "perennial.streams.cli", "forget", *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=3 * PATIENCE_S, check=False)

    first = bench.start("retain.send")
    asked = forget(
        "--adapter", "acme/*", "--document", "d1", "--as", "ann", "--wait-s", str(PATIENCE_S), "--json"
    )  # fmt: skip
    assert asked.returncode == 7, asked.stderr
    request_id = json.loads(asked.stdout)["request_id"]
    assert f"perennial forget approve {request_id} --as NAME" in asked.stderr
    assert first.wait(PATIENCE_S) == -signal.SIGKILL
    assert load_request(bench.store, request_id) is None

    second = bench.start("retain.state:2")
    deadline = time.monotonic() + PATIENCE_S
    while load_request(bench.store, request_id) is None:
        assert time.monotonic() < deadline, bench.log.read_text()
        time.sleep(0.2)
    itself = forget("approve", request_id, "--as", "Ann")
    assert itself.returncode == 1
    assert "who asked for a request cannot approve it" in itself.stderr
    assert forget("approve", request_id, "--as", "bob", "--wait-s", "0").returncode == 0
    assert second.wait(PATIENCE_S) == -signal.SIGKILL
    assert bench.events("adapter-jobs") == []

    bench.start()
    states = bench.wait_for("quarantined", request_id)
    assert states.index("accepted") > states.index("unapproved")
    assert [job.request_id for job in bench.events("adapter-jobs")] == [request_id]
    assert load_request(bench.store, request_id).approval.approved_by == "bob"


@pytest.mark.slow(10)
def test_the_command_line_asks_and_follows_until_it_is_closed(bench):
    bench.learn(example(1))
    bench.start()
    env = {key: value for key, value in os.environ.items() if not key.startswith("PERENNIAL_")}
    env |= bench.settings.environment()
    command = [sys.executable, "-m", "perennial.streams.cli", "forget"]
    asked = subprocess.Popen(
        [*command, "--adapter", ADAPTER, "--document", "d1", "--wait-s", str(PATIENCE_S), "--json"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE_S
    while not (entries := load_quarantine(bench.store, ADAPTER).entries) and time.monotonic() < deadline:
        time.sleep(0.2)
    finish_entry(bench.store, ADAPTER, entries[0].request_id, RequestOutcome(at_ms=1, examples=1))
    out, errors = asked.communicate(timeout=PATIENCE_S)
    assert asked.returncode == 0, errors
    assert json.loads(out)["status"]["state"] == "closed"
    shown = subprocess.run(
        [*command, "status", entries[0].request_id, "--json"], env=env, capture_output=True, text=True, check=True
    )
    assert [(event["state"], event["examples"]) for event in json.loads(shown.stdout)] == [("closed", 1)]

    def ended(kind: str, document: str) -> tuple[int, str]:
        named = ["--adapter", ADAPTER, "--document", document, "--wait-s", str(PATIENCE_S), "--json"]
        done = subprocess.run([*command, kind, *named], env=env, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)["status"]["state"]

    assert ended("hold", "d2") == (0, "executed")
    assert ended("release", "d3") == (1, "failed")
    shown = subprocess.run([*command, "status"], env=env, capture_output=True, text=True, check=True)
    (hold,) = [row.split() for row in shown.stdout.splitlines() if row.startswith("hold-")]
    assert hold[1:6] == ["hold", ADAPTER, "document", "d2", "executed"], "what a release must name is shown"
    assert ended("release", "d2") == (0, "closed")
