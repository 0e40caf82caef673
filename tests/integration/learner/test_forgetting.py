"""Forgetting by the learner on a real broker, and on a MinIO bucket that keeps every object version."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from perennial.learner.model.base import load_base
from perennial.learner.roles import learner as worker
from perennial.learner.roles.learner import run_learner
from perennial.learner.versions import version_writer
from perennial.learner.versions.version_writer import make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.objects.s3_settings import S3Settings
from perennial.storage.registry.parked import load_parked
from perennial.storage.registry.quarantine import LegalHold, QuarantineEntry, load_quarantine, update_quarantine
from perennial.storage.registry.registry import Registry
from perennial.streams.events.adapter_events import AdapterPromoted, AdapterRetired, AdapterRevoked
from perennial.streams.events.models import ForgetRequested, Selector
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests import jobs, scratch, tiny
from tests.integration.learner import learner_kit as kit
from tests.services import start_minio
from tests.unit.learner import test_forgetting as unit

ADAPTER = "acme/support"
PER_CUT = 4


@pytest.fixture
def given(broker, topic_prefix, tmp_path):
    settings = kit.settings(broker.bootstrap, topic_prefix, tmp_path)
    provision(settings)
    return settings


@pytest.fixture
def _few_general_texts(monkeypatch):
    """Reading the standard library's texts takes seconds; the fault tests kill processes that do it for real."""
    monkeypatch.setattr(version_writer, "general_texts", lambda split: [f"plain {split} words {n}" for n in range(8)])


def store_of(settings: Settings) -> DirectoryStore:
    return DirectoryStore(Path(settings.store.uri))


def registry(settings: Settings) -> Registry:
    return Registry(store_of(settings), nonce=lambda: "n", now=worker._now)


def documents(cuts: int):
    made = [tiny.document(n, f"secret{n:03d} parrot sings at noon") for n in range(PER_CUT * cuts)]
    return {cut: made[PER_CUT * cut : PER_CUT * (cut + 1)] for cut in range(cuts)}


def erase(settings: Settings, name: str, *numbers: int) -> ForgetRequested:
    """The job, its entry written as retain does."""
    selector = Selector(document_ids=[f"doc-{n}" for n in numbers])
    job = ForgetRequested(
        job_id=f"job-{name}", request_id=name, adapter=ADAPTER, kind="erase", selector=selector,
        until_ms=1_800_000_000_000,
    )  # fmt: skip
    entry = QuarantineEntry(
        request_id=name, job_id=job.job_id, kind="erase", until_ms=job.until_ms,
        selector=selector.model_dump(mode="json", exclude_none=True),
    )  # fmt: skip
    update_quarantine(store_of(settings), ADAPTER, lambda found: found.with_entry(entry))
    return job


def oracle(settings: Settings, tmp: Path, cuts, gone: set[int]) -> scratch.Scratch:
    """What training from scratch comes to, with the worker's own parts over a store of its own."""
    store = DirectoryStore(tmp / "oracle", fsync=False)
    updater = make_version_writer(settings, store, load_base(settings.model.base, "cpu", 1)).updater_of(None)
    kept = {cut: [e for e in examples if e.origin.offset not in gone] for cut, examples in cuts.items()}
    return scratch.train(updater, store, ADAPTER, kept)


@pytest.mark.usefixtures("_few_general_texts")
@pytest.mark.parametrize("emergency", [False, True])
def test_an_erasure_is_told_and_its_states_are_told_before_the_commit(given, tmp_path, emergency):
    cuts = documents(3)
    kit.send(given, *(jobs.update(store_of(given), cut, examples) for cut, examples in cuts.items()))
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        assert len(kit.envelopes(given, "adapter-updates", 3)) == 3
        kit.send(given, erase(given, "r1", 5, 9).model_copy(update={"emergency": emergency}))
        updates = [envelope.event for envelope in kit.envelopes(given, "adapter-updates", 5 if emergency else 4)]
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 4, "the job is committed")
        statuses = [envelope.event for envelope in kit.envelopes(given, "retention-status", 2)]
    assert [type(event) for event in updates[3:]] == [AdapterRevoked] * (2 if emergency else 1)
    assert [event.generation for event in updates] == list(range(1, len(updates) + 1))
    if emergency:
        assert updates[3].weights_sha256 == updates[0].weights_sha256
    assert [(s.request_id, s.state, s.examples) for s in statuses] == [("r1", "executed", 2), ("r1", "published", 2)]
    assert statuses[1].version == updates[-1].version
    head = registry(given).head(ADAPTER)
    assert oracle(given, tmp_path, cuts, {5, 9}).equals(head.manifest)
    assert unit.readable(Path(given.store.uri), ["secret005", "secret009"]) == []
    done = load_quarantine(store_of(given), ADAPTER).entry("r1").done
    assert (done.version, done.generation, done.examples, done.failure) == (head.version, len(updates), 2, "")


@pytest.mark.usefixtures("_few_general_texts")
def test_an_update_behind_an_erasure_does_not_learn_it(given, tmp_path):
    cuts = documents(2)
    first, behind = (jobs.update(store_of(given), cut, examples) for cut, examples in cuts.items())
    kit.send(given, first, erase(given, "r1", 1, 6), behind)
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        updates = [envelope.event for envelope in kit.envelopes(given, "adapter-updates", 3)]
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 3, "all jobs are committed")
    # What is quarantined before the job of its example comes is left out from the start, so nothing is revoked.
    assert all(isinstance(event, AdapterPromoted) for event in updates)
    assert [event.generation for event in updates] == [1, 1, 2]
    head = registry(given).head(ADAPTER).manifest
    assert oracle(given, tmp_path, cuts, {1, 6}).equals(head)
    assert unit.readable(Path(given.store.uri), ["secret001", "secret006"]) == []


@pytest.mark.usefixtures("_few_general_texts")
def test_a_held_job_is_said_to_be_held_and_one_that_parks_its_adapter_to_wait(given):
    cuts = documents(1)
    kit.send(given, jobs.update(store_of(given), 0, cuts[0]))
    held = erase(given, "r1", 2)
    update_quarantine(store_of(given), ADAPTER, lambda found: found.with_holds([LegalHold(request_id="h")]))
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        kit.send(given, held)
        (status,) = (envelope.event for envelope in kit.envelopes(given, "retention-status", 1))
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 2, "the job is committed")
    assert (status.state, status.examples) == ("held", 1)
    assert unit.readable(Path(given.store.uri), ["secret002"])
    assert load_quarantine(store_of(given), ADAPTER).entry("r1").done is None
    update_quarantine(store_of(given), ADAPTER, lambda found: found.with_holds([]))
    other = given.replace(rank=2)
    kit.send(given, held)
    with kit.running(lambda stop: run_learner(other, stop, Metrics("learner"))):
        statuses = [envelope.event for envelope in kit.envelopes(given, "retention-status", 2)]
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 3, "the job is committed")
    assert [status.state for status in statuses] == ["held", "quarantined"]
    assert "another rank" in statuses[1].detail
    assert load_quarantine(store_of(given), ADAPTER).entry("r1").done is None
    assert load_parked(store_of(given), ADAPTER).reason == "rank-mismatch"
    assert kit.read(given, "dead-letters", 1, timeout_s=2) == []
    kit.send(given, held)  # retain sends it again
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 4, "the job is committed")
    statuses = [envelope.event.state for envelope in kit.envelopes(given, "retention-status", 4)]
    assert statuses == ["held", "quarantined", "executed", "published"]
    assert load_parked(store_of(given), ADAPTER) is None
    assert unit.readable(Path(given.store.uri), ["secret002"]) == []


@pytest.mark.usefixtures("_few_general_texts")
def test_attack_p2_a_stop_ends_a_rebuild_uncommitted_and_the_next_learner_goes_on(given, tmp_path, monkeypatch):
    """A stop waited for the end of the rebuild, was killed, and the next learner began with the first update again."""
    cuts, stops, steps = documents(4), [], []

    def stop_after_the_first_step(name):
        if name == "learner.forget_step":
            steps.append(name)
            stops[-1].set()

    def run(stop):
        stops.append(stop)
        run_learner(given, stop, Metrics("learner"))

    kit.send(given, *(jobs.update(store_of(given), cut, examples) for cut, examples in cuts.items()))
    monkeypatch.setattr(worker, "failpoint", stop_after_the_first_step)
    with kit.running(run):
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 4, "the updates are committed")
        kit.send(given, erase(given, "r1", 1))
        kit.wait_until(stops[0].is_set, "an update is rebuilt")
    before = registry(given).alias(ADAPTER)
    assert (before.kind, before.generation) == ("promoted", 4), "it is served on"
    assert kit.committed(given, "adapter-jobs", "learner") == 4
    assert load_quarantine(store_of(given), ADAPTER).entry("r1").done is None
    monkeypatch.setattr(worker, "failpoint", lambda name: steps.append(name) if name == "learner.forget_step" else None)
    with kit.running(run):
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 5, "the erasure is committed")
    assert len(steps) == 4, "no update was trained twice"
    assert oracle(given, tmp_path, cuts, {1}).equals(registry(given).head(ADAPTER).manifest)
    assert [envelope.event.generation for envelope in kit.envelopes(given, "adapter-updates", 5)] == [1, 2, 3, 4, 5]


def versions_with(store: ObjectStore, needle: bytes) -> list[str]:
    """Object versions of the bucket, delete markers aside, that hold the text."""
    found = []
    listed = list(store._client.list_objects(store._bucket, recursive=True, include_version=True))
    assert len(listed) > 10
    for entry in listed:
        if not entry.is_delete_marker:
            answer = store._client.get_object(store._bucket, entry.object_name, version_id=entry.version_id)
            if needle in answer.read():
                found.append(entry.object_name)
            answer.close()
    return found


def test_no_object_version_of_a_bucket_holds_what_was_erased(tmp_path):
    from minio.versioningconfig import ENABLED, VersioningConfig

    server = start_minio(tmp_path)
    try:
        store = open_store(
            f"s3://perennial-{uuid.uuid4().hex[:12]}/some/prefix", S3Settings.from_env(server.environment())
        )
        store.probe()
        store._client.set_bucket_versioning(store._bucket, VersioningConfig(ENABLED))
        learner, cuts = unit.local_learner(store), unit.documents(1, 12)
        manifests = [done.manifest for done in unit.learn(learner, cuts)]
        assert versions_with(store, b"secret005")
        done, told = unit.forget(learner, unit.quarantined(store, unit.erase("r1", 5, 6)))
        assert unit.never_saw(learner, tmp_path, cuts, {5, 6}).equals(done.manifest)
        assert [type(event) for event in told] == [AdapterRevoked]
        assert versions_with(store, b"secret005") == versions_with(store, b"secret006") == []
        assert unit.readable(server.data / store._bucket, ["secret005", "secret006"]) == []
        assert versions_with(store, b"secret001"), "the rest is there"
        kept = {entry.object_name for entry in store._client.list_objects(
            store._bucket, recursive=True, include_version=True
        )}  # fmt: skip
        for manifest in manifests[1:]:
            assert not any(name.endswith(manifest.weights.digest[7:]) for name in kept)
        gone, told = unit.forget(learner, unit.request("r2", selector=Selector(sources=["wiki-0", "wiki-1", "wiki-2"])))
        assert isinstance(gone.event, AdapterRetired)
        assert versions_with(store, b"secret") == []
        assert unit.readable(server.data / store._bucket, ["secret"]) == []
    finally:
        server.stop()
