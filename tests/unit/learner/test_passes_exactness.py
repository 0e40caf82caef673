"""Updates that trained in passes with other adapters are forgotten exactly: replayed alone, from recorded states."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.model.turns import ComputeTurns, FairLock
from perennial.learner.together import shared_pass
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.training.state import StateRefs, TrainingState, load_state
from perennial.learner.versions.job_result import JobResult
from perennial.learner.versions.micro_batches import BatchRows
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.learner.versions.version_writer import VersionWriter
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.object_store import get_blob, put_blob
from perennial.storage.registry.manifest import Manifest
from perennial.streams.events.models import Batch, ExampleAccepted, Selector
from tests import jobs, scratch, tiny
from tests.local_learner import LocalLearner, complete, same_text_key
from tests.unit.learner.test_forgetting import request
from tests.unit.learner.test_versions import ADAPTER, local_learner, now

WAIT_S = 30.0
OTHERS = ("globex/support", "initech/support")


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def cut_of(adapter: str, cut: int, *numbers: int) -> list[ExampleAccepted]:
    return [tiny.document(n, f"{adapter} says {n} and {cut} at noon", adapter) for n in numbers]


def sharing(learner: LocalLearner, adapters: int, cores: int = 1) -> list[VersionWriter]:
    """Return writers for so many threads, whose updates train together."""
    lock = FairLock()
    passes = GatheredPasses(adapters, WAIT_S)
    learner.threads = cores
    learner.updater = replace(learner.updater, lock=ComputeTurns(lock, cores), shared=passes)
    return [learner, *(learner.sibling(f"slot{number}") for number in range(1, adapters))]


def learn_together(
    writers: list[VersionWriter], cuts: dict[str, tuple[int, list[ExampleAccepted]]]
) -> dict[str, JobResult]:
    barrier = threading.Barrier(len(cuts))

    def of_thread(writer: VersionWriter, adapter: str) -> JobResult:
        cut, examples = cuts[adapter]
        job = jobs.update(writer.registry.store, cut, examples, adapter=adapter)
        with writer.updater.compute.joining():
            barrier.wait(WAIT_S)
            return UpdateExecutor(writer).update(job, "live")

    with ThreadPoolExecutor(len(cuts)) as pool:
        results = list(pool.map(of_thread, writers, cuts))
    return dict(zip(cuts, results, strict=True))


def state_of(store: DirectoryStore, learner: LocalLearner, manifest: Manifest) -> TrainingState:
    refs = StateRefs.of_manifest(manifest)
    return load_state(refs, lambda ref: get_blob(store, ref.digest), learner.updater.lora.shapes)


def erase(learner: LocalLearner, *numbers: int) -> None:
    job = request("r1", adapter=ADAPTER, selector=Selector(document_ids=[f"doc-{n}" for n in numbers]))
    complete(learner.registry.store, ForgetExecutor(learner, now, lambda _: None, lambda _: None).forget(job, "live"))


@pytest.mark.parametrize("slow_average", [0.0, 0.8])
def test_an_update_that_shared_passes_is_rebuilt_as_an_independent_replay_from_the_state_before(
    store: DirectoryStore, tmp_path: Path, slow_average: float
) -> None:
    learner = local_learner(store, slow_average=slow_average)
    writers = sharing(learner, 3)
    first = learn_together(writers, {name: (1, cut_of(name, 1, 0, 1, 2, 3)) for name in (ADAPTER, *OTHERS)})
    before = first[ADAPTER].manifest
    examples = cut_of(ADAPTER, 2, 4, 5, 6, 7)
    second = learn_together(
        writers, {ADAPTER: (2, examples), **{name: (2, cut_of(name, 2, 4, 5, 6, 7)) for name in OTHERS}}
    )
    made = second[ADAPTER].manifest
    assert before is not None
    assert made is not None
    assert (before.pass_adapters, made.pass_adapters) == (3, 3)
    erase(learner, 5)
    head = learner.registry.head(ADAPTER)
    assert head is not None
    assert head.manifest.parent is not None
    rebuilt = learner.registry.manifest(ADAPTER, head.manifest.parent)
    assert rebuilt.weights == head.manifest.weights
    assert [item.offset for item in rebuilt.learned] == [4, 6, 7]
    assert rebuilt.pass_adapters == 1

    oracle = DirectoryStore(tmp_path / "oracle", fsync=False)
    rows = BatchRows(oracle, learner.updater.rows)
    put_blob(oracle, get_blob(store, before.batch.digest) if before.batch else b"")
    batch = Batch(adapter=ADAPTER, cut=2, examples=[e for e in examples if e.origin.offset != 5], skipped=[])
    alone = replace(learner.updater, shared=GatheredPasses())
    replayed = alone.update(
        state_of(store, learner, before), batch.examples, adapter=ADAPTER, cut=2,
        batch=rebuilt.batch.digest if rebuilt.batch else "", replayed=rows,
    )  # fmt: skip
    found = state_of(store, learner, rebuilt)
    for name, weights in replayed.state.weights.items():
        assert weights.equal(found.weights[name]), name
    assert replayed.state.optimizer is not None
    assert found.optimizer is not None
    assert replayed.state.optimizer.keys() == found.optimizer.keys()
    assert any(name.startswith("fast.") for name in found.optimizer) is (slow_average > 0)
    for name, moment in replayed.state.optimizer.items():
        assert moment.equal(found.optimizer[name]), name


@pytest.mark.parametrize("cores", [1, 2])
def test_forgetting_in_the_first_cut_gives_the_bits_of_a_run_alone_that_never_saw_the_example(
    store: DirectoryStore, tmp_path: Path, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two threads compute half of each pass, as with a large base."""
    monkeypatch.setattr(shared_pass, "_LEAST_PARAMETERS", 0)
    learner = local_learner(store)
    writers = sharing(learner, 3, cores)
    cuts = {cut: cut_of(ADAPTER, cut, *range(4 * cut, 4 * cut + 4)) for cut in (1, 2)}
    for cut, examples in cuts.items():
        others = {name: (cut, cut_of(name, cut, *range(4 * cut, 4 * cut + 4))) for name in OTHERS}
        results = learn_together(writers, {ADAPTER: (cut, examples), **others})
        assert all(result.manifest is not None and result.manifest.pass_adapters == 3 for result in results.values())
    erase(learner, 4)
    head = learner.registry.head(ADAPTER)
    assert head is not None
    kept = {cut: [e for e in examples if e.origin.offset != 4] for cut, examples in cuts.items()}
    alone = replace(learner.updater, shared=GatheredPasses())
    never_saw = scratch.train(alone, DirectoryStore(tmp_path / "oracle", fsync=False), ADAPTER, kept)
    assert never_saw.equals(learner.registry.manifest(ADAPTER, head.version))


def test_an_update_alone_names_one_adapter_and_is_the_same_with_any_number_allowed(
    store: DirectoryStore, tmp_path: Path
) -> None:
    learner, other = local_learner(store), local_learner(DirectoryStore(tmp_path / "other", fsync=False))
    same_text_key(store, other.registry.store)
    sharing(learner, 3)
    versions = [
        one.update(jobs.update(one.registry.store, 1, cut_of(ADAPTER, 1, 0, 1, 2, 3)), "live").manifest
        for one in (learner, other)
    ]
    assert versions[0] is not None
    assert versions[0].pass_adapters == 1
    assert versions[0] == versions[1]
