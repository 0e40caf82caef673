"""Collecting versions deletes what nothing can need, whatever runs at the same time, and forgetting stays exact."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from perennial.learner.forgetting import collect_versions as collection
from perennial.learner.forgetting.collect_orphans import collect_orphans
from perennial.learner.forgetting.collect_versions import collect_versions
from perennial.learner.versions.job_result import JobError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import get_blob, put_blob
from perennial.storage.recovery.rollback import RollbackError, revoke, roll_back
from perennial.storage.registry.history.collected import load_collected, pinned
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry
from perennial.streams.events.models import RollbackRequested
from tests import jobs, tiny
from tests.local_learner import LocalLearner
from tests.synthetic import registry_of
from tests.unit.learner.test_forgetting import documents, erase, forget, learn, never_saw, quarantined
from tests.unit.learner.test_versions import ADAPTER, local_learner

UPDATES, KEEP, EVERY = 12, 2, 4


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    monkeypatch.setattr(collection, "CHECKPOINT_EVERY", EVERY)
    return DirectoryStore(tmp_path / "store", fsync=False)


def learned(store: DirectoryStore) -> tuple[LocalLearner, list[Manifest]]:
    learner = local_learner(store)
    made = [result.manifest for result in learn(learner, documents(1, 2 * UPDATES, per_cut=2))]
    return learner, [manifest for manifest in made if manifest is not None]


def collect(store: DirectoryStore, keep: int = KEEP, **more: object) -> collection.CollectionReport:
    return collect_versions(registry_of(store), ADAPTER, keep, **{"failpoint": lambda _: None, **more})


def stored(store: DirectoryStore, manifests: list[Manifest]) -> list[int]:
    """Return the sequence numbers of the versions whose weights are stored."""
    return [manifest.seq for manifest in manifests if store.exists(blob_key(manifest.weights.digest))]


def check_live(registry: Registry) -> None:
    """Read every blob of the live and of the newest version."""
    alias, head = registry.alias(ADAPTER), registry.head(ADAPTER)
    assert alias is not None
    assert head is not None
    for manifest in (registry.manifest(ADAPTER, alias.version), head.manifest):
        for ref in manifest.blobs():
            assert len(get_blob(registry.store, ref.digest)) == ref.size_bytes


def test_old_versions_lose_their_state_and_keep_manifest_claim_and_text(store: DirectoryStore) -> None:
    _, made = learned(store)
    planned = collect(store, dry_run=True)
    assert stored(store, made) == list(range(1, UPDATES + 1)), "a dry run deletes nothing"
    done = collect(store)
    assert stored(store, made) == [4, 8, 11, 12]
    assert done == planned
    assert (done.versions, done.blobs, done.kept) == (8, 24, 4)
    assert done.freed_bytes > 0
    registry = registry_of(store)
    assert [seq for seq, _ in registry.versions(ADAPTER)] == list(range(UPDATES, 0, -1))
    assert all(manifest.batch and store.exists(blob_key(manifest.batch.digest)) for manifest in made)
    check_live(registry)
    assert collect(store).versions == 0, "nothing is left to do"


@pytest.mark.parametrize("offset", [1, 9, 17, 23])
def test_forgetting_after_a_collection_gives_the_bytes_of_a_run_that_never_saw_the_example(
    store: DirectoryStore, tmp_path: Path, offset: int
) -> None:
    learner, _ = learned(store)
    collect(store)
    learner = local_learner(store)  # nothing in memory
    done, _ = forget(learner, quarantined(store, erase("r1", offset)))
    assert done.manifest is not None
    oracle = never_saw(learner, tmp_path, documents(1, 2 * UPDATES, per_cut=2), {offset})
    assert oracle.equals(done.manifest)
    collect(store)
    check_live(registry_of(store))
    done, _ = forget(local_learner(store), quarantined(store, erase("r2", offset - 1)))
    oracle = never_saw(learner, tmp_path, documents(1, 2 * UPDATES, per_cut=2), {offset, offset - 1})
    assert done.manifest is not None
    assert oracle.equals(done.manifest)


def test_a_rollback_reaches_what_is_kept_and_says_what_was_collected(store: DirectoryStore) -> None:
    learner, made = learned(store)
    collect(store)
    registry = registry_of(store)
    with pytest.raises(RollbackError) as refused:
        roll_back(registry, ADAPTER, "live", made[8].digest(), "r1", "")
    assert refused.value.reason == "collected-version"
    job = RollbackRequested(job_id="r2", adapter=ADAPTER, version=made[8].digest(), requested_by="test")
    with pytest.raises(JobError, match="perennial gc"):
        learner.rollback(job)
    roll_back(registry, ADAPTER, "live", made[10].digest(), "r3", "")
    check_live(registry)
    collect(store, keep=1)
    check_live(registry_of(store))


def test_a_revocation_falls_back_to_a_version_that_has_its_state(store: DirectoryStore) -> None:
    _, made = learned(store)
    collect(store)
    registry = registry_of(store)
    for number, manifest in enumerate(made[:8:-1]):  # versions 12, 11, 10
        revoke(registry, ADAPTER, "live", manifest.digest(), f"r{number}", "")
    alias = registry.alias(ADAPTER)
    assert alias is not None
    assert registry.manifest(ADAPTER, alias.version).weights == made[7].weights
    check_live(registry)


@pytest.mark.parametrize("step", ["gc.plan", "gc.mark", "gc.delete"])
def test_a_collection_that_was_cut_off_is_completed_by_the_next(store: DirectoryStore, step: str) -> None:
    _, made = learned(store)

    def crash(name: str) -> None:
        if name == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(store, failpoint=crash)
    check_live(registry_of(store))
    collect(store)
    assert stored(store, made) == [4, 8, 11, 12]
    assert load_collected(store, ADAPTER).deleting == []


def test_a_rollback_that_comes_between_plan_and_mark_keeps_its_target(store: DirectoryStore) -> None:
    _, made = learned(store)

    def race(name: str) -> None:
        if name == "gc.plan":
            roll_back(registry_of(store), ADAPTER, "live", made[4].digest(), "r1", "")

    collect(store, failpoint=race)
    check_live(registry_of(store))
    assert 5 in stored(store, made)
    assert made[4].digest() not in load_collected(store, ADAPTER).all


def test_a_rollback_that_has_begun_before_the_mark_keeps_its_target(store: DirectoryStore) -> None:
    _, made = learned(store)
    with pinned(store, ADAPTER, made[4].digest(), "r1") as has_blobs:
        assert has_blobs
        collect(store)
        assert 5 in stored(store, made)
    collect(store)
    assert 5 not in stored(store, made)


def test_a_rollback_that_comes_after_the_mark_is_refused(store: DirectoryStore) -> None:
    _, made = learned(store)
    refused: list[str] = []

    def race(name: str) -> None:
        if name == "gc.mark":
            with pytest.raises(RollbackError) as error:
                roll_back(registry_of(store), ADAPTER, "live", made[4].digest(), "r1", "")
            refused.append(error.value.reason)

    collect(store, failpoint=race)
    assert refused == ["collected-version"]
    check_live(registry_of(store))


@pytest.mark.parametrize("step", ["gc.plan", "gc.mark", "gc.delete"])
def test_a_learner_that_publishes_meanwhile_loses_nothing(store: DirectoryStore, step: str) -> None:
    learner, _ = learned(store)
    numbers = iter(range(2 * UPDATES, 100))

    def race(name: str) -> None:
        if name == step:
            number = next(numbers)
            learner.update(jobs.update(store, number, [tiny.document(number, f"new text {number}")]), "live")

    collect(store, failpoint=race)
    check_live(registry_of(store))
    forget(local_learner(store), quarantined(store, erase("r1", 3)))
    check_live(registry_of(store))


def test_collections_and_a_learner_at_the_same_time(store: DirectoryStore) -> None:
    learner, _ = learned(store)
    stop = threading.Event()
    errors: list[BaseException] = []

    def collect_again() -> None:
        try:
            while not stop.is_set():
                collect(store, keep=1)
        except BaseException as error:  # noqa: BLE001 - the test shows it
            errors.append(error)

    thread = threading.Thread(target=collect_again)
    thread.start()
    try:
        for number in range(2 * UPDATES, 2 * UPDATES + 12):
            learner.update(jobs.update(store, number, [tiny.document(number, f"new text {number}")]), "live")
            check_live(registry_of(store))
    finally:
        stop.set()
        thread.join(60)
    assert errors == []


def test_nothing_is_collected_while_a_forgetting_is_under_way(store: DirectoryStore) -> None:
    learner, made = learned(store)
    job = quarantined(store, erase("r1", 3))
    assert "forgetting" in collect(store).skipped
    assert stored(store, made) == list(range(1, UPDATES + 1))
    forget(learner, job)
    assert collect(store).skipped == ""


def test_orphans_are_deleted_once_nothing_has_named_them_for_a_while(store: DirectoryStore) -> None:
    learner, made = learned(store)
    orphan = put_blob(store, b"left behind by a crash")
    now = datetime(2026, 1, 1, tzinfo=UTC)
    day = timedelta(days=1)
    registry = registry_of(store)
    assert (collect_orphans(registry, now, day, dry_run=True).waiting, store.exists("orphans")) == (1, False)
    assert collect_orphans(registry, now, day).deleted == 0
    waiting = jobs.waiting(store, jobs.update(store, 99, [tiny.document(99, "a job that waits")]))
    late = put_blob(store, b"written a moment ago")
    report = collect_orphans(registry, now + day, day)
    assert (report.deleted, report.waiting) == (1, 1)
    assert not store.exists(blob_key(orphan))
    assert store.exists(blob_key(late))
    assert store.exists(blob_key(waiting.batch.digest))
    assert stored(store, made) == list(range(1, UPDATES + 1))
    check_live(registry_of(store))
    forget(learner, quarantined(store, erase("r1", 3)))
