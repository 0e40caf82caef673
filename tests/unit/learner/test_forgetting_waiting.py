"""From the acceptance of a request until it is carried out: what updates replay, and what refused jobs leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.versions.job_result import JobError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.pending_deletes import record_pending_deletes
from perennial.storage.registry.quarantine import LegalHold, ensure_text_key, load_quarantine, update_quarantine
from perennial.streams.retention.quarantine_filter import text_hash
from tests import jobs
from tests.unit.learner.test_forgetting import (
    ADAPTER,
    documents,
    erase,
    forget,
    learn,
    local_learner,
    never_saw,
    now,
    quarantined,
    readable,
)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def test_an_example_is_not_replayed_once_its_request_is_accepted(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(21, 12)
    straight = local_learner(DirectoryStore(tmp_path / "straight", fsync=False))
    with_it = learn(straight, cuts)[1].manifest
    learner = local_learner(store)
    learn(learner, {0: cuts[0]})
    job = quarantined(store, erase("r1", 2))
    without_it = learner.update(jobs.update(store, 1, cuts[1]), "live").manifest
    assert (with_it.gate.replay_missing, without_it.gate.replay_missing > 0) == (0, True)
    rows = [manifest.gate.replayed_rows + manifest.gate.replay_missing for manifest in (with_it, without_it)]
    assert rows[0] == rows[1], "the same was drawn"
    learn(learner, {2: cuts[2]})
    done, _ = forget(learner, job)
    assert never_saw(learner, tmp_path, cuts, {2}).equals(done.manifest)


def test_a_request_accepted_while_an_update_replays_its_example_restarts_the_update(
    store: DirectoryStore, tmp_path: Path
) -> None:
    cuts, job = documents(22, 8), erase("r1", 1)
    learn(local_learner(store), {0: cuts[0]})
    trained = 0

    def accept(name: str) -> None:
        nonlocal trained
        if name == "learner.train":
            trained += 1
            quarantined(store, job)

    learner = local_learner(store, failpoint=accept)
    made = learner.update(jobs.update(store, 1, cuts[1]), "live").manifest
    assert trained == 2
    assert made.gate.replay_missing > 0
    done, _ = forget(learner, job)
    assert never_saw(learner, tmp_path, cuts, {1}).equals(done.manifest)


def test_a_held_example_is_still_replayed(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(23, 8)
    learn(learner, {0: cuts[0]})
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([LegalHold(request_id="h1")]))
    quarantined(store, erase("r1", 2))
    assert learner.update(jobs.update(store, 1, cuts[1]), "live").manifest.gate.replay_missing == 0


@pytest.mark.parametrize("learned_before", [False, True])
def test_the_text_of_a_job_that_was_refused_for_good_is_erased_too(store: DirectoryStore, learned_before: bool) -> None:
    learner, cuts = local_learner(store), documents(24, 8)
    if learned_before:
        learn(learner, {0: cuts[0]})
    refused = jobs.update(store, 1, cuts[1])
    learner.refused(refused)
    other = learner.registry.head(ADAPTER)
    forget(learner, quarantined(store, erase("r1", 30)))
    assert store.root.joinpath(*blob_key(refused.batch.digest).split("/")).exists(), "nothing of it was meant"
    done, _ = forget(learner, quarantined(store, erase("r2", 6)))
    assert [status.state for status in done.statuses] == ["executed", "published"]
    assert readable(store.root, ["secret006"]) == []
    assert text_hash(cuts[1][2], ensure_text_key(store, ADAPTER)) in load_quarantine(store, ADAPTER).keyed
    assert learner.registry.head(ADAPTER) == other, "no version knew it"
    again, _ = forget(learner, quarantined(store, erase("r3", 7)))
    assert [status.state for status in again.statuses] == ["executed", "published"]


def test_a_hold_keeps_the_text_of_a_refused_job(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(25, 4)
    learner.refused(jobs.update(store, 0, cuts[0]))
    hold = LegalHold(request_id="h1", selector={"document_ids": ["doc-2"]})
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([hold]))
    job = quarantined(store, erase("r1", 2))
    assert forget(learner, job)[0].outcome == "held"
    assert readable(store.root, ["secret002"])
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([]))
    forget(learner, job)
    assert readable(store.root, ["secret002"]) == []


def test_a_refused_job_may_name_anything(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(26, 8)
    learn(learner, {0: cuts[0]})
    foreign = jobs.update(
        store, 0, [example.model_copy(update={"adapter": "acme/other"}) for example in cuts[0]], adapter="acme/other"
    )
    learner.refused(foreign.model_copy(update={"adapter": ADAPTER, "job_id": "one"}))
    learner.refused(jobs.with_batch(store, jobs.update(store, 1, cuts[1]), b"weights, or noise"))
    learner.refused(jobs.update(store, 0, cuts[0]).model_copy(update={"job_id": "again"}))  # what was learned long ago
    done, _ = forget(learner, quarantined(store, erase("r1", 2)))
    assert done.outcome == "promoted"
    assert store.root.joinpath(*blob_key(foreign.batch.digest).split("/")).exists(), "another adapter's text"


def test_a_held_text_stays_when_another_text_of_its_micro_batch_is_erased(store: DirectoryStore) -> None:
    """In a refused job's micro-batch, and in a version's of which the rebuild learns nothing more."""
    learner, cuts = local_learner(store), documents(27, 12)
    learn(learner, {0: cuts[0]})
    signal = cuts[1][1].model_copy(update={"learn": False})
    learn(learner, {1: [cuts[1][0], signal]})
    learner.refused(jobs.update(store, 2, cuts[2]))
    hold = LegalHold(request_id="h1", selector={"document_ids": ["doc-5", "doc-9"]})
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([hold]))
    forget(learner, quarantined(store, erase("r1", 4, 8)))
    assert readable(store.root, ["secret004", "secret008"]) == []
    assert len(readable(store.root, ["secret005", "secret009"])) == 2, "the hold stands on them"
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([]))
    forget(learner, quarantined(store, erase("r2", 5, 9)))
    assert readable(store.root, ["secret005", "secret009"]) == []


def test_a_refused_job_that_is_redelivered_too_late_deletes_nothing(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(28, 8)
    refused = jobs.update(store, 0, cuts[0])
    learner.refused(refused)
    learn(learner, {1: cuts[1]})
    with pytest.raises(JobError, match="given up before"):
        learner.update(refused, "live")
    assert readable(store.root, ["secret001"])


class _CutOffError(Exception):
    """Stands for the end of the process."""


def _dies(at: str) -> Callable[[str], None]:
    def failpoint(name: str) -> None:
        if name == at:
            raise _CutOffError

    return failpoint


@pytest.mark.parametrize("end", ["held", "given up"])
def test_blobs_of_an_interrupted_forgetting_are_deleted_and_searched(store: DirectoryStore, end: str) -> None:
    """The process ends with a micro-batch stored that lacks the forgotten example but holds others; then the job ends."""
    cuts = documents(29, 8)
    learn(local_learner(store), cuts)
    first = quarantined(store, erase("r1", 1))
    with pytest.raises(_CutOffError):
        forget(local_learner(store), first, _dies("learner.forget_replayed"))
    assert len(readable(store.root, ["secret002"])) == 2
    successor = local_learner(store)
    if end == "held":
        hold = LegalHold(request_id="h1", selector={"document_ids": ["doc-1"]})
        update_quarantine(store, ADAPTER, lambda found: found.with_holds([hold]))
        assert forget(successor, first)[0].outcome == "held"
    else:
        ForgetExecutor(successor, now, lambda _: None).give_up(first)
    assert len(readable(store.root, ["secret002"])) == 1
    assert list(store.list("forgotten/")) == []
    forget(successor, quarantined(store, erase("r2", 2)))
    assert readable(store.root, ["secret002"]) == []
    assert bool(readable(store.root, ["secret001"])) is (end == "held")


def test_micro_batches_that_a_stalled_learner_left_are_searched(store: DirectoryStore) -> None:
    cuts = documents(30, 8)
    learn(local_learner(store), cuts)
    body = jobs.update(store, 7, [cuts[0][2]]).batch.digest
    record_pending_deletes(store, ADAPTER, "a stalled job", [body])
    forget(local_learner(store), quarantined(store, erase("r1", 2)))
    assert readable(store.root, ["secret002"]) == []


def test_a_damaged_micro_batch_of_a_refused_job_does_not_stop_a_forgetting(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(31, 8)
    learn(learner, {0: cuts[0]})
    refused = jobs.update(store, 1, cuts[1])
    learner.refused(refused)
    store.root.joinpath(*blob_key(refused.batch.digest).split("/")).write_bytes(b"bit rot")
    assert forget(learner, quarantined(store, erase("r1", 2)))[0].outcome == "promoted"


def test_a_version_claimed_before_an_acceptance_does_not_win_after_it(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(32, 8)
    learn(local_learner(store), {0: cuts[0]})
    update = jobs.update(store, 1, cuts[1])
    with pytest.raises(_CutOffError):
        local_learner(store, failpoint=_dies("publish.claim_update")).update(update, "live")
    quarantined(store, erase("r1", 5))
    learner = local_learner(store)
    done = learner.update(update, "live")
    assert [item.offset for item in done.manifest.learned] == [4, 6, 7]
    assert never_saw(learner, tmp_path, cuts, {5}).equals(done.manifest)
    assert readable(store.root, ["secret005"]) == []
    assert list(store.list("forgotten/")) == []
