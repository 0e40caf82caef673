"""Intake on a real broker: its output, its dead letters, and that kills, restarts and rebalances lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256

import pytest
from confluent_kafka import Producer as LibrdkafkaProducer
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.errors import CoordinatorLoadInProgressError, CoordinatorNotAvailableError, NotCoordinatorError
from kafka.partitioner import murmur2

from perennial.storage.errors import PerennialError
from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker
from perennial.streams.events.cloudevents import decode, encode
from perennial.streams.events.dead_letter import decode_dead_letter
from perennial.streams.events.input_events import InteractionObserved
from perennial.streams.intake import librdkafka
from perennial.streams.intake.librdkafka import DeliveryError
from perennial.streams.intake.service import run_intake
from perennial.streams.intake.validation import Acceptor
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.kafka.topics import TopicError, identify, provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests.integration.streams.topic_kit import create_again

WAIT_S = 180


class RecordedMetrics:
    """Metrics that a test can read."""

    def __init__(self) -> None:
        self.counts = Counter()
        self.lags = {}

    def events_in(self, topic, n):
        self.counts["in", topic] += n

    def events_out(self, topic, n):
        self.counts["out", topic] += n

    def refused(self, reason, n):
        self.counts["refused", reason] += n

    def topic_recreated(self, topic):
        self.counts["recreated", topic] += 1

    def offsets_lost(self, topic, kind, n):
        self.counts["lost", topic, kind] += n

    def lag(self, topic, events):
        self.lags[topic] = events

    def tick(self, loop):
        self.counts["tick", loop] += 1

    def oldest_age_s(self, seconds):
        self.counts["oldest_age_s"] = seconds

    def waiting(self, waits):
        self.counts["waiting"] = waits

    def progress(self):
        self.counts["progress"] += 1


@pytest.fixture
def settings(broker, topic_prefix):
    found = Settings.of(
        kafka=broker.bootstrap, topic_prefix=topic_prefix, partitions=2, dedupe_window=200, env_file=None
    )
    provision(found)
    return found


@pytest.fixture
def producer(settings):
    client = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap, max_request_size=4_000_000)
    yield client
    client.close()


@contextmanager
def running(settings, metrics=None):
    metrics, stop, errors = metrics or RecordedMetrics(), threading.Event(), []

    def body() -> None:
        try:
            run_intake(settings, stop, metrics)
        except PerennialError as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield metrics
    finally:
        stop.set()
        thread.join(WAIT_S)
    assert not thread.is_alive()
    assert [str(error) for error in errors] == []


def wait_for(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "not within time"
        time.sleep(0.05)


def read_all(settings, name):
    """Every record of a topic, in order per partition."""
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka.bootstrap, enable_auto_commit=False)
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
    return [decode(record.value, record.headers, "examples").event for record in read_all(settings, "examples")]


def committed(settings):
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap)
    group = settings.kafka.topic("intake")
    try:
        offsets = admin.list_group_offsets([group])[group]
        return {(each.topic, each.partition): found.offset for each, found in offsets.items()}
    except (CoordinatorLoadInProgressError, CoordinatorNotAvailableError, NotCoordinatorError):  # is being set up
        return {}
    finally:
        admin.close()


def document(number, text=None, adapter="acme/support"):
    return json.dumps({"adapter": adapter, "document_id": f"d{number}", "text": text or f"text {number}"}).encode()


def publish(producer, settings, values, topic="documents", partition=None, headers=None):
    sent = [
        producer.send(settings.kafka.topic(topic), value=value, partition=partition, headers=headers or [])
        for value in values
    ]
    producer.flush()
    return [each.get(timeout=WAIT_S) for each in sent]


def test_documents_and_interactions_become_examples(settings, producer):
    adapters = [f"tenant-{number}/a" for number in range(12)]
    sent = publish(producer, settings, [document(n, adapter=adapter) for n, adapter in enumerate(adapters)])
    correction = InteractionObserved(
        adapter="acme", interaction_id="i1", prompt="2+2?", response="5", correction="4", rating=-1
    )
    written = encode(correction, event_id="7", source="/test", occurred_at=datetime(2026, 1, 1, tzinfo=UTC))
    publish(producer, settings, [written.value], "interactions", headers=written.headers)
    rating = {"adapter": "acme", "interaction_id": "i2", "prompt": "p", "response": "r", "rating": 1}
    structured = {"specversion": "1.0", "type": "interaction.observed", "id": "8", "source": "/test", "data": rating}
    publish(producer, settings, [json.dumps(structured).encode()], "interactions",
            headers=[("content-type", b"application/cloudevents+json")])  # fmt: skip

    with running(settings) as metrics:
        wait_for(lambda: metrics.counts["out", "examples"] == 14)
        wait_for(lambda: metrics.lags == {"documents": 0, "interactions": 0})
    assert (metrics.counts["in", "documents"], metrics.counts["in", "interactions"]) == (12, 2)

    records = read_all(settings, "examples")
    events = [decode(record.value, record.headers, "examples").event for record in records]
    assert {event.kind for event in events} == {"document", "correction", "rating"}
    learned = next(event for event in events if event.kind == "correction")
    assert (learned.prompt, learned.answer, learned.learn, learned.rating) == ("2+2?", "4", True, -1)
    signal = next(event for event in events if event.kind == "rating")
    assert (signal.learn, signal.rating) == (False, 1)

    ids = identify(settings)
    origins = {(event.origin.partition, event.origin.offset) for event in events if event.kind == "document"}
    assert origins == {(each.partition, each.offset) for each in sent}
    assert {event.origin.topic_id for event in events if event.kind == "document"} == {
        ids.topic_ids[settings.kafka.topic("documents")]
    }
    assert {event.origin.cluster_id for event in events} == {ids.cluster_id}
    # Every client of the project must choose the same partition for the same key.
    for record in records:
        assert record.partition == (murmur2(record.key) & 0x7FFFFFFF) % 2
    assert sum(committed(settings).values()) == 14


def test_refused_records_go_to_dead_letters_unchanged(settings, producer):
    class BytesNotUtf8(str):
        __slots__ = ()

        def encode(self, *_: object) -> bytes:
            return b"\xff\xfe"

    good = document(1)
    librdkafka = LibrdkafkaProducer({"bootstrap.servers": settings.kafka.bootstrap})
    for value in (b"\xffnot json", good, None):
        headers = [("trace", b"\x00\xff"), ("none", None)]
        librdkafka.produce(settings.kafka.topic("documents"), value, partition=0, headers=headers)
    librdkafka.flush(WAIT_S)
    publish(producer, settings, [good], partition=1, headers=[("ce_id", b"1")])
    publish(producer, settings, [good] * 20, partition=1, headers=[(BytesNotUtf8("x"), b"1")])
    publish(producer, settings, [b"x" * (1024 * 1024 + 1)], partition=1)
    with running(settings) as metrics:
        wait_for(lambda: sum(committed(settings).values()) == 25)
    dead_letters = [decode_dead_letter(record.value, record.headers) for record in read_all(settings, "dead-letters")]
    assert sorted((each.partition, each.offset, each.reason) for each in dead_letters) == [
        (0, 0, "not-utf8"), (0, 2, "tombstone"), (1, 0, "missing-attribute"),
        *((1, offset, "bad-header") for offset in range(1, 21)), (1, 21, "oversize"),
    ]  # fmt: skip
    first = next(each for each in dead_letters if each.reason == "not-utf8")
    assert (first.value, first.headers) == (b"\xffnot json", [("trace", b"\x00\xff"), ("none", None)])
    assert (first.topic, first.stage) == (settings.kafka.topic("documents"), "intake")
    oversized = next(each for each in dead_letters if each.reason == "oversize")
    assert len(oversized.value) == 1024 * 1024 + 1
    assert metrics.counts["refused", "oversize"] == 1
    assert [event.document_id for event in examples(settings)] == ["d1"]


def test_duplicates_are_dropped_across_a_restart_and_changed_texts_are_not(settings, producer):
    publish(producer, settings, [document(n % 30) for n in range(60)], partition=0)
    with running(settings) as metrics:
        wait_for(lambda: metrics.counts["in", "documents"] == 60)
    assert len(examples(settings)) == 30

    publish(producer, settings, [document(n) for n in range(30)], partition=0)
    publish(producer, settings, [document(0, "changed")], partition=0)
    with running(settings) as metrics:
        wait_for(lambda: metrics.counts["in", "documents"] == 31)
    assert metrics.counts["out", "examples"] == 1
    last = examples(settings)[-1]
    assert (last.text, last.origin.offset) == ("changed", 90)
    assert last.revises == next(event.example_id for event in examples(settings) if event.document_id == "d0")

    publish(producer, settings, [document(n) for n in range(1000, 1200)], partition=0)
    publish(producer, settings, [document(1)], partition=0)  # last seen 260 offsets ago, outside the window of 200
    with running(settings) as metrics:
        wait_for(lambda: metrics.counts["in", "documents"] == 201)
    assert metrics.counts["out", "examples"] == 201


def test_health_turns_red_while_the_broker_takes_no_example(broker_jars, tmp_path, monkeypatch):
    with EmbeddedBroker(tmp_path / "broker") as own:
        settings = Settings.of(kafka=own.bootstrap, partitions=1, stall_s=1.0, env_file=None)
        provision(settings)
        metrics = Metrics("intake", settings)
        with running(settings, metrics):
            wait_for(lambda: metrics.health.report().status == "ok")  # it has measured the lag, and nothing waits
            # The broker hangs once the document was read, so intake cannot measure the lag any more.
            accept, published = Acceptor.accept, threading.Event()

            def hang_and_accept(self, *record):
                monkeypatch.setattr(Acceptor, "accept", accept)
                assert published.wait(WAIT_S)
                os.kill(own.pid, signal.SIGSTOP)
                return accept(self, *record)

            monkeypatch.setattr(Acceptor, "accept", hang_and_accept)
            client = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap)
            publish(client, settings, [document(1)], partition=0)
            published.set()
            wait_for(lambda: not metrics.health.report().healthy)
            os.kill(own.pid, signal.SIGCONT)
            wait_for(lambda: metrics.health.report().healthy)
            client.close()
        assert [event.document_id for event in examples(settings)] == ["d1"]


def child(settings, **environment: str):
    program = (
        "import threading; from perennial.streams.intake.service import run_intake; from perennial.streams.observe.metrics import Metrics;"
        "from perennial.streams.settings import load_settings;"
        "run_intake(load_settings(), threading.Event(), Metrics('intake'))"
    )
    names = settings.environment()
    return subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **names, **environment})


def assert_in_order_without_gaps(settings, expected):
    """Assert that per origin partition a record is written only after all before it; repeats are allowed."""
    by_key = defaultdict(list)
    for event in examples(settings):
        by_key[event.origin.partition].append(event.origin.offset)
    assert {number: len(set(offsets)) for number, offsets in by_key.items()} == expected
    for offsets in by_key.values():
        first_seen = list(dict.fromkeys(offsets))
        assert first_seen == sorted(first_seen)
        high = -1
        for offset in offsets:
            assert offset <= high + 1
            high = max(high, offset)


def test_a_second_member_takes_over_without_loss(settings, producer):
    settings = settings.replace(intake_batch=20)
    with running(settings):
        publish(producer, settings, [document(n) for n in range(100)], partition=0)
        other = child(settings, PERENNIAL_INTAKE_BATCH="20")
        for start in range(100, 400, 50):
            publish(producer, settings, [document(n) for n in range(start, start + 50)], partition=start // 50 % 2)
            time.sleep(0.5)
        other.kill()
        other.wait(WAIT_S)
        wait_for(lambda: sum(committed(settings).values()) == 400)
    assert_in_order_without_gaps(settings, {0: 250, 1: 150})
    digests = [sha256(event.model_dump_json().encode()).hexdigest() for event in examples(settings)]
    assert len(set(digests)) == 400  # what was written twice was written with the same bytes


@pytest.mark.parametrize("step", ["consume", "produce", "flush", "commit"])
def test_a_kill_within_a_backlog_loses_nothing(settings, producer, step):
    """Batches are full or nearly so, so that the third begins while the commit of the second is under way."""
    publish(producer, settings, [document(n) for n in range(200)], partition=0)
    killed = child(settings, PERENNIAL_INTAKE_BATCH="20", PERENNIAL_FAILPOINT=f"intake.{step}:3")
    assert killed.wait(WAIT_S) == -signal.SIGKILL
    done = sum(committed(settings).values())
    assert 1 <= done <= len(examples(settings))
    with running(settings.replace(intake_batch=20)):
        wait_for(lambda: sum(committed(settings).values()) == 200)
    assert_in_order_without_gaps(settings, {0: 200})
    digests = [sha256(event.model_dump_json().encode()).hexdigest() for event in examples(settings)]
    assert len(set(digests)) == 200


def test_a_write_that_fails_stops_the_role_and_leaves_no_gap(settings, producer):
    create_again(settings, "examples", 1, {"max.message.bytes": "30000"})
    noise = "".join(chr(0x4E00 + n * 7919 % 20000) for n in range(20_000))  # does not compress below the limit
    publish(producer, settings, [document(n) for n in range(10)], partition=0)
    with running(settings) as metrics:
        wait_for(lambda: metrics.counts["out", "examples"] == 10)
    publish(producer, settings, [document(10, noise), *(document(n) for n in range(11, 50))], partition=0)
    with pytest.raises(DeliveryError, match=r"MSG_SIZE_TOO_LARGE|GAPLESS|FATAL"):
        run_intake(settings, threading.Event(), RecordedMetrics())
    assert committed(settings)[settings.kafka.topic("documents"), 0] == 10
    assert [event.origin.offset for event in examples(settings)] == list(range(10))


def test_aborted_transactions_are_not_learned_and_markers_are_no_lag(settings):
    client = LibrdkafkaProducer({
        "bootstrap.servers": settings.kafka.bootstrap, "transactional.id": settings.kafka.topic("test"), "partitioner": "murmur2_random",
    })  # fmt: skip
    client.init_transactions(WAIT_S)
    for number, end in ((1, client.abort_transaction), (2, client.commit_transaction), (3, client.abort_transaction)):
        client.begin_transaction()
        client.produce(settings.kafka.topic("documents"), document(number), partition=0)
        client.flush(WAIT_S)
        end(WAIT_S)
    with running(settings) as metrics:
        wait_for(lambda: metrics.counts["out", "examples"] == 1)
        wait_for(lambda: metrics.lags["documents"] == 0)
    assert [event.document_id for event in examples(settings)] == ["d2"]


def test_missing_topics_and_an_unreachable_broker_raise_errors(broker, monkeypatch):
    nowhere = Settings.of(kafka=broker.bootstrap, topic_prefix="nobody-made-these-", env_file=None)
    with pytest.raises(TopicError, match="nobody-made-these-examples"):
        run_intake(nowhere, threading.Event(), RecordedMetrics())
    monkeypatch.setattr(librdkafka, "CALL_TIMEOUT_S", 1)
    with pytest.raises(KafkaUnavailableError):
        run_intake(Settings.of(kafka="127.0.0.1:9", env_file=None), threading.Event(), RecordedMetrics())
