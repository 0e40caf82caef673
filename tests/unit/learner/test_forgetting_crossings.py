"""Requests to forget that meet something else half-way: holds that come after an attempt that did not end."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.quarantine import LegalHold, load_quarantine, update_quarantine
from tests.unit.learner.test_forgetting import (
    ADAPTER,
    CutOffError,
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
