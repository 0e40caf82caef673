"""Two learners with the same job, at the worst moments: what one has done and deleted is no failure of the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.learner.versions import update_job as lineage_module
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
    lineage,
    never_saw,
    quarantined,
    readable,
)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


@pytest.mark.parametrize("place", ["learner.forget_plan", "learner.forget_quarantine", "learner.forget_replayed"])
def test_a_forgetting_that_a_rival_ends_in_between_ends_as_the_rivals(store, tmp_path, place):
    line, cuts = lineage(store), documents(31, 12)
    learn(line, cuts)
    job = quarantined(store, erase("r1", 1, 6))
    ended = []

    def rival(name):
        if name == place and not ended:
            ended.append(forget(lineage(store), job)[0])

    done, _ = forget(line, job, rival)
    assert [rival.outcome for rival in ended] == ["promoted"]
    assert (done.outcome, done.statuses) == ("repeated", ()), "said once"
    assert never_saw(line, tmp_path, cuts, {1, 6}).equals(line.registry.head(ADAPTER).manifest)
    assert readable(store.root, ["secret001", "secret006"]) == []
    assert list(store.list("forgotten/")) == []


def test_an_update_whose_body_a_rival_replaced_is_repeated(store, monkeypatch):
    """The rival learned it without what was to be forgotten, and deleted the body with it."""
    line, cuts = lineage(store), documents(32, 8)
    learn(line, {0: cuts[0]})
    quarantined(store, erase("r1", 5))
    behind = jobs.update(store, 1, cuts[1])
    read, ended = lineage_module.read_batch, []

    def late(*given):
        if not ended:
            ended.append("")
            ended[0] = lineage(store).update(behind, "live").outcome
        return read(*given)

    monkeypatch.setattr(lineage_module, "read_batch", late)
    assert line.update(behind, "live").outcome == "repeated"
    assert ended == ["promoted"]


def test_an_update_from_weights_that_a_rival_deleted_begins_anew(store, tmp_path, monkeypatch):
    cuts = documents(33, 8)
    learn(lineage(store), {0: cuts[0]})
    line, job = lineage(store), quarantined(store, erase("r1", 2))  # with nothing in memory
    read, ended = lineage_module.read_batch, []

    def late(*given):
        if not ended:
            ended.append(forget(lineage(store), job)[0].outcome)
        return read(*given)

    monkeypatch.setattr(lineage_module, "read_batch", late)
    done = line.update(jobs.update(store, 1, cuts[1]), "live")
    assert (ended, done.outcome) == (["promoted"], "promoted")
    monkeypatch.undo()
    assert never_saw(line, tmp_path, cuts, {2}).equals(done.manifest)


def test_what_is_gone_for_good_ends_the_job_at_the_second_sight(store, monkeypatch):
    line, cuts = lineage(store), documents(34, 4)
    request = jobs.update(store, 0, cuts[0])
    seen = []

    def gone(*_):
        seen.append(1)
        raise JobError("missing-batch", "gone")

    monkeypatch.setattr(lineage_module, "read_batch", gone)
    with pytest.raises(JobError, match="gone"):
        line.update(request, "live")
    assert len(seen) == 2


def test_a_rival_that_is_late_by_a_forgetting_leaves_no_weights_that_knew_it(store, tmp_path):
    """It trains from before the forgetting, and stores what the forgetting has just deleted once more."""
    cuts = documents(36, 8)
    learn(lineage(store), {0: cuts[0]})
    update, job = jobs.update(store, 1, cuts[1]), erase("r1", 2)
    ended = []

    def heir(name):
        if name == "learner.train" and not ended:
            ended.append(lineage(store).update(update, "live").manifest)
            forget(lineage(store), quarantined(store, job))
            update_quarantine(store, ADAPTER, lambda found: found.without(["r1"]).model_copy(update={"suppressed": []}))

    line = lineage(store, failpoint=heir)
    line.update(update, "live")
    assert never_saw(line, tmp_path, cuts, {2}).equals(line.registry.head(ADAPTER).manifest)
    left = [ref.digest for ref in ended[0].blobs() if ref != ended[0].batch]
    assert [digest for digest in left if store.exists(blob_key(digest))] == []
