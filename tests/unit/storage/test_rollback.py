"""Rollback and revocation at once, on the store alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.recovery.rollback import RollbackError, revoke, roll_back, version_before
from perennial.storage.registry.registry import Registry
from tests.versions import VersionPublisher

ADAPTER = "acme/support"


@pytest.fixture
def line(tmp_path: Path) -> VersionPublisher:
    return VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER)


def live(registry: Registry) -> tuple[str, int]:
    state = registry.alias(ADAPTER)
    assert state is not None
    return registry.manifest(ADAPTER, state.version).parent or "", state.generation


def test_case_19_a_rollback_that_is_done_again_changes_nothing_however_late(line: VersionPublisher) -> None:
    """Case 19: the job is recognised after more versions than any look back would search."""
    made = [line.publish() for _ in range(3)]
    roll_back(line.registry, ADAPTER, "live", made[0].version, "job 1", "worse")
    assert live(line.registry) == (made[0].version, 4)
    for _ in range(300):
        line.publish()
    state = roll_back(line.registry, ADAPTER, "live", made[0].version, "job 1", "worse")
    assert state is not None
    assert (state.generation, state.kind) == (304, "promoted")


def test_case_19_a_learner_that_publishes_first_moves_no_target(
    line: VersionPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [line.publish() for _ in range(2)]
    head, other = line.registry.head, VersionPublisher(line.store, ADAPTER)
    intruded = []

    def stale(adapter: str) -> object:
        found = head(adapter)
        if not intruded:
            intruded.append(other.publish())
        return found

    monkeypatch.setattr(line.registry, "head", stale)
    state = roll_back(line.registry, ADAPTER, "live", made[0].version, "job 1", "worse")
    assert state is not None
    assert intruded
    assert live(other.registry) == (made[0].version, 4)


def test_only_what_may_be_served_is_gone_back_to(line: VersionPublisher) -> None:
    made = [line.publish() for _ in range(3)]
    line.registry.revoke(ADAPTER, made[0].version, "leak")
    with pytest.raises(RollbackError) as caught:
        roll_back(line.registry, ADAPTER, "live", made[0].version, "job 1", "")
    assert caught.value.reason == "revoked-version"
    with pytest.raises(RollbackError) as caught:
        roll_back(line.registry, ADAPTER, "live", "sha256:" + "0" * 64, "job 2", "")
    assert caught.value.reason == "unknown-version"
    assert version_before(line.registry, ADAPTER, made[2].version) == made[1].version
    with pytest.raises(RollbackError):
        version_before(line.registry, ADAPTER, made[1].version)


def test_case_19_a_revocation_takes_out_what_was_trained_from_the_version_meanwhile(line: VersionPublisher) -> None:
    """Case 19, its kind: updates learned after the request was made do not keep the revoked version's text in service."""
    made = [line.publish() for _ in range(4)]
    state = revoke(line.registry, ADAPTER, "live", made[1].version, "job 1", "leak")
    assert state is not None
    assert state.kind == "revoked"
    assert live(line.registry) == (made[0].version, 5)
    assert [line.registry.is_revoked(ADAPTER, seq) for seq in (1, 2, 3, 4)] == [False, True, True, True]
    assert revoke(line.registry, ADAPTER, "live", made[1].version, "job 1", "leak") == state


def test_a_revocation_of_a_version_that_is_not_in_service_moves_nothing(line: VersionPublisher) -> None:
    made = [line.publish() for _ in range(3)]
    roll_back(line.registry, ADAPTER, "live", made[0].version, "job 1", "worse")
    state = revoke(line.registry, ADAPTER, "live", made[1].version, "job 2", "leak")
    assert state is not None
    assert (state.kind, state.generation) == ("rolled_back", 4)
    with pytest.raises(NotFoundError):
        revoke(line.registry, ADAPTER, "live", "sha256:" + "0" * 64, "job 3", "leak")


def test_a_revocation_of_the_only_version_retires_the_alias(line: VersionPublisher) -> None:
    made = line.publish()
    state = revoke(line.registry, ADAPTER, "live", made.version, "job 1", "leak")
    assert state is not None
    assert state.kind == "retired"
