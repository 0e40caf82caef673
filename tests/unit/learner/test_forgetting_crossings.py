"""Requests to forget that meet something else half-way: holds that come after an attempt that did not end."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.quarantine import LegalHold, load_quarantine, update_quarantine
from perennial.storage.registry.refused_examples import load_refused_examples
from tests import tiny
from tests.unit.learner.test_forgetting import (
    ADAPTER,
    CutOffError,
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


def test_a_hold_after_an_attempt_that_did_not_end_keeps_the_other_request_open(
    store: DirectoryStore, tmp_path: Path
) -> None:
    """One rebuild serves two requests and is interrupted; then a hold covers the second one's example.

    The second request was taken for carried out, so its example stayed for good once the hold was released.
    """
    learner, cuts = local_learner(store), documents(51, 16)
    learn(learner, cuts)
    first, second = (quarantined(store, erase(name, number)) for name, number in (("r1", 5), ("r2", 10)))

    def cut_off(name: str) -> None:
        if name == "learner.forget_quarantine":
            raise CutOffError

    with pytest.raises(CutOffError):
        forget(learner, first, cut_off)
    hold = LegalHold(request_id="h", selector={"document_ids": ["doc-10"]})
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([hold]))
    done, _ = forget(local_learner(store), first)
    assert {status.request_id for status in done.statuses} == {"r1"}
    entry = load_quarantine(store, ADAPTER).entry("r2")
    assert entry is not None
    assert entry.done is None
    assert readable(store.root, ["secret010"])

    update_quarantine(store, ADAPTER, lambda found: found.with_holds([]))
    done, _ = forget(local_learner(store), second)
    assert readable(store.root, ["secret005", "secret010"]) == []
    assert never_saw(learner, tmp_path, cuts, {5, 10}).equals(done.manifest)


@pytest.mark.parametrize("kind", ["expire", "supersede", "erase"])
def test_what_was_forgotten_and_not_erased_can_be_published_again_as_it_is(store: DirectoryStore, kind: str) -> None:
    """Intake dropped it as a duplicate of what is not learned any more, without a word."""
    learner, cuts = local_learner(store), documents(52, 12)
    learn(learner, cuts)
    wanted = erase("r1", 5, kind=kind, suppress=kind == "erase")
    before_ms = int(now().timestamp() * 1000)
    forget(learner, quarantined(store, wanted))
    refused = load_refused_examples(store, ADAPTER)
    assert set(refused) == (set() if kind == "erase" else {f"{5:032x}"})
    assert all(at_ms >= before_ms for at_ms in refused.values())


def test_a_forgotten_example_that_is_still_learned_elsewhere_stays_a_duplicate(store: DirectoryStore) -> None:
    """Only its first publication expires: the one that followed it is learned, and a third one is a repeat of that."""
    learner, cuts = local_learner(store), documents(53, 8)
    learn(learner, cuts)
    again = cuts[0][1].model_copy(update={"origin": tiny.origin(100), "returned": True})
    learn(learner, {2: [again]})
    first_ms = cuts[0][1].origin.timestamp_ms
    wanted = erase("r1", 1, kind="expire", suppress=False, until_ms=first_ms)
    assert again.origin.timestamp_ms > first_ms
    forget(learner, quarantined(store, wanted))
    assert load_refused_examples(store, ADAPTER) == {}
