"""Which examples have a place in the replay buffer: limits, order, documents that supersede others, and forgetting."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.replay.places import (
    BufferUpdate,
    document_key,
    keep_places,
    text_bytes,
)
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.events.input_events import Turn
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.settings import Settings
from tests import tiny
from tests.unit.learner.test_forgetting import erase, forget, head, learn, never_saw
from tests.unit.learner.test_update import RECIPE as TINY_RECIPE
from tests.unit.learner.test_update import documents, first, make
from tests.unit.learner.test_versions import local_learner

SEED = 3
RECIPE = replace(Recipe.of(Settings.of()), seed=SEED)

limits = st.tuples(st.integers(min_value=1, max_value=20), st.sampled_from([0, 1, 40, 200]))
"""Most entries, and bytes of text that end the buffer."""


@dataclass(frozen=True)
class Published:
    """A stream of documents, some of which supersede earlier ones.

    Attributes:
        updates: The examples of each update; their numbers are their offsets.
        superseded: Number of the example that an example supersedes, by its number.
    """

    updates: tuple[tuple[ExampleAccepted, ...], ...]
    superseded: dict[int, int]


@st.composite
def streams(draw: st.DrawFn, most: int = 30) -> Published:
    """Draw a stream. A document names all that it replaces, the oldest first, as a correct publisher may."""
    count = draw(st.integers(min_value=1, max_value=most))
    rng = random.Random(draw(st.integers(min_value=0, max_value=10**6)))
    share = draw(st.sampled_from([0.0, 0.3, 0.7]))
    chains: dict[int, list[str]] = {}
    current: list[int] = []
    superseded: dict[int, int] = {}
    made = []
    for number in range(count):
        older: list[str] = []
        if current and rng.random() < share:
            old = current.pop(rng.randrange(len(current)))
            superseded[number] = old
            older = [*chains[old], f"doc-{old}"]
        chains[number] = older
        current.append(number)
        made.append(tiny.document(number, "x" * rng.randint(1, 60), source="wiki", supersedes=older))
    updates = []
    while made:
        size = rng.randint(1, 7)
        updates.append(tuple(made[:size]))
        made = made[size:]
    return Published(tuple(updates), superseded)


def number_of(entry: ReplayEntry) -> int:
    return int(entry.example_id, 16)


def learned(
    updates: Sequence[Sequence[ExampleAccepted]],
    size: int,
    max_bytes: int = 0,
    gone: Collection[int] = (),
    start: tuple[ReplayEntry, ...] = (),
    places: str = "documents",
) -> Iterator[tuple[ReplayEntry, ...]]:
    """Yield the buffer after each update; `gone` are left out, and so is an update of which nothing is left."""
    recipe = replace(RECIPE, replay_size=size, replay_bytes=max_bytes, replay_places=places)
    index = start
    for examples in updates:
        left = [example for example in examples if example.origin.offset not in gone]
        if left:
            index = BufferUpdate(index, left, "batch", recipe).after({example.example_id for example in left})
        yield index


def last(buffers: Iterator[tuple[ReplayEntry, ...]]) -> tuple[ReplayEntry, ...]:
    return list(buffers)[-1]


def rank(entry: ReplayEntry, seed: int = SEED) -> tuple[bytes, bytes]:
    names = entry.place or entry.document or entry.example_id, entry.example_id
    return tuple(sha256(f"{seed}:{name}".encode()).digest() for name in names)  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(streams(), limits)
def test_the_buffer_keeps_its_limits(stream: Published, limit: tuple[int, int]) -> None:
    size, max_bytes = limit
    for buffer in learned(stream.updates, size, max_bytes):
        assert 0 < len(buffer) <= size
        within = sum(entry.text_bytes for entry in sorted(buffer, key=rank)[:-1])
        assert not max_bytes or within < max_bytes, "the last one may pass the limit, and no other"


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(min_value=0, max_value=10**6), max_size=40), limits, st.sampled_from(["examples", "documents"]),
    st.randoms(),
)  # fmt: skip
def test_without_superseding_the_buffer_depends_on_the_set_of_examples_alone(
    numbers: set[int], limit: tuple[int, int], places: str, shuffler: random.Random
) -> None:
    examples = [tiny.document(number, "x" * (1 + number % 70)) for number in sorted(numbers)]
    if not examples:
        return
    at_once = last(learned([examples], *limit, places=places))
    shuffler.shuffle(examples)
    stepwise = last(learned([examples[n : n + 7] for n in range(0, len(examples), 7)], *limit, places=places))
    assert stepwise == at_once


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(min_value=0, max_value=10**6), min_size=2, max_size=40),
    st.sets(st.integers(min_value=0, max_value=10**6)), limits,
)  # fmt: skip
def test_leaving_examples_out_pushes_no_other_out(numbers: set[int], gone: set[int], limit: tuple[int, int]) -> None:
    gone = gone | set(sorted(numbers)[::3])
    examples = [tiny.document(number, "x" * (1 + number % 70)) for number in sorted(numbers)]
    updates = [examples[n : n + 7] for n in range(0, len(examples), 7)]
    whole = last(learned(updates, *limit))
    assert {entry for entry in whole if number_of(entry) not in gone} <= set(last(learned(updates, *limit, gone)))


@settings(max_examples=60, deadline=None)
@given(streams(), limits)
def test_what_is_superseded_is_neither_kept_nor_drawn_by_the_update_that_supersedes_it(
    stream: Published, limit: tuple[int, int]
) -> None:
    size, max_bytes = limit
    recipe = replace(RECIPE, replay_size=size, replay_bytes=max_bytes, replay_places="documents")
    index: tuple[ReplayEntry, ...] = ()
    left: set[int] = set()
    for examples in stream.updates:
        left |= {stream.superseded.get(example.origin.offset, -1) for example in examples}
        update = BufferUpdate(index, examples, "batch", recipe)
        assert {number_of(entry) for entry in update.drawable} == {number_of(entry) for entry in index} - left
        index = update.after({example.example_id for example in examples})
        assert left.isdisjoint(number_of(entry) for entry in index)


@settings(max_examples=60, deadline=None)
@given(st.integers(min_value=2, max_value=30), st.integers(min_value=1, max_value=20), st.data())
def test_a_document_takes_the_place_of_the_one_that_it_supersedes(count: int, size: int, data: st.DataObject) -> None:
    """It is in the buffer if the other one was, and it pushes nothing else out; so is the one that supersedes it."""
    old = data.draw(st.integers(min_value=0, max_value=count - 1))
    before = last(learned([[tiny.document(n, "some text", source="wiki") for n in range(count)]], size))
    buffer, superseded = before, old
    for number in (100, 101):
        newer = tiny.document(number, "other text", source="wiki", supersedes=[f"doc-{superseded}"])
        buffer = last(learned([[newer]], size, start=buffer))
        taken = old in {number_of(entry) for entry in before}
        if not taken:
            break
        assert {number_of(entry) for entry in buffer} == {number_of(entry) for entry in before} - {old} | {number}
        superseded = number
    else:
        return
    assert buffer == before


@settings(max_examples=60, deadline=None)
@given(streams(), st.integers(min_value=1, max_value=20))
def test_the_rebuild_without_what_was_superseded_leaves_the_buffer_as_it_is(stream: Published, size: int) -> None:
    """Retain lets superseded documents be forgotten. Their places are taken by then."""
    gone = set(stream.superseded.values())
    assert last(learned(stream.updates, size)) == last(learned(stream.updates, size, gone=gone))


@settings(max_examples=80, deadline=None)
@given(streams(), limits, st.data())
def test_a_rebuild_without_an_example_gives_the_buffer_that_would_have_been(
    stream: Published, limit: tuple[int, int], data: st.DataObject
) -> None:
    """It goes on from the buffer before the update that had the example, as a rebuild does."""
    count = sum(map(len, stream.updates))
    gone = set(data.draw(st.lists(st.integers(min_value=0, max_value=count - 1), min_size=1, max_size=3)))
    met = [n for n, examples in enumerate(stream.updates) if gone & {example.origin.offset for example in examples}]
    buffers = list(learned(stream.updates, *limit))
    start = buffers[met[0] - 1] if met[0] else ()
    rebuilt = last(learned(stream.updates[met[0] :], *limit, gone, start))
    assert rebuilt == last(learned(stream.updates, *limit, gone))
    assert gone.isdisjoint(map(number_of, rebuilt))


@settings(max_examples=60, deadline=None)
@given(streams(), limits, st.randoms())
def test_the_order_within_an_update_is_irrelevant_where_no_example_of_it_supersedes_another(
    stream: Published, limit: tuple[int, int], shuffler: random.Random
) -> None:
    updates = []
    for examples in stream.updates:
        numbers = {example.origin.offset for example in examples}
        shuffled = list(examples)
        if numbers.isdisjoint(stream.superseded.get(number, -1) for number in numbers):
            shuffler.shuffle(shuffled)
        updates.append(shuffled)
    assert list(learned(updates, *limit)) == list(learned(stream.updates, *limit))


def test_of_two_in_one_update_the_later_one_supersedes() -> None:
    old = tiny.document(1, "the price is 5", source="wiki")
    new = tiny.document(2, "the price is 6", source="wiki", supersedes=["doc-1"])
    assert [number_of(entry) for entry in last(learned([[old, new]], 9))] == [2]
    assert [number_of(entry) for entry in last(learned([[new, old]], 9))] == [1, 2], "the older text came back"


@pytest.mark.parametrize(("source", "kept"), [("wiki", [2]), ("other", [1, 2]), (None, [1, 2])])
def test_documents_of_another_source_keep_their_places(source: str | None, kept: list[int]) -> None:
    old = tiny.document(1, "the price is 5", source="wiki")
    new = tiny.document(2, "the price is 6", source=source, supersedes=["doc-1"])
    assert [number_of(entry) for entry in last(learned([[old], [new]], 9))] == kept
    assert document_key("wiki", "doc-1") != document_key(None, "doc-1")


def test_where_examples_have_the_places_a_superseded_one_stays_until_it_is_forgotten() -> None:
    old = tiny.document(1, "the price is 5", source="wiki")
    new = tiny.document(2, "the price is 6", source="wiki", supersedes=["doc-1"])
    buffer = last(learned([[old], [new]], 9, places="examples"))
    assert buffer == tuple(ReplayEntry(example.example_id, "batch") for example in (old, new))


def test_ties_go_by_a_hash_of_the_id_and_the_seed() -> None:
    texts = [ReplayEntry(f"{n:032x}", "batch", "same-document") for n in range(2)]
    winners = {seed: keep_places(texts, 1, 0, seed) for seed in range(20)}
    assert {entry for kept in winners.values() for entry in kept} == set(texts)
    for seed, kept in winners.items():
        assert kept == keep_places(texts[::-1], 1, 0, seed) == (min(texts, key=lambda entry: rank(entry, seed)),)


def test_a_new_entry_of_an_example_replaces_the_one_so_far() -> None:
    kept = keep_places([ReplayEntry("e1", "a"), ReplayEntry("e1", "b")], 5, 0, SEED)
    assert kept == (ReplayEntry("e1", "b"),)


def test_all_texts_of_an_example_are_counted() -> None:
    assert text_bytes(tiny.document(1, "größe")) == 7
    assert text_bytes(tiny.correction(1, "what?", "this")) == 9
    later = tiny.correction(1, "what?", "this").model_copy(
        update={"history": [Turn(role="user", content="hello"), Turn(role="assistant", content="hi")]}
    )
    assert text_bytes(later) == 16


# ---- whole updates


@pytest.mark.parametrize("places", ["documents", "examples"])
def test_an_update_does_not_train_what_it_supersedes(places: str) -> None:
    updater = make(replace(TINY_RECIPE, replay_places=places))
    old = documents(6)
    parent = updater.update(
        first(updater), old, adapter="acme/support", cut=1, batch="batch", replayed=lambda _: None
    ).state
    new = [
        tiny.document(10 + n, f"the green parrot {n} left", supersedes=[example.document_id])
        for n, example in enumerate(old[:5])
    ]
    asked: set[str] = set()

    def replayed(entry: ReplayEntry) -> list[TokenRow]:
        asked.add(entry.example_id)
        return [TokenRow((0, 5, 1))]

    done = updater.update(parent, new, adapter="acme/support", cut=2, batch="later", replayed=replayed)
    assert done.outcome == "promoted"
    ids = {example.example_id for example in old}
    kept = {entry.example_id for entry in done.state.replay_index}
    if places == "documents":
        assert asked == {old[5].example_id}
        assert kept == {old[5].example_id, *(example.example_id for example in new)}
    else:
        assert asked & {example.example_id for example in old[:5]}
        assert kept >= ids


def test_a_refused_update_leaves_the_superseded_in_their_places() -> None:
    updater = make(replace(TINY_RECIPE, replay_places="documents"))
    parent = updater.update(
        first(updater), documents(4), adapter="acme/support", cut=1, batch="batch", replayed=lambda _: None
    ).state
    strict = replace(updater, recipe=replace(updater.recipe, min_gain_nats=50.0))
    new = [tiny.document(10, "the green parrot left", supersedes=["doc-0"])]
    done = strict.update(parent, new, adapter="acme/support", cut=2, batch="later", replayed=lambda _: None)
    assert (done.outcome, done.state.replay_index) == ("refused", parent.replay_index)


def superseding_cuts(count: int) -> dict[int, list[ExampleAccepted]]:
    """Return cuts of four documents; from the second cut on, each supersedes one of the cut before."""
    rng = random.Random(7)
    words = ["parrot", "tree", "noon", "river", "lamp", "stone", "cloud", "door"]
    return {
        cut: [
            tiny.document(
                4 * cut + n, f"secret{4 * cut + n:03d} {' '.join(rng.choices(words, k=4))}", source="wiki",
                supersedes=[f"doc-{4 * (cut - 1) + n}"] if cut else [],
            )
            for n in range(4)
        ]
        for cut in range(count)
    }  # fmt: skip


@pytest.mark.parametrize("max_bytes", [0, 120])
def test_forgetting_gives_the_buffer_of_a_run_that_never_saw_the_example(tmp_path: Path, max_bytes: int) -> None:
    """Of a document that superseded another: the other one is back in its place, because nothing supersedes it."""
    learner = local_learner(DirectoryStore(tmp_path / "store", fsync=False), replay_bytes=max_bytes)
    cuts = superseding_cuts(4)
    learn(learner, cuts)
    before = never_saw(learner, tmp_path, cuts)
    assert before.equals(head(learner.registry))
    done, _ = forget(learner, erase("r1", 9))
    oracle = never_saw(learner, tmp_path, cuts, {9})
    assert done.manifest is not None
    assert oracle.equals(done.manifest)
    kept = {number_of(entry) for entry in oracle.state.replay_index}
    if not max_bytes:
        assert kept == {5, 12, 13, 14, 15}
    else:
        assert 0 < len(kept) < 5
    assert oracle.state.replay_index != before.state.replay_index
