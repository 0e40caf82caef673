"""The service while an adapter forgets, and rebuilds that go on where an earlier one ended."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from perennial.learner.forgetting import rebuild_progress
from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.roles.job_runner import JobRunner
from perennial.learner.versions.job_result import JobInterruptedError, JobResult
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.history.rebuilt_steps import list_steps
from perennial.storage.registry.parked import load_parked
from perennial.storage.registry.quarantine import NOTHING_MATCHED, LegalHold, load_quarantine, update_quarantine
from perennial.storage.registry.registry import Registry
from perennial.streams.events.models import ForgetRequested
from tests import jobs
from tests.local_learner import LocalLearner, complete, trained_cuts
from tests.unit.learner.test_forgetting import (
    ADAPTER,
    CutOffError,
    documents,
    erase,
    forget,
    head,
    learn,
    local_learner,
    never_saw,
    now,
    quarantined,
    readable,
    request,
)

CUTS = 6


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cut number of every update that is trained from now on."""
    return trained_cuts(monkeypatch)


@pytest.fixture(scope="module")
def learned_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with six cuts learned, that the tests only copy."""
    root = tmp_path_factory.mktemp("six") / "store"
    learn(local_learner(DirectoryStore(root, fsync=False)), documents(41, 4 * CUTS))
    return root


@pytest.fixture
def store(learned_root: Path, tmp_path: Path) -> DirectoryStore:
    return copy_of(learned_root, tmp_path / "store")


def copy_of(root: Path, to: Path) -> DirectoryStore:
    shutil.copytree(root, to)
    return DirectoryStore(to, fsync=False)


def stops_at(name: str, times: int = 1) -> Callable[[str], None]:
    """Return a failpoint that ends the process when it is reached for the given time."""
    reached = 0

    def failpoint(here: str) -> None:
        nonlocal reached
        reached += here == name
        if here == name and reached == times:
            raise CutOffError

    return failpoint


class Observer(threading.Thread):
    """Asks as a subscriber does what the alias names, and records every moment at which nothing could be served.

    Attributes:
        gaps: What was wrong, each time that it was.
        gap_s: Seconds in which something was wrong.
        seen: The versions that the alias named, in order.
    """

    def __init__(self, store: DirectoryStore) -> None:
        super().__init__(daemon=True)
        self.registry = Registry(store, nonce=lambda: "n", now=now)
        self.store = store
        self.ended = threading.Event()
        self.gaps: list[str] = []
        self.gap_s = 0.0
        self.seen: list[str] = []

    def run(self) -> None:
        looked = time.monotonic()
        while not self.ended.is_set():
            before = len(self.gaps)
            self.look()
            looked, since = time.monotonic(), looked
            if len(self.gaps) > before:
                self.gap_s += looked - since

    def look(self) -> None:
        state = self.registry.alias(ADAPTER)
        if state is None or state.kind == "retired":
            self.gaps.append("nothing is live")
            return
        manifest = self.registry.manifest(ADAPTER, state.version)
        servable = manifest.outcome == "promoted" and not self.registry.is_revoked(ADAPTER, manifest.seq)
        servable = servable and self.store.exists(blob_key(manifest.weights.digest))
        if not servable and self.registry.alias(ADAPTER) == state:  # else the alias moved while this thread looked
            self.gaps.append(state.version)
        if not self.seen or self.seen[-1] != state.version:
            self.seen.append(state.version)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()
        self.look()


@pytest.mark.parametrize("kind", ["expire", "supersede", "erase"])
def test_attack_g_a_forgetting_leaves_the_served_version_in_service(
    store: DirectoryStore, tmp_path: Path, kind: str
) -> None:
    """A time to live took the live adapter out of service for the length of the rebuild."""
    learner, cuts = local_learner(store), documents(41, 4 * CUTS)
    before = learner.registry.alias(ADAPTER)
    job = quarantined(store, erase("r1", 1, 2, kind=kind, suppress=kind == "erase"))  # in the first cut
    with Observer(store) as observer:
        done, published = forget(learner, job)
    assert observer.gaps == []
    assert observer.seen == [before.version, done.event.version]
    assert [event.version for event in published] == [done.event.version], "subscribers hear of it when it is live"
    assert never_saw(learner, tmp_path, cuts, {1, 2}).equals(done.manifest)
    assert readable(store.root, ["secret001", "secret002"]) == []


def test_an_emergency_takes_the_version_out_of_service_at_once(store: DirectoryStore) -> None:
    with Observer(store) as observer:
        forget(local_learner(store), quarantined(store, erase("r1", 1, emergency=True)))
    assert observer.gaps


def test_revocations_come_after_the_new_version_is_live(store: DirectoryStore) -> None:
    learner = local_learner(store)
    live_at_revocation: list[str] = []
    revoke = learner.registry.revoke

    def watched(adapter: str, version: str, reason: str) -> Any:
        live_at_revocation.append(learner.registry.alias(adapter).version)
        return revoke(adapter, version, reason)

    learner.registry.revoke = watched
    done, _ = forget(learner, quarantined(store, erase("r1", 1)))
    assert set(live_at_revocation) == {done.event.version}
    assert len(live_at_revocation) == CUTS


@pytest.mark.parametrize("point", ["learner.forget_trained", "learner.forget_step"])
@pytest.mark.parametrize("update", [1, 3, 5])
def test_attack_p2_a_killed_rebuild_goes_on_where_it_was(
    store: DirectoryStore, tmp_path: Path, trained: list[int], point: str, update: int
) -> None:
    """Killed at update 6 of 6, tried again: 6 of 6 again, for ever."""
    straight = copy_of(store.root, tmp_path / "straight")
    job = quarantined(store, erase("r1", 5))  # in cut 1: five updates are rebuilt
    with Observer(store) as observer, pytest.raises(CutOffError):
        forget(local_learner(store), job, stops_at(point, update))
    assert observer.gaps == []
    done, _ = forget(local_learner(store), job)
    assert len(trained) == 5 + (point == "learner.forget_trained")
    want, _ = forget(local_learner(straight), quarantined(straight, job))
    assert done.event.version == want.event.version
    assert {p.name for p in store.root.rglob("*")} == {p.name for p in straight.root.rglob("*")}


def test_a_rebuild_that_is_killed_again_and_again_ends(
    store: DirectoryStore, tmp_path: Path, trained: list[int]
) -> None:
    job, cuts = quarantined(store, erase("r1", 0)), documents(41, 4 * CUTS)
    interruptions, done = 0, None
    while done is None:
        try:
            done, _ = forget(local_learner(store), job, stops_at("learner.forget_trained", 2))
        except CutOffError:
            interruptions += 1
    assert interruptions == CUTS - 1
    assert len(trained) == CUTS + interruptions
    assert never_saw(local_learner(store), tmp_path, cuts, {0}).equals(done.manifest)


def test_a_stop_ends_a_rebuild_between_two_updates(store: DirectoryStore, tmp_path: Path, trained: list[int]) -> None:
    job, cuts = quarantined(store, erase("r1", 5)), documents(41, 4 * CUTS)
    before = local_learner(store).registry.head(ADAPTER)
    with pytest.raises(JobInterruptedError):
        run(local_learner(store), job, should_stop=lambda: len(trained) == 2)
    assert (len(trained), local_learner(store).registry.head(ADAPTER)) == (2, before)
    assert load_quarantine(store, ADAPTER).entry("r1").done is None
    assert readable(store.root, ["secret005"]), "nothing is deleted before the new version is live"
    done = run(local_learner(store), job)
    assert len(trained) == 5
    assert never_saw(local_learner(store), tmp_path, cuts, {5}).equals(done.manifest)
    assert list(store.list("rebuilds/")) == []


def run(learner: LocalLearner, job: ForgetRequested, **more: Any) -> JobResult:
    done = ForgetExecutor(learner, now, lambda _: None, **more).forget(job, "live")
    complete(learner.registry.store, done)
    return done


def test_a_stop_neither_parks_the_adapter_nor_fails_the_request(store: DirectoryStore) -> None:
    stopping = JobRunner(
        local_learner(store), "live", now, lambda _: None, lambda _: None, lambda: None, should_stop=lambda: True
    )
    with pytest.raises(JobInterruptedError):
        stopping.run(quarantined(store, erase("r1", 5)))
    assert load_parked(store, ADAPTER) is None
    assert load_quarantine(store, ADAPTER).entry("r1").done is None


def test_a_rebuild_ticks_at_every_step_of_its_training(store: DirectoryStore, trained: list[int]) -> None:
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    run(local_learner(store), erase("r1", 20), progress=tick)
    steps = head(local_learner(store).registry).gate.steps
    assert (len(trained), ticks > steps > 1) == (1, True)


def test_a_version_published_during_a_rebuild_is_rebuilt_too_and_nothing_else_again(
    store: DirectoryStore, tmp_path: Path, trained: list[int]
) -> None:
    cuts = documents(41, 4 * (CUTS + 1))
    job = quarantined(store, erase("r1", 5))

    def another_learner(name: str) -> None:
        if name == "learner.forget_replayed" and CUTS not in trained:
            local_learner(store).update(jobs.update(store, CUTS, cuts[CUTS]), "live")

    learner = local_learner(store)
    with Observer(store) as observer:
        done, _ = forget(learner, job, another_learner)
    assert observer.gaps == []
    assert trained == [1, 2, 3, 4, 5, CUTS, CUTS], "the update itself, and its rebuild"
    assert never_saw(learner, tmp_path, cuts, {5}).equals(done.manifest)


@pytest.mark.parametrize("other_job_id", [False, True])
def test_a_prepared_expiry_trains_only_what_came_since(
    store: DirectoryStore, tmp_path: Path, trained: list[int], other_job_id: bool
) -> None:
    cuts = documents(41, 4 * (CUTS + 2))
    ids = [cuts[1][1].example_id]
    fields = {"kind": "expire", "example_ids": ids, "suppress": False}
    ahead = request(prepare=True, **fields)
    learner = local_learner(store)
    before, generation = head(learner.registry), learner.registry.alias(ADAPTER).generation
    prepared, published = forget(learner, ahead)
    assert (prepared.outcome, prepared.statuses, published) == ("unchanged", (), [])
    assert (head(learner.registry), learner.registry.alias(ADAPTER).generation) == (before, generation)
    assert trained == [1, 2, 3, 4, 5]
    assert readable(store.root, ["secret005"])
    again, _ = forget(learner, ahead)
    assert (again.outcome, trained) == ("unchanged", [1, 2, 3, 4, 5])
    learn(learner, {CUTS: cuts[CUTS], CUTS + 1: cuts[CUTS + 1]})
    del trained[:]
    due = request("other" if other_job_id else "r1", **fields)
    with Observer(store) as observer:
        done, _ = forget(local_learner(store), quarantined(store, due))
    assert (trained, observer.gaps) == ([CUTS, CUTS + 1], [])
    assert never_saw(learner, tmp_path, cuts, {5}).equals(done.manifest)
    assert readable(store.root, ["secret005"]) == []
    assert list(store.list("rebuilds/")) == []


def test_a_preparation_that_cannot_be_made_fails_nothing(store: DirectoryStore) -> None:
    other = local_learner(store, rank=2)
    done = run(other, erase("r1", 5, prepare=True))
    assert (done.outcome, done.statuses, done.completion) == ("unchanged", (), None)


def test_an_erasure_deletes_what_a_preparation_made_of_its_example(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(41, 4 * CUTS)
    learner = local_learner(store)
    expiring = request("e1", kind="expire", example_ids=[cuts[1][1].example_id], suppress=False, prepare=True)
    forget(learner, expiring)
    assert len(readable(store.root, ["secret006"])) == 2, "the rebuilt micro-batch of cut 1 holds the others"
    steps = len(list(list_steps(store, ADAPTER)))
    done, _ = forget(learner, quarantined(store, erase("r1", 13)))  # in cut 3
    assert never_saw(learner, tmp_path, cuts, {13}).equals(done.manifest)
    kept = [step.recorded for _, step in list_steps(store, ADAPTER)]
    assert (steps, len(kept)) == (5, 2), "cuts 1 and 2 are still as they were prepared"
    erased, _ = forget(learner, quarantined(store, erase("r2", 6)))
    assert never_saw(learner, tmp_path, cuts, {6, 13}).equals(erased.manifest)
    assert readable(store.root, ["secret006", "secret013"]) == []
    assert list(store.list("rebuilds/")) == []


def test_progress_that_nobody_uses_is_removed_in_the_end(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, blobs = local_learner(store), sorted((store.root / "blobs/sha256").iterdir())
    forget(learner, erase("e1", 5, prepare=True))
    assert len(list((store.root / "blobs/sha256").iterdir())) > len(blobs)
    monkeypatch.setattr(rebuild_progress, "KEEP_PROGRESS", rebuild_progress.KEEP_PROGRESS * 0)
    done, _ = forget(learner, quarantined(store, erase("r1", 99)))
    assert done.outcome == "unchanged"
    assert sorted((store.root / "blobs/sha256").iterdir()) == blobs
    assert list(store.list("rebuilds/")) == []


def test_progress_whose_blobs_are_lost_is_made_again(store: DirectoryStore, tmp_path: Path, trained: list[int]) -> None:
    job, cuts = quarantined(store, erase("r1", 5)), documents(41, 4 * CUTS)
    with pytest.raises(CutOffError):
        forget(local_learner(store), job, stops_at("learner.forget_step", 3))
    _, second = sorted(list_steps(store, ADAPTER), key=lambda item: item[1].made_at)[1:3][0]
    for digest in second.blobs:
        store.delete(blob_key(digest))
    done, _ = forget(local_learner(store), job)
    assert trained == [1, 2, 3, 2, 4, 5]
    assert never_saw(local_learner(store), tmp_path, cuts, {5}).equals(done.manifest)


def test_a_hold_that_comes_during_a_rebuild_stops_it_before_anything_is_published(store: DirectoryStore) -> None:
    learner, job = local_learner(store), quarantined(store, erase("r1", 5))
    before = learner.registry.head(ADAPTER)

    def held(name: str) -> None:
        if name == "learner.forget_replayed":
            hold = LegalHold(request_id="h1", selector={"document_ids": ["doc-5"]})
            update_quarantine(store, ADAPTER, lambda found: found.with_holds([hold]))

    with Observer(store) as observer:
        done, _ = forget(learner, job, held)
    assert (done.outcome, learner.registry.head(ADAPTER), observer.gaps) == ("held", before, [])
    assert readable(store.root, ["secret005"])
    assert [*store.list("rebuilds/"), *store.list("forgotten/")] == []


def test_requests_accepted_during_a_rebuild_share_the_next_one(
    store: DirectoryStore, tmp_path: Path, trained: list[int]
) -> None:
    first, cuts = quarantined(store, erase("r1", 9)), documents(41, 4 * CUTS)
    later = [erase("r2", 10), erase("r3", 14), erase("r4", 21)]

    def accept(name: str) -> None:
        if name == "learner.forget_step":
            for job in later:
                quarantined(store, job)

    forget(local_learner(store), first, accept)
    assert trained == [2, 3, 4, 5]
    del trained[:]
    results = [forget(local_learner(store), job)[0] for job in later]
    assert trained == [2, 3, 4, 5]
    assert [done.outcome for done in results] == ["promoted", "repeated", "repeated"]
    assert {s.request_id: s.examples for s in results[0].statuses} == {"r2": 1, "r3": 1, "r4": 1}
    assert never_saw(local_learner(store), tmp_path, cuts, {9, 10, 14, 21}).equals(head(local_learner(store).registry))


def test_case_13_a_request_that_matches_nothing_says_so(store: DirectoryStore) -> None:
    """An erasure of an id that never existed closed as if it had been fulfilled."""
    done, _ = forget(local_learner(store), quarantined(store, erase("r1", 99)))
    assert [(s.state, s.examples, s.detail) for s in done.statuses] == [
        ("executed", 0, NOTHING_MATCHED), ("published", 0, NOTHING_MATCHED),
    ]  # fmt: skip
    outcome = load_quarantine(store, ADAPTER).entry("r1").done
    assert (outcome.examples, outcome.detail) == (0, NOTHING_MATCHED)
    done, _ = forget(local_learner(store), quarantined(store, erase("r2", 5)))
    assert [s.detail for s in done.statuses] == ["", ""]
