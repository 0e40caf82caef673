"""Rebase jobs do not learn anew what an operator has revoked."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.recovery.rollback import revoke
from tests.unit.learner.test_forgetting import (
    CutOffError,
    documents,
    erase,
    forget,
    head,
    learn,
    never_saw,
    quarantined,
)
from tests.unit.learner.test_rebase import NEW, OLD, rebase
from tests.unit.learner.test_versions import ADAPTER, local_learner


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


@pytest.mark.parametrize("revoked", [0, 1])
def test_what_an_operator_revoked_is_not_learned_anew(store: DirectoryStore, tmp_path: Path, revoked: int) -> None:
    """No learner of the old base is left that could carry out the rest of the revocation."""
    cuts = documents(1, 12)
    versions = [done.manifest.digest() for done in learn(local_learner(store, OLD), cuts) if done.manifest]
    learner = local_learner(store, NEW)
    revoke(learner.registry, ADAPTER, "live", versions[revoked], "off", "poisoned")
    before = learner.registry.alias(ADAPTER)
    assert before is not None
    done = rebase(learner)
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, dict(list(cuts.items())[:revoked])).equals(done.manifest)
    after = learner.registry.alias(ADAPTER)
    assert after is not None
    if revoked:
        assert (after.version, after.kind) == (done.manifest.digest(), "promoted")
    else:
        assert (before.kind, done.outcome) == ("retired", "unchanged")
        assert after == before, "nothing is left that could be served"
        assert f"without what was learned from {versions[0]} on" in done.manifest.reason
    late = documents(2, 16)[3]
    learn(learner, {3: late})
    assert never_saw(learner, tmp_path, {**dict(list(cuts.items())[:revoked]), 3: late}).equals(head(learner.registry))


def test_a_revocation_during_a_rebase_is_seen_before_its_result_is_published(
    store: DirectoryStore, tmp_path: Path
) -> None:
    cuts = documents(1, 12)
    versions = [done.manifest.digest() for done in learn(local_learner(store, OLD), cuts) if done.manifest]
    learner = local_learner(store, NEW)
    steps = 0

    def revoke_first(name: str) -> None:
        nonlocal steps
        steps += name == "learner.forget_step"
        if steps == 3:
            revoke(learner.registry, ADAPTER, "live", versions[0], "off", "poisoned")

    done = rebase(learner, failpoint=revoke_first)
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, {}).equals(done.manifest)
    state = learner.registry.alias(ADAPTER)
    assert state is not None
    assert state.kind == "retired"


def test_the_updates_behind_a_revoked_forgetting_are_not_learned_anew(store: DirectoryStore, tmp_path: Path) -> None:
    """The rebuilt updates have no revocations of their own: the version that took over their state has one."""
    old = local_learner(store, OLD)
    learn(old, documents(1, 12))
    forget(old, quarantined(store, erase("r1", 1)))
    learner = local_learner(store, NEW)
    state = revoke(learner.registry, ADAPTER, "live", head(old.registry).digest(), "off", "poisoned")
    assert state is not None
    assert state.kind == "retired"
    done = rebase(learner)
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, {}).equals(done.manifest)


def test_what_an_emergency_set_aside_is_learned_anew(store: DirectoryStore, tmp_path: Path) -> None:
    """The old learner ended between the quarantine and the rebuild: the versions set aside are revoked, too."""
    cuts = documents(1, 12)

    def cut_off(name: str) -> None:
        if name == "learner.forget_quarantine":
            raise CutOffError

    old = local_learner(store, OLD)
    learn(old, cuts)
    request = quarantined(store, erase("r1", 5, emergency=True))
    with pytest.raises(CutOffError):
        forget(old, request, cut_off)
    assert head(old.registry).kind == "quarantine"
    assert len(list(old.registry.revocations(ADAPTER))) == 2
    learner = local_learner(store, NEW)
    done = rebase(learner)
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts, {5}).equals(done.manifest)
