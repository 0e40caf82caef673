"""Somebody who can write to the bucket and to the topics, against a learner and a subscriber with keys, on a real broker."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kafka import KafkaProducer

from perennial.learner.roles.learner import run_learner
from perennial.learner.versions import version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.objects.s3_settings import S3Settings
from perennial.storage.registry.parked import list_parked
from perennial.storage.registry.records import alias_key
from perennial.storage.registry.registry import Registry
from perennial.storage.signing.key_files import make_signing_key, write_public_keys, write_signing_key
from perennial.storage.signing.trust import Trust
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.adapter_events import AdapterFailed, AdapterPromoted, AdapterUpdate, ReplicaLeft
from perennial.streams.events.cloudevents import decode, encode
from perennial.streams.events.fields import Event
from perennial.streams.kafka.event_signatures import check_event, signed_event
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.replicas.acks import AckReader
from perennial.streams.settings import Settings
from perennial.testing import MemoryBackend
from tests import jobs, tiny
from tests.integration.learner import learner_kit as kit
from tests.keys import Keys
from tests.services import start_minio
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
NEVER_S = 3600.0


@pytest.fixture(autouse=True)
def _few_general_texts(monkeypatch):
    monkeypatch.setattr(version_writer, "general_texts", lambda split: [f"plain {split} words {n}" for n in range(8)])


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys")


@pytest.fixture
def given(broker, topic_prefix, tmp_path, keys):
    settings = kit.settings(
        broker.bootstrap, topic_prefix, tmp_path, signing_key_file=str(keys.private), trusted_keys=str(keys.public),
        seen_dir=str(tmp_path / "seen"),
    )  # fmt: skip
    provision(settings)
    return settings


def documents(*numbers: int):
    return [tiny.document(n, f"the blue parrot {n} sings at noon") for n in numbers]


def updates(given: Settings, count: int) -> list[tuple[AdapterUpdate, bytes]]:
    found = kit.read(given, "adapter-updates", count)
    return [(decode(record.value, record.headers, "adapter-updates").event, record.value) for record in found]


def announce(given: Settings, event: AdapterUpdate) -> None:
    send_to(given, "adapter-updates", event)


def send_to(given: Settings, name: str, event: Event) -> None:
    record = encode(event, event_id=uuid.uuid4().hex, source="test", occurred_at=datetime.now(UTC))
    producer = KafkaProducer(bootstrap_servers=given.kafka.bootstrap)
    try:
        topic = given.kafka.topic(name)
        producer.send(topic, key=record.key, value=record.value, headers=record.headers).get(120)
    finally:
        producer.close()


def failures(given: Settings) -> list[str]:
    found = kit.read(given, "adapter-acks", 10**6, timeout_s=2)
    events = [decode(record.value, record.headers, "adapter-acks").event for record in found if record.value]
    return [event.error for event in events if isinstance(event, AdapterFailed)]


def test_what_a_learner_signs_is_served_and_what_a_stranger_writes_is_not(given, keys):
    """Every step of the loop with keys: a learner, the topic, the store, a subscriber, and somebody in between."""
    store = DirectoryStore(Path(given.store.uri))
    metrics = Metrics("subscriber")
    backend = MemoryBackend()
    follower = Subscriber(ADAPTER, backend, settings=given.replace(poll_s=NEVER_S), replica="r1", metrics=metrics)
    ignored = {"role": "subscriber", "reason": "bad-signature"}
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))), follower:
        kit.send(given, jobs.waiting(store, jobs.update(store, 0, documents(0, 1, 2, 3))))
        ((event, value),) = updates(given, 1)
        assert isinstance(event, AdapterPromoted)
        check_event(event, value, keys.readers)
        assert follower.wait_for(1, 180), "the signed event alone leads to the version: there is no poll"
        assert backend.active == follower.name_of(event.version)

        # The topic: a forged event, an unsigned one, and a signed one with another generation wake nobody.
        for forged in (
            event.model_copy(update={"generation": 900}),
            event.model_copy(update={"generation": 901, "signature": None}),
            signed_event(event.model_copy(update={"generation": 902, "signature": None}), keys.stranger),
        ):
            announce(given, forged)
        kit.wait_until(
            lambda: metrics.registry.get_sample_value("perennial_refused_total", ignored) == 3,
            "three events are ignored",
        )
        assert follower._progress.announced <= 1

        # The bucket: the next place in the line, and the alias on it.
        forged = VersionPublisher(store, ADAPTER, base_sha256=event.base.sha256, trust=keys.stranger).publish()
        kit.send(given, jobs.waiting(store, jobs.update(store, 1, documents(4, 5))))
        kit.wait_until(lambda: any(record.adapter == ADAPTER for record in list_parked(store)), "the adapter is parked")
        (parked,) = list_parked(store)
        assert parked.reason == "unreadable-object"
        assert "not trusted" in parked.detail
        announce(
            given, signed_event(event.model_copy(update={"generation": 2, "signature": None}), keys.owner)
        )  # wakes it
        kit.wait_until(lambda: any("unknown-key: " in error for error in failures(given)), "the refusal is reported")
        assert backend.active == follower.name_of(event.version)
        assert follower.generation == 1
        assert Registry(store, nonce=str, now=None).alias(ADAPTER) == forged.model_copy(
            update={"etag": store.get(alias_key(ADAPTER, "live")).etag}
        ), "nobody put the owner's signature on it"


@pytest.mark.parametrize("versioned", [False, True])
def test_a_fresh_subscriber_on_minio_refuses_what_was_swapped_and_follows_a_rotation(tmp_path, keys, versioned):
    server = start_minio(tmp_path)
    try:
        store: ObjectStore = open_store(
            f"s3://perennial-{uuid.uuid4().hex[:12]}/x", S3Settings.from_env(server.environment())
        )
        store.probe()
        if versioned:
            from minio.versioningconfig import ENABLED, VersioningConfig

            store._client.set_bucket_versioning(store._bucket, VersioningConfig(ENABLED))
        owner = VersionPublisher(store, ADAPTER, trust=keys.owner)
        first = owner.publish()
        settings = Settings.of(
            kafka="", env_file=None, poll_s=0.1, trusted_keys=str(keys.public), seen_dir=str(tmp_path / "seen")
        )
        old_alias = store.get(alias_key(ADAPTER, "live")).data
        with Subscriber(ADAPTER, backend := MemoryBackend(), store=store, settings=settings) as follower:
            assert follower.wait_for(1, 180)
            second = owner.publish()
            assert follower.wait_for(2, 180)
            new_alias = store.get(alias_key(ADAPTER, "live"))
            store.compare_and_swap(alias_key(ADAPTER, "live"), old_alias, new_alias.etag)
            reason = {"role": "subscriber", "kind": "replayed"}
            kit.wait_until(
                lambda: follower._metrics.registry.get_sample_value("perennial_subscriber_failures_total", reason),
                "the older alias is refused",
            )
            assert backend.active == follower.name_of(second.version)
        with Subscriber(ADAPTER, later := MemoryBackend(), store=store, settings=settings) as follower:
            kit.wait_until(
                lambda: follower._metrics.registry.get_sample_value("perennial_subscriber_failures_total", reason),
                "a restart does not forget the later alias",
            )
            assert later.active is None
            replayed = store.get(alias_key(ADAPTER, "live"))
            store.compare_and_swap(alias_key(ADAPTER, "live"), new_alias.data, replayed.etag)
            assert follower.wait_for(2, 180)
            new = make_signing_key()
            write_signing_key(tmp_path / "new.pem", new)
            write_public_keys(keys.public, {**keys.readers.trusted.by_id(), new.public.key_id: new.public})
            third = VersionPublisher(store, ADAPTER, trust=Trust(new)).publish()
            assert follower.wait_for(3, 180)
            assert later.active == follower.name_of(third.version)
        assert first.version != second.version
    finally:
        server.stop()


def test_acknowledgements_are_signed_and_forged_ones_do_not_count(given, keys, tmp_path):
    """A forged goodbye on the real topic does not end the wait for a replica."""
    settings = given.replace(
        replica_key_file=str(keys.private), trusted_replica_keys=str(keys.public), poll_s=0.2, replica_lease_s=60
    )
    state = VersionPublisher(DirectoryStore(Path(given.store.uri)), ADAPTER, trust=keys.owner).publish()
    reader = AckReader(settings)
    with Subscriber(ADAPTER, MemoryBackend(), settings=settings, replica="r1") as follower:
        assert follower.wait_for(1, 180)
        kit.wait_until(lambda: reader.replicas(ADAPTER), "the replica is known")
        left = ReplicaLeft(adapter=ADAPTER, replica="r1", generation=1, version=state.version, at=datetime.now(UTC))
        send_to(given, "adapter-acks", left)
        send_to(given, "adapter-acks", signed_event(left.model_copy(update={"replica": "r2"}), keys.stranger))
        unsigned = AckReader(settings.replace(trusted_replica_keys=""))
        kit.wait_until(lambda: len(unsigned.replicas(ADAPTER)) == 2, "whoever asks for no signature sees both")
        unsigned.close()
        (status,) = reader.replicas(ADAPTER)
        assert (status.replica, status.left, status.version) == ("r1", False, state.version)
    kit.wait_until(lambda: reader.replicas(ADAPTER)[0].left, "its own goodbye counts")
    reader.close()
