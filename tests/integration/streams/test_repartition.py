"""Partition counts and topic ids on a real broker: what an operator does with Kafka's own tools loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from kafka.admin import KafkaAdminClient

from perennial import Publisher
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli import doctor
from perennial.streams.events.cloudevents import decode
from perennial.streams.intake.service import run_intake
from perennial.streams.kafka import group, maintenance
from perennial.streams.kafka.group import GroupConsumer
from perennial.streams.kafka.installation import (
    ROLE_TOPICS,
    InstallationError,
    check_installation,
    load_installation,
    provision_recorded,
)
from perennial.streams.kafka.maintenance import MaintenanceError, MaintenanceLease, load_maintenance, run_pausable
from perennial.streams.kafka.repartition import RepartitionError, adopt, plan_repartition, repartition
from perennial.streams.kafka.topic_guard import KeyPartitions, TopicGuard
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests.integration.streams.topic_kit import create_again

ROOT = Path(__file__).parents[3]
ADAPTERS = [f"acme/a{n}" for n in range(9)]


@pytest.fixture
def settings(broker, topic_prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(maintenance, "POLL_S", 0.2)
    monkeypatch.setattr(group, "METADATA_AGE_MS", 1_000)
    settings = Settings.of(
        kafka=broker.bootstrap, topic_prefix=topic_prefix, partitions=3, store=str(tmp_path / "store"), env_file=None
    )
    provision_recorded(settings, store_of(settings))
    return settings


def store_of(settings):
    return DirectoryStore(Path(settings.store.uri))


def alter(settings, topic, partitions):
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap)
    admin.create_partitions({settings.kafka.topic(topic): partitions})
    admin.close()


def publish(settings, count, start=0):
    with Publisher(settings.kafka.bootstrap, settings=settings) as publisher:
        for n in range(start, start + count):
            publisher.document(adapter=ADAPTERS[n % 9], document_id=str(n), text=f"text number {n}")


class Reader:
    """Stands for the scorer: reads `examples` slowly, in order, and commits."""

    def __init__(self, settings, pause_s=0.0) -> None:
        self.settings, self.pause_s = settings, pause_s
        self.read = defaultdict(list)  # by adapter: what was read, in order
        self.partitions = set()
        self.failure = None

    @property
    def count(self):
        return sum(map(len, self.read.values()))

    def run(self, stop):
        try:
            with GroupConsumer(self.settings, "examples", "scorer", 10) as consumer:
                while not stop.is_set():
                    records = consumer.poll(0.2)
                    for record in records:
                        self.read[record.key.decode()].append(decode(record.value, record.headers, "examples").event)
                        self.partitions.add(record.partition)
                    time.sleep(self.pause_s if records else 0)
                    consumer.commit(records)
        except Exception as error:  # noqa: BLE001
            self.failure = error


@contextmanager
def running(*bodies) -> Iterator[threading.Event]:
    stop = threading.Event()
    threads = [threading.Thread(target=body, args=(stop,)) for body in bodies]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def intake(settings, metrics):
    def body(stop):
        run_pausable(
            "intake", store_of(settings), stop, metrics, partial(run_intake, settings, metrics=metrics),
            lambda: TopicGuard(settings, ROLE_TOPICS["intake"], store_of(settings)),
        )  # fmt: skip

    return body


def until(holds, within_s=60):
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def offsets(examples, partition):
    return [example.origin.offset for example in examples if example.origin.partition == partition]


@pytest.mark.slow(12)
def test_case_14_a_repartitioning_under_a_backlog_loses_nothing_and_keeps_the_order(settings):
    """Case 14, attack C: partitions were added while records waited, and the waiting ones were dropped."""
    metrics, reader, seen = Metrics("intake"), Reader(settings, 0.15), []
    with running(intake(settings, metrics), reader.run):
        publish(settings, 300)
        until(lambda: reader.count > 20)
        assert reader.count < 300
        plan = plan_repartition(settings, store_of(settings), "examples", 8)
        health = []

        def progress(line):
            seen.append(line)
            health.append(metrics.health.report().status)
            if "paused" in line and len(seen) < 6:
                publish(settings, 30, start=300 + 30 * len(seen))  # producers go on; the events wait in Kafka

        repartition(settings, store_of(settings), plan, progress, wait_s=60, grace_s=1)
        published = 300 + 30 * sum("paused" in line for line in seen[:5])
        publish(settings, 90, start=2000)
        until(lambda: reader.count >= published + 90 or reader.failure)
    assert reader.failure is None
    assert any("records of examples wait for scorer" in line for line in seen)
    assert "maintenance" in health
    read = [example.document_id for examples in reader.read.values() for example in examples]
    assert len(read) == len(set(read)) == published + 90
    for examples in reader.read.values():
        for partition in range(3):
            assert offsets(examples, partition) == sorted(offsets(examples, partition))
    assert max(reader.partitions) > 2
    assert load_installation(store_of(settings)).topics["examples"].partitions == 8
    assert load_maintenance(store_of(settings))[0].ended


@pytest.mark.slow(8)
def test_case_14_a_role_does_not_read_after_an_unauthorised_alter(settings):
    """Case 14: a role that is started after `kafka-topics --alter` stops before it reads, and says the remedy."""
    publish(settings, 5)
    alter(settings, "examples", 6)
    environment = {**os.environ, **settings.environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "perennial.streams.cli", "worker", "intake"], check=False, env=environment, capture_output=True,
        text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "got: 6 partitions; allowed: 3 partitions" in done.stderr
    assert "perennial topics repartition examples --partitions 6" in done.stderr
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap)
    assert not admin.list_group_offsets(settings.kafka.topic("intake")).get(settings.kafka.topic("intake"))
    admin.close()
    with pytest.raises(InstallationError):
        GroupConsumer(settings, "examples", "scorer", 10)

    reader = Reader(settings)  # the remedy: while the command runs the roles read again
    plan = plan_repartition(settings, store_of(settings), "examples", 6)

    def go():
        until(lambda: load_maintenance(store_of(settings))[0] is not None)
        threading.Thread(target=reader.run, args=(stop,), daemon=True).start()

    stop = threading.Event()
    threading.Thread(target=go, daemon=True).start()
    repartition(settings, store_of(settings), plan, lambda _: None, wait_s=60, grace_s=1)
    stop.set()
    check_installation(settings, store_of(settings), ROLE_TOPICS["intake"])


@pytest.mark.slow(8)
def test_case_14_an_unauthorised_alter_moves_no_key_and_stops_the_readers(settings):
    """Case 14: with producers that choose by the recorded count, an alter under way changes no key's partition."""
    metrics, reader = Metrics("intake"), Reader(settings)
    failures = []

    def guarded(stop):
        try:
            intake(settings, metrics)(stop)
        except InstallationError as error:
            failures.append(error)

    with running(guarded, reader.run):
        publish(settings, 20)
        until(lambda: reader.count == 20)
        alter(settings, "examples", 9)
        publish(settings, 60, start=100)
        until(lambda: reader.failure and failures)
    assert isinstance(reader.failure, InstallationError)
    assert reader.partitions <= {0, 1, 2}
    assert "perennial topics repartition examples --partitions 9" in failures[0].remedy


def test_a_topic_created_again_under_a_reader_is_noticed_at_the_first_batch(settings):
    """Case 10's kind, internal topics: ids were looked up at the start only."""
    guard = TopicGuard(settings, ["examples"], store_of(settings))
    guard.verify()
    create_again(settings, "examples", 3)
    with pytest.raises(InstallationError, match="deleted and created again") as refused:
        guard.verify()
    guard.close()
    assert "`perennial topics adopt examples`" in refused.value.remedy
    with pytest.raises(InstallationError):
        check_installation(settings, store_of(settings), ["examples"])
    adopt(settings, store_of(settings), ["examples"])
    check_installation(settings, store_of(settings), ["examples"])


@pytest.mark.slow(6)
def test_without_a_reader_the_command_gives_up_and_the_writers_go_on(settings):
    metrics, store = Metrics("intake"), store_of(settings)
    with running(intake(settings, metrics)):
        publish(settings, 5)
        until(lambda: ends(settings, "examples") == 5)
        plan = plan_repartition(settings, store, "examples", 4)
        with pytest.raises(RepartitionError, match="not read to its end") as refused:
            repartition(settings, store, plan, lambda _: None, wait_s=4, grace_s=1)
        assert "5 records wait for scorer" in str(refused.value.got)
        publish(settings, 5, start=10)
        until(lambda: ends(settings, "examples") == 10)
    assert load_installation(store).topics["examples"].partitions == 3
    check_installation(settings, store, ["examples"])


def ends(settings, topic):
    from kafka import KafkaConsumer, TopicPartition

    consumer = KafkaConsumer(bootstrap_servers=settings.kafka.bootstrap)
    name = settings.kafka.topic(topic)
    partitions = [TopicPartition(name, n) for n in consumer.partitions_for_topic(name)]
    total = sum(consumer.end_offsets(partitions).values())
    consumer.close()
    return total


def test_what_cannot_be_repartitioned_is_refused(settings):
    store = store_of(settings)
    for topic in ("documents", "adapter-acks", "elsewhere"):
        with pytest.raises(RepartitionError, match="not a topic whose partition count"):
            plan_repartition(settings, store, topic, 8)
    with pytest.raises(RepartitionError, match="fewer partitions"):
        plan_repartition(settings, store, "examples", 2)
    with MaintenanceLeaseOf(store) as lease:
        with pytest.raises(MaintenanceError, match="another command"):
            MaintenanceLease(store, "examples", 4, ("intake",))
        lease.renew()
        with pytest.raises(MaintenanceError), Publisher(settings.kafka.bootstrap, settings=settings) as publisher:
            publisher.publish(rollback())


@contextmanager
def MaintenanceLeaseOf(store):  # noqa: N802
    lease = MaintenanceLease(store, "adapter-jobs", 4, ("streams",))
    try:
        yield lease
    finally:
        lease.end()


def rollback():
    from perennial.streams.events.models import RollbackRequested

    return RollbackRequested(job_id="r", adapter="acme/a0", alias="live", requested_by="t", reason="t")


def test_all_clients_choose_the_same_partition_for_a_key(settings):
    """An adapter's order rests on it: the routing by the recorded count is Java's default partitioner."""
    from confluent_kafka import Producer

    expected, producer, found = KeyPartitions(3), Producer({
        "bootstrap.servers": settings.kafka.bootstrap, "partitioner": "murmur2_random"
    }), {}  # fmt: skip
    for adapter in ADAPTERS:
        producer.produce(
            settings.kafka.topic("drift"), b"", adapter.encode(),
            on_delivery=lambda _error, message: found.update({message.key(): message.partition()}),
        )  # fmt: skip
    producer.flush(30)
    assert found == {adapter.encode(): expected[adapter.encode()] for adapter in ADAPTERS}


def test_case_14_the_doctor_says_what_the_broker_has(settings):
    """Case 14: the doctor fails where a count is not the recorded one; a single broker for development is only a note."""
    publish(settings, 3)
    before = {name: doctor.CHECKS[name](settings) for name in ("durability", "offsets", "recorded topics", "topics")}
    assert all(finding.ok for finding in before.values()), before
    assert "one broker, which is for development" in before["durability"].found
    assert "3 records wait" in before["offsets"].found
    alter(settings, "adapter-jobs", 5)
    finding = doctor.CHECKS["recorded topics"](settings)
    assert not finding.ok
    assert "perennial topics repartition adapter-jobs --partitions 5" in finding.remedy
    assert not doctor.CHECKS["topics"](settings).ok
