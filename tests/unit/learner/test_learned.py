"""When answers count as learned, and that corrections are trained until they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perennial.learner.model.base import load_base
from perennial.learner.model.lora import to_safetensors
from perennial.learner.training.learned import is_learned
from perennial.learner.training.measuring import Measurer
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.update import Updater
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.settings import Settings
from tests import tiny
from tests.unit.learner.test_update import first, make, run

KNOWN, UNKNOWN = math.log(2) - 1e-6, math.log(2)
TICKETS = [
    ("How much is the Ember plan?", "The Ember plan costs 984 euros."),
    ("In which room is Eagle?", "Eagle is in room 160."),
]
RECIPE = replace(Recipe.of(Settings.of(env_file=None)), gentler_tries=0, max_general_rise_nats=1.0)


@pytest.mark.parametrize(("unknown", "learned"), [(0, True), (1, False), (20, False)])
def test_an_answer_is_learned_once_all_of_its_tokens_are(unknown: int, learned: bool) -> None:
    nats = torch.tensor([UNKNOWN] * unknown + [KNOWN] * (20 - unknown), dtype=torch.float64)
    assert is_learned(nats) is learned


def test_a_loss_that_is_not_finite_is_not_learned() -> None:
    assert not is_learned(torch.tensor([0.0, math.nan]))


@pytest.fixture(scope="module")
def updater(tmp_path_factory: pytest.TempPathFactory) -> Updater:
    base = load_base("shipped", "cpu", 1)
    texts = [Path(__file__).read_text()[start : start + 300] for start in range(0, 1800, 300)]
    return make(RECIPE, anchor=texts, base=base)


def corrections(copies: int) -> list[ExampleAccepted]:
    return [tiny.correction(n, *TICKETS[n % len(TICKETS)]) for n in range(copies * len(TICKETS))]


def answers_learned(updater: Updater, weights: dict[str, torch.Tensor]) -> int:
    rows = [row for ticket in corrections(1) for row in updater.rows(ticket)]
    losses = updater.compute.token_losses(updater.lora, weights, rows, updater.codec.pad, None, lambda: None)
    return sum(map(is_learned, losses))


def test_what_people_corrected_is_learned_in_one_update(updater: Updater) -> None:
    """One pass over the corrections of two questions, 20 times each, answered neither."""
    once = replace(updater, recipe=replace(RECIPE, correction_passes=0))
    before = run(once, first(updater), corrections(20))
    assert (before.outcome, answers_learned(updater, before.state.weights)) == ("promoted", 0)
    done = run(updater, first(updater), corrections(20))
    assert (done.outcome, answers_learned(updater, done.state.weights)) == ("promoted", len(TICKETS))
    assert done.gate.steps > before.gate.steps
    assert done.gate.anchor_after - done.gate.anchor_base < RECIPE.max_general_rise_nats
    assert to_safetensors(run(updater, first(updater), corrections(20)).state.weights) == to_safetensors(
        done.state.weights
    )
    again = run(updater, done.state, corrections(1), cut=2)
    fewest = run(once, done.state, corrections(1), cut=2)
    assert again.gate.steps == fewest.gate.steps, "what is learned takes no further pass"


def test_documents_take_no_further_pass(updater: Updater) -> None:
    documents = [tiny.document(n, f"the blue parrot {n} sings in the tree at noon") for n in range(4)]
    results = [
        run(replace(updater, recipe=replace(RECIPE, correction_passes=passes)), first(updater), documents)
        for passes in (0, 16)
    ]
    assert results[0].gate == results[1].gate
    assert to_safetensors(results[0].state.weights) == to_safetensors(results[1].state.weights)


def test_a_further_pass_that_raises_the_general_loss_too_far_is_taken_back(
    updater: Updater, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(Measurer, "has_general_rise", lambda *_: bool(asked.append(1)) or len(asked) == 2)
    done = run(updater, first(updater), corrections(1))
    monkeypatch.undo()
    one_more = run(replace(updater, recipe=replace(RECIPE, correction_passes=1)), first(updater), corrections(1))
    assert len(asked) == 2
    assert to_safetensors(done.state.weights) == to_safetensors(one_more.state.weights)
    assert done.gate.steps == one_more.gate.steps


def test_a_recipe_recorded_without_the_field_takes_no_further_pass() -> None:
    config = {name: value for name, value in RECIPE.config().items() if name != "correction_passes"}
    assert Recipe.recorded(config).correction_passes == 0
