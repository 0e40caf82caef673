"""Rollbacks and revocations that overtake the learner: what it makes of them, and of the updates behind them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.versions.history import load_history
from perennial.learner.versions.job_result import JobError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.recovery.rollback import RollbackError, carried_manifest, revoke, roll_back
from perennial.storage.registry.registry import Registry
from perennial.streams.events.adapter_events import AdapterRetired, AdapterRevoked, AdapterRolledBack
from perennial.streams.events.models import ForgetRequested, RollbackRequested
from tests.unit.learner.test_versions import ADAPTER, job, local_learner


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def requested(
    job_id: str, version: str | None, live: str | None = None, *, taken_out: bool = False
) -> RollbackRequested:
    return RollbackRequested(
        job_id=job_id, adapter=ADAPTER, version=version, live=live, requested_by="ann", reason="worse", revoke=taken_out
    )


def erasure_of(offset: int) -> ForgetRequested:
    return ForgetRequested(
        job_id="f1", request_id="f1", kind="erase", adapter=ADAPTER, example_ids=[f"{offset:032x}"],
        until_ms=2_000_000_000_000,
    )  # fmt: skip


def test_case_19_queued_updates_are_learned_on_top_of_the_version_that_was_named(store: DirectoryStore) -> None:
    """Case 19: rolled back while one update trains and others wait; all are learned, on top of the target's state."""
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(3)]
    target, live = made[1].digest(), made[2].digest()

    def at_once(name: str) -> None:
        if name == "learner.train" and not moved:
            moved.append(roll_back(learner.registry, ADAPTER, "live", target, "r1", "worse"))

    moved: list[object] = []
    busy = local_learner(store, failpoint=at_once)
    fourth = busy.update(job(store, 3, 6, 7), "live").manifest
    assert moved
    assert fourth is not None
    rolled_back = learner.registry.manifest(ADAPTER, fourth.parent)
    assert (rolled_back.kind, rolled_back.parent, rolled_back.weights) == ("rollback", target, made[1].weights)
    assert [example.offset for example in fourth.learned] == [6, 7]
    assert fourth.next_cut == 4
    assert rolled_back.marks == made[2].marks
    done = busy.rollback(requested("r1", target, live))
    assert done.outcome == "repeated"
    assert done.event is not None
    assert done.event.version == fourth.digest(), "the job's turn comes after an update: the event tells what is live"
    assert len(list(learner.registry.versions(ADAPTER))) == 5


def test_case_19_the_learner_announces_what_the_command_line_did(store: DirectoryStore) -> None:
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(2)]
    roll_back(learner.registry, ADAPTER, "live", made[0].digest(), "r1", "worse")
    for other in (learner, local_learner(store)):
        done = other.rollback(requested("r1", made[0].digest(), made[1].digest()))
        assert done.outcome == "repeated"
        assert isinstance(done.event, AdapterRolledBack)


def test_case_19_the_version_before_is_the_one_before_what_was_live_when_it_was_requested(
    store: DirectoryStore,
) -> None:
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(4)]
    done = learner.rollback(requested("r1", None, live=made[2].digest()))
    assert done.manifest is not None
    assert done.manifest.parent == made[1].digest()


def test_case_19_a_revocation_at_once_is_finished_by_the_learner(store: DirectoryStore) -> None:
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(2)]
    revoke(learner.registry, ADAPTER, "live", made[1].digest(), "r1", "leak")
    done = learner.rollback(requested("r1", made[1].digest(), taken_out=True))
    assert done.outcome == "repeated"
    assert isinstance(done.event, AdapterRevoked)
    revoke(learner.registry, ADAPTER, "live", made[0].digest(), "r2", "leak")
    done = learner.rollback(requested("r2", made[0].digest(), taken_out=True))
    assert isinstance(done.event, AdapterRetired)
    assert done.manifest is not None
    assert (done.manifest.kind, done.manifest.optimizer) == ("revoke", None)
    after = learner.update(job(store, 2, 4, 5), "live").manifest
    assert after is not None
    assert after.replay is not None
    assert learner.registry.alias(ADAPTER).version == after.digest()


def test_case_19_a_revocation_that_waited_takes_out_what_was_trained_from_the_version(store: DirectoryStore) -> None:
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(4)]
    done = learner.rollback(requested("r1", made[1].digest(), taken_out=True))
    assert done.manifest is not None
    assert done.manifest.weights == made[0].weights
    assert [learner.registry.is_revoked(ADAPTER, seq) for seq in (1, 2, 3, 4)] == [False, True, True, True]


def test_a_rollback_on_a_worker_with_another_rank_is_still_refused(store: DirectoryStore) -> None:
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(2)]
    with pytest.raises(JobError) as caught:
        local_learner(store, rank=2).rollback(requested("r1", made[0].digest()))
    assert caught.value.reason == "rank-mismatch"


def test_a_rollback_at_once_between_a_forgetting_and_its_revocations_is_forgotten_too(store: DirectoryStore) -> None:
    """An operator goes back to a version that an erasure has replaced and not yet revoked: its state is not kept."""
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(3)]
    erasure = erasure_of(3)

    def at_once(name: str) -> None:
        if name == "learner.forget_published" and not moved:
            moved.append(roll_back(learner.registry, ADAPTER, "live", made[1].digest(), "r1", "worse"))

    moved: list[object] = []
    done = ForgetExecutor(learner, learner.now, at_once).forget(erasure, "live")
    assert moved
    assert done.manifest is not None
    live = learner.registry.alias(ADAPTER)
    assert live.version == done.manifest.digest()
    assert done.manifest.weights not in {manifest.weights for manifest in made[1:]}
    assert not store.exists(blob_key(made[1].weights.digest))


@pytest.mark.parametrize("ends", ["publish.manifest", "publish.claim_update"])
def test_a_rollback_at_once_does_not_take_over_what_is_forgotten_meanwhile(store: DirectoryStore, ends: str) -> None:
    """The erasure ends while the rollback is between its look at the version and the version of its own."""
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(3)]
    erasure = erasure_of(3)

    def cut_off(name: str) -> None:
        if name == "learner.forget_published":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ForgetExecutor(learner, learner.now, cut_off).forget(erasure, "live")
    clean = learner.registry.alias(ADAPTER)

    def forgotten(name: str) -> None:
        if name == ends and not moved:
            moved.append(ForgetExecutor(learner, learner.now, lambda _: None).forget(erasure, "live"))

    moved: list[object] = []
    operator = Registry(store, nonce=lambda: "operator", now=learner.now, failpoint=forgotten)
    with pytest.raises(RollbackError, match="revoked"):
        roll_back(operator, ADAPTER, "live", made[1].digest(), "r1", "worse")
    assert moved
    live, head = learner.registry.alias(ADAPTER), learner.registry.head(ADAPTER)
    assert (
        learner.registry.manifest(ADAPTER, live.version).weights
        == learner.registry.manifest(ADAPTER, clean.version).weights
    )
    assert head.manifest.weights == learner.registry.manifest(ADAPTER, clean.version).weights
    after = learner.update(job(store, 3, 6, 7), "live").manifest
    assert after.outcome == "promoted"


@pytest.mark.parametrize("ends", ["publish.claim_update", "publish.claim_seq", "publish.alias"])
@pytest.mark.parametrize("killed", ["publish.claim_seq", "publish.alias", None])
def test_a_rollback_that_is_killed_beside_an_erasure_leaves_nothing_contaminated(
    store: DirectoryStore, ends: str, killed: str | None
) -> None:
    """A rollback that ended within milliseconds of an erasure left a version with the erased example as the newest."""
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(3)]
    erasure = erasure_of(3)

    def cut_off(name: str) -> None:
        if name == "learner.forget_published":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ForgetExecutor(learner, learner.now, cut_off).forget(erasure, "live")

    def step(name: str) -> None:
        if name == ends and not moved:
            moved.append(ForgetExecutor(learner, learner.now, lambda _: None).forget(erasure, "live"))
        if name == killed:
            raise InterruptedError

    moved: list[object] = []
    operator = Registry(store, nonce=lambda: "operator", now=learner.now, failpoint=step)
    with suppress(InterruptedError, RollbackError):
        roll_back(operator, ADAPTER, "live", made[1].digest(), "r1", "worse")
    erased = {manifest.weights for manifest in made[1:]}

    def weights_live() -> object:
        return learner.registry.manifest(ADAPTER, learner.registry.alias(ADAPTER).version).weights

    assert not moved or weights_live() not in erased
    learner.registry.converge(ADAPTER)
    assert not moved or weights_live() not in erased
    if not moved:  # the process ended first
        ForgetExecutor(learner, learner.now, lambda _: None).forget(erasure, "live")
    learner.update(job(store, 3, 6, 7), "live")
    assert weights_live() not in erased
    history = load_history(learner.registry, ADAPTER)
    assert not history.descendants({made[1].digest()}) & set(trail_of(learner.registry))


def test_a_killed_rollback_to_the_only_version_leaves_nothing_to_train_from(store: DirectoryStore) -> None:
    """The alias was retired, and the next update was trained from the erased state, which stayed the newest."""
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(2)]
    for manifest in made:
        learner.registry.revoke(ADAPTER, manifest.digest(), "erased")

    def cut_off(name: str) -> None:
        if name == "publish.alias":
            raise InterruptedError

    operator = Registry(store, nonce=lambda: "operator", now=learner.now, failpoint=cut_off)
    head = operator.head(ADAPTER)
    state = {name: getattr(made[0], name) for name in ("weights", "optimizer", "replay")}
    carried = carried_manifest(
        head, made[0], state, kind="rollback", parent=made[0].digest(), served=True, job_id="r1", reason="worse",
        code=made[0].code, threads=made[0].threads,
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        operator.publish(carried, (), lambda _: None, "live")
    assert learner.registry.head(ADAPTER).manifest.kind == "rollback"
    learner.update(job(store, 2, 4, 5), "live")
    assert not {manifest.digest() for manifest in made} & set(trail_of(learner.registry))
    assert learner.registry.alias(ADAPTER).version == learner.registry.head(ADAPTER).version


def test_a_rollback_between_the_last_look_of_an_erasure_and_its_delete_keeps_no_blob(store: DirectoryStore) -> None:
    """The rollback was killed; what it took over stayed in the store, and nobody deleted it any more."""
    learner = local_learner(store)
    made = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in range(3)]

    def cut_off(name: str) -> None:
        if name == "publish.alias":
            raise InterruptedError

    operator = Registry(store, nonce=lambda: "operator", now=learner.now, failpoint=cut_off)
    forgetter = ForgetExecutor(learner, learner.now, lambda _: None)
    delete = forgetter._delete
    late: list[str] = []

    def rollback_first(*arguments: object, **keywords: object) -> None:
        if not late:
            late.append("r1")
            head = operator.head(ADAPTER)
            state = {name: getattr(made[1], name) for name in ("weights", "optimizer", "replay")}
            carried = carried_manifest(
                head, made[1], state, kind="rollback", parent=made[1].digest(), served=True, job_id="r1",
                reason="worse", code=made[1].code, threads=made[1].threads,
            )  # fmt: skip
            with pytest.raises(InterruptedError):
                operator.publish(carried, (), lambda _: None, "live")
        delete(*arguments, **keywords)

    forgetter._delete = rollback_first
    forgetter.forget(erasure_of(3), "live")
    assert late
    assert not any(store.exists(blob_key(manifest.weights.digest)) for manifest in made[1:])


def trail_of(registry: Registry) -> list[str]:
    """Return the newest version and those that its state stems from."""
    version, trail = registry.head(ADAPTER).version, []
    while version is not None:
        trail.append(version)
        version = registry.manifest(ADAPTER, version).state_parent
    return trail
