"""A user's adapter is trained over its tenant's, and again when the tenant's forgets something."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from perennial.learner.forgetting.collect_versions import collect_versions
from perennial.learner.training import recipe
from perennial.learner.training.personal.shared_versions import VersionBeneath
from perennial.learner.training.recipe import Recipe, UnknownFieldError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.history.dependants import dependants
from perennial.storage.registry.history.rebuilt_steps import list_steps
from perennial.storage.registry.manifest import Manifest, OtherVersion, Start
from perennial.streams.events.models import ExampleAccepted, RollbackRequested
from perennial.streams.settings import Settings
from tests import jobs, scratch
from tests.local_learner import LocalLearner
from tests.unit.learner.test_learned_starts import (
    SHARED,
    STEPS,
    StoppedError,
    cuts_of,
    forget_in,
    head,
    teach,
    versions,
)
from tests.unit.learner.test_rebase import NEW, rebase
from tests.unit.learner.test_rebase import job as rebase_job
from tests.unit.learner.test_versions import local_learner

USER = f"{SHARED}/zoe"


def layering(store: DirectoryStore, base: int = 0, *, starts: str = "", **more: object) -> LocalLearner:
    """Return a learner as PERENNIAL_TRAIN_OVER_SHARED makes it."""
    learner = local_learner(store, base, **more)
    tenants = Settings.of(
        shared_adapters=SHARED, train_over_shared=SHARED, learned_starts=starts, env_file=None
    ).tenants
    learner.extended_by, learner.trained_over = tenants.extended_by, tenants.trained_over
    learner.learned_from = tenants.learned_from
    return learner


def learn(learner: LocalLearner, adapter: str, cut: int) -> Manifest:
    """Let an adapter learn one of its three micro-batches of four documents."""
    job = jobs.update(learner.registry.store, cut, cuts_of(adapter, 12)[cut], adapter=adapter)
    made = learner.update(job, "live").manifest
    assert made is not None
    return made


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the tenant and its user learn in turn: each of the user's updates lies over another version."""
    root = tmp_path_factory.mktemp("taught") / "store"
    learner = layering(DirectoryStore(root, fsync=False))
    for cut in range(3):
        learn(learner, SHARED, cut)
        learn(learner, USER, cut)
    return root


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


@pytest.fixture
def learner(taught: Path, store: DirectoryStore) -> LocalLearner:
    shutil.copytree(taught, store.root, dirs_exist_ok=True)
    return layering(store)


def ref(learner: LocalLearner, manifest: Manifest) -> OtherVersion:
    return OtherVersion(adapter=manifest.adapter, version=manifest.digest(), seq=manifest.seq)


def shared_version(learner: LocalLearner, over: OtherVersion | None) -> VersionBeneath | None:
    return None if over is None else learner.shared.recorded(over)


def trained_alone(
    learner: LocalLearner,
    tmp: Path,
    overs: Sequence[VersionBeneath | None],
    cuts: Mapping[int, Sequence[ExampleAccepted]],
) -> scratch.Scratch:
    """Train the user's adapter by other code than the service's jobs, each micro-batch over the version given."""
    oracle = DirectoryStore(tmp / "oracle", fsync=False)
    state, done = None, None
    for (cut, examples), over in zip(cuts.items(), overs, strict=True):
        updater = learner.over(learner.updater, over)
        known = {number: cuts[number] for number in cuts if number <= cut}
        for number, batch in known.items():  # replayed examples are looked up in the store of the run
            scratch.store_batch(oracle, USER, number, batch)
        done = scratch.train(updater, oracle, USER, {cut: examples}, state)
        state = done.state
    assert done is not None
    return done


def kept(*gone: int) -> dict[int, list[ExampleAccepted]]:
    return {cut: [e for e in each if e.origin.offset not in gone] for cut, each in cuts_of(USER, 12).items()}


def test_each_update_names_the_shared_version_that_lay_beneath(learner: LocalLearner, tmp_path: Path) -> None:
    tenants, users = versions(learner, SHARED), versions(learner, USER)
    assert [made.over for made in users] == [ref(learner, made) for made in tenants]
    assert [made.over for made in tenants] == [None] * 3
    overs = [shared_version(learner, made.over) for made in users]
    assert None not in overs
    assert trained_alone(learner, tmp_path, overs, kept()).equals(users[-1])
    assert not trained_alone(learner, tmp_path, [overs[0]] * 3, kept()).equals(users[-1])
    assert [made.probes for made in users] == [{}] * 3
    assert dependants(learner.registry.store, SHARED) == [USER]


def without_live(learner: LocalLearner) -> None:
    assert learner.registry.retire(SHARED, "live", "unused", head(learner, SHARED).digest())


def with_revoked(learner: LocalLearner) -> None:
    learner.registry.revoke(SHARED, head(learner, SHARED).digest(), "bad")


def with_damaged(learner: LocalLearner) -> None:
    weights = blob_key(head(learner, SHARED).weights.digest)
    learner.registry.store.delete(weights)
    learner.registry.store.put_if_absent(weights, b"no tensors")


@pytest.mark.parametrize("unusable", [without_live, with_revoked, with_damaged])
def test_without_a_shared_version_that_can_lie_beneath_the_base_alone_does(learner: LocalLearner, unusable) -> None:
    unusable(learner)
    fresh = layering(learner.registry.store)
    made = teach(fresh, f"{SHARED}/yan", 4)[0]
    assert made.over is None
    plain = teach(local_learner(DirectoryStore(learner.registry.store.root.parent / "plain")), f"{SHARED}/yan", 4)[0]
    assert made.weights == plain.weights
    assert made.probes == plain.probes != {}


def test_an_erasure_in_the_shared_adapter_trains_again_what_lay_over_it(learner: LocalLearner, tmp_path: Path) -> None:
    before = versions(learner, USER)
    overs = [made.over for made in before]
    forget_in(learner, SHARED, 5)  # of the tenant's second micro-batch
    done = forget_in(learner, USER, name="follows")
    made = done.manifest
    assert made is not None
    clean = shared_version(learner, ref(learner, head(learner, SHARED)))
    first = shared_version(learner, overs[0])
    assert clean is not None
    assert first is not None
    assert trained_alone(learner, tmp_path, [first, clean, clean], kept()).equals(made)
    rebuilt = learner.registry.manifest(USER, made.parent or "")
    assert (rebuilt.kind, rebuilt.over) == ("replayed", clean.ref)
    revoked = [learner.registry.is_revoked(USER, each.seq) for each in before]
    assert revoked == [False, True, True]
    held = [learner.registry.store.exists(blob_key(each.weights.digest)) for each in before]
    assert held == [True, False, False]
    outcome = done.completion.outcomes["follows"] if done.completion else None
    assert outcome is not None
    assert outcome.generation == 4
    assert forget_in(learner, USER, name="again").manifest is None
    assert dependants(learner.registry.store, SHARED) == [USER], "its next update lies over the shared adapter again"


@pytest.mark.parametrize("step", STEPS)
def test_a_follower_that_is_killed_anywhere_ends_in_the_same_state(
    learner: LocalLearner, tmp_path: Path, step: str
) -> None:
    before = versions(learner, USER)
    first = shared_version(learner, before[0].over)
    forget_in(learner, SHARED, 5)

    def killed(name: str) -> None:
        if name == step:
            raise StoppedError

    with pytest.raises(StoppedError):
        forget_in(learner, USER, name="follows", failpoint=killed)
    again = layering(learner.registry.store)
    forget_in(again, USER, name="follows")
    clean = shared_version(again, ref(again, head(again, SHARED)))
    assert trained_alone(again, tmp_path, [first, clean, clean], kept()).equals(head(again, USER))
    assert [again.registry.is_revoked(USER, each.seq) for each in before] == [False, True, True]
    assert [again.registry.store.exists(blob_key(each.weights.digest)) for each in before] == [True, False, False]


@pytest.mark.parametrize("collected", [False, True])
def test_an_erasure_of_the_users_own_keeps_what_lay_beneath_or_takes_what_is_live(
    learner: LocalLearner, tmp_path: Path, collected: bool
) -> None:
    users, tenants = versions(learner, USER), versions(learner, SHARED)
    overs = [shared_version(learner, made.over) for made in users]
    if collected:
        collect_versions(learner.registry, SHARED, 1)
        held = [learner.registry.store.exists(blob_key(made.weights.digest)) for made in tenants]
        assert held == [False, True, True], "a rollback would go back to the second one"
        overs[0] = overs[2]
    fresh = layering(learner.registry.store)
    made = forget_in(fresh, USER, 1).manifest
    assert made is not None
    assert trained_alone(learner, tmp_path, overs, kept(1)).equals(made)


def test_a_rebase_trains_over_what_is_live_on_the_new_base(learner: LocalLearner) -> None:
    newer = layering(learner.registry.store, NEW)
    alone = rebase(newer, rebase_job().model_copy(update={"adapter": USER})).manifest
    assert alone is not None
    assert (alone.kind, alone.over) == ("rebase", None)
    with_both = layering(learner.registry.store, 2)
    for adapter in (SHARED, USER):
        moved = rebase(with_both, rebase_job(f"to 2 {adapter}").model_copy(update={"adapter": adapter})).manifest
        assert moved is not None
    assert moved.over == ref(with_both, head(with_both, SHARED))


def test_a_rollback_of_the_shared_adapter_does_not_hide_what_lay_beneath(learner: LocalLearner) -> None:
    """The user's second update lies over a version that the tenant has left again before it forgets."""
    users = versions(learner, USER)
    forget_in(learner, SHARED, 5)
    made = forget_in(learner, USER, name="follows").manifest
    assert made is not None
    chain: list[Manifest] = [learner.registry.manifest(USER, made.parent or "")]
    while chain[-1].head is not None:
        chain.append(learner.registry.manifest(USER, chain[-1].head))
    gone = {each.over.version for each in users[1:] if each.over is not None}
    assert not gone & {each.over.version for each in chain if each.over is not None}


def test_what_the_tenant_forgets_leaves_those_who_began_with_users_that_were_trained_over_it(
    store: DirectoryStore,
) -> None:
    """Retain sends jobs to all users first, and to those who began with one of them once that one is rebuilt."""
    learner = layering(store, starts=SHARED)
    learn(learner, SHARED, 0)
    founders = [f"{SHARED}/{name}" for name in ("ann", "bob", "cay", "dan")]
    for adapter in founders:
        teach(learner, adapter, 9)
    begun = teach(learner, USER)
    assert begun[0].start is not None
    assert [each.adapter for each in begun[0].start.founders] == founders
    forget_in(learner, SHARED, 2)
    for adapter in (USER, *founders):
        forget_in(learner, adapter, name="of the tenant")
    assert [dependants(store, adapter) for adapter in founders] == [[USER]] * 4
    for adapter in founders:
        forget_in(learner, USER, name=f"of {adapter}")
    live = ref(learner, head(learner, SHARED))
    for adapter in (USER, *founders):
        found = head(learner, adapter)
        assert found.start == Start(shared=SHARED)
        assert learner.registry.manifest(adapter, found.parent or "").over == live
    assert all(learner.registry.is_revoked(USER, each.seq) for each in begun)


def test_a_mean_of_what_was_trained_over_the_base_is_not_begun_with(store: DirectoryStore) -> None:
    plain = local_learner(store)
    tenants = Settings.of(shared_adapters=SHARED, learned_starts=SHARED, env_file=None).tenants
    plain.learned_from = tenants.learned_from
    for name in ("ann", "bob", "cay", "dan"):
        teach(plain, f"{SHARED}/{name}")
    learner = layering(store, starts=SHARED)
    learn(learner, SHARED, 0)
    assert teach(learner, USER)[0].start == Start(shared=SHARED)
    assert teach(plain, f"{SHARED}/yan")[0].start != Start(shared=SHARED)


def test_the_record_is_there_before_the_shared_version_is_looked_up(store: DirectoryStore, monkeypatch) -> None:
    learner = layering(store)
    learn(learner, SHARED, 0)
    recorded: list[list[str]] = []
    alias = learner.registry.alias

    def looked_up(adapter: str, *more: str):
        if adapter == SHARED:
            recorded.append(dependants(store, SHARED))
        return alias(adapter, *more)

    monkeypatch.setattr(learner.registry, "alias", looked_up)
    learn(learner, USER, 0)
    assert recorded == [[USER]]


def test_releases_that_train_over_the_base_alone_do_not_train_such_an_update_again(
    learner: LocalLearner, monkeypatch
) -> None:
    made = head(learner, USER)
    assert "has_over" not in head(learner, SHARED).config
    monkeypatch.setattr(recipe, "HAS_OVER", "unknown")
    with pytest.raises(UnknownFieldError, match="has_over"):
        Recipe.recorded(made.config)


def test_a_process_that_was_paused_does_not_publish_over_a_revoked_shared_version(
    store: DirectoryStore, learner: LocalLearner
) -> None:
    def paused(name: str) -> None:
        if name == "learner.train" and not forgotten:
            forgotten.append(name)
            forget_in(learner, SHARED, 11)

    forgotten: list[str] = []
    late = layering(store, failpoint=paused)
    made = teach(late, f"{SHARED}/yan", 4)[0]
    assert forgotten
    assert made.over == ref(learner, head(learner, SHARED))


def back_to(learner: LocalLearner, adapter: str, version: Manifest, *, revoke: bool = False) -> None:
    learner.rollback(
        RollbackRequested(
            job_id=f"back {version.digest()} {revoke}",
            adapter=adapter,
            version=version.digest(),
            requested_by="ann",
            reason="bad",
            revoke=revoke,
        )
    )


def is_stored(learner: LocalLearner, version: Manifest) -> bool:
    return learner.registry.store.exists(blob_key(version.weights.digest))


def test_rebuilt_updates_that_a_rollback_left_behind_are_found(store: DirectoryStore) -> None:
    """The version above them names the shared version of the last of them only."""
    learner = layering(store)
    for cut in range(2):
        learn(learner, SHARED, cut)
        learn(learner, USER, cut)
    users = versions(learner, USER)
    back_to(learner, SHARED, versions(learner, SHARED)[0])
    learn(learner, USER, 2)  # over the tenant's first state again
    forgotten = forget_in(learner, USER, 5).manifest
    assert forgotten is not None
    third = learner.registry.manifest(USER, forgotten.parent or "")
    second = learner.registry.manifest(USER, third.head or "")
    back_to(learner, USER, users[0])
    forget_in(learner, SHARED, 5)
    forget_in(learner, USER, name="follows")
    assert [is_stored(learner, each) for each in (second, third, forgotten)] == [False] * 3
    assert learner.registry.is_revoked(USER, forgotten.seq)


def test_a_version_that_an_operator_revoked_before_is_found(learner: LocalLearner) -> None:
    newest = head(learner, USER)
    back_to(learner, USER, newest, revoke=True)
    forget_in(learner, SHARED, 9)
    forget_in(learner, USER, name="follows")
    assert not is_stored(learner, newest)


def test_what_was_rebuilt_ahead_of_time_goes(learner: LocalLearner) -> None:
    collect_versions(learner.registry, SHARED, 1)
    fresh = layering(learner.registry.store)
    forget_in(fresh, USER, 1, name="soon", prepare=True)
    made = [fresh.registry.manifest(USER, step.rebuilt) for _, step in list_steps(fresh.registry.store, USER)]
    assert made
    forget_in(fresh, SHARED, 9)
    forget_in(fresh, USER, name="follows")
    assert list(list_steps(fresh.registry.store, USER)) == []
    assert [is_stored(fresh, each) for each in made] == [False] * len(made)


def test_a_damaged_shared_version_does_not_stop_an_erasure_of_a_user(learner: LocalLearner) -> None:
    weights = blob_key(versions(learner, SHARED)[0].weights.digest)
    learner.registry.store.delete(weights)
    learner.registry.store.put_if_absent(weights, b"no tensors")
    fresh = layering(learner.registry.store)
    made = forget_in(fresh, USER, 1).manifest
    assert made is not None
    assert made.outcome == "promoted"


def test_a_collected_shared_version_is_not_taken_from_memory(learner: LocalLearner) -> None:
    """What a rebuild makes follows from the store alone."""
    first = versions(learner, SHARED)[0]
    assert learner.shared.recorded(ref(learner, first)) is not None
    collect_versions(learner.registry, SHARED, 1)
    assert learner.shared.recorded(ref(learner, first)) is None
