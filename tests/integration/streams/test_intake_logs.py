"""Intake where the log changes under it: created again, cut off, deleted unread, more partitions."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewPartitions
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker
from perennial.streams.intake import input_consumer
from perennial.streams.kafka.installation import load_installation, provision_recorded
from perennial.streams.kafka.topics import identify, provision
from perennial.streams.settings import Settings
from tests.integration.streams.test_intake import (
    RecordedMetrics,
    committed,
    document,
    examples,
    publish,
    running,
    wait_for,
)
from tests.integration.streams.topic_kit import create_again


@pytest.fixture
def settings(broker, topic_prefix, tmp_path):
    found = Settings.of(
        kafka=broker.bootstrap, topic_prefix=topic_prefix, partitions=4, dedupe_window=200, env_file=None,
        store=str(tmp_path / "store"),
    )  # fmt: skip
    provision_recorded(found, DirectoryStore(tmp_path / "store"))
    return found


@pytest.fixture
def producer(settings):
    client = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap, max_request_size=4_000_000, linger_ms=5)
    yield client
    client.close()


@pytest.fixture
def sockets():
    """Collect the sockets that kafka-python drops unclosed while no broker listens, or a later test bears their warnings."""
    yield
    gc.collect()


def origins(settings):
    return Counter((each.origin.topic_id, each.origin.partition, each.origin.offset) for each in examples(settings))


def publish_to_all(settings, first, count):
    """Publish to each of four partitions with a client that has no older metadata."""
    client = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap, linger_ms=5)
    for number in range(4):
        for n in range(count):
            client.send(settings.kafka.topic("documents"), document(first + 1000 * number + n), partition=number)
    client.flush()
    client.close()


def test_case_10_a_topic_created_again_under_a_running_intake_loses_nothing(settings, producer):
    """40 read records, then 4 x 40 in a new topic of the same name at once: all 160 come, under the new topic's id."""
    old_id = identify(settings).topic_ids[settings.kafka.topic("documents")]
    publish(producer, settings, [document(n) for n in range(40)])
    metrics = RecordedMetrics()
    with running(settings, metrics):
        wait_for(lambda: metrics.counts["out", "examples"] == 40)
        create_again(settings, "documents", 4)
        publish_to_all(settings, 10_000, 40)
        new_id = identify(settings).topic_ids[settings.kafka.topic("documents")]
        wait_for(lambda: sum(topic_id == new_id for topic_id, _, _ in origins(settings)) == 160)
    found = origins(settings)
    assert {key for key in found if key[0] == new_id} == {(new_id, p, n) for p in range(4) for n in range(40)}
    assert sum(1 for key in found if key[0] == old_id) == 40
    assert metrics.counts["recreated", "documents"] == 1
    record = load_installation(DirectoryStore(Path(settings.store.uri)))
    assert record.known_topic_ids("documents") == (old_id, new_id)
    # The commits are the new topic's: a restart reads nothing again.
    again = RecordedMetrics()
    with running(settings, again):
        publish_to_all(settings, 20_000, 1)
        wait_for(lambda: again.counts["out", "examples"] == 4)
    assert again.counts["recreated", "documents"] == 0


def test_case_10_a_topic_created_again_while_intake_is_down_loses_nothing(settings, producer):
    """A commit counts in the log of its topic only; the new topic has grown past it by the time intake starts."""
    publish_to_all(settings, 0, 30)
    with running(settings) as metrics:
        wait_for(lambda: metrics.counts["out", "examples"] == 120)
    create_again(settings, "documents", 4)
    publish_to_all(settings, 10_000, 40)
    metrics = RecordedMetrics()
    with running(settings, metrics):
        wait_for(lambda: metrics.counts["out", "examples"] == 160)
    assert metrics.counts["recreated", "documents"] == 1
    new_id = identify(settings).topic_ids[settings.kafka.topic("documents")]
    assert sum(topic_id == new_id for topic_id, _, _ in origins(settings)) == 160


def test_attack_k_records_that_were_deleted_unread_are_counted(settings, producer):
    """Retention deleted records before intake read them: an error with the count, and the rest is read."""
    publish(producer, settings, [document(n) for n in range(20)], partition=0)
    with running(settings) as metrics:
        wait_for(lambda: metrics.counts["out", "examples"] == 20)
    publish(producer, settings, [document(n) for n in range(20, 50)], partition=0)
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap)
    admin.delete_records({TopicPartition(settings.kafka.topic("documents"), 0): 45})
    admin.close()
    metrics = RecordedMetrics()
    with running(settings, metrics):
        wait_for(lambda: metrics.counts["out", "examples"] == 5)
    assert metrics.counts["lost", "documents", "deleted"] == 25
    assert metrics.counts["recreated", "documents"] == 0


def test_case_14_partitions_added_to_an_input_topic_are_read(settings, producer, monkeypatch):
    """An input topic may get more partitions while intake runs; it is read in full."""
    monkeypatch.setattr(
        input_consumer, "CONSUMER_CONFIG",
        {**input_consumer.CONSUMER_CONFIG, "topic.metadata.refresh.interval.ms": 500},
    )  # fmt: skip
    metrics = RecordedMetrics()
    with running(settings, metrics):
        publish(producer, settings, [document(n) for n in range(10)], partition=1)
        wait_for(lambda: metrics.counts["out", "examples"] == 10)
        admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap})
        for future in admin.create_partitions([NewPartitions(settings.kafka.topic("documents"), 6)]).values():
            future.result()
        client = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap)
        wait_for(lambda: len(client.partitions_for(settings.kafka.topic("documents"))) == 6)
        publish(client, settings, [document(n) for n in range(10, 20)], partition=5)
        client.close()
        wait_for(lambda: metrics.counts["out", "examples"] == 20)
    assert committed(settings)[settings.kafka.topic("documents"), 5] == 10


def cut_tail(data_dir, topic, records):
    """Cut the last records off partition 0 of a stopped broker, as a power cut does that comes before a flush."""
    (folder,) = Path(data_dir).rglob(f"{topic}-0")
    (segment,) = folder.glob("*.log")
    data, ends, at = segment.read_bytes(), [], 0
    while at < len(data):
        at += 12 + int.from_bytes(data[at + 8 : at + 12], "big")
        ends.append(at)
    segment.write_bytes(data[: ends[-records - 1]])
    for path in (*folder.glob("*.index"), *folder.glob("*.timeindex"), *folder.glob("*.snapshot")):
        path.unlink()
    for path in Path(data_dir).rglob(".kafka_cleanshutdown"):
        path.unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see `sockets`
@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize(
    ("intake_runs", "published", "window"),
    [(False, 4, 15), (False, 10, 15), (False, 25, 5), (True, 4, 15), (True, 25, 15)],
)
def test_attack_k_a_lost_tail_drops_no_new_record(broker_jars, tmp_path, intake_runs, published, window):
    """The broker loses the last ten records that were read; what is published in their place is read, as new."""
    own = EmbeddedBroker(tmp_path / "broker")
    own.start()
    try:
        settings = Settings.of(kafka=own.bootstrap, partitions=1, dedupe_window=window, env_file=None)
        provision(settings)
        client = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap)
        for n in range(40):  # one batch each, so that the log can be cut between any two
            publish(client, settings, [document(n)], partition=0)
        client.close()
        metrics = RecordedMetrics()
        with ExitStack() as stack:
            if intake_runs:
                stack.enter_context(running(settings, metrics))
            else:
                with running(settings):
                    wait_for(lambda: sum(committed(settings).values()) == 40)
            wait_for(lambda: sum(committed(settings).values()) == 40)
            own.stop()
            cut_tail(tmp_path / "broker", settings.kafka.topic("documents"), 10)
            own.start()
            assert own.bootstrap == settings.kafka.bootstrap
            client = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap)
            sent = publish(client, settings, [document(n) for n in range(100, 100 + published)], partition=0)
            client.close()
            assert sent[0].offset == 30
            if not intake_runs:
                stack.enter_context(running(settings, metrics))
            expected = {f"d{n}" for n in [*range(40), *range(100, 100 + published)]}
            wait_for(lambda: {each.document_id for each in examples(settings)} == expected)
        assert metrics.counts["lost", "documents", "tail"] >= 10
        found = {each.document_id: each.origin for each in examples(settings)}
        assert found["d100"].offset == found["d30"].offset == 30
        assert found["d100"].leader_epoch > found["d30"].leader_epoch
    finally:
        own.stop()
