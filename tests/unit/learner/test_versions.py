"""Update and rollback jobs over a directory store: learned once, repeatable, refused without harm, rolled back."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from perennial.learner.bases.compute_dtype import DTYPES
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.general_text import GeneralText
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.tokenization import ExampleTokenizer
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.replay_buffer import index_from_bytes
from perennial.learner.training.update import Updater
from perennial.learner.versions.job_result import JobError
from perennial.storage.errors import ConflictError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.storage.registry.history.update_costs import costs_key, load_costs
from perennial.storage.registry.registry import Registry
from perennial.streams.events.adapter_events import AdapterPromoted, AdapterRolledBack
from perennial.streams.events.models import ExampleAccepted, RollbackRequested, UpdateRequested
from perennial.streams.settings import Settings
from tests import jobs, tiny
from tests.local_learner import LocalLearner, same_text_key

ADAPTER = "acme/support"
SETTINGS = Settings.of(
    rank=4, alpha=8, learning_rate=5e-3, steps=2, rows=4, row_tokens=32, anchor_rows=2, max_general_rise_nats=50,
    min_gain_nats=-50, replay_size=64,
)  # fmt: skip
GENERAL = [f"plain words number {number}" for number in range(6)]
_serial = itertools.count()


def local_learner(
    store: ObjectStore, base_seed: int = 0, failpoint: Callable[[str], None] | None = None, **more: Any
) -> LocalLearner:
    make_deterministic(1)
    settings = SETTINGS.replace(**more)
    base = tiny.base(base_seed)
    codec = ExampleTokenizer(base.tokenizer)
    registry = Registry(store, nonce=lambda: f"n{next(_serial)}", now=now, failpoint=failpoint or (lambda _: None))
    updater = Updater(
        Lora(base, LoraConfig(settings.training.rank, settings.training.alpha)), codec,
        GeneralText(GENERAL, GENERAL, codec, settings.training.row_tokens),
        Recipe.of(settings, DTYPES.get(settings.model.dtype)), shared=GatheredPasses(),
    )  # fmt: skip
    return LocalLearner(registry, updater, base, threads=1, now=now, failpoint=failpoint or (lambda _: None))


def now() -> datetime:
    return datetime.now(UTC)


def documents(*numbers: int) -> list[ExampleAccepted]:
    return [tiny.document(n, f"the blue parrot {n} sings at noon") for n in numbers]


def job(store: ObjectStore, cut: int, *numbers: int, **more: Any) -> UpdateRequested:
    return jobs.update(store, cut, documents(*numbers), **more)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def test_an_update_makes_a_version_with_a_complete_manifest(store: DirectoryStore) -> None:
    learner = local_learner(store)
    done = learner.update(job(store, 1, 0, 1, 2, 3), "live")
    assert done.outcome == "promoted"
    manifest, event = done.manifest, done.event
    assert manifest is not None
    assert isinstance(event, AdapterPromoted)
    assert [example.offset for example in manifest.learned] == [0, 1, 2, 3]
    assert manifest.marks == {tiny.origin(0).partition_key(): 3}
    assert (manifest.seq, manifest.parent, manifest.head) == (1, None, None)
    assert manifest.base_sha256 == learner.base.digest
    assert (manifest.published_from_ms, manifest.published_to_ms) == (1_700_000_000_000, 1_700_000_000_003)
    assert "torch" in manifest.code
    assert manifest.config["learning_rate"] == 5e-3
    assert (event.version, event.generation, event.learned.examples) == (manifest.digest(), 1, 4)
    assert event.weights_uri.endswith(blob_key(manifest.weights.digest))
    assert list(event.stage_at) == ["published", "cut", "received", "trained", "promoted"]
    assert done.stage_s.keys() == {"load", "train", "publish"}


def test_an_update_records_what_it_cost_beside_its_manifest(store: DirectoryStore) -> None:
    learner = local_learner(store)
    for cut, numbers in ((1, (0, 1, 2, 3)), (2, (4, 5))):
        done = learner.update(job(store, cut, *numbers), "live")
        assert done.manifest is not None
        recorded = load_costs(store, ADAPTER).updates
        assert recorded[-1] == done.cost
        assert (recorded[-1].version, recorded[-1].seq) == (done.manifest.digest(), cut)
        assert recorded[-1].tokens == done.manifest.tokens
        assert recorded[-1].device == "cpu"
        assert min(recorded[-1].training_flops, recorded[-1].measuring_flops, recorded[-1].seconds) > 0
    again = learner.update(job(store, 2, 4, 5), "live")
    assert (again.outcome, again.cost) == ("repeated", None)
    assert [cost.seq for cost in load_costs(store, ADAPTER).updates] == [1, 2]


def test_a_cost_that_cannot_be_recorded_fails_no_update(
    store: DirectoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.compare_and_swap(costs_key(ADAPTER), b"damaged", None)
    done = local_learner(store).update(job(store, 1, 0, 1), "live")
    assert done.outcome == "promoted"
    assert done.cost is not None
    assert "the cost of version 1 of acme/support is not recorded" in caplog.text


def test_each_version_follows_the_one_before(store: DirectoryStore) -> None:
    learner = local_learner(store)
    first = learner.update(job(store, 1, 0, 1), "live").manifest
    second = learner.update(job(store, 2, 2, 3), "live").manifest
    assert first is not None
    assert second is not None
    assert (second.parent, second.head, second.seq) == (first.digest(), first.digest(), 2)
    assert second.replay is not None
    kept = index_from_bytes(get_blob(store, second.replay.digest))
    assert [int(entry.example_id, 16) for entry in kept] == [0, 1, 2, 3]
    assert len({entry.batch for entry in kept}) == 2
    assert second.gate.replayed_rows > 0


def test_a_redelivered_job_is_not_learned_again_but_published_again(store: DirectoryStore) -> None:
    learner = local_learner(store)
    request = job(store, 1, 0, 1, 2, 3)
    first = learner.update(request, "live")
    for other in (learner, local_learner(store)):
        again = other.update(request, "live")
        assert (again.outcome, again.manifest) == ("repeated", None)
        assert again.event is not None
        assert again.event.model_copy(update={"stage_at": first.event.stage_at}) == first.event
    assert len(list(learner.registry.versions(ADAPTER))) == 1


def test_only_examples_above_the_high_water_marks_are_learned(store: DirectoryStore) -> None:
    learner = local_learner(store)
    learner.update(job(store, 1, 0, 1, 2), "live")
    manifest = learner.update(job(store, 2, 1, 2, 3, 4), "live").manifest
    assert manifest is not None
    assert [example.offset for example in manifest.learned] == [3, 4]
    assert manifest.dropped == 2


def version_of(root: Path) -> str:
    """Return the version that two jobs make in a new store and a new process."""
    store = DirectoryStore(root, fsync=False)
    same_text_key(store)
    learner = local_learner(store)
    learner.update(job(store, 1, 0, 1, 2, 3, 4), "live")
    done = learner.update(job(store, 2, 5, 6, 7, 8), "live")
    assert done.manifest is not None
    return done.manifest.digest()


def test_the_same_jobs_give_the_same_version_in_two_processes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.unit.learner.test_versions import version_of;"
        "print(version_of(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "other")]
    root = Path(__file__).parents[3]
    out = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, check=True).stdout
    assert out.strip() == version_of(tmp_path / "here")


def test_a_restart_between_jobs_changes_no_byte(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "restarted", fsync=False)
    same_text_key(store)
    local_learner(store).update(job(store, 1, 0, 1, 2, 3, 4), "live")
    done = local_learner(store).update(job(store, 2, 5, 6, 7, 8), "live")
    assert done.manifest is not None
    assert done.manifest.digest() == version_of(tmp_path / "straight")


def test_a_refused_version_is_recorded_and_the_next_one_starts_from_its_parent(store: DirectoryStore) -> None:
    learner = local_learner(store)
    good = learner.update(job(store, 1, 0, 1, 2, 3), "live").manifest
    strict = local_learner(store, min_gain_nats=50.0)
    refused = strict.update(job(store, 2, 4, 5, 6, 7), "live")
    assert good is not None
    assert refused.manifest is not None
    assert (refused.outcome, refused.manifest.reason, refused.event) == ("refused", "no-gain", None)
    assert refused.manifest.gate.reason == "no-gain"
    assert refused.manifest.weights == good.weights
    assert refused.manifest.optimizer == good.optimizer
    assert [(skip.offset, skip.reason) for skip in refused.manifest.skipped] == [(n, "no-gain") for n in (4, 5, 6, 7)]
    assert learner.registry.alias(ADAPTER).version == good.digest()
    after = learner.update(job(store, 3, 8, 9, 10, 11), "live").manifest
    assert after is not None
    assert (after.outcome, after.seq, after.parent) == ("promoted", 3, good.digest())
    assert after.head == refused.manifest.digest()
    assert learner.registry.alias(ADAPTER).version == after.digest()


def test_a_first_version_that_is_refused_leaves_a_state_to_start_from(store: DirectoryStore) -> None:
    refused = local_learner(store, min_gain_nats=50.0).update(job(store, 1, 0, 1, 2, 3), "live")
    assert refused.outcome == "refused"
    assert local_learner(store).registry.alias(ADAPTER) is None
    after = local_learner(store).update(job(store, 2, 4, 5), "live").manifest
    assert after is not None
    assert (after.outcome, after.seq, after.parent) == ("promoted", 2, None)


def test_a_cut_without_anything_to_learn_moves_only_the_high_water_marks(store: DirectoryStore) -> None:
    learner = local_learner(store)
    first = learner.update(job(store, 1, 0, 1), "live").manifest
    signal = tiny.document(2, "x").model_copy(update={"learn": False, "kind": "turn"})
    done = learner.update(jobs.update(store, 2, [signal], skipped=[3], high_water_mark=4), "live")
    assert first is not None
    assert done.manifest is not None
    assert (done.outcome, done.event, done.manifest.tokens) == ("unchanged", None, 0)
    assert [(skip.offset, skip.reason) for skip in done.manifest.skipped] == [(3, "duplicate"), (2, "signal")]
    assert done.manifest.marks == {tiny.origin(0).partition_key(): 4}
    assert done.manifest.weights == first.weights
    assert learner.registry.alias(ADAPTER).version == first.digest()


def test_erased_micro_batches_are_not_replayed_and_are_counted(store: DirectoryStore) -> None:
    first = job(store, 1, 0, 1, 2, 3)
    local_learner(store).update(first, "live")
    store.delete(blob_key(first.batch.digest))
    learner = local_learner(store)
    manifest = learner.update(job(store, 2, 4, 5, 6, 7), "live").manifest
    assert manifest is not None
    assert manifest.outcome == "promoted"
    assert manifest.gate.replay_missing > 0
    assert manifest.gate.replayed_rows == 0


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("missing-batch", lambda store, request: store.delete(blob_key(request.batch.digest)) and request),
        ("wrong-adapter", lambda _, request: request.model_copy(update={"adapter": "other/one"})),
        ("wrong-adapter", lambda _, request: request.model_copy(update={"cut": 9})),
        ("bad-batch", lambda store, request: jobs.with_batch(store, request, b'{"adapter": 1}')),
    ],
)
def test_an_invalid_job_is_refused_and_changes_nothing(
    store: DirectoryStore, reason: str, spoil: Callable[..., UpdateRequested]
) -> None:
    learner = local_learner(store)
    with pytest.raises(JobError) as caught:
        learner.update(spoil(store, job(store, 1, 0, 1)), "live")
    assert caught.value.reason == reason
    assert learner.registry.head(ADAPTER) is None
    assert learner.registry.head("other/one") is None


def test_an_adapter_never_meets_another_base(store: DirectoryStore) -> None:
    local_learner(store).update(job(store, 1, 0, 1), "live")
    other = local_learner(store, base_seed=1)
    with pytest.raises(JobError, match="another base") as caught:
        other.update(job(store, 2, 2, 3), "live")
    assert caught.value.reason == "base-mismatch"
    with pytest.raises(JobError) as caught:
        local_learner(store, rank=2).update(job(store, 2, 2, 3), "live")
    assert caught.value.reason == "rank-mismatch"


STEPS = [
    "learner.load", "learner.train", "publish.blobs", "publish.verify", "publish.manifest", "publish.claim_update",
    "publish.claim_seq", "publish.gate", "publish.alias", "learner.publish",
]  # fmt: skip


class CutOffError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_update_makes_the_same_version_once(tmp_path: Path, step: str) -> None:
    store, straight = (DirectoryStore(tmp_path / name, fsync=False) for name in ("cut", "straight"))
    same_text_key(store, straight)

    def dies(name: str) -> None:
        if name == step:
            raise CutOffError

    with pytest.raises(CutOffError):
        local_learner(store, failpoint=dies).update(job(store, 1, 0, 1, 2, 3), "live")
    done = local_learner(store).update(job(store, 1, 0, 1, 2, 3), "live")
    want = local_learner(straight).update(job(straight, 1, 0, 1, 2, 3), "live")
    assert done.event is not None
    assert want.event is not None
    assert (done.event.version, done.event.generation) == (want.event.version, 1)
    learner = local_learner(store).registry
    assert [version for _, version in learner.versions(ADAPTER)] == [want.event.version]
    assert learner.alias(ADAPTER).version == want.event.version


def test_a_learner_whose_head_is_stale_starts_over(store: DirectoryStore) -> None:
    slow, fast = local_learner(store), local_learner(store)
    slow.update(job(store, 1, 0, 1), "live")
    intruded = []

    def meanwhile(name: str) -> None:
        if name == "learner.train" and not intruded:
            intruded.append(fast.update(job(store, 2, 2, 3), "live"))

    done = local_learner(store, failpoint=meanwhile).update(job(store, 3, 2, 3, 4, 5), "live")
    assert done.manifest is not None
    assert [example.offset for example in done.manifest.learned] == [4, 5]
    assert done.manifest.seq == 3
    assert done.manifest.dropped == 2


def test_two_learners_with_the_same_job_make_one_version(store: DirectoryStore) -> None:
    request = job(store, 1, 0, 1, 2, 3)
    twins = []

    def meanwhile(name: str) -> None:
        if name == "learner.train" and not twins:
            twins.append(local_learner(store).update(request, "live"))

    done = local_learner(store, failpoint=meanwhile).update(request, "live")
    assert done.manifest == twins[0].manifest
    assert done.event.generation == twins[0].event.generation == 1


def test_endless_races_end(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = local_learner(store)
    monkeypatch.setattr(learner.registry, "publish", lambda *_: (_ for _ in ()).throw(ConflictError("faster")))
    with pytest.raises(ConflictError, match="in a row"):
        learner.update(job(store, 1, 0, 1), "live")


def rollback(job_id: str, version: str | None = None) -> RollbackRequested:
    return RollbackRequested(job_id=job_id, adapter=ADAPTER, version=version, requested_by="ann", reason="worse")


def test_a_rollback_serves_the_version_before_and_keeps_the_high_water_marks(store: DirectoryStore) -> None:
    learner = local_learner(store)
    first = learner.update(job(store, 1, 0, 1), "live").manifest
    second = learner.update(job(store, 2, 2, 3), "live").manifest
    done = learner.rollback(rollback("r1"))
    assert first is not None
    assert second is not None
    assert done.manifest is not None
    assert isinstance(done.event, AdapterRolledBack)
    assert (done.manifest.kind, done.manifest.parent, done.manifest.reason) == ("rollback", first.digest(), "worse")
    assert done.manifest.weights == first.weights
    assert done.manifest.marks == second.marks
    assert done.event.weights_sha256 == first.weights.digest
    assert done.event.previous_version == second.digest()
    again = learner.rollback(rollback("r1"))
    assert (again.outcome, again.event) == ("repeated", done.event)
    third = learner.update(job(store, 3, 4, 5), "live").manifest
    assert third is not None
    assert third.parent == done.manifest.digest()
    assert third.replay is not None
    kept = index_from_bytes(get_blob(store, third.replay.digest))
    assert [int(entry.example_id, 16) for entry in kept] == [0, 1, 4, 5]


def test_rolling_back_twice_goes_back_further(store: DirectoryStore) -> None:
    learner = local_learner(store)
    manifests = [learner.update(job(store, cut, 2 * cut, 2 * cut + 1), "live").manifest for cut in (1, 2, 3)]
    weights = [manifest.weights for manifest in manifests if manifest]
    assert learner.rollback(rollback("r1")).manifest.weights == weights[1]
    assert learner.rollback(rollback("r2")).manifest.weights == weights[0]
    with pytest.raises(JobError, match="live before"):
        learner.rollback(rollback("r3"))
    named = learner.rollback(rollback("r4", manifests[2].digest()))
    assert named.manifest.weights == weights[2]


def test_a_version_that_cannot_be_rolled_back_to_is_refused(store: DirectoryStore) -> None:
    learner = local_learner(store)
    with pytest.raises(JobError, match="no version"):
        learner.rollback(rollback("r0"))
    first = learner.update(job(store, 1, 0, 1), "live").manifest
    refused = local_learner(store, min_gain_nats=50.0).update(job(store, 2, 2, 3), "live").manifest
    learner.update(job(store, 3, 4, 5), "live")
    learner.registry.revoke(ADAPTER, first.digest(), "leak")
    for version, reason in (
        ("sha256:" + "0" * 64, "unknown-version"), (refused.digest(), "not-promoted"),
        (first.digest(), "revoked-version"), (None, "nothing-to-roll-back-to"),
    ):  # fmt: skip
        with pytest.raises(JobError) as caught:
            learner.rollback(rollback(f"r {version}", version))
        assert caught.value.reason == reason
