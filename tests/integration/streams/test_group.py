"""The group member of scorer and learner on a real broker: every partition is read on, whatever happened to the client."""

from __future__ import annotations

import time

import pytest
from kafka import KafkaProducer, TopicPartition

from perennial.streams.kafka import group
from perennial.streams.kafka.group import GroupConsumer
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings


@pytest.fixture
def settings(broker, topic_prefix):
    settings = Settings.of(kafka=broker.bootstrap, topic_prefix=topic_prefix, partitions=2, store="", env_file=None)
    provision(settings)
    return settings


@pytest.fixture
def produce(settings):
    producer = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap)

    def send(partition, *values):
        for value in values:
            producer.send(settings.kafka.topic("examples"), value=value, partition=partition)
        producer.flush()

    yield send
    producer.close()


def read(consumer, count, within_s=20.0, commit=False):
    found, deadline = [], time.monotonic() + within_s
    while len(found) < count and time.monotonic() < deadline:
        records = consumer.poll(0.2)
        found += [record.value for record in records]
        if commit:
            consumer.commit(records)
    return found


def test_the_soak_s_stall_a_partition_parked_while_paused_is_read_again(settings, produce):
    """Soak: after a rebalance a learner read nothing from one of its partitions for minutes; lag 0, health green.

    kafka-python 3.0.12 sets the rest of a paused partition's batch aside and takes it up again only while the slot of
    the batch in hand is None. A batch of another partition that was read to its end stays in that slot.
    """
    first, second = (TopicPartition(settings.kafka.topic("examples"), number) for number in range(2))
    with GroupConsumer(settings, "examples", "scorer", 1) as consumer:
        produce(0, b"a1", b"a2")
        assert read(consumer, 1) == [b"a1"]
        consumer.pause()  # a job trains
        assert consumer.poll(0.3) == []  # a2 is set aside
        consumer._consumer.resume(second)  # as a rebalance leaves a partition that it has just assigned
        produce(1, b"b1")
        assert read(consumer, 1) == [b"b1"]
        consumer.resume()
        assert consumer._consumer.position(first) == 1
        assert read(consumer, 1, 10) == [b"a2"]


@pytest.mark.parametrize("by", ["seek", "rejoin"])
def test_a_partition_that_yields_nothing_is_found_and_read_again(settings, produce, monkeypatch, by):
    monkeypatch.setattr(group, "WATCH_S", 0.3)
    monkeypatch.setattr(group, "STALL_S", 1.5)
    metrics = Metrics("scorer")
    with GroupConsumer(settings, "examples", "scorer", 10, metrics=metrics) as consumer:
        produce(0, b"a1")
        assert read(consumer, 1, commit=True) == [b"a1"]
        state = consumer._consumer._subscription.assignment[TopicPartition(settings.kafka.topic("examples"), 0)]
        if by == "seek":
            state._awaiting_validation = True
            state.next_allowed_retry_time = time.monotonic() + 1000
        else:
            state.is_fetchable = lambda: False  # outlives a seek, not a new client
        produce(0, b"a2")
        deadline = time.monotonic() + 10
        while not consumer.lag() and time.monotonic() < deadline:
            assert consumer.poll(0.1) == []
        assert consumer.lag() == 1  # by the broker's end, not by what was fetched
        assert read(consumer, 1, 30) == [b"a2"]
        assert consumer.lag() == 0
    counted = {
        remedy: metrics.registry.get_sample_value(
            "perennial_stalled_partitions_total", {"role": "scorer", "topic": "examples", "remedy": remedy}
        )
        for remedy in ("seek", "rejoin")
    }
    assert counted == ({"seek": 1, "rejoin": None} if by == "seek" else {"seek": 1, "rejoin": 1})


def test_a_paused_or_idle_partition_is_not_taken_for_a_stalled_one(settings, produce, monkeypatch):
    monkeypatch.setattr(group, "WATCH_S", 0.2)
    monkeypatch.setattr(group, "STALL_S", 0.5)
    metrics = Metrics("scorer")
    with GroupConsumer(settings, "examples", "scorer", 1, metrics=metrics) as consumer:
        produce(0, b"a1", b"a2")
        assert read(consumer, 1) == [b"a1"]
        consumer.pause()
        for _ in range(10):
            assert consumer.poll(0.2) == []
        consumer.resume()
        assert read(consumer, 1) == [b"a2"]
        for _ in range(10):
            assert consumer.poll(0.2) == []
    assert b"perennial_stalled_partitions_total{" not in metrics.exposition()
