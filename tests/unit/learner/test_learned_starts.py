"""A user's adapter begins with the mean of its siblings', and is rebuilt without it when one of them forgets."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from perennial.learner.model.lora import Tensors, from_safetensors, load_tensors
from perennial.learner.training import recipe
from perennial.learner.training.personal import learned_starts
from perennial.learner.training.personal.learned_starts import MIN_FOUNDERS
from perennial.learner.training.recipe import Recipe, UnknownFieldError
from perennial.learner.training.state import TrainingState
from perennial.learner.versions.job_result import JobResult
from perennial.storage.errors import NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.history.dependants import dependants
from perennial.storage.registry.manifest import Manifest, Start
from perennial.storage.registry.pending_deletes import load_pending_deletes
from perennial.storage.registry.quarantine import QuarantineEntry, update_quarantine
from perennial.streams.events.models import ExampleAccepted, ForgetRequested, RollbackRequested
from perennial.streams.settings import Settings
from tests import jobs, scratch, tiny
from tests.local_learner import LocalLearner
from tests.unit.learner.test_forgetting import UNTIL_MS, forget
from tests.unit.learner.test_rebase import NEW, rebase
from tests.unit.learner.test_rebase import job as rebase_job
from tests.unit.learner.test_versions import local_learner

SHARED = "acme/support"
NEWCOMER = f"{SHARED}/zoe"
FOUNDERS = [f"{SHARED}/{name}" for name in ("ann", "bob", "cay", "dan")]
STEPS = [
    "learner.forget_plan", "learner.forget_quarantine", "learner.forget_trained", "learner.forget_step",
    "learner.forget_replayed", "learner.forget_published", "learner.forget_deleted",
]  # fmt: skip


class StoppedError(Exception):
    """The process is killed here."""


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def starting(store: DirectoryStore, base: int = 0, **more: object) -> LocalLearner:
    """Return a learner as PERENNIAL_LEARNED_STARTS makes it."""
    learner = local_learner(store, base, **more)
    tenants = Settings.of(shared_adapters=SHARED, learned_starts=SHARED, env_file=None).tenants
    learner.extended_by, learner.learned_from = tenants.extended_by, tenants.learned_from
    return learner


def cuts_of(adapter: str, count: int = 8, per_cut: int = 4) -> dict[int, list[ExampleAccepted]]:
    who = adapter.rpartition("/")[2]
    made = [tiny.document(n, f"{who} secret{n:03d} parrots sing at noon", adapter) for n in range(count)]
    return {cut: made[cut * per_cut : (cut + 1) * per_cut] for cut in range(-(-count // per_cut))}


def teach(learner: LocalLearner, adapter: str, count: int = 8) -> list[Manifest]:
    store = learner.registry.store
    done = [
        learner.update(jobs.update(store, cut, examples, adapter=adapter), "live")
        for cut, examples in cuts_of(adapter, count).items()
    ]
    return [each.manifest for each in done if each.manifest is not None]


def forget_in(
    learner: LocalLearner, adapter: str, *numbers: int, name: str = "r1", failpoint=lambda _: None, **more: object
) -> JobResult:
    """Forget documents of an adapter; without numbers only look at its start, as for a follower."""
    store = learner.registry.store
    job = ForgetRequested(
        job_id=f"job {name} {adapter}", request_id=name, kind="erase", adapter=adapter, until_ms=UNTIL_MS,
        example_ids=[f"{n:032x}" for n in numbers], **more,
    )  # fmt: skip
    entry = QuarantineEntry(
        request_id=name, job_id=job.job_id, kind="erase", example_ids=job.example_ids, until_ms=UNTIL_MS, suppress=True
    )
    update_quarantine(store, adapter, lambda found: found.with_entry(entry))
    return forget(learner, job, failpoint)[0]


def head(learner: LocalLearner, adapter: str) -> Manifest:
    found = learner.registry.head(adapter)
    assert found is not None
    return found.manifest


def weights_of(learner: LocalLearner, manifest: Manifest) -> Tensors:
    return from_safetensors(get_blob(learner.registry.store, manifest.weights.digest), learner.updater.lora.shapes)


def trained_alone(
    learner: LocalLearner, tmp: Path, adapter: str, start: Tensors, cuts: Mapping[int, Sequence[ExampleAccepted]]
) -> scratch.Scratch:
    """Train an adapter by other code than the service's jobs, in a store of its own."""
    begins = TrainingState(start, adapter=adapter)
    return scratch.train(learner.updater, DirectoryStore(tmp / "oracle", fsync=False), adapter, cuts, begins)


def nothing_learned(learner: LocalLearner) -> Tensors:
    return learner.updater.lora.initial_weights(f"{SHARED}/*", learner.updater.recipe.seed)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose founders have learned nine examples each."""
    root = tmp_path_factory.mktemp("taught") / "store"
    made = starting(DirectoryStore(root, fsync=False))
    for adapter in FOUNDERS:
        teach(made, adapter, 9)
    return root


@pytest.fixture
def learner(taught: Path, store: DirectoryStore) -> LocalLearner:
    """A learner over a copy of that store."""
    shutil.copytree(taught, store.root, dirs_exist_ok=True)
    return starting(store)


def test_the_first_adapters_begin_with_one_a_and_b_zero(store: DirectoryStore, tmp_path: Path) -> None:
    learner = starting(store)
    first, last = teach(learner, FOUNDERS[0])
    assert first.start == last.start == Start(shared=SHARED)
    zero = nothing_learned(learner)
    assert trained_alone(learner, tmp_path, FOUNDERS[0], zero, cuts_of(FOUNDERS[0])).equals(last)
    tenants = learner.updater.lora.initial_weights(SHARED, learner.updater.recipe.seed)
    assert not torch.equal(next(iter(zero.values())), next(iter(tenants.values())))


def test_without_the_setting_nothing_has_a_start(store: DirectoryStore) -> None:
    learner = local_learner(store)
    assert [made.start for made in teach(learner, NEWCOMER)] == [None, None]
    shared_alone = starting(store)
    assert [made.start for made in teach(shared_alone, SHARED)] == [None, None]


def test_a_new_adapter_begins_with_the_mean_of_its_siblings(learner: LocalLearner, tmp_path: Path) -> None:
    parts = [weights_of(learner, head(learner, adapter)) for adapter in FOUNDERS]
    mean = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
    first, last = teach(learner, NEWCOMER)
    start = first.start
    assert start is not None
    assert start == last.start
    assert [founder.adapter for founder in start.founders] == FOUNDERS
    assert [founder.version for founder in start.founders] == [head(learner, each).digest() for each in FOUNDERS]
    assert start.weights is not None
    stored = from_safetensors(get_blob(learner.registry.store, start.weights.digest), learner.updater.lora.shapes)
    for name, tensor in mean.items():
        torch.testing.assert_close(stored[name], tensor)
    assert trained_alone(learner, tmp_path, NEWCOMER, stored, cuts_of(NEWCOMER)).equals(last)
    assert [dependants(learner.registry.store, adapter) for adapter in FOUNDERS] == [[NEWCOMER]] * 4


def test_too_few_siblings_give_no_start(store: DirectoryStore) -> None:
    learner = starting(store)
    for adapter in FOUNDERS[: MIN_FOUNDERS - 1]:
        teach(learner, adapter)
    assert teach(learner, NEWCOMER)[0].start == Start(shared=SHARED)
    assert dependants(learner.registry.store, FOUNDERS[0]) == []


def unable_little(learner: LocalLearner) -> str:
    teach(learner, f"{SHARED}/eve", 4)
    return f"{SHARED}/eve"


def unable_old(learner: LocalLearner) -> str:
    """An adapter from before the setting, with an A of its own."""
    teach(local_learner(learner.registry.store), f"{SHARED}/eve")
    return f"{SHARED}/eve"


def unable_learned(learner: LocalLearner) -> str:
    teach(learner, f"{SHARED}/eve")
    return f"{SHARED}/eve"


def unable_seed(learner: LocalLearner) -> str:
    teach(starting(learner.registry.store, seed=9), f"{SHARED}/eve")
    return f"{SHARED}/eve"


def unable_retired(learner: LocalLearner) -> str:
    assert learner.registry.retire(FOUNDERS[0], "live", "unused", head(learner, FOUNDERS[0]).digest())
    return FOUNDERS[0]


def unable_revoked(learner: LocalLearner) -> str:
    learner.registry.revoke(FOUNDERS[0], head(learner, FOUNDERS[0]).digest(), "bad")
    return FOUNDERS[0]


def unable_damaged(learner: LocalLearner) -> str:
    weights = blob_key(head(learner, FOUNDERS[0]).weights.digest)
    learner.registry.store.delete(weights)
    learner.registry.store.put_if_absent(weights, b"no tensors")
    return FOUNDERS[0]


@pytest.mark.parametrize(
    "unable",
    [unable_little, unable_old, unable_learned, unable_seed, unable_retired, unable_revoked, unable_damaged],
)
def test_who_is_not_learned_from(learner: LocalLearner, unable) -> None:
    left_out = unable(learner)
    start = teach(learner, NEWCOMER)[0].start
    assert start is not None
    assert left_out not in [founder.adapter for founder in start.founders]
    assert len(start.founders) == (4 if left_out not in FOUNDERS else 0)


def test_no_more_than_some_siblings_are_averaged_or_looked_at(learner: LocalLearner, monkeypatch) -> None:
    with monkeypatch.context() as many:
        many.setattr(learned_starts, "MIN_FOUNDERS", 99)  # all of these begin with nothing learned
        for name in ("cat", "daf", "eve"):
            teach(learner, f"{SHARED}/{name}")
    names = [*FOUNDERS[:2], f"{SHARED}/cat", FOUNDERS[2], f"{SHARED}/daf", FOUNDERS[3], f"{SHARED}/eve"]
    monkeypatch.setattr(learned_starts, "MAX_FOUNDERS", 5)
    start = teach(learner, f"{SHARED}/cow")[0].start
    assert start is not None
    following = [each for each in sorted(names) if each > f"{SHARED}/cow"]
    assert [each.adapter for each in start.founders] == [*following, *sorted(names)][:5]
    monkeypatch.setattr(learned_starts, "MAX_LOOKED_AT", 3)
    assert teach(learner, f"{SHARED}/cox")[0].start == Start(shared=SHARED)


def test_what_a_founder_forgets_leaves_those_who_began_with_it(learner: LocalLearner, tmp_path: Path) -> None:
    before = teach(learner, NEWCOMER)
    store, begun = learner.registry.store, before[0].start
    assert begun is not None
    assert begun.weights is not None
    assert forget_in(learner, FOUNDERS[1], 5).outcome == "promoted"
    done = forget_in(learner, NEWCOMER, name="follows")
    made = done.manifest
    assert made is not None
    assert (made.kind, made.outcome, made.start) == ("forget", "promoted", Start(shared=SHARED))
    assert trained_alone(learner, tmp_path, NEWCOMER, nothing_learned(learner), cuts_of(NEWCOMER)).equals(made)
    assert all(learner.registry.is_revoked(NEWCOMER, version.seq) for version in before)
    for ref in (begun.weights, *(version.weights for version in before), *(v.optimizer for v in before)):
        assert ref is not None
        with pytest.raises(NotFoundError):
            get_blob(store, ref.digest)
    assert dependants(store, FOUNDERS[1]) == [NEWCOMER], "another request may be about to look who depends on it"
    assert forget_in(learner, NEWCOMER, name="another").manifest is None
    state = learner.registry.alias(NEWCOMER)
    assert state is not None
    assert (state.version, state.generation) == (made.digest(), 3)
    outcome = done.completion.outcomes["follows"] if done.completion else None
    assert outcome is not None
    assert (outcome.generation, outcome.failure) == (3, "")


def test_everything_is_found_out_of_service_at_once_in_an_emergency(learner: LocalLearner) -> None:
    teach(learner, NEWCOMER)
    forget_in(learner, FOUNDERS[1], 5, emergency=True)
    done = forget_in(learner, NEWCOMER, name="follows", emergency=True)
    assert done.manifest is not None
    assert done.manifest.start == Start(shared=SHARED)
    kinds = [v.kind for v in versions(learner, NEWCOMER)]
    assert kinds == ["update", "update", "quarantine", "forget"]


def versions(learner: LocalLearner, adapter: str) -> list[Manifest]:
    made: list[Manifest] = []
    version: str | None = head(learner, adapter).digest()
    while version is not None:
        made.append(learner.registry.manifest(adapter, version))
        version = made[-1].head
    return made[::-1]


@pytest.mark.parametrize("step", STEPS)
def test_a_follower_that_is_killed_anywhere_ends_in_the_same_state(
    learner: LocalLearner, tmp_path: Path, step: str
) -> None:
    before = teach(learner, NEWCOMER)
    forget_in(learner, FOUNDERS[1], 5)

    def killed(name: str) -> None:
        if name == step:
            raise StoppedError

    with pytest.raises(StoppedError):
        forget_in(learner, NEWCOMER, name="follows", failpoint=killed)
    again = starting(learner.registry.store)
    done = forget_in(again, NEWCOMER, name="follows")
    made = head(again, NEWCOMER)
    assert made.start == Start(shared=SHARED)
    assert trained_alone(again, tmp_path, NEWCOMER, nothing_learned(again), cuts_of(NEWCOMER)).equals(made)
    assert all(again.registry.is_revoked(NEWCOMER, version.seq) for version in before)
    assert not again.registry.store.exists(blob_key(before[0].weights.digest))
    assert before[0].start is not None
    assert before[0].start.weights is not None
    assert not again.registry.store.exists(blob_key(before[0].start.weights.digest))
    assert done.completion is not None


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_follower_whose_start_is_fine_or_that_has_no_version_is_done_at_once(
    learner: LocalLearner, forgotten: bool
) -> None:
    if forgotten:
        forget_in(learner, FOUNDERS[1], 5)
    teach(learner, NEWCOMER)
    before = head(learner, NEWCOMER)
    for adapter in (NEWCOMER, f"{SHARED}/yan"):
        done = forget_in(learner, adapter, name="follows")
        assert (done.outcome, done.manifest) == ("unchanged", None)
        assert done.completion is not None
    assert head(learner, NEWCOMER) == before
    assert before.start is not None
    assert len(before.start.founders) == 4
    assert dependants(learner.registry.store, FOUNDERS[1]) == [NEWCOMER]


def test_an_adapter_that_forgets_something_of_its_own_keeps_its_start(learner: LocalLearner, tmp_path: Path) -> None:
    first, _ = teach(learner, NEWCOMER)
    assert first.start is not None
    assert first.start.weights is not None
    mean = load_tensors(get_blob(learner.registry.store, first.start.weights.digest))
    made = forget_in(learner, NEWCOMER, 2).manifest
    assert made is not None
    kept = {cut: [e for e in each if e.origin.offset != 2] for cut, each in cuts_of(NEWCOMER).items()}
    assert made.start == first.start
    assert trained_alone(learner, tmp_path, NEWCOMER, mean, kept).equals(made)


def test_an_adapter_that_forgets_all_begins_with_nothing_learned(learner: LocalLearner, tmp_path: Path) -> None:
    teach(learner, NEWCOMER)
    forget_in(learner, NEWCOMER, *range(8))
    assert head(learner, NEWCOMER).start == Start(shared=SHARED)
    assert learner.registry.alias(NEWCOMER).kind == "retired"
    later = [tiny.document(n, f"zoe learns {n} again", NEWCOMER) for n in range(8, 12)]
    made = learner.update(jobs.update(learner.registry.store, 2, later, adapter=NEWCOMER), "live").manifest
    assert made is not None
    assert trained_alone(learner, tmp_path, NEWCOMER, nothing_learned(learner), {2: later}).equals(made)


def test_an_adapter_that_was_rebuilt_without_its_start_is_learned_from(learner: LocalLearner) -> None:
    teach(learner, NEWCOMER)
    forget_in(learner, FOUNDERS[1], 5)
    forget_in(learner, NEWCOMER, name="follows")
    start = teach(learner, f"{SHARED}/yan")[0].start
    assert start is not None
    assert NEWCOMER in [founder.adapter for founder in start.founders]


def test_two_adapters_with_one_start_share_no_blob(store: DirectoryStore, learner: LocalLearner) -> None:
    """Blobs are deleted adapter by adapter; also a first update that the gate refused stores the state it began with."""
    strict = starting(store, min_gain_nats=50)
    made = [teach(strict, f"{SHARED}/{name}")[0] for name in ("xia", "yan")]
    assert [each.outcome for each in made] == ["refused", "refused"]
    assert made[0].start is not None
    assert made[1].start is not None
    assert [f.version for f in made[0].start.founders] == [f.version for f in made[1].start.founders]
    one, two = ({ref.digest for ref in each.blobs() if ref != each.general} for each in made)
    assert not one & two
    new = DirectoryStore(store.root.parent / "fresh", fsync=False)
    bare = [teach(starting(new, min_gain_nats=50), f"{SHARED}/{name}")[0] for name in ("xia", "yan")]
    assert not {ref.digest for ref in bare[0].blobs()} & {ref.digest for ref in bare[1].blobs()}


def test_a_rollback_keeps_the_start_and_a_rebase_drops_what_was_learned(learner: LocalLearner) -> None:
    first, last = teach(learner, NEWCOMER)
    learner.rollback(
        RollbackRequested(
            job_id="b1", adapter=NEWCOMER, version=first.digest(), live=last.digest(), requested_by="ann", reason="bad"
        )
    )
    assert (head(learner, NEWCOMER).kind, head(learner, NEWCOMER).start) == ("rollback", first.start)
    newer = starting(learner.registry.store, NEW)
    made = rebase(newer, rebase_job().model_copy(update={"adapter": NEWCOMER})).manifest
    assert made is not None
    assert (made.kind, made.start) == ("rebase", Start(shared=SHARED))
    zero = newer.initial_state(NEWCOMER, newer.updater.recipe.seed, made.start).weights
    assert torch.equal(next(iter(zero.values())), next(iter(nothing_learned(newer).values())))


def test_a_first_update_that_was_killed_does_not_bring_a_forgotten_start_back(
    store: DirectoryStore, learner: LocalLearner
) -> None:
    def killed(name: str) -> None:
        if name == "publish.claim_update":
            raise StoppedError

    dying = starting(store, failpoint=killed)
    with pytest.raises(StoppedError):
        teach(dying, NEWCOMER)
    forget_in(learner, FOUNDERS[1], 5)
    assert forget_in(learner, NEWCOMER, name="follows").outcome == "unchanged"
    start = teach(learner, NEWCOMER)[0].start
    assert start is not None
    assert len(start.founders) == 4
    assert not [f for f in start.founders if learner.registry.is_revoked(f.adapter, f.seq)]


def test_releases_that_know_no_starts_do_not_train_such_an_update_again(learner: LocalLearner, monkeypatch) -> None:
    """They would begin with another A, and pass on a start that they do not look at."""
    made = teach(learner, NEWCOMER)[0]
    assert "has_start" not in teach(local_learner(learner.registry.store), "acme/sales")[0].config
    monkeypatch.setattr(recipe, "HAS_START", "unknown")
    with pytest.raises(UnknownFieldError, match="has_start"):
        Recipe.recorded(made.config)


def test_a_process_that_was_paused_does_not_publish_over_what_was_revoked_meanwhile(
    store: DirectoryStore, learner: LocalLearner
) -> None:
    """Its job was given to another process, which ended it without a version; the follower found no version either."""

    def paused(name: str) -> None:
        if name == "learner.train" and not forgotten:
            forgotten.append(name)
            forget_in(learner, FOUNDERS[1], 5)
            forget_in(learner, NEWCOMER, name="follows")

    forgotten: list[str] = []
    late = starting(store, failpoint=paused)
    made = teach(late, NEWCOMER, 4)[0]
    assert forgotten
    assert made.start is not None
    assert len(made.start.founders) == 4
    assert not [each for each in made.start.founders if learner.registry.is_revoked(each.adapter, each.seq)]


def test_what_an_attempt_left_of_an_update_that_is_then_refused_is_deleted(
    store: DirectoryStore, learner: LocalLearner
) -> None:
    def killed(name: str) -> None:
        if name == "publish.blobs":
            raise StoppedError

    job = jobs.update(store, 0, cuts_of(NEWCOMER)[0], adapter=NEWCOMER)
    with pytest.raises(StoppedError):
        starting(store, failpoint=killed).update(job, "live")
    left = load_pending_deletes(store, NEWCOMER, job.job_id)
    assert left is not None
    assert len([digest for digest in left.digests if store.exists(blob_key(digest))]) >= 3
    learner.refused(job)
    held = [digest for digest in left.digests if store.exists(blob_key(digest))]
    assert held in ([], [job.batch.digest])
    assert store.exists(blob_key(job.batch.digest))


@pytest.mark.parametrize("key", ["zz@Bad=x", "zoe/0", "Zz", "zed"])
def test_odd_names_beside_the_siblings_stop_nobody(learner: LocalLearner, key: str) -> None:
    learner.registry.store.put_if_absent(f"adapters/{SHARED}/{key}", b"{}")
    start = teach(learner, NEWCOMER, 4)[0].start
    assert start is not None
    assert len(start.founders) == 4


def test_a_mean_that_is_not_finite_is_not_begun_with(learner: LocalLearner, monkeypatch) -> None:
    monkeypatch.setattr(
        learned_starts,
        "from_safetensors",
        lambda _, shapes: {name: torch.full(shape, 3e38) for name, shape in shapes.items()},
    )
    assert teach(learner, NEWCOMER, 4)[0].start == Start(shared=SHARED)
