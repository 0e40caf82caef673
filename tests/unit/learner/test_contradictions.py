"""Corrections that answer the same question differently: who is trained, also where a voter is forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.learner.training.thinning.contradictions import OUTVOTED, outvoted
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.refused_examples import load_refused_examples
from perennial.streams.events.models import Batch, ExampleAccepted, ForgetRequested, Selector
from tests import scratch, tiny
from tests.unit.learner.test_forgetting import forget, head, learn, quarantined, readable, request
from tests.unit.learner.test_versions import ADAPTER, local_learner

ASKED = "the birch asks the delta"


def correction(number: int, answer: str, source: str | None = None, prompt: str = ASKED) -> ExampleAccepted:
    return tiny.correction(number, prompt, answer).model_copy(update={"source": source})


def ids(*numbers: int) -> set[str]:
    return {f"{number:032x}" for number in numbers}


def forgetting(name: str, *numbers: int, **more: Any) -> ForgetRequested:
    return request(name, selector=Selector(document_ids=[f"turn-{number}" for number in numbers]), **more)


def offsets(manifest: Manifest) -> tuple[list[int], list[int]]:
    """Offsets of the examples that were trained, and of those that were outvoted."""
    skipped = [item.offset for item in manifest.skipped if item.reason == OUTVOTED]
    return [item.offset for item in manifest.learned], skipped


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def test_a_source_that_repeats_itself_has_one_vote() -> None:
    lies = [correction(n, "never", "attacker") for n in range(10, 30)]
    honest = [correction(1, "five days", "desk a"), correction(2, "five days", "desk b")]
    assert outvoted([*lies, *honest]) == outvoted([*honest, *lies]) == ids(*range(10, 30))


def test_a_source_votes_for_its_newest_answer() -> None:
    examples = [correction(1, "five", "a"), correction(2, "six", "b"), correction(3, "six", "a")]
    assert outvoted(examples) == ids(1)


def test_of_answers_with_as_many_votes_the_newest_is_trained() -> None:
    assert outvoted([correction(1, "five", "a"), correction(2, "six", "b")]) == ids(1)
    assert outvoted([correction(2, "six"), correction(1, "five")]) == ids(1)


def test_earlier_examples_vote_where_they_are_given() -> None:
    earlier = [correction(1, "five", "a"), correction(2, "five", "b")]
    assert outvoted([correction(3, "six", "c")], earlier) == ids(3)
    assert outvoted([correction(3, "six", "c"), correction(4, "six", "b")], earlier) == set()


def test_without_the_forgotten_source_the_others_decide() -> None:
    examples = [correction(1, "never", "a"), correction(2, "never", "b"), correction(3, "five", "c")]
    assert outvoted(examples) == ids(3)
    assert outvoted([example for example in examples if example.source != "b"]) == ids(1)


@pytest.mark.parametrize("other", ["the delta asks the birch", ASKED.upper()])
def test_answers_to_other_questions_do_not_contradict(other: str) -> None:
    assert outvoted([correction(1, "five"), correction(2, "six", prompt=other)]) == set()


def test_documents_and_equal_answers_are_left_alone() -> None:
    same = [correction(1, "five", "a"), correction(2, " five\n", "b")]
    assert outvoted([*same, tiny.document(3, "five"), tiny.document(4, "six")]) == set()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from(["s", "t", None]))))
def test_every_question_keeps_exactly_one_answer(drawn) -> None:
    examples = [correction(n, answer, source, prompt) for n, (prompt, answer, source) in enumerate(drawn)]
    found = outvoted(examples)
    kept = [example for example in examples if example.example_id not in found]
    for prompt in {example.prompt for example in examples}:
        assert len({example.answer for example in kept if example.prompt == prompt}) == 1


def test_without_an_outvoted_answer_its_source_votes_for_the_one_before() -> None:
    given_by = [("z", "a"), ("x", "b"), ("x", "c"), ("z", "d"), ("y", "a")]
    examples = [correction(n, answer, source) for n, (answer, source) in enumerate(given_by)]
    assert outvoted(examples) == ids(0, 3, 4)
    assert outvoted(examples[:4]) == ids(1, 2), "two votes each, and z is newer"


def test_an_update_trains_the_answer_with_more_sources_and_says_which_it_left_out(store: DirectoryStore) -> None:
    learner = local_learner(store)
    examples = [
        correction(0, "amber cedar", "a"), correction(1, "amber cedar", "b"), tiny.document(2, "grove heath inlet"),
        *(correction(n, "jetty kelp", "attacker") for n in range(3, 9)),
    ]  # fmt: skip
    manifest = learn(learner, {1: examples})[0].manifest
    assert manifest is not None
    assert offsets(manifest) == ([0, 1, 2], [3, 4, 5, 6, 7, 8])
    assert {example.example_id for example in examples[3:]} <= load_refused_examples(store, ADAPTER).keys()
    everything = local_learner(DirectoryStore(store.root.with_name("off"), fsync=False), correction_votes="off")
    assert offsets(learn(everything, {1: examples})[0].manifest) == (list(range(9)), [])


def test_a_forgotten_voter_changes_the_vote_as_if_it_had_never_come(store: DirectoryStore, tmp_path: Path) -> None:
    learner = local_learner(store)
    cuts = {
        1: [
            correction(0, "amber cedar", "a"), correction(1, "amber cedar", "b"), correction(2, "jetty kelp", "c"),
            tiny.document(3, "grove heath inlet"),
        ],
        2: [tiny.document(4, "larch flint ember"), tiny.document(5, "delta birch amber")],
    }  # fmt: skip
    first = learn(learner, cuts)[0].manifest
    assert offsets(first) == ([0, 1, 3], [2])
    done, _ = forget(learner, quarantined(store, forgetting("r1", 0, kind="expire", suppress=False)))

    def trained(batch: Batch) -> list[ExampleAccepted]:
        return [example for example in batch.examples if example.document_id != "turn-1"]

    oracle = scratch.train_batches(
        learner.updater, DirectoryStore(tmp_path / "oracle", fsync=False), ADAPTER,
        {
            cut: Batch(adapter=ADAPTER, cut=cut, examples=[e for e in group if e.origin.offset], skipped=[])
            for cut, group in cuts.items()
        },
        trained=trained,
    )  # fmt: skip
    assert done.manifest is not None
    assert oracle.equals(done.manifest)
    # What is learned now is a duplicate if it comes again; what is outvoted now may come again.
    assert ids(1) <= load_refused_examples(store, ADAPTER).keys()
    assert not ids(2) & load_refused_examples(store, ADAPTER).keys()


def test_with_the_history_one_source_does_not_take_back_what_two_taught(store: DirectoryStore, tmp_path: Path) -> None:
    learner = local_learner(store, correction_votes="history")
    cuts = {
        1: [
            correction(0, "amber cedar", "a"),
            correction(1, "amber cedar", "b"),
            tiny.document(2, "grove heath inlet"),
        ],
        2: [correction(3, "jetty kelp", "c")],
        3: [correction(4, "jetty kelp", "c"), tiny.document(5, "larch flint ember")],
    }
    manifests = [done.manifest for done in learn(learner, cuts)]
    assert [offsets(manifest) for manifest in manifests] == [([0, 1, 2], []), ([], [3]), ([5], [4])]
    assert manifests[1].outcome == "unchanged"
    done, _ = forget(learner, quarantined(store, forgetting("r1", 0, 1)))
    oracle = scratch.train(
        learner.updater,
        DirectoryStore(tmp_path / "oracle", fsync=False),
        ADAPTER,
        {1: cuts[1][2:], 2: cuts[2], 3: cuts[3]},
    )
    assert done.manifest is not None
    assert oracle.equals(done.manifest)
    assert readable(store.root, ["amber cedar"]) == []


def test_what_is_outvoted_can_be_forgotten_without_a_change(store: DirectoryStore) -> None:
    learner = local_learner(store)
    cuts = {1: [correction(0, "amber cedar", "a"), correction(1, "amber cedar", "b"), correction(2, "jetty kelp", "c")]}
    before = learn(learner, cuts)[0].manifest
    done, _ = forget(learner, quarantined(store, forgetting("r1", 2)))
    assert done.outcome == "promoted"
    assert head(learner.registry).weights == before.weights
    assert readable(store.root, ["jetty kelp"]) == []
