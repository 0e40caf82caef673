"""Flipped bits in blobs and manifests, and an event that was lost after the alias had been swapped."""

from __future__ import annotations

import random
import signal
import time
import uuid
from pathlib import Path

import pytest

from perennial.learner.training.replay_buffer import index_from_bytes
from perennial.learner.versions.state_cache import StateCache
from perennial.storage.errors import IntegrityError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import get_blob
from perennial.storage.objects.s3_settings import S3Settings
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.parked import load_parked, unpark_adapter
from perennial.storage.registry.registry import Registry, manifest_key
from perennial.storage.registry.waiting_jobs import list_jobs
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from perennial.testing import MemoryBackend
from tests import jobs
from tests.faults import parts
from tests.faults.report import Row
from tests.integration.learner import learner_kit as kit
from tests.oracle import account
from tests.services import start_minio
from tests.unit.learner.test_versions import ADAPTER, documents, local_learner, now

FLIPS = 1000
SHORT_FLIPS = 200
"""On MinIO in the short form: what checks a blob does not know which store it came from."""


@pytest.fixture(params=["directory", "minio"])
def store(request, tmp_path):
    if request.param == "directory":
        yield DirectoryStore(tmp_path / "store", fsync=False)
        return
    server = start_minio(tmp_path / "minio")
    try:
        made = open_store(f"s3://perennial-{uuid.uuid4().hex[:12]}", S3Settings.from_env(server.environment()))
        made.probe()
        yield made
    finally:
        server.stop()


@pytest.mark.slow(15)
def test_flipped_bytes_are_refused_by_learner_and_subscriber(store, fault_runs, record_fault):
    """Flips bits in turn in the manifest, the weights, the optimizer state, the replay index, an old and a new micro-batch."""
    learner = local_learner(store)
    for cut in range(2):
        learner.update(jobs.update(store, cut, documents(*range(4 * cut, 4 * cut + 4))), "live")
    following = jobs.update(store, 2, documents(*range(8, 12)))
    head = learner.registry.head(ADAPTER)
    first = learner.registry.manifest(ADAPTER, head.manifest.parent)
    state, settings, metrics = learner.registry.alias(ADAPTER), Settings.of(env_file=None), Metrics("subscriber")
    assert all((head.manifest.optimizer, head.manifest.replay, first.batch))
    served = (manifest_key(ADAPTER, head.version), blob_key(head.manifest.weights.digest))
    keys = [
        *served, blob_key(head.manifest.optimizer.digest), blob_key(head.manifest.replay.digest),
        blob_key(first.batch.digest), blob_key(following.batch.digest),
    ]  # fmt: skip
    rng, accepted = random.Random(6), []
    flips = FLIPS if fault_runs > 1 or isinstance(store, DirectoryStore) else SHORT_FLIPS
    for number in range(flips):
        key = keys[number % len(keys)]
        good = store.get(key)
        broken = bytearray(good.data)
        at = rng.randrange(len(broken))
        broken[at] ^= 1 << rng.randrange(8)
        etag = store.compare_and_swap(key, bytes(broken), good.etag)
        fresh = Registry(store, nonce=lambda: "n", now=now)
        learner.registry, learner.rows = (
            fresh,
            type(learner.rows)(store, learner.updater.rows),
        )  # nothing stays in memory from before
        learner._states = StateCache()
        try:
            if key == blob_key(first.batch.digest):  # training would read it for the replay buffer
                learner.rows(replay_entry(learner.registry, head.manifest, first.batch.digest))
            else:
                learner.update(following, "live")
            accepted.append((key, at, "learner"))
        except IntegrityError:
            pass
        if key in served:
            backend = MemoryBackend(None)
            subscriber = Subscriber(ADAPTER, backend, settings=settings, store=store, metrics=metrics, replica="r")
            subscriber._look()
            if subscriber.current is not None or backend.held:
                accepted.append((key, at, "subscriber"))
        store.compare_and_swap(key, good.data, etag)
    record_fault(Row("flipped bytes in blobs and manifests", flips, stale_publishes=len(accepted)))
    assert accepted == []
    assert learner.registry.alias(ADAPTER) == state
    assert learner.update(following, "live").outcome == "promoted", "repaired, everything is used again"


def replay_entry(registry: Registry, manifest: Manifest, batch: str):
    """Return the first replay entry of a micro-batch."""
    index = index_from_bytes(get_blob(registry.store, manifest.replay.digest))
    return next(entry for entry in index if entry.batch == batch)


@pytest.mark.slow(30)
def test_attack_j_a_flipped_byte_parks_the_adapter_and_nothing_is_lost(broker, topic_prefix, tmp_path, record_fault):
    given = kit.settings(broker.bootstrap, topic_prefix, tmp_path)
    provision(given)
    files = DirectoryStore(Path(given.store.uri))
    cuts = [jobs.waiting(files, jobs.update(files, cut, documents(4 * cut, 4 * cut + 1))) for cut in range(3)]
    registry = Registry(files, nonce=lambda: "n", now=now)
    with parts.child("learner", given, "learner.publish:1", parts.FEW_TEXTS) as learner:
        # Killed between the swap of the alias and its event: the next learner has to publish it.
        kit.send(given, cuts[0])
        assert learner.wait(180) == -signal.SIGKILL
    assert registry.alias(ADAPTER).generation == 1
    assert parts.envelopes(given, "adapter-updates") == []
    polling = given.replace(poll_s=0.2)
    began = time.monotonic()
    with Subscriber(ADAPTER, MemoryBackend(None), settings=polling, store=files) as subscriber:
        assert subscriber.wait_for(1, 120), "the alias is the truth, the event a hint"
    recovery_s = time.monotonic() - began
    key = blob_key(cuts[1].batch.digest)
    good = files.get(key)
    files.compare_and_swap(key, bytes([good.data[0] ^ 1]) + good.data[1:], good.etag)
    with parts.child("learner", given, more=parts.FEW_TEXTS):
        kit.send(given, *cuts[1:])
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 3, "all jobs are committed")
        assert load_parked(files, ADAPTER).reason == "unreadable-object"
        assert list(list_jobs(files, ADAPTER)) == [1, 2]
        files.compare_and_swap(key, good.data, files.get(key).etag)
        unpark_adapter(files, ADAPTER)
        kit.send(given, *cuts[1:])
        mended = time.monotonic()
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 5, "all jobs are done")
        unparked_s = time.monotonic() - mended
    assert load_parked(files, ADAPTER) is None
    stale = parts.stale_publishes(given, registry)
    record_fault(Row("event lost after the alias was swapped", 1, stale_publishes=len(stale), recovery_s=recovery_s))
    found = account(registry, [ADAPTER])
    lost = found.missing([("documents/0", n) for cut in range(3) for n in (4 * cut, 4 * cut + 1)])
    record_fault(
        Row("flipped bit: parked, mended, unparked", 1, len(lost), len(found.learned_twice), len(stale), unparked_s)
    )
    assert (lost, found.learned_twice) == ([], [])
    assert kit.read(given, "dead-letters", 1, timeout_s=2) == []
    assert stale == []
    generations = [envelope.event.generation for envelope in parts.envelopes(given, "adapter-updates")]
    assert sorted(set(generations)) == [1, 2, 3], "the first one published by the next learner"
