"""Forgetting what is only in the micro-batch of a job that waits in the store: queued, parked, or lost in Kafka."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from perennial.learner.roles.job_runner import JobRunner
from perennial.learner.versions.job_result import JobResult
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.parked import ParkedAdapter, park_adapter, unpark_adapter
from perennial.storage.registry.quarantine import LegalHold, update_quarantine
from perennial.storage.registry.waiting_jobs import list_jobs, load_job
from perennial.streams.events.models import Batch, UpdateRequested
from tests import jobs
from tests.local_learner import LocalLearner
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
)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def run(learner: LocalLearner, job: UpdateRequested) -> JobResult:
    return JobRunner(learner, "live", now, lambda _: None, lambda _: None, lambda: None).run(job)


@pytest.mark.parametrize("learned_before", [False, True])
@pytest.mark.parametrize("parked", [False, True])
def test_case_14_an_erasure_finds_the_body_of_a_job_that_waits(
    store: DirectoryStore, tmp_path: Path, learned_before: bool, parked: bool
) -> None:
    """The bodies of jobs that no version names stayed in the store, and an erasure did not find them."""
    learner, cuts = local_learner(store), documents(51, 12)
    if learned_before:
        learn(learner, {0: cuts[0]})
    first = 1 if learned_before else 0
    waiting = [jobs.waiting(store, jobs.update(store, cut, cuts[cut])) for cut in range(first, 3)]
    if parked:
        at = datetime(2026, 1, 1, tzinfo=UTC)
        park_adapter(
            store, ParkedAdapter(adapter=ADAPTER, reason="no-space", detail="", job_id="j", since=at, worker="w")
        )
    done, _ = forget(learner, quarantined(store, erase("r1", 5, 10)))
    assert [(s.state, s.examples, s.detail) for s in done.statuses] == [("executed", 2, ""), ("published", 2, "")]
    assert readable(store.root, ["secret005", "secret010"]) == []
    assert list(list_jobs(store, ADAPTER)) == [job.cut for job in waiting]
    assert list(store.list("forgotten/")) == []
    unpark_adapter(store, ADAPTER)
    for job in waiting:
        assert run(learner, job).outcome == "promoted", "the record in Kafka names the old micro-batch"
    assert list(list_jobs(store, ADAPTER)) == []
    known = {cut: cuts[cut] for cut in range(3)}
    assert never_saw(learner, tmp_path, known, {5, 10}).equals(head(learner.registry))
    skipped = {
        item.offset: item.reason
        for _, version in learner.registry.versions(ADAPTER)
        for item in learner.registry.manifest(ADAPTER, version).skipped
    }
    assert skipped == {5: "quarantined", 10: "quarantined"}, "every record is accounted for"


def test_a_job_that_waits_and_holds_nothing_to_forget_stays_as_it_is(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(52, 8)
    learn(learner, {0: cuts[0]})
    waiting = jobs.waiting(store, jobs.update(store, 1, cuts[1]))
    before = load_job(store, ADAPTER, 1)
    forget(learner, quarantined(store, erase("r1", 2)))
    assert load_job(store, ADAPTER, 1) == before
    assert store.exists(blob_key(waiting.batch.digest))


def test_a_hold_keeps_the_body_of_a_job_that_waits(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(53, 4)
    jobs.waiting(store, jobs.update(store, 0, cuts[0]))
    hold = LegalHold(request_id="h1", selector={"document_ids": ["doc-2"]})
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([hold]))
    job = quarantined(store, erase("r1", 2))
    assert forget(learner, job)[0].outcome == "held"
    assert readable(store.root, ["secret002"])
    other, _ = forget(learner, quarantined(store, erase("r2", 1)))
    assert other.outcome == "unchanged"
    assert readable(store.root, ["secret001"]) == []
    assert readable(store.root, ["secret002"]), "what is held stays in the new micro-batch"


def test_an_interrupted_erasure_of_a_waiting_body_leaves_no_text_that_nobody_finds(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = documents(54, 4)
    jobs.waiting(store, jobs.update(store, 0, cuts[0]))
    job = quarantined(store, erase("r1", 2))
    swap = store.compare_and_swap

    def dies(key: str, data: bytes, expected: str | None) -> str:
        if key.startswith("jobs/"):
            raise CutOffError
        return swap(key, data, expected)

    with monkeypatch.context() as patched:
        patched.setattr(store, "compare_and_swap", dies)
        with pytest.raises(CutOffError):
            forget(local_learner(store), job)
    assert len(readable(store.root, ["secret001"])) == 2, "the old body and the new one"
    forget(local_learner(store), quarantined(store, erase("r2", 1)))
    forget(local_learner(store), job)
    assert readable(store.root, ["secret001", "secret002"]) == []
    stored = load_job(store, ADAPTER, 0)
    assert stored is not None
    named = UpdateRequested.model_validate_json(stored.data).batch
    batch = Batch.model_validate_json(store.get(blob_key(named.digest)).data)
    assert [example.origin.offset for example in batch.examples] == [0, 3]
    assert {path.name for path in (store.root / "blobs/sha256").iterdir()} == {named.digest[7:]}
    assert list(store.list("forgotten/")) == []
