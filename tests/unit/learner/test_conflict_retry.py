"""Two learners with the same job: what one has done and deleted does not make the other one fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.learner.versions import update_job
from perennial.learner.versions.job_result import JobError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.quarantine import update_quarantine
from tests import jobs
from tests.unit.learner.test_forgetting import (
    ADAPTER,
    documents,
    erase,
    forget,
    learn,
    local_learner,
    never_saw,
    quarantined,
    readable,
)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


@pytest.mark.parametrize("step", ["learner.forget_plan", "learner.forget_quarantine", "learner.forget_replayed"])
def test_a_forgetting_that_another_learner_finishes_first_is_repeated(store, tmp_path, step):
    learner, cuts = local_learner(store), documents(31, 12)
    learn(learner, cuts)
    job = quarantined(store, erase("r1", 1, 6))
    ended = []

    def other_learner(name):
        if name == step and not ended:
            ended.append(forget(local_learner(store), job)[0])

    done, _ = forget(learner, job, other_learner)
    assert [other_learner.outcome for other_learner in ended] == ["promoted"]
    assert (done.outcome, done.statuses) == ("repeated", ()), "said once"
    assert never_saw(learner, tmp_path, cuts, {1, 6}).equals(learner.registry.head(ADAPTER).manifest)
    assert readable(store.root, ["secret001", "secret006"]) == []
    assert list(store.list("forgotten/")) == []


def test_an_update_whose_micro_batch_another_learner_replaced_is_repeated(store, monkeypatch):
    """The other learner learned it without the example to forget, and deleted the old micro-batch."""
    learner, cuts = local_learner(store), documents(32, 8)
    learn(learner, {0: cuts[0]})
    quarantined(store, erase("r1", 5))
    behind = jobs.update(store, 1, cuts[1])
    read, ended = update_job.read_batch, []

    def late(*given):
        if not ended:
            ended.append("")
            ended[0] = local_learner(store).update(behind, "live").outcome
        return read(*given)

    monkeypatch.setattr(update_job, "read_batch", late)
    assert learner.update(behind, "live").outcome == "repeated"
    assert ended == ["promoted"]


def test_an_update_from_weights_that_another_learner_deleted_starts_over(store, tmp_path, monkeypatch):
    cuts = documents(33, 8)
    learn(local_learner(store), {0: cuts[0]})
    learner, job = local_learner(store), quarantined(store, erase("r1", 2))  # with nothing in memory
    read, ended = update_job.read_batch, []

    def late(*given):
        if not ended:
            ended.append(forget(local_learner(store), job)[0].outcome)
        return read(*given)

    monkeypatch.setattr(update_job, "read_batch", late)
    done = learner.update(jobs.update(store, 1, cuts[1]), "live")
    assert (ended, done.outcome) == (["promoted"], "promoted")
    monkeypatch.undo()
    assert never_saw(learner, tmp_path, cuts, {2}).equals(done.manifest)


def test_a_missing_micro_batch_ends_the_job_at_the_second_attempt(store, monkeypatch):
    learner, cuts = local_learner(store), documents(34, 4)
    request = jobs.update(store, 0, cuts[0])
    seen = []

    def gone(*_):
        seen.append(1)
        raise JobError("missing-batch", "gone")

    monkeypatch.setattr(update_job, "read_batch", gone)
    with pytest.raises(JobError, match="gone"):
        learner.update(request, "live")
    assert len(seen) == 2


def test_an_update_that_is_overtaken_by_a_forgetting_leaves_no_contaminated_weights(store, tmp_path):
    """It trains from the state before the forgetting, and stores what the forgetting has just deleted once more."""
    cuts = documents(36, 8)
    learn(local_learner(store), {0: cuts[0]})
    update, job = jobs.update(store, 1, cuts[1]), erase("r1", 2)
    ended = []

    def successor(name):
        if name == "learner.train" and not ended:
            ended.append(local_learner(store).update(update, "live").manifest)
            forget(local_learner(store), quarantined(store, job))
            update_quarantine(store, ADAPTER, lambda found: found.without(["r1"]).model_copy(update={"suppressed": []}))

    learner = local_learner(store, failpoint=successor)
    learner.update(update, "live")
    assert never_saw(learner, tmp_path, cuts, {2}).equals(learner.registry.head(ADAPTER).manifest)
    left = [ref.digest for ref in ended[0].blobs() if ref != ended[0].batch]
    assert [digest for digest in left if store.exists(blob_key(digest))] == []
