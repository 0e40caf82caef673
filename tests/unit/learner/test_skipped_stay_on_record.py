"""Every record of a micro-batch stays accounted for, whatever is erased beside it."""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path

import pytest

from perennial.learner.versions.micro_batches import origin_offset, without_examples
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.events.models import Batch, BatchSkip, ExampleAccepted
from tests import jobs, oracle, tiny
from tests.local_learner import LocalLearner
from tests.unit.learner.test_forgetting import ADAPTER, erase, forget, learn, local_learner, quarantined

PARTITION = "documents/0"


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def documents(*numbers: int) -> list[ExampleAccepted]:
    return [tiny.document(n, f"secret{n:03d} the parrot sings") for n in numbers]


def rating(number: int) -> ExampleAccepted:
    """A rating without a correction; earlier releases of curate left it among the examples."""
    return ExampleAccepted(
        adapter=ADAPTER, example_id=f"{number:032x}", kind="rating", document_id=f"turn-{number}", learn=False,
        rating=1.0, origin=tiny.origin(number),
    )  # fmt: skip


def accounted(learner: LocalLearner, everything: Collection[int], erased: Collection[int]) -> None:
    """Check with the oracle of the fault tests that exactly the erased records are gone."""
    record = oracle.read_adapter(learner.registry, ADAPTER)
    on_record = {position[1] for position in (*record.learned, *record.skipped)}
    assert on_record == set(everything) - set(erased)
    assert {position[1] for position in record.removed} == set(erased)
    assert record.learned_twice() == []


@pytest.mark.parametrize("erased", [(0,), (2,), (0, 2)])
def test_case_22_ratings_stay_on_record_when_their_neighbours_are_erased(
    store: DirectoryStore, erased: tuple[int, ...]
) -> None:
    """Case 22: cuts whose documents are all erased left no trace of the ratings in them."""
    learner = local_learner(store)
    for cut in range(3):
        first = 2 * cut
        learner.update(jobs.update(store, cut, documents(first), skipped=[first + 1]), "live")
    learner.update(jobs.update(store, 3, [rating(6)], skipped=[7]), "live")
    forget(learner, quarantined(store, erase("r1", *erased)))
    accounted(learner, range(8), erased)
    forget(learner, quarantined(store, erase("r2", 4)))
    accounted(learner, range(8), {*erased, 4})


def test_case_22_an_adapter_that_has_nothing_but_ratings_left_keeps_them_on_record(store: DirectoryStore) -> None:
    learner = local_learner(store)
    learner.update(jobs.update(store, 0, documents(0), skipped=[1]), "live")
    forget(learner, quarantined(store, erase("r1", 0)))
    accounted(learner, range(2), {0})
    assert learner.registry.alias(ADAPTER).kind == "retired"
    learn(learner, {1: documents(2, 3)})
    accounted(learner, range(4), {0})


def test_case_22_duplicates_of_an_erased_example_stay_on_record(store: DirectoryStore) -> None:
    """The example is erased before its job is learned: the version lists what is left of the micro-batch."""
    learner = local_learner(store)
    first, second = documents(0, 1)
    duplicate = BatchSkip(example_id=first.example_id, origin=tiny.origin(2), reason="duplicate")
    batch = Batch(adapter=ADAPTER, cut=0, examples=[first, second], skipped=[duplicate])
    assert without_examples(batch, {origin_offset(first)}).skipped == [duplicate]
    request = jobs.with_batch(
        store, jobs.update(store, 0, [first, second]), batch.model_dump_json(by_alias=True).encode()
    )
    quarantined(store, erase("r1", 0))
    manifest = learner.update(request, "live").manifest
    assert manifest is not None
    assert {(item.offset, item.reason) for item in manifest.skipped} == {(0, "quarantined"), (2, "duplicate")}


@pytest.mark.parametrize("seed", range(6))
def test_case_22_whatever_is_removed_the_rest_is_accounted_for(store: DirectoryStore, seed: int) -> None:
    """A property over random micro-batches, gates, removed sets, and requests one after another."""
    rng = random.Random(seed)
    learner = local_learner(store)
    strict = local_learner(store, min_gain_nats=50.0)
    numbers = iter(range(1000))
    published: set[int] = set()
    learnable: list[int] = []
    for cut in range(4):
        chosen = [next(numbers) for _ in range(rng.randint(1, 4))]
        skipped = [next(numbers) for _ in range(rng.randint(0, 3))]
        ratings = [next(numbers) for _ in range(rng.randint(0, 1))]
        published |= {*chosen, *skipped, *ratings}
        if rng.random() < 0.25:  # a cut of ratings alone
            examples = [rating(n) for n in chosen]
        else:
            examples = documents(*chosen)
            learnable += chosen
        examples += [rating(n) for n in ratings]
        role = strict if rng.random() < 0.25 else learner
        role.update(jobs.update(store, cut, examples, skipped=skipped), "live")
    erased: set[int] = set()
    for number in range(2):
        left = [n for n in learnable if n not in erased]
        removed = rng.sample(left, rng.randint(0, len(left)))
        erased |= set(removed)
        if removed:
            forget(learner, quarantined(store, erase(f"r{number}", *removed)))
        accounted(learner, published, erased)
