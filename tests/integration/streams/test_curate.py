"""The curate agent against a real broker, in child processes: every example is in exactly one job, whatever crashes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.quarantine import QuarantineEntry, update_quarantine
from perennial.streams.events.cloudevents import decode, encode
from perennial.streams.events.dead_letter import decode_dead_letter
from perennial.streams.events.models import Batch, ExampleAccepted, ExampleScored, Origin, UpdateRequested
from perennial.streams.faust_app import Guard, InterruptedStepError
from perennial.streams.kafka.topics import provision
from perennial.streams.settings import Settings
from tests import origins

RUN = """
from perennial.streams.devstack.signals import event_on_stop_signals
from perennial.streams.faust_app import run_streams
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import load_settings
settings = load_settings()
with event_on_stop_signals() as stop:
    run_streams(settings, stop, Metrics("curate", settings))
"""
TOKENS = 10
PATIENCE_S = 180


def scored(number: int, adapter: str = "acme/a", loss: float = 3.0, text: str = "", learn: bool = True):
    example = ExampleAccepted(
        adapter=adapter, example_id=f"{number:032x}"[::-1], kind="document" if learn else "rating",
        document_id=f"d{number}", learn=learn, text=text or f"text {number}" if learn else None,
        rating=None if learn else -1.0,
        origin=Origin(cluster_id="c", topic="documents", topic_id="t", partition=0, offset=number, timestamp_ms=number),
    )  # fmt: skip
    return ExampleScored(
        example=example, tokens=TOKENS if learn else 0,
        base_loss_nats=loss if learn else None, live_loss_nats=loss if learn else None,
    )  # fmt: skip


@dataclass
class Bench:
    """One test's topics, store and child processes."""

    settings: Settings
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    log: Path = Path()

    def start(self, failpoint: str = "") -> subprocess.Popen[bytes]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("PERENNIAL_")}
        env |= self.settings.environment()
        if failpoint:
            env["PERENNIAL_FAILPOINT"] = failpoint
        with self.log.open("ab") as log:
            child = subprocess.Popen([sys.executable, "-c", RUN], env=env, stderr=log, stdout=log)
        self.children.append(child)
        return child

    def publish(self, events) -> None:
        producer = KafkaProducer(bootstrap_servers=self.settings.kafka.bootstrap, acks="all")
        topic = self.settings.kafka.topic("scored-examples")
        for event in events:
            if isinstance(event, bytes):
                producer.send(topic, key=b"acme/a", value=event)
                continue
            event = origins.adopt_scored(self.settings, event)  # noqa: PLW2901 - what is sent
            record = encode(event, event_id=event.example.example_id, source="test", occurred_at=datetime.now(UTC))
            producer.send(topic, key=record.key, value=record.value, headers=record.headers)
        producer.flush(30)
        producer.close()

    def read(self, name: str) -> list:
        consumer = KafkaConsumer(
            self.settings.kafka.topic(name), bootstrap_servers=self.settings.kafka.bootstrap, auto_offset_reset="earliest",
            enable_auto_commit=False, consumer_timeout_ms=1500, group_id=None,
        )  # fmt: skip
        records = list(consumer)
        consumer.close()
        return records

    def jobs(self) -> list[UpdateRequested]:
        """The distinct jobs, by job id, in the order of adapter and cut."""
        found = {}
        for record in self.read("adapter-jobs"):
            event = decode(record.value, record.headers, "adapter-jobs").event
            found[event.job_id] = event
        return sorted(found.values(), key=lambda job: (job.adapter, job.cut))

    def batches(self) -> list[Batch]:
        store = DirectoryStore(Path(self.settings.store.uri))
        return [Batch.model_validate_json(get_blob(store, job.batch.digest)) for job in self.jobs()]

    def learned(self) -> Counter[str]:
        return Counter(example.document_id for batch in self.batches() for example in batch.examples)

    def wait(self, condition) -> None:
        """Wait until the condition holds. If it never does, the assertion that follows explains why."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not condition():
            time.sleep(0.3)

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
            max_batch_tokens=TOKENS * 20, max_age_s=3.0, min_batch_examples=4,
        ),
        log=tmp_path / "curate.log",
    )  # fmt: skip
    provision(made.settings)
    yield made
    made.stop()


def test_size_cuts_cover_every_example_once_and_in_order(bench):
    child = bench.start()
    bench.publish(scored(n) for n in range(60))
    bench.wait(lambda: sum(bench.learned().values()) >= 60)
    batches = bench.batches()
    assert [[e.document_id for e in batch.examples] for batch in batches] == [
        [f"d{n}" for n in range(start, start + 20)] for start in (0, 20, 40)
    ], bench.log.read_text()
    assert [job.reason for job in bench.jobs()] == ["size"] * 3
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == 0, bench.log.read_text()


@pytest.mark.slow(15)
def test_a_body_that_a_kill_left_behind_holds_no_text_that_is_erased_before_the_next_start(bench):
    bench.publish(scored(n) for n in range(20))
    dead = bench.start(failpoint="curate.blob")
    assert dead.wait(PATIENCE_S) == -signal.SIGKILL, bench.log.read_text()
    store = DirectoryStore(Path(bench.settings.store.uri))
    erase = QuarantineEntry(
        request_id="r1", job_id="j1", kind="erase", selector={"document_ids": ["d3"]}, until_ms=1_000_000
    )
    update_quarantine(store, "acme/a", lambda quarantine: quarantine.with_entry(erase))
    bench.start()
    bench.wait(lambda: bench.learned().total() >= 19)
    assert bench.learned() == {f"d{n}": 1 for n in range(20) if n != 3}, bench.log.read_text()
    holding = [path for path in store.root.rglob("*") if path.is_file() and b'"text 3"' in path.read_bytes()]
    assert holding == []


@pytest.mark.slow(40)
def test_kills_in_mid_flow_lose_and_double_nothing(bench):
    rng = random.Random(5)
    numbers = iter(range(10_000))
    published = 0
    for _ in range(3):
        child = bench.start()
        for _ in range(4):
            count = rng.randint(20, 60)
            bench.publish(scored(n, adapter=rng.choice(["acme/a", "acme/b", "other"])) for n in islice(numbers, count))
            published += count
            time.sleep(rng.uniform(0.1, 1.0))
        child.kill()
        child.wait(120)
    bench.start()
    bench.wait(lambda: sum(bench.learned().values()) >= published)
    learned = bench.learned()
    assert max(learned.values()) == 1
    assert len(learned) == published, bench.log.read_text()
    for adapter in ("acme/a", "acme/b", "other"):
        assert [job.cut for job in bench.jobs() if job.adapter == adapter] == list(
            range(sum(job.adapter == adapter for job in bench.jobs()))
        )


@pytest.mark.slow(20)
def test_a_process_that_joins_and_one_that_leaves_lose_and_double_nothing(bench):
    adapters = [f"acme/{name}" for name in "abcdef"]
    rng = random.Random(6)
    total = 600
    events = [scored(n, adapter=rng.choice(adapters)) for n in range(total)]
    first = bench.start()
    bench.publish(events[:200])
    bench.wait(lambda: bench.learned().total() > 20)
    second = bench.start()
    for start in range(200, 400, 25):
        bench.publish(events[start : start + 25])
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    for start in range(400, total, 25):
        bench.publish(events[start : start + 25])
        time.sleep(0.3)
    bench.wait(lambda: bench.learned().total() >= total)
    learned = bench.learned()
    assert first.wait(120) == 0, bench.log.read_text()
    assert second.poll() is None, bench.log.read_text()
    assert max(learned.values()) == 1
    assert len(learned) == total, bench.log.read_text()


@pytest.mark.slow(12)
def test_poison_goes_to_dead_letters_and_what_is_behind_goes_through(bench):
    bench.start()
    bench.publish([scored(0), b"{not json", scored(1), b"\xff", scored(2)])
    bench.wait(lambda: bench.learned().total() >= 3)
    assert set(bench.learned()) == {"d0", "d1", "d2"}, bench.log.read_text()
    refused = [decode_dead_letter(record.value, record.headers) for record in bench.read("dead-letters")]
    assert [record.value for record in refused] == [b"{not json", b"\xff"]
    assert {(record.stage, record.topic) for record in refused} == {("curate", "scored-examples")}
    assert [job.reason for job in bench.jobs()] == ["age"]


def test_more_adapters_than_fit_in_memory_are_all_cut(bench):
    bench.settings = bench.settings.replace(max_adapters=2)
    child = bench.start()
    bench.publish(scored(n, adapter=f"acme/{'abcde'[n % 5]}") for n in range(50))
    bench.wait(lambda: bench.learned().total() >= 50)
    learned = bench.learned()
    assert child.poll() is None, bench.log.read_text()
    assert max(learned.values()) == 1
    assert len(learned) == 50


@pytest.mark.slow(20)
def test_signals_alone_make_no_job_and_are_recorded_by_the_next(bench):
    child = bench.start()
    bench.publish(scored(n, learn=False) for n in range(5))
    store = DirectoryStore(Path(bench.settings.store.uri))
    bench.wait(lambda: store.exists("state/curate/acme/a"))
    assert len(json.loads(store.get("state/curate/acme/a").data)["carried"]) == 5
    assert bench.jobs() == []
    child.kill()
    child.wait(120)
    bench.start()
    bench.publish(scored(n) for n in range(5, 25))
    bench.wait(lambda: bench.learned().total() >= 20)
    (batch,) = bench.batches()
    assert [skip.reason for skip in batch.skipped] == ["signal"] * 5
    (marks,) = [job.marks for job in bench.jobs()]
    assert [(key.split("/", 1)[1], offset) for key, offset in marks.items()] == [
        (f"t/{bench.settings.kafka.topic('documents')}/0", 24)
    ]


@pytest.mark.slow(12)
def test_a_change_of_domain_is_reported_and_cuts(bench):
    rng = random.Random(7)
    domains = [[f"{kind}{n}" for n in range(300)] for kind in ("law", "sea")]
    events = [
        scored(n, loss=rng.gauss(3.0, 0.3) + 2.0 * (n >= 600), text=" ".join(rng.choices(domains[n >= 600], k=40)))
        for n in range(750)
    ]
    bench.start()
    bench.publish(events)
    bench.wait(lambda: bench.learned().total() >= 750)
    jobs = bench.jobs()
    drifts = [decode(record.value, record.headers, "drift").event for record in bench.read("drift")]
    assert {"base_loss", "live_loss", "vocabulary"} <= {drift.signal for drift in drifts}
    assert all(drift.origin.offset >= 600 for drift in drifts)
    (cut, *_) = [job for job in jobs if job.reason == "drift"]
    assert cut.drift is not None
    assert 600 <= cut.drift.origin.offset <= 680


def test_nothing_runs_on_state_that_a_cancelled_step_left_half_way():
    async def scenario() -> tuple[list[str], Exception | None]:
        guard, ran = Guard(), []

        async def half() -> None:
            ran.append("half")
            await asyncio.sleep(60)

        async def other() -> None:
            ran.append("other")

        async def bad() -> None:
            raise KeyError("bad")

        cancelled = asyncio.create_task(guard(half))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled.cancel()
        parked = asyncio.create_task(guard(other))
        await asyncio.wait([parked], timeout=0.1)
        parked.cancel()
        failing = Guard()
        parked = asyncio.create_task(failing(bad))
        await asyncio.wait([parked], timeout=0.1)
        assert not parked.done()
        parked.cancel()
        assert isinstance(failing.failure, KeyError)
        return ran, guard.failure

    ran, failure = asyncio.run(scenario())
    assert ran == ["half"]
    assert isinstance(failure, InterruptedStepError)
