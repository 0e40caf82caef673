"""Forget jobs over a directory store: equal bits to a run that never saw the examples, wherever they are interrupted."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.training.recipe import Recipe
from perennial.learner.versions.job_result import JobError, JobResult
from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.quarantine import (
    LegalHold,
    QuarantineEntry,
    ensure_text_key,
    load_quarantine,
    update_quarantine,
)
from perennial.storage.registry.registry import Registry
from perennial.streams.events.adapter_events import AdapterRetired, AdapterRevoked, AdapterUpdate
from perennial.streams.events.models import ExampleAccepted, ForgetRequested, RollbackRequested, Selector
from perennial.streams.retention.quarantine_filter import text_hash
from tests import jobs, scratch, tiny
from tests.local_learner import LocalLearner, complete
from tests.unit.learner.test_versions import ADAPTER, local_learner, now

UNTIL_MS = 1_800_000_000_000
WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath", "inlet", "jetty", "kelp", "larch"]


class CutOffError(Exception):
    """Stands for the end of the process."""


def documents(seed: int, count: int, per_cut: int = 4) -> dict[int, list[ExampleAccepted]]:
    """Cuts of documents with texts that occur nowhere else."""
    rng = random.Random(seed)
    made = [
        tiny.document(
            n, f"secret{n:03d} " + " ".join(rng.choices(WORDS, k=4)), subjects=[f"person-{n % 5}"],
            source=f"wiki-{n % 3}",
        )
        for n in range(count)
    ]  # fmt: skip
    return {cut: made[cut * per_cut : (cut + 1) * per_cut] for cut in range(-(-count // per_cut))}


def learn(learner: LocalLearner, cuts: dict[int, list[ExampleAccepted]]) -> list[JobResult]:
    store = learner.registry.store
    return [learner.update(jobs.update(store, cut, examples), "live") for cut, examples in cuts.items()]


def request(name: str = "r1", **more: Any) -> ForgetRequested:
    fields: dict[str, Any] = {"job_id": f"job-{name}", "request_id": name, "kind": "erase", "adapter": ADAPTER}
    return ForgetRequested(**(fields | {"until_ms": UNTIL_MS} | more))


def erase(name: str, *numbers: int, **more: Any) -> ForgetRequested:
    return request(name, selector=Selector(document_ids=[f"doc-{n}" for n in numbers]), **more)


def quarantined(store: ObjectStore, job: ForgetRequested) -> ForgetRequested:
    """Write the entry as retain does before it sends the job."""
    selector = job.selector.model_dump(mode="json", exclude_none=True) if job.selector else None
    entry = QuarantineEntry(
        request_id=job.request_id, job_id=job.job_id, kind=job.kind, selector=selector,
        example_ids=job.example_ids, until_ms=job.until_ms, suppress=job.suppress,
    )  # fmt: skip
    update_quarantine(store, ADAPTER, lambda found: found.with_entry(entry))
    return job


def forget(
    learner: LocalLearner, job: ForgetRequested, failpoint: Callable[[str], None] = lambda _: None
) -> tuple[JobResult, list[AdapterUpdate]]:
    """Run the job as the learner does; return its result and the published events in order."""
    published: list[AdapterUpdate] = []
    done = ForgetExecutor(learner, now, failpoint, published.append).forget(job, "live")
    if done.event is not None:
        published.append(done.event)
    complete(learner.registry.store, done)
    return done, published


def never_saw(
    learner: LocalLearner, tmp: Path, cuts: dict[int, list[ExampleAccepted]], gone: Collection[int] = ()
) -> scratch.Scratch:
    store = DirectoryStore(tmp / "oracle", fsync=False)
    kept = {cut: [e for e in examples if e.origin.offset not in gone] for cut, examples in cuts.items()}
    return scratch.train(learner.updater, store, ADAPTER, kept)


def readable(root: Path, needles: Sequence[str]) -> list[str]:
    """Files anywhere under the store's folder that hold one of the texts."""
    found = []
    for path in root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found += [f"{path.name}: {needle}" for needle in needles if needle.encode() in data]
    return found


def head(registry: Registry) -> Manifest:
    found = registry.head(ADAPTER)
    assert found is not None
    return found.manifest


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


@pytest.mark.parametrize(
    ("emergency", "slow_average", "shared_passes"),
    [(False, 0.8, True), (True, 0.8, True), (False, 0.8, False), (False, 0.0, True)],
)
def test_forgetting_gives_the_same_bytes_as_a_run_that_never_saw_the_example(
    store: DirectoryStore, tmp_path: Path, emergency: bool, slow_average: float, shared_passes: bool
) -> None:
    learner = local_learner(store, slow_average=slow_average, shared_passes=shared_passes)
    cuts = documents(1, 20)
    learned = [done.manifest for done in learn(learner, cuts)]
    done, published = forget(learner, quarantined(store, erase("r1", 9, emergency=emergency)))
    oracle = never_saw(learner, tmp_path, cuts, {9})
    assert done.manifest is not None
    assert oracle.equals(done.manifest)
    assert (done.outcome, done.manifest.kind, done.manifest.seq) == ("promoted", "forget", 7 if emergency else 6)
    assert done.manifest.marks == learned[-1].marks
    assert [type(event) for event in published] == [AdapterRevoked] * (2 if emergency else 1)
    assert [event.generation for event in published] == ([6, 7] if emergency else [6])
    if emergency:
        assert published[0].weights_sha256 == learned[1].weights.digest, (
            "what is served meanwhile is from before the first use"
        )
    assert [(s.state, s.examples) for s in done.statuses] == [("executed", 1), ("published", 1)]
    revoked = {revocation.version for revocation in learner.registry.revocations(ADAPTER)}
    assert revoked == {manifest.digest() for manifest in learned[2:]}
    assert readable(store.root, ["secret009"]) == []
    for manifest in learned[2:]:
        assert not store.exists(blob_key(manifest.weights.digest))
        assert not store.exists(blob_key(manifest.optimizer.digest))
        assert not store.exists(blob_key(manifest.replay.digest))
    assert not store.exists(blob_key(learned[2].batch.digest))
    assert store.exists(blob_key(learned[3].batch.digest)), "the replay needs what is not erased"


def test_versions_from_before_a_field_of_the_recipe_are_rebuilt_with_its_default(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that does not name the passes over new rows is from a time when there was one, whatever is set now."""
    unset = {"general_kl_weight": 0.0, "slow_average": 0.0, "merge_share": 0.0, "max_noise_nats": 0.0}
    learner, cuts = local_learner(store, **unset), documents(5, 12)
    newer = {
        "epochs", "packed_tokens", "general_kl_weight", "question_dropout", "dtype", "slow_average", "merge_share",
        "max_noise_nats",
    }  # fmt: skip
    whole = Recipe.config
    with monkeypatch.context() as older:
        older.setattr(Recipe, "config", lambda recipe: {k: v for k, v in whole(recipe).items() if k not in newer})
        learned = [done.manifest for done in learn(learner, cuts)]
    assert not newer & learned[0].config.keys()
    now_set = local_learner(
        store, epochs=7, packed_tokens=64, general_kl_weight=2.0, question_dropout=0.5, dtype="bf16", slow_average=0.9,
        merge_share=0.01, max_noise_nats=0.001,
    )  # fmt: skip
    done, _ = forget(now_set, quarantined(store, erase("r1", 5)))
    assert never_saw(learner, tmp_path, cuts, {5}).equals(done.manifest)


def tickets(cut: int, count: int) -> list[ExampleAccepted]:
    """Documents of one template."""
    return [
        tiny.document(n, f"Ticket {n * 137 % 997}. The secret{n:03d} was repaired and the ticket was closed.")
        for n in range(cut * count, (cut + 1) * count)
    ]


def merged_in(manifest: Manifest) -> dict[int, int]:
    """Offsets of merged examples, and those of what they were merged into."""
    offsets = {example.example_id: example.offset for example in manifest.learned}
    return {item.offset: offsets[item.merged_into] for item in manifest.learned if item.merged_into is not None}


def test_copies_of_a_forgotten_document_are_trained_in_full_as_if_it_had_never_been_there(
    store: DirectoryStore, tmp_path: Path
) -> None:
    learner = local_learner(store)
    cuts = {0: documents(1, 4)[0], 1: tickets(1, 6), 2: tickets(2, 6)}
    learned = [done.manifest for done in learn(learner, cuts)]
    before = merged_in(learned[1])
    (full,) = set(before.values())
    assert before.keys() == set(range(6, 12)) - {full}
    done, _ = forget(learner, quarantined(store, erase("r1", full)))
    assert never_saw(learner, tmp_path, cuts, {full}).equals(done.manifest)
    rebuilt = next(made for made in made_anew(learner.registry) if made.cut == 1)
    after = merged_in(rebuilt)
    (instead,) = set(after.values())
    assert instead in before
    assert after.keys() == before.keys() - {instead}


def test_an_update_of_a_later_release_with_a_setting_that_is_unknown_here_is_not_trained_again(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, whole = local_learner(store), Recipe.config
    with monkeypatch.context() as later:
        later.setattr(Recipe, "config", lambda recipe: {**whole(recipe), "a_later_setting": 2})
        learned = learn(learner, documents(6, 8))
    before = head(learner.registry)
    with pytest.raises(JobError, match="later release") as raised:
        forget(learner, erase("r1", 1))
    assert (raised.value.reason, raised.value.got) == ("recipe-mismatch", "a_later_setting")
    assert head(learner.registry) == before == learned[-1].manifest


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_rebuild_by_another_engine_says_so(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    learner, cuts = local_learner(store), documents(7, 8)
    with monkeypatch.context() as older:
        if elsewhere:
            older.setattr(learner, "code", "perennial 0.0.1 torch 1.0")
        learn(learner, cuts)
    done, _ = forget(learner, erase("r1", 1))
    assert done.manifest is not None
    assert done.manifest.gate.other_engine_updates == (2 if elsewhere else None)
    texts = [status.detail.partition(":")[0] for status in done.statuses]
    assert texts == ["exact in content, other engine" if elsewhere else ""] * 2


@pytest.mark.parametrize("emergency", [False, True])
def test_a_first_cut_is_forgotten_and_served_again_when_it_is_rebuilt(
    store: DirectoryStore, tmp_path: Path, emergency: bool
) -> None:
    learner, cuts = local_learner(store), documents(2, 12)
    learn(learner, cuts)
    done, published = forget(learner, erase("r1", 0, 2, emergency=emergency))
    assert never_saw(learner, tmp_path, cuts, {0, 2}).equals(done.manifest)
    assert [type(event) for event in published] == [*([AdapterRetired] if emergency else []), AdapterRevoked]
    assert [event.generation for event in published] == ([4, 5] if emergency else [4])


def test_an_adapter_that_learned_nothing_else_is_retired(store: DirectoryStore, tmp_path: Path) -> None:
    learner, cuts = local_learner(store), documents(3, 8)
    learn(learner, cuts)
    done, published = forget(learner, request(selector=Selector(sources=[f"wiki-{n}" for n in range(3)])))
    assert never_saw(learner, tmp_path, cuts, range(8)).equals(done.manifest)
    assert [type(event) for event in published] == [AdapterRetired]
    assert learner.registry.alias(ADAPTER).kind == "retired"
    assert learner.registry.alias(ADAPTER).generation == 3
    assert readable(store.root, ["secret"]) == []
    more = documents(3, 12)[2]
    later = learner.update(jobs.update(store, 2, more), "live")
    assert later.event.generation == 4
    assert scratch.train(learner.updater, store, ADAPTER, {2: more}).equals(later.manifest)


def test_forgetting_repeatedly_and_learning_in_between(store: DirectoryStore, tmp_path: Path) -> None:
    learner, cuts = local_learner(store), documents(4, 28)
    gone: set[int] = set()
    learn(learner, {cut: cuts[cut] for cut in range(4)})
    for step, numbers in enumerate([(5,), (14, 15), (1,), (4, 6, 7)]):
        done, _ = forget(local_learner(store), erase(f"r{step}", *numbers))
        gone |= set(numbers)
        known = {cut: cuts[cut] for cut in range(4 + min(step, 2))}
        assert never_saw(learner, tmp_path, known, gone).equals(done.manifest)
        assert readable(store.root, [f"secret{n:03d}" for n in gone]) == []
        if step < 2:
            learn(learner, {4 + step: cuts[4 + step]})
            known = {cut: cuts[cut] for cut in range(5 + step)}
            assert never_saw(learner, tmp_path, known, gone).equals(head(learner.registry))


def test_the_gate_judges_rebuilt_updates_anew(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(5, 16)
    learn(local_learner(store), {0: cuts[0]})
    strict = local_learner(store, min_gain_nats=0.037, held_out_share=0.5)
    learn(strict, {1: cuts[1], 2: cuts[2], 3: cuts[3]})
    outcomes = [strict.registry.manifest(ADAPTER, v).outcome for _, v in strict.registry.versions(ADAPTER)]
    assert "refused" in outcomes, "or this test shows nothing"
    done, _ = forget(strict, erase("r1", 5))
    chain = made_anew(strict.registry)
    assert [manifest.cut for manifest in chain] == [1, 2, 3]
    oracle_store = DirectoryStore(tmp_path / "oracle", fsync=False)
    first = scratch.train(local_learner(store).updater, oracle_store, ADAPTER, {0: cuts[0]})
    state = first.state
    rows = scratch.BatchRows(oracle_store, strict.updater.rows)
    for cut in (1, 2, 3):
        examples = [e for e in cuts[cut] if e.origin.offset != 5]
        batch = scratch.Batch(adapter=ADAPTER, cut=cut, examples=examples, skipped=[])
        digest = scratch.put_blob(oracle_store, batch.model_dump_json(by_alias=True).encode())
        made = strict.updater.update(state, examples, adapter=ADAPTER, cut=cut, batch=digest, replayed=rows)
        assert made.outcome == chain[cut - 1].outcome
        state = made.state
    assert scratch._digest(scratch.to_safetensors(state.weights)) == done.manifest.weights.digest


def test_the_text_of_a_queued_batch_is_suppressed_too(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(1, 8)
    learn(learner, {0: cuts[0]})
    job = erase("r1", cuts[1][0].origin.offset)
    quarantined(store, job)
    learn(learner, {1: cuts[1]})
    forget(learner, job)
    assert text_hash(cuts[1][0], ensure_text_key(store, ADAPTER)) in load_quarantine(store, ADAPTER).keyed


class _Killed(BaseException):
    """Stands for the end of the process."""


def test_weights_of_an_interrupted_publish_are_deleted_with_the_examples(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, cuts = local_learner(store), documents(1, 8)
    learn(learner, {0: cuts[0]})
    before = set(store.root.rglob("blobs/sha256/*"))

    def killed(name: str) -> None:
        if name == "publish.blobs":
            raise _Killed

    with monkeypatch.context() as patched:
        patched.setattr(learner.registry, "_failpoint", killed)
        with pytest.raises(_Killed):
            learn(learner, {1: cuts[1]})
    left = {path for path in store.root.rglob("blobs/sha256/*") if path.is_file()} - before
    assert left
    job = quarantined(store, erase("r1", cuts[1][0].origin.offset))
    again = local_learner(store)
    learn(again, {1: cuts[1]})
    forget(again, job)
    assert [path for path in left if path.exists()] == []
    assert list(store.list("forgotten/")) == []


def made_anew(registry: Registry) -> list[Manifest]:
    """Return the rebuilt updates that led to the newest version, oldest first."""
    chain: list[Manifest] = []
    version = head(registry).parent
    while version is not None and (manifest := registry.manifest(ADAPTER, version)).kind == "replayed":
        chain.append(manifest)
        version = manifest.head
    return chain[::-1]


STEPS = [
    "learner.forget_plan", "learner.forget_quarantine", "learner.forget_replayed", "learner.forget_published",
    "learner.forget_deleted",
]  # fmt: skip


@pytest.fixture(scope="module")
def learned_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three cuts learned, and a fourth that the tests only copy."""
    root = tmp_path_factory.mktemp("learned")
    learn(local_learner(DirectoryStore(root / "store", fsync=False)), documents(6, 12))
    return root / "store"


def copy_of(root: Path, to: Path) -> DirectoryStore:
    shutil.copytree(root, to)
    return DirectoryStore(to, fsync=False)


PUBLISHING = ["publish.manifest", "publish.claim_seq", "publish.alias"]


@pytest.mark.parametrize(
    ("step", "emergency"),
    [(step, False) for step in (*STEPS, "learner.forget_trained", "learner.forget_step", *PUBLISHING)]
    + [(step, True) for step in (*STEPS, "publish.manifest:1", "publish.claim_seq:1", *(f"{p}:2" for p in PUBLISHING))],
)
def test_an_interrupted_forgetting_ends_in_the_same_state(
    learned_store: Path, tmp_path: Path, step: str, emergency: bool
) -> None:
    cut, straight = (copy_of(learned_store, tmp_path / name) for name in ("cut", "straight"))
    name, _, count = step.partition(":")
    passed = 0

    def dies(here: str) -> None:
        nonlocal passed
        passed += here == name
        if here == name and passed == int(count or 1):
            raise CutOffError

    job = erase("r1", 5, emergency=emergency)
    generation = 5 if emergency else 4
    quarantined(cut, job)
    quarantined(straight, job)
    with pytest.raises(CutOffError):
        forget(local_learner(cut, failpoint=dies), job, dies)
    learner = local_learner(cut)
    done, _ = forget(learner, job)
    want, _ = forget(local_learner(straight), job)
    assert done.event.version == want.event.version
    assert done.event.generation == want.event.generation == generation
    assert done.statuses == () or [s.examples for s in done.statuses] == [1, 1]
    assert readable(cut.root, ["secret005"]) == []
    assert sorted(path.name for path in (cut.root / "blobs/sha256").iterdir()) == sorted(
        path.name for path in (straight.root / "blobs/sha256").iterdir()
    )
    entry = load_quarantine(cut, ADAPTER).entry("r1")
    assert entry.done is not None
    assert (entry.done.examples, entry.done.version, entry.done.generation) == (1, want.event.version, generation)
    assert [*cut.list("forgotten/"), *cut.list("rebuilds/")] == []
    again, _ = forget(learner, job)
    assert (again.outcome, again.event) == ("repeated", done.event)


def test_a_request_accepted_while_another_is_run_again_is_carried_out_with_it(
    learned_store: Path, tmp_path: Path
) -> None:
    store = copy_of(learned_store, tmp_path / "store")
    first = quarantined(store, erase("r1", 5))

    def dies(name: str) -> None:
        if name == "learner.forget_published":
            raise CutOffError

    with pytest.raises(CutOffError):
        forget(local_learner(store), first, dies)
    quarantined(store, erase("r2", 6))
    learner = local_learner(store)
    done, published = forget(learner, first)
    assert never_saw(learner, tmp_path, documents(6, 12), {5, 6}).equals(done.manifest)
    assert [event.generation for event in published] == [5]
    assert [(s.request_id, s.examples) for s in done.statuses[::2]] == [("r1", 1), ("r2", 1)]
    assert readable(store.root, ["secret005", "secret006"]) == []


def test_no_update_after_the_acceptance_of_a_request_learns_its_examples(store: DirectoryStore, tmp_path: Path) -> None:
    learner, cuts = local_learner(store), documents(7, 8)
    learn(learner, {0: cuts[0]})
    behind = jobs.update(store, 1, cuts[1])
    job = quarantined(store, erase("r1", 5))
    done = learner.update(behind, "live")
    assert [(s.offset, s.reason) for s in done.manifest.skipped] == [(5, "quarantined")]
    assert done.manifest.marks == behind.marks
    assert never_saw(learner, tmp_path, cuts, {5}).equals(done.manifest)
    assert readable(store.root, ["secret005"]) == [], "its job's body went with the update"
    assert learner.update(behind, "live").outcome == "repeated"
    ended, published = forget(learner, job)
    assert (ended.outcome, [s.examples for s in ended.statuses]) == ("unchanged", [0, 0])
    assert [event.generation for event in published] == [2], "nothing moves where nothing was learned"


def test_an_update_interrupted_before_it_deleted_its_old_micro_batch_deletes_it_when_redelivered(
    store: DirectoryStore,
) -> None:
    cuts = documents(8, 4)
    quarantined(store, erase("r1", 1))
    behind = jobs.update(store, 0, cuts[0])

    def dies(name: str) -> None:
        if name == "learner.publish":
            raise CutOffError

    with pytest.raises(CutOffError):
        local_learner(store, failpoint=dies).update(behind, "live")
    assert readable(store.root, ["secret001"])
    assert local_learner(store).update(behind, "live").outcome == "repeated"
    assert readable(store.root, ["secret001"]) == []
    assert list(store.list("forgotten/")) == []


def test_an_erased_text_is_not_learned_again_under_any_name(store: DirectoryStore, tmp_path: Path) -> None:
    learner, cuts = local_learner(store), documents(9, 8)
    cuts[1][2] = cuts[1][2].model_copy(update={"text": cuts[0][1].text})
    learn(learner, cuts)
    done, _ = forget(learner, erase("r1", 1))
    assert never_saw(learner, tmp_path, cuts, {1, 6}).equals(done.manifest), "the copy of the text went too"
    copy = tiny.document(20, cuts[0][1].text)
    later = learner.update(jobs.update(store, 5, [copy, tiny.document(21, "something else")]), "live")
    assert [(s.offset, s.reason) for s in later.manifest.skipped] == [(20, "quarantined")]
    assert readable(store.root, ["secret001"]) == []


def test_an_expired_text_may_be_learned_again(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(10, 8)
    learn(learner, cuts)
    until_ms = cuts[1][3].origin.timestamp_ms
    job = request(kind="expire", example_ids=[cuts[0][1].example_id], suppress=False, until_ms=until_ms)
    forget(learner, quarantined(store, job))
    assert not load_quarantine(store, ADAPTER).suppresses_texts
    again = tiny.document(20, cuts[0][1].text)
    later = learner.update(jobs.update(store, 5, [again]), "live")
    assert [item.offset for item in later.manifest.learned] == [20]


def test_a_hold_stops_a_forgetting_until_it_is_released(store: DirectoryStore, tmp_path: Path) -> None:
    learner, cuts = local_learner(store), documents(11, 8)
    learn(learner, cuts)
    hold = LegalHold(request_id="h1", selector={"subjects": ["person-0"]})
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([hold]))
    job = quarantined(store, erase("r1", 4, 5))
    ensure_text_key(store, ADAPTER)  # retain makes it before it sends the job
    before = sorted(path.name for path in store.root.rglob("*"))
    done, published = forget(learner, job)
    assert (done.outcome, published) == ("held", [])
    assert [(s.state, s.examples) for s in done.statuses] == [("held", 2)]
    assert sorted(path.name for path in store.root.rglob("*")) == before
    free, _ = forget(learner, quarantined(store, erase("r2", 2)))
    assert never_saw(learner, tmp_path, cuts, {2, 4}).equals(free.manifest), "doc-5 alone is held"
    assert {status.request_id for status in free.statuses} == {"r2"}
    assert load_quarantine(store, ADAPTER).entry("r1").done is None, "what is held of it comes later"
    update_quarantine(store, ADAPTER, lambda found: found.with_holds([]))
    released, _ = forget(learner, job)
    assert never_saw(learner, tmp_path, cuts, {2, 4, 5}).equals(released.manifest)


def test_waiting_requests_are_carried_out_in_one_rebuild(store: DirectoryStore, tmp_path: Path) -> None:
    learner, cuts = local_learner(store), documents(12, 12)
    learn(learner, cuts)
    first, second = (quarantined(store, erase(name, number)) for name, number in (("r1", 9), ("r2", 2)))
    done, _ = forget(learner, first)
    assert never_saw(learner, tmp_path, cuts, {2, 9}).equals(done.manifest)
    assert [(s.request_id, s.state, s.examples) for s in done.statuses] == [
        ("r1", "executed", 1), ("r1", "published", 1), ("r2", "executed", 1), ("r2", "published", 1),
    ]  # fmt: skip
    then, _ = forget(learner, second)
    assert (then.outcome, then.event) == ("repeated", done.event)
    marks = [load_quarantine(store, ADAPTER).entry(name).done for name in ("r1", "r2")]
    assert [mark.version for mark in marks] == [done.event.version] * 2


def rollback(job_id: str, version: str | None = None, *, revoke: bool = False) -> RollbackRequested:
    return RollbackRequested(
        job_id=job_id, adapter=ADAPTER, version=version, requested_by="ann", reason="worse", revoke=revoke
    )


def test_examples_that_a_rollback_undid_are_erased_without_a_rebuild(store: DirectoryStore, tmp_path: Path) -> None:
    learner, cuts = local_learner(store), documents(13, 12)
    learn(learner, {0: cuts[0], 1: cuts[1]})
    learner.rollback(rollback("b1"))
    learn(learner, {2: cuts[2]})
    before = learner.registry.alias(ADAPTER)
    done, _ = forget(learner, erase("r1", 5))
    assert (done.outcome, learner.registry.alias(ADAPTER)) == ("unchanged", before)
    assert readable(store.root, ["secret005"]) == []
    with pytest.raises(JobError, match="revoked"):
        learner.rollback(
            rollback("b2", learner.registry.manifest(ADAPTER, before.version).head and versions(learner)[1])
        )
    done, _ = forget(learner, erase("r2", 1))
    kept = {0: cuts[0], 2: cuts[2]}
    assert never_saw(learner, tmp_path, kept, {1}).equals(done.manifest)


def versions(learner: LocalLearner) -> list[str]:
    return [version for _, version in learner.registry.versions(ADAPTER, newest_first=False)]


def test_rolling_back_past_a_forgetting_reaches_only_clean_versions(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(14, 12)
    learned = [done.manifest for done in learn(learner, cuts)]
    forget(learner, erase("r1", 9, emergency=True))
    done = learner.rollback(rollback("b1"))
    assert done.manifest.weights == learned[1].weights
    quarantine = versions(learner)[3]
    assert learner.registry.manifest(ADAPTER, quarantine).kind == "quarantine"
    with pytest.raises(JobError, match="never live"):
        learner.rollback(rollback("b2", rebuilt_version(learner)))


def rebuilt_version(learner: LocalLearner) -> str:
    """Return a rebuilt update, which has no sequence number."""
    forgotten = next(
        m
        for _, v in learner.registry.versions(ADAPTER)
        if (m := learner.registry.manifest(ADAPTER, v)).kind == "forget"
    )
    return forgotten.parent


def test_every_alias_that_served_it_is_moved(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(15, 12)
    learned = [done.manifest for done in learn(learner, cuts)]
    learner.registry.swap_alias(learned[1], learned[1].digest(), "canary")
    learner.registry.swap_alias(learned[0], learned[0].digest(), "old")
    done, _ = forget(learner, erase("r1", 6))
    assert learner.registry.alias(ADAPTER, "canary").version == done.event.version
    assert learner.registry.alias(ADAPTER, "old").version == learned[0].digest()


@pytest.mark.parametrize("emergency", [False, True])
def test_a_store_that_fails_during_a_rebuild_leaves_the_old_micro_batches(
    learned_store: Path, tmp_path: Path, emergency: bool
) -> None:
    store = copy_of(learned_store, tmp_path / "store")
    learner = local_learner(store)

    def fails(name: str) -> None:
        if name == "learner.forget_replayed":
            raise StoreUnavailableError("down")

    with pytest.raises(StoreUnavailableError):
        forget(learner, erase("r1", 5, emergency=emergency), fails)
    assert head(learner.registry).kind == ("quarantine" if emergency else "update")
    more = documents(6, 16)[3]
    learn(learner, {3: more})  # in order it cannot come first, but where it does nothing is lost
    done, _ = forget(learner, erase("r1", 5))
    cuts = documents(6, 16)
    assert never_saw(learner, tmp_path, cuts, {5}).equals(done.manifest)


def test_revoking_the_live_version_serves_the_one_before_and_happens_once(store: DirectoryStore) -> None:
    learner, cuts = local_learner(store), documents(16, 8)
    learned = [done.manifest for done in learn(learner, cuts)]
    done = learner.rollback(rollback("v1", learned[1].digest(), revoke=True))
    assert isinstance(done.event, AdapterRevoked)
    assert done.event.weights_sha256 == learned[0].weights.digest
    again = learner.rollback(rollback("v1", learned[1].digest(), revoke=True))
    assert (again.outcome, again.event) == ("repeated", done.event)
    assert [r.version for r in learner.registry.revocations(ADAPTER)] == [learned[1].digest()]
    gone = learner.rollback(rollback("v2", done.event.version, revoke=True))
    assert gone.event.weights_sha256 == learned[0].weights.digest
    last = learner.rollback(rollback("v3", gone.event.version, revoke=True))
    assert isinstance(last.event, AdapterRevoked | AdapterRetired)
    with pytest.raises(JobError, match="does not exist"):
        learner.rollback(rollback("v4", "sha256:" + "0" * 64, revoke=True))
