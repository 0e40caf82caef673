"""Dead letters on a real broker: redriven once, counted, resumed after a kill, quarantined, and shown by the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.factory import open_store
from perennial.storage.registry.quarantine import QuarantineEntry, update_quarantine
from perennial.streams.deadletters.model import DeadLetterError, Selection
from perennial.streams.deadletters.reader import DeadLetterReader
from perennial.streams.deadletters.redrive import Redriver
from perennial.streams.events.cloudevents import REDRIVES_HEADER, decode
from perennial.streams.events.dead_letter import encode_dead_letter
from perennial.streams.intake.service import run_intake
from perennial.streams.intake.validation import Acceptor, Decision, Refused
from perennial.streams.kafka.topics import TopicError, provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests.oracle import wait_until

WAIT_S = 180
NOW = datetime(2026, 1, 31, tzinfo=UTC)
NEW_FIELD = "a field of the next version"


@pytest.fixture
def settings(broker, topic_prefix, tmp_path):
    found = Settings.of(
        kafka=broker.bootstrap, topic_prefix=topic_prefix, partitions=2, store=str(tmp_path / "store"), env_file=None
    )
    provision(found)
    return found


@pytest.fixture
def producer(settings):
    client = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap, max_request_size=4_000_000)
    yield client
    client.close()


def document(number, adapter="acme/support"):
    return json.dumps({"adapter": adapter, "document_id": f"d{number}", "text": f"text {number}"}).encode()


def publish(producer, settings, values, partition=None, headers=None):
    sent = [
        producer.send(
            settings.kafka.topic("documents"), value=value, partition=partition, headers=headers or [], key=b"any"
        )
        for value in values
    ]
    return [(each.partition, each.offset) for each in (future.get(timeout=WAIT_S) for future in sent)]


@pytest.fixture
def old_version(monkeypatch):
    """Make intake refuse what the next version accepts, as long as the context lasts."""

    @contextmanager
    def refusing() -> Iterator[None]:
        accept_of_new = Acceptor.accept

        def accept_of_old(self: Acceptor, value: bytes, headers: Any, *position: int) -> Decision:
            if value is not None and b"text 1" in value:
                return Refused("unknown-field", NEW_FIELD)
            return accept_of_new(self, value, headers, *position)

        with monkeypatch.context() as patched:
            patched.setattr(Acceptor, "accept", accept_of_old)
            yield

    return refusing


@contextmanager
def intake(settings):
    """Run intake until it has decided about every record that was published."""
    stop, failed = threading.Event(), []

    def body() -> None:
        try:
            run_intake(settings, stop, Metrics("intake", settings))
        except BaseException as error:
            failed.append(error)
            raise

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield
        wait_until(lambda: failed or lag(settings) == 0, WAIT_S, "intake at the end of documents")
    finally:
        stop.set()
        thread.join(WAIT_S)
    assert failed == []


def client(settings, group=None):
    return KafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap,
        enable_auto_commit=False,
        group_id=settings.kafka.topic(group) if group else None,
    )


def lag(settings):
    consumer = client(settings, "intake")
    try:
        topic = settings.kafka.topic("documents")
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
        ends = consumer.end_offsets(partitions)
        return sum(ends[each] - (consumer.committed(each) or 0) for each in partitions)
    finally:
        consumer.close()


def read_all(settings, name):
    consumer = client(settings)
    try:
        topic = settings.kafka.topic(name)
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        ends = consumer.end_offsets(partitions)
        found = []
        while any(consumer.position(each) < ends[each] for each in partitions):
            for records in consumer.poll(timeout_ms=500).values():
                found.extend(records)
        return found
    finally:
        consumer.close()


def examples(settings):
    events = [decode(record.value, record.headers, "examples").event for record in read_all(settings, "examples")]
    return sorted(event.document_id for event in events)


def redrive(settings, selection=None, **options: Any):
    with Redriver(settings, rate=0) as redriver:
        return redriver.run(selection or Selection(), **{"max_redrives": 3, **options})


def dry_run(settings, selection=None, max_redrives=3):
    with DeadLetterReader(settings) as reader:
        return reader.dry_run(selection or Selection(), max_redrives=max_redrives)


def perennial(settings, *arguments: str, check=True, **environment: str):
    env = {
        **os.environ, "PERENNIAL_KAFKA": settings.kafka.bootstrap, "PERENNIAL_TOPIC_PREFIX": settings.kafka.topic_prefix,
        "PERENNIAL_STORE": settings.store.uri, "COLUMNS": "200", **environment,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "perennial.streams.cli", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_dead_letters_are_learned_once_after_an_upgrade_though_redrives_are_killed(settings, producer, old_version):
    with old_version(), intake(settings):
        sent = publish(producer, settings, [document(n) for n in range(20)])
    refused = [f"d{n}" for n in (1, *range(10, 20))]
    assert examples(settings) == sorted({f"d{n}" for n in range(20)} - set(refused))

    report = dry_run(settings)
    assert (report.sent, report.left) == ({("unknown-field", "intake"): 11}, {})
    assert len(read_all(settings, "documents")) == 20

    # Killed after the records were acknowledged, before or just after the progress was saved. In the first case the next
    # run sends the same records again.
    for failpoint in ("dlq.send:2", "dlq.save:2"):
        killed = perennial(settings, "dlq", "replay", "--rate", "4", check=False, PERENNIAL_FAILPOINT=failpoint)
        assert killed.returncode == -9, killed.stderr
    report = redrive(settings)
    assert report.sent.total() < 11
    again = [record for record in read_all(settings, "documents") if dict(record.headers).get(REDRIVES_HEADER)]
    assert len(again) > 11
    assert {record.partition for record in again} == {partition for partition, _ in sent}
    with intake(settings):
        pass
    assert examples(settings) == sorted(f"d{n}" for n in range(20))
    assert redrive(settings).sent.total() == 0


def test_a_record_that_is_refused_again_and_again_ends_in_quarantine(settings, producer):
    with intake(settings):
        publish(producer, settings, [b"\xff"], headers=[("trace", b"\x00\xff"), ("empty", b"")])
    for times in range(1, 4):
        assert redrive(settings).sent == {("not-utf8", "intake"): 1}
        with intake(settings):
            pass
        newest = max(read_all(settings, "documents"), key=lambda record: record.offset)
        assert newest.headers == [("trace", b"\x00\xff"), ("empty", b""), (REDRIVES_HEADER, str(times).encode())]
        assert newest.key == b"any"
    report = redrive(settings)
    assert (report.sent.total(), report.left) == (0, {"quarantined": 1})
    assert len(read_all(settings, "documents")) == 4
    listed = json.loads(perennial(settings, "dlq", "ls", "--json").stdout)
    assert listed["states"] == {"replayed": 3, "quarantined": 1}
    assert [letter["replays"] for letter in sorted(listed["letters"], key=lambda each: each["replays"])] == [0, 1, 2, 3]
    assert redrive(settings, max_redrives=4).sent.total() == 1


def test_dead_letters_erased_meanwhile_are_not_sent_back(settings, producer):
    about = [[], ["person-17"], ["person-18"]]
    values = [
        json.dumps({**json.loads(document(n)), "subjects": subjects, "unknown": 1}).encode()
        for n, subjects in enumerate(about)
    ]
    with intake(settings):
        publish(producer, settings, values)
    entries = [
        QuarantineEntry(
            request_id=f"r{n}", job_id="j", kind="erase", selector={"subjects": [f"person-{n}"]},
            until_ms=int(time.time() * 1000) + shift_ms,
        )
        for n, shift_ms in ((17, 1000), (18, -60_000))
    ]  # fmt: skip
    for entry in entries:
        update_quarantine(
            open_store(settings.store.uri), "acme/support", lambda found, entry=entry: found.with_entry(entry)
        )
    assert dry_run(settings).left == {"erased": 1}
    report = redrive(settings)
    assert (report.sent.total(), report.left) == (2, {"erased": 1})
    assert [json.loads(record.value)["document_id"] for record in read_all(settings, "documents")].count("d1") == 1


def test_filters_leave_the_others_for_later_and_nothing_is_sent_twice(settings, producer):
    with intake(settings):
        for n in range(6):
            publish(producer, settings, [b"\xff", b"[]", b'{"adapter": "b/c"}', document(n)])
    assert redrive(settings, Selection(reason="not-object")).sent == {("not-object", "intake"): 6}
    assert redrive(settings, Selection(reason="not-object")).sent.total() == 0
    assert redrive(settings, Selection(adapter="b/*"), limit=4).sent == {("missing-field", "intake"): 4}
    assert dry_run(settings).sent == {("not-utf8", "intake"): 6, ("missing-field", "intake"): 2}
    assert redrive(settings).sent == {("not-utf8", "intake"): 6, ("missing-field", "intake"): 2}
    assert redrive(settings).sent.total() == 0
    sent_again = [record for record in read_all(settings, "documents") if dict(record.headers).get(REDRIVES_HEADER)]
    assert len(sent_again) == 18


def test_dead_letters_of_internal_topics_and_foreign_records_are_left(settings, producer):
    def refused(topic: str, value: bytes = b"{}") -> dict[str, Any]:
        value, headers = encode_dead_letter(
            value, [], reason="bad-field", stage="curate", detail="d", topic=topic, partition=0, offset=1, at=NOW
        )
        return {"value": value, "headers": headers}

    dead_letters = [refused("scored-examples"), refused(settings.kafka.topic("adapter-jobs")), {"value": b"foreign"},
               refused("documents", b"x" * 3_000_000)]  # fmt: skip
    for record in dead_letters:
        producer.send(settings.kafka.topic("dead-letters"), partition=0, **record).get(timeout=WAIT_S)
    expected = {"inside": 2, "unreadable": 1, "cut": 1}
    assert dry_run(settings).left == expected
    assert redrive(settings).left == expected
    for topic in ("scored-examples", "adapter-jobs", "documents"):
        assert read_all(settings, topic) == []
    states = json.loads(perennial(settings, "dlq", "ls", "--json").stdout)["states"]
    assert states == expected
    shown = perennial(settings, "dlq", "show", "0:3").stdout
    assert "the value of 3000000 bytes was cut" in shown
    assert len(shown) < 10_000


def test_a_record_too_large_for_its_topic_does_not_stop_the_others(settings, producer):
    for original in (b"x" * 1_500_000, b"[]"):
        value, headers = encode_dead_letter(
            original,
            [],
            reason="oversize",
            stage="intake",
            detail="d",
            topic="documents",
            partition=0,
            offset=1,
            at=NOW,
        )
        producer.send(settings.kafka.topic("dead-letters"), value=value, headers=headers, partition=0).get(
            timeout=WAIT_S
        )
    report = redrive(settings)
    assert (report.sent.total(), report.left) == (1, {"too large for its topic": 1})
    assert [record.value for record in read_all(settings, "documents")] == [b"[]"]


def test_a_redrive_ends_when_another_one_takes_over(settings, producer):
    with intake(settings):
        publish(producer, settings, [b"\xff"] * 5, partition=0)
    errors, began, stop = [], threading.Event(), threading.Event()

    def redrive_slowly() -> None:
        with Redriver(settings, rate=1) as redriver:
            try:
                redriver.run(Selection(), max_redrives=3, stop=stop, on_sent=lambda _n: began.set())
            except DeadLetterError as error:
                errors.append(error)

    thread = threading.Thread(target=redrive_slowly)
    thread.start()
    assert began.wait(WAIT_S)
    taken_over = redrive(settings).sent.total()
    thread.join(WAIT_S)
    assert [error.message for error in errors] == ["another redrive runs"]
    assert 1 <= taken_over < 5
    sent = [record for record in read_all(settings, "documents") if dict(record.headers).get(REDRIVES_HEADER)]
    assert 5 <= len(sent) <= 6
    assert redrive(settings).sent.total() == 0


def test_a_stopped_redrive_goes_on_later(settings, producer):
    with intake(settings):
        publish(producer, settings, [b"\xff"] * 3, partition=0)
    stop = threading.Event()
    with Redriver(settings, rate=1) as redriver:
        report = redriver.run(Selection(), max_redrives=3, stop=stop, on_sent=lambda _n: stop.set())
    assert (report.sent.total(), report.stopped) == (1, True)
    assert redrive(settings).sent.total() == 2


def test_the_command_lists_shows_and_sends_dead_letters(settings, producer):
    with intake(settings):
        publish(producer, settings, [b"\xff\x1b[31m", b'{"adapter":"a","x":"\\u001b[31m"}'], partition=1)
    listed = json.loads(perennial(settings, "dlq", "ls", "--json", "--reason", "not-utf8", "--since", "1h").stdout)
    (row,) = listed["letters"]
    assert (row["from"], row["from_partition"], row["from_offset"], row["state"]) == ("documents", 1, 0, "waiting")
    shown = perennial(settings, "dlq", "show", row["place"]).stdout
    assert "ff 1b 5b 33 31 6d" in shown
    assert "\x1b" not in shown
    table = perennial(settings, "dlq", "ls").stdout
    assert "not-utf8" in table
    assert "missing-field" in table
    histogram = perennial(settings, "dlq", "replay", "--dry-run").stdout
    assert "█" in histogram
    assert "2 dead letters would be sent back" in histogram
    whole = perennial(settings, "dlq", "replay", "--rate", "0", "--json").stdout
    assert json.loads(whole)["sent"] == 2
    missing = perennial(settings, "dlq", "show", "0:999", check=False)
    assert (missing.returncode, "no such dead letter" in missing.stderr) == (4, True)
    assert perennial(settings, "dlq", "show", "x", check=False).returncode == 2
    with DeadLetterReader(settings) as reader, pytest.raises(NotFoundError):
        reader.read(7, 0)


def test_missing_topics_raise(broker, topic_prefix, tmp_path):
    with pytest.raises(TopicError, match="topics are missing"):
        DeadLetterReader(
            Settings.of(kafka=broker.bootstrap, topic_prefix=topic_prefix, store=str(tmp_path), env_file=None)
        )
