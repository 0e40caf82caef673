"""The client library on a real broker: what is published arrives; what a subscriber hears, misses and acknowledges."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import StoredObject
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import AliasState
from perennial.streams.client.base_publisher import PublishError
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events import cloudevents as wire
from perennial.streams.events.adapter_events import (
    AdapterActivated,
    AdapterFailed,
    AdapterPromoted,
    BaseRef,
    Learned,
    ReplicaLeft,
)
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.kafka.topics import provision
from perennial.streams.replicas.acks import AckReader
from perennial.streams.replicas.replica_status import KEPT_S
from perennial.streams.retain.rules.replica_report import report_of
from perennial.streams.settings import Settings
from perennial.testing import MemoryBackend, small_weights
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
NEVER_S = 3600.0


@pytest.fixture
def settings(broker, topic_prefix: str, tmp_path: Path) -> Settings:
    made = Settings.of(
        kafka=broker.bootstrap, topic_prefix=topic_prefix, partitions=3, store=str(tmp_path / "store"),
        poll_s=NEVER_S, env_file=None,
    )  # fmt: skip
    provision(made)
    return made


@pytest.fixture
def versions(settings: Settings) -> VersionPublisher:
    return VersionPublisher(DirectoryStore(Path(settings.store.uri), fsync=False), ADAPTER)


def until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def everything(settings: Settings, topic: str) -> list[tuple[Any, wire.Envelope]]:
    """All records of a topic, each with its decoded event."""
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka.bootstrap, auto_offset_reset="earliest")
    try:
        name = settings.kafka.topic(topic)
        partitions = [TopicPartition(name, number) for number in consumer.partitions_for_topic(name)]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        found = []
        while any(consumer.position(partition) < ends[partition] for partition in partitions):
            for batch in consumer.poll(timeout_ms=200).values():
                found += [(record, wire.decode(record.value, record.headers, topic)) for record in batch]
        return found
    finally:
        consumer.close()


@pytest.fixture
def announce(settings: Settings) -> Iterator[Callable[..., None]]:
    """Sends the event of a generation, as a learner does."""
    producer = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap)

    def send(versions: VersionPublisher, state: AliasState, **changes: Any) -> None:
        manifest = versions.registry.manifest(state.adapter, state.version)
        event = promoted(manifest, state).model_copy(update=changes)
        record = wire.encode(event, event_id="test", source="test", occurred_at=datetime.now(UTC))
        topic = settings.kafka.topic("adapter-updates")
        producer.send(topic, key=record.key, value=record.value, headers=record.headers).get(timeout=120)

    yield send
    producer.close()


def promoted(manifest: Manifest, state: AliasState) -> AdapterPromoted:
    return AdapterPromoted(
        adapter=state.adapter, alias=state.alias, generation=state.generation, version=state.version, seq=state.seq,
        manifest_uri="test:manifest", weights_uri="test:weights", weights_sha256=manifest.weights.digest,
        weights_bytes=manifest.weights.size_bytes, rank=manifest.rank,
        base=BaseRef(model=manifest.base_model, sha256=manifest.base_sha256), learned=Learned(examples=0, tokens=0),
        reason="test", published_at=state.published_at,
    )  # fmt: skip


# ---- publishing


def test_published_events_arrive_unchanged(settings: Settings):
    with Publisher(settings=settings) as publisher:
        first = publisher.document(adapter=ADAPTER, document_id="d1", text="Grüße 👋", subjects=["ada"])
        again = publisher.document(adapter=ADAPTER, document_id="d1", text="Grüße 👋", subjects=["ada"])
        other = publisher.document(adapter=ADAPTER, document_id="d2", text="Grüße 👋")
        turn = publisher.interaction(
            adapter=ADAPTER, interaction_id="i1", prompt="When?", response="Never.", correction="On Monday.", rating=-1
        )
        places = [receipt.result(120) for receipt in (first, again, other)]
    assert turn.done
    assert first.event_id == again.event_id != other.event_id
    found = everything(settings, "documents")
    assert sorted((r.partition, r.offset) for r, _ in found) == sorted((p.partition, p.offset) for p in places)
    assert places[0].topic == settings.kafka.topic("documents")
    expected = DocumentObserved(adapter=ADAPTER, document_id="d1", text="Grüße 👋", subjects=["ada"])
    assert [envelope.event for _, envelope in found].count(expected) == 2
    assert {envelope.id for _, envelope in found if envelope.event == expected} == {first.event_id}
    record, envelope = everything(settings, "interactions")[0]
    assert record.key == b"acme/support|i1"
    assert dict(record.headers)["ce_type"] == b"interaction.observed"
    assert isinstance(envelope.event, InteractionObserved)
    assert envelope.event.correction == "On Monday."
    assert envelope.time is not None
    assert abs(envelope.time - datetime.now(UTC)) < timedelta(minutes=5)


def test_many_threads_share_one_publisher(settings: Settings):
    with Publisher(settings=settings) as publisher:

        def publish(worker: int) -> None:
            for number in range(50):
                publisher.document(adapter=ADAPTER, document_id=f"{worker}-{number}", text="x")

        threads = [threading.Thread(target=publish, args=(worker,)) for worker in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    names = [envelope.event.document_id for _, envelope in everything(settings, "documents")]
    assert sorted(names) == sorted(f"{w}-{n}" for w in range(6) for n in range(50))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"adapter": "Acme Support"}, "adapter"),
        ({"text": ""}, "text"),
        ({"text": "x" * (256 * 1024 + 1)}, "text"),
        ({"text": "\x00" * 200_000}, "size of the value"),
        ({"retention_class": "30 days"}, "retention_class"),
        ({"txet": "misspelt"}, "txet"),
    ],
)
def test_what_is_not_valid_is_refused_before_anything_is_sent(settings: Settings, fields: dict[str, Any], named: str):
    given = {"adapter": ADAPTER, "document_id": "d1", "text": "x", **fields}
    with Publisher(settings=settings) as publisher, pytest.raises(PublishError, match=named) as caught:
        publisher.document(**given)
    assert caught.value.remedy
    assert caught.value.allowed
    assert everything(settings, "documents") == []


def test_a_topic_that_is_not_there_is_said_in_bounded_time_with_the_command_that_makes_it(broker, topic_prefix: str):
    nowhere = Settings.of(kafka=broker.bootstrap, topic_prefix=f"{topic_prefix}none-", env_file=None)
    with (
        Publisher(settings=nowhere, timeout_s=1) as publisher,
        pytest.raises(PublishError, match="perennial topics create"),
    ):
        publisher.document(adapter=ADAPTER, document_id="d1", text="x")


def test_closing_says_what_was_not_delivered_and_a_closed_publisher_takes_nothing(settings: Settings):
    publisher = Publisher(settings=settings)
    publisher.document(adapter=ADAPTER, document_id="d1", text="x").result(120)
    future = publisher._producer.send(settings.kafka.topic("documents"), key=b"k", value=b"v")
    publisher._accepted += 1  # an event whose acknowledgement never came
    future.get(timeout=120)
    with pytest.raises(PublishError, match="1 of 2 events"):
        publisher.close()
    publisher.close()
    with pytest.raises(PublishError, match="closed"):
        publisher.document(adapter=ADAPTER, document_id="d2", text="x")


# ---- subscribing


class LateStore(DirectoryStore):
    """A store that hides the alias until `hidden` is False."""

    hidden = True

    def get(self, key: str, max_bytes: int = 1 << 30) -> StoredObject:
        if self.hidden and key.startswith("aliases/"):
            raise NotFoundError("not yet")
        return super().get(key, max_bytes)


def reveal_with_event(subscriber: Subscriber, store: LateStore) -> None:
    """Let the subscriber find the alias only after it has read an event."""
    original = subscriber._updates._generation

    def revealing(record: Any) -> int:
        store.hidden = False
        return original(record)

    subscriber._updates._generation = revealing


def test_a_subscriber_that_comes_late_starts_from_the_topic(
    settings: Settings, versions: VersionPublisher, announce: Callable[..., None]
):
    """Polling is off and the first look finds no alias, so only the earlier event can lead to the version."""
    for _ in range(3):
        state = versions.publish()
        announce(versions, state)
    store = LateStore(Path(settings.store.uri), fsync=False)
    backend = MemoryBackend()
    with Subscriber(ADAPTER, backend, store=store, settings=settings, replica="r1") as subscriber:
        reveal_with_event(subscriber, store)
        assert subscriber.wait_for(3, 120)
        assert backend.active == subscriber.name_of(state.version)
    assert [call for call, _ in backend.calls].count("load") == 1


def test_an_event_wakes_a_subscriber_that_does_not_poll(
    settings: Settings, versions: VersionPublisher, announce: Callable[..., None]
):
    backend = MemoryBackend()
    stages: list[dict[str, float]] = []
    with Subscriber(
        ADAPTER, backend, settings=settings, replica="r1", on_activate=lambda _s, t: stages.append(dict(t))
    ) as subscriber:
        for generation in range(1, 4):
            state = versions.publish()
            announce(versions, state)
            assert subscriber.wait_for(generation, 120)
            assert backend.active == subscriber.name_of(state.version)
        until(lambda: len(stages) == 3)
    *acks, last = [envelope.event for _, envelope in everything(settings, "adapter-acks")]
    assert (type(last), last.generation, last.version) == (ReplicaLeft, 3, state.version)
    assert [type(ack) for ack in acks] == [AdapterActivated] * 3
    assert {ack.lease_s for ack in acks} == {60.0}
    assert [ack.generation for ack in acks] == [1, 2, 3]
    assert acks[-1].version == state.version
    assert acks[-1].replica == "r1"
    assert set(acks[-1].stage_s) == {"fetch", "verify", "load", "warm", "activate", "publish_to_served"}
    assert {record.key for record, _ in everything(settings, "adapter-acks")} == {b"acme/support#r1"}


def test_old_forged_and_foreign_events_change_nothing(
    settings: Settings, versions: VersionPublisher, announce: Callable[..., None]
):
    backend = MemoryBackend()
    first, second = versions.publish(), versions.publish()
    foreign = VersionPublisher(versions.store, "acme/other").publish()
    with Subscriber(ADAPTER, backend, settings=settings, replica="r1") as subscriber:
        assert subscriber.wait_for(2, 120)
        announce(versions, first)
        announce(VersionPublisher(versions.store, "acme/other"), foreign)
        announce(versions, first, generation=900, version="sha256:" + "f" * 64)  # the alias never had this generation
        third = versions.publish()
        announce(versions, third)
        assert subscriber.wait_for(3, 120)
        assert backend.active == subscriber.name_of(third.version)
    loaded = [name for call, name in backend.calls if call == "load"]
    assert loaded == [subscriber.name_of(second.version), subscriber.name_of(third.version)]


def test_an_event_behind_the_alias_brings_the_alias(
    settings: Settings, versions: VersionPublisher, announce: Callable[..., None]
):
    first = versions.publish()
    last = versions.publish()
    store = LateStore(Path(settings.store.uri), fsync=False)
    backend = MemoryBackend()
    with Subscriber(ADAPTER, backend, store=store, settings=settings, replica="r1") as subscriber:
        reveal_with_event(subscriber, store)
        announce(versions, first)
        assert subscriber.wait_for(2, 120)
        assert backend.active == subscriber.name_of(last.version)
    assert [call for call, _ in backend.calls].count("load") == 1


def test_polling_alone_is_enough_when_the_event_is_lost(settings: Settings, versions: VersionPublisher):
    backend = MemoryBackend()
    polling = settings.replace(poll_s=0.2)
    with Subscriber(ADAPTER, backend, settings=polling, replica="r1") as subscriber:
        assert not subscriber.wait_for(1, 0.5)
        for generation in (1, 2):
            state = versions.publish()
            assert subscriber.wait_for(generation, 120)
        assert backend.active == subscriber.name_of(state.version)
    assert everything(settings, "adapter-updates") == []


def test_damaged_weights_are_refused_and_said(
    settings: Settings, versions: VersionPublisher, announce: Callable[..., None]
):
    backend = MemoryBackend()
    with Subscriber(ADAPTER, backend, settings=settings, replica="r1") as subscriber:
        good = versions.publish()
        announce(versions, good)
        assert subscriber.wait_for(1, 120)
        bad = versions.publish()
        key = blob_key(versions.registry.manifest(ADAPTER, bad.version).weights.digest)
        stored = versions.store.get(key)
        versions.store.compare_and_swap(key, small_weights(10_000), stored.etag)
        announce(versions, bad)
        until(lambda: any(isinstance(e.event, AdapterFailed) for _, e in everything(settings, "adapter-acks")))
        assert backend.active == subscriber.name_of(good.version)
        assert subscriber.generation == 1
    failed = [e.event for _, e in everything(settings, "adapter-acks") if isinstance(e.event, AdapterFailed)]
    assert {(ack.generation, ack.version) for ack in failed} == {(2, bad.version)}
    assert "IntegrityError" in failed[0].error
    assert [name for call, name in backend.calls if call == "load"] == [subscriber.name_of(good.version)]


# ---- leases


def test_attack_l_a_heartbeat_renews_the_lease_and_a_goodbye_ends_it(settings: Settings, versions: VersionPublisher):
    """A replica that was stopped kept every later erasure open."""
    short = settings.replace(poll_s=0.2, replica_lease_s=3)
    reader = AckReader(settings)
    state = versions.publish()
    with Subscriber(ADAPTER, MemoryBackend(), settings=short, replica="r1") as subscriber:
        assert subscriber.wait_for(1, 120)
        until(lambda: reader.replicas(ADAPTER))
        first_ms = reader.replicas(ADAPTER)[0].stored_ms
        until(lambda: reader.replicas(ADAPTER)[0].stored_ms >= first_ms + 2_000)  # two heartbeats at least
        (status,) = reader.replicas(ADAPTER)
        assert status.lease_expires_ms == status.stored_ms + 3_000
        assert (status.version, status.generation) == (state.version, 1)
        assert report_of([status], 2, {state.version}, status.stored_ms).behind == ("r1",)
    until(lambda: reader.replicas(ADAPTER)[0].left)
    (status,) = reader.replicas(ADAPTER)
    assert status.version == state.version
    assert report_of([status], 2, {state.version}, status.stored_ms).left == ("r1",)
    records = everything(settings, "adapter-acks")
    assert {record.timestamp_type for record, _ in records} == {
        1
    }  # the broker's time: a subscriber's clock has no part
    reader.close()


def test_attack_l_restarts_leave_nobody_to_wait_for_and_their_records_are_pruned(
    settings: Settings, versions: VersionPublisher
):
    """The default name of a replica is new at each restart, and the topic kept every one."""
    polling = settings.replace(poll_s=0.2)
    state = versions.publish()
    names = []
    for _ in range(50):
        with Subscriber(ADAPTER, MemoryBackend(), settings=polling) as subscriber:
            assert subscriber.wait_for(1, 120)
            names.append(subscriber.replica)
    wall_ms = [time.time_ns() // 1_000_000]
    reader = AckReader(settings, wall_ms=lambda: wall_ms[0])
    report = report_of(reader.replicas(ADAPTER), 2, {state.version}, wall_ms[0])
    assert report.behind == ()
    assert set(report.left) <= set(names)
    assert len(report.left) >= 49  # each said goodbye, if it had acknowledged
    assert reader.prune() == 0
    wall_ms[0] += KEPT_S * 1000 + 3_600_000
    assert reader.prune() == len(report.left)
    until(lambda: reader.replicas(ADAPTER) == [])
    reader.close()


def test_attack_l_a_process_that_ends_without_a_close_says_goodbye(settings: Settings, versions: VersionPublisher):
    """An exception at the top of a program ends its lease too."""
    state = versions.publish()
    script = (
        "from perennial import MemoryBackend, Settings, Subscriber\n"
        f"settings = Settings.of(kafka={settings.kafka.bootstrap!r}, topic_prefix={settings.kafka.topic_prefix!r},\n"
        f"                       store={settings.store.uri!r}, poll_s=0.2, env_file=None)\n"
        "subscriber = Subscriber('acme/support', MemoryBackend(), settings=settings, replica='r1').start()\n"
        "assert subscriber.wait_for(1, 120)\n"
        "import time; time.sleep(5)\n"
        "raise ValueError('mine')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=240)
    assert "ValueError: mine" in done.stderr
    reader = AckReader(settings)
    (status,) = reader.replicas(ADAPTER)
    assert (status.replica, status.left, status.version) == ("r1", True, state.version), done.stderr
    reader.close()


def test_attack_l_one_replica_is_removed_and_another_one_stays(settings: Settings, versions: VersionPublisher):
    """No command deleted the record of a replica that will not come back."""
    polling = settings.replace(poll_s=0.2)
    versions.publish()
    reader = AckReader(settings)
    with (
        Subscriber(ADAPTER, MemoryBackend(), settings=polling, replica="r1") as one,
        Subscriber(ADAPTER, MemoryBackend(), settings=polling, replica="r2") as two,
    ):
        assert one.wait_for(1, 120)
        assert two.wait_for(1, 120)
        until(lambda: len(reader.replicas(ADAPTER)) == 2)
    until(lambda: all(status.left for status in reader.replicas(ADAPTER)))
    assert reader.remove(ADAPTER, "r1") == 1
    until(lambda: [status.replica for status in reader.replicas(ADAPTER)] == ["r2"])
    reader.close()


def test_a_missing_topic_leaves_polling(broker, topic_prefix: str, versions: VersionPublisher, settings: Settings):
    nowhere = settings.replace(topic_prefix=f"{topic_prefix}none-", poll_s=0.2)
    versions.publish()
    with Subscriber(ADAPTER, MemoryBackend(), settings=nowhere, replica="r1") as subscriber:
        assert subscriber.wait_for(1, 120)
        versions.publish()
        assert subscriber.wait_for(2, 120)


def test_the_five_lines_of_the_readme(
    settings: Settings,
    versions: VersionPublisher,
    announce: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("PERENNIAL_KAFKA", settings.kafka.bootstrap)
    monkeypatch.setenv("PERENNIAL_STORE", settings.store.uri)
    monkeypatch.setenv("PERENNIAL_TOPIC_PREFIX", settings.kafka.topic_prefix)
    monkeypatch.chdir(tmp_path)

    from perennial.streams.client.publisher import Publisher

    with Publisher() as publisher:
        publisher.document(adapter="acme/support", document_id="faq-7", text="Refunds take two days since March.")

    state = versions.publish()
    announce(versions, state)
    stop = threading.Event()

    from perennial.streams.client.subscriber import Subscriber

    subscriber = Subscriber("acme/support", DirectoryBackend("served"))
    thread = threading.Thread(target=subscriber.run, args=(stop,))
    thread.start()
    assert subscriber.wait_for(1, 120)
    stop.set()
    thread.join(120)
    assert not thread.is_alive()
    assert DirectoryBackend("served").current(ADAPTER) == subscriber.name_of(state.version)
    assert [e.event for _, e in everything(settings, "documents")] == [
        DocumentObserved(adapter=ADAPTER, document_id="faq-7", text="Refunds take two days since March.")
    ]
