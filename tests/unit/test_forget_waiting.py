"""From a request's acceptance until it is carried out: what updates replay meanwhile, and what refused jobs left."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.blobs import DirectoryStore, blob_key
from storage.quarantine import Hold, load_quarantine, update_quarantine
from streams.quarantine import text_hash
from tests import jobs
from tests.unit.test_forget import ADAPTER, documents, erase, forget, learn, lineage, never_saw, quarantined, readable


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def test_what_was_learned_is_replayed_no_more_from_acceptance_on(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(21, 12)
    straight = lineage(DirectoryStore(tmp_path / "straight", fsync=False))
    with_it = learn(straight, cuts)[1].manifest
    line = lineage(store)
    learn(line, {0: cuts[0]})
    job = quarantined(store, erase("r1", 2))
    without_it = line.update(jobs.update(store, 1, cuts[1]), "live").manifest
    assert (with_it.gate["replay_missing"], without_it.gate["replay_missing"] > 0) == (0, True)
    rows = [manifest.gate["replayed_rows"] + manifest.gate["replay_missing"] for manifest in (with_it, without_it)]
    assert rows[0] == rows[1], "the same was drawn"
    learn(line, {2: cuts[2]})
    done, _ = forget(line, job)
    assert never_saw(line, tmp_path, cuts, {2}).equals(done.manifest)


def test_what_is_accepted_while_an_update_replays_it_begins_that_update_anew(store: DirectoryStore, tmp_path: Path) -> None:
    cuts, job = documents(22, 8), erase("r1", 1)
    learn(lineage(store), {0: cuts[0]})
    trained = 0

    def accept(place: str) -> None:
        nonlocal trained
        if place == "learner.train":
            trained += 1
            quarantined(store, job)

    line = lineage(store, failpoint=accept)
    made = line.update(jobs.update(store, 1, cuts[1]), "live").manifest
    assert trained == 2
    assert made.gate["replay_missing"] > 0
    done, _ = forget(line, job)
    assert never_saw(line, tmp_path, cuts, {1}).equals(done.manifest)


def test_a_held_example_is_replayed_as_ever(store: DirectoryStore) -> None:
    line, cuts = lineage(store), documents(23, 8)
    learn(line, {0: cuts[0]})
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([Hold(request_id="h1")]))
    quarantined(store, erase("r1", 2))
    assert line.update(jobs.update(store, 1, cuts[1]), "live").manifest.gate["replay_missing"] == 0


@pytest.mark.parametrize("learned_before", [False, True])
def test_the_text_of_a_job_that_was_refused_for_good_is_erased_too(store: DirectoryStore, learned_before: bool) -> None:
    line, cuts = lineage(store), documents(24, 8)
    if learned_before:
        learn(line, {0: cuts[0]})
    refused = jobs.update(store, 1, cuts[1])
    line.refused(refused)
    other = line.registry.head(ADAPTER)
    forget(line, quarantined(store, erase("r1", 30)))
    assert store.root.joinpath(*blob_key(refused.batch.digest).split("/")).exists(), "nothing of it was meant"
    done, _ = forget(line, quarantined(store, erase("r2", 6)))
    assert [status.state for status in done.statuses] == ["executed", "published"]
    assert readable(store.root, ["secret006"]) == []
    assert text_hash(cuts[1][2]) in load_quarantine(store, ADAPTER).suppressed
    assert line.registry.head(ADAPTER) == other, "no version knew it"
    again, _ = forget(line, quarantined(store, erase("r3", 7)))
    assert [status.state for status in again.statuses] == ["executed", "published"]


def test_a_hold_keeps_the_text_of_a_refused_job(store: DirectoryStore) -> None:
    line, cuts = lineage(store), documents(25, 4)
    line.refused(jobs.update(store, 0, cuts[0]))
    hold = Hold(request_id="h1", selector={"document_ids": ["doc-2"]})
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([hold]))
    job = quarantined(store, erase("r1", 2))
    assert forget(line, job)[0].outcome == "held"
    assert readable(store.root, ["secret002"])
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([]))
    forget(line, job)
    assert readable(store.root, ["secret002"]) == []


def test_a_refused_job_may_name_anything(store: DirectoryStore) -> None:
    line, cuts = lineage(store), documents(26, 8)
    learn(line, {0: cuts[0]})
    foreign = jobs.update(store, 0, [example.model_copy(update={"adapter": "acme/other"}) for example in cuts[0]], adapter="acme/other")
    line.refused(foreign.model_copy(update={"adapter": ADAPTER, "job_id": "one"}))
    line.refused(jobs.with_batch(store, jobs.update(store, 1, cuts[1]), b"weights, or noise"))
    line.refused(jobs.update(store, 0, cuts[0]).model_copy(update={"job_id": "again"}))  # what was learned long ago
    done, _ = forget(line, quarantined(store, erase("r1", 2)))
    assert done.outcome == "promoted"
    assert store.root.joinpath(*blob_key(foreign.batch.digest).split("/")).exists(), "another adapter's text"
