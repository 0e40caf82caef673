"""When answers count as learned, and that corrections are trained until they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perennial.learner.model.base import load_base
from perennial.learner.model.lora import to_safetensors
from perennial.learner.model.loss import ignore_step
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training import update
from perennial.learner.training.averaging.slow_average import AVERAGED, FAST
from perennial.learner.training.learned import is_learned
from perennial.learner.training.measuring import Measurer
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.learner.training.state import TrainingState
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
RECIPE = replace(
    Recipe.of(Settings.of(env_file=None)), gentler_tries=0, max_general_rise_nats=1.0, learning_rate=1e-3,
    general_kl_weight=0.0,
)  # fmt: skip


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
    assert (done.gate.corrections, done.gate.corrections_not_learned) == (len(TICKETS), 0)
    assert before.gate.corrections is None, "nobody looked"
    assert to_safetensors(run(updater, first(updater), corrections(20)).state.weights) == to_safetensors(
        done.state.weights
    )


def after_documents(updater: Updater, updates: int) -> TrainingState:
    """Return the state of an adapter whose average has so many updates of documents."""
    state = first(updater)
    for cut in range(1, updates + 1):
        told = [tiny.document(n, f"the blue parrot {n} sings in the tree at noon") for n in range(4 * cut, 4 * cut + 4)]
        state = run(updater, state, told, cut).state
    assert state.optimizer is not None
    assert state.optimizer[AVERAGED].item() == updates
    return state


def test_corrections_show_at_once_where_an_average_is_served(updater: Updater) -> None:
    averaging = replace(updater, recipe=replace(RECIPE, slow_average=0.8, max_general_rise_nats=3.0))
    parent = after_documents(averaging, 2)
    done = run(averaging, parent, corrections(20), 3)
    assert (done.outcome, answers_learned(averaging, done.state.weights)) == ("promoted", len(TICKETS))
    assert done.state.optimizer is not None
    assert done.state.optimizer[AVERAGED].item() == 1
    assert all(tensor.equal(done.state.optimizer[FAST + name]) for name, tensor in done.state.weights.items())


def test_an_average_that_shows_the_corrections_is_served(updater: Updater, monkeypatch: pytest.MonkeyPatch) -> None:
    averaging = replace(updater, recipe=replace(RECIPE, slow_average=0.8))
    parent = after_documents(averaging, 2)
    monkeypatch.setattr(update, "is_learned", lambda _: True)
    done = run(averaging, parent, corrections(4), 3)
    assert done.outcome == "promoted"
    assert done.state.optimizer is not None
    assert done.state.optimizer[AVERAGED].item() == 3
    for name, served in done.state.weights.items():
        assert served.equal(2 / 3 * parent.weights[name] + (1 - 2 / 3) * done.state.optimizer[FAST + name])


def test_what_is_learned_takes_no_further_pass(updater: Updater, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "is_learned", lambda _: True)
    done = run(updater, first(updater), corrections(4))
    monkeypatch.undo()
    once = run(replace(updater, recipe=replace(RECIPE, correction_passes=0)), first(updater), corrections(4))
    assert to_safetensors(done.state.weights) == to_safetensors(once.state.weights)


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
    monkeypatch.setattr(Measurer, "too_far", lambda *_: bool(asked.append(1)) or len(asked) == 2)
    done = run(updater, first(updater), corrections(1))
    monkeypatch.undo()
    one_more = run(replace(updater, recipe=replace(RECIPE, correction_passes=1)), first(updater), corrections(1))
    assert len(asked) == 2
    assert (done.gate.corrections, done.gate.corrections_not_learned) == (len(TICKETS), len(TICKETS))
    assert to_safetensors(done.state.weights) == to_safetensors(one_more.state.weights)
    assert done.gate.steps == one_more.gate.steps


def test_several_passes_between_two_looks_train_the_same(updater: Updater, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "is_learned", lambda _: False)
    rises, looks = Measurer.rises, []
    monkeypatch.setattr(Measurer, "rises", lambda *given: looks.append(1) or rises(*given))
    results, counts = [], []
    for steps in (1, 1000):
        looks.clear()
        recipe = replace(RECIPE, correction_passes=6, correction_check_steps=steps)
        results.append(run(replace(updater, recipe=recipe), first(updater), corrections(1)))
        counts.append(len(looks))
    assert counts == [1 + 6, 1 + 1]
    assert results[0].gate == results[1].gate
    assert to_safetensors(results[0].state.weights) == to_safetensors(results[1].state.weights)


def test_further_passes_replay_examples_of_their_update_where_the_recipe_says_so(
    updater: Updater, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "is_learned", lambda _: False)
    tickets = corrections(4)
    rows = {ticket.example_id: updater.rows(ticket) for ticket in tickets}
    asked: list[str] = []

    def replayed(entry: ReplayEntry) -> list[TokenRow]:
        asked.append(entry.example_id)
        return rows[entry.example_id]

    for rehearse in (False, True):
        recipe = replace(RECIPE, correction_passes=4, rehearse_update=rehearse)
        replace(updater, recipe=recipe).update(
            first(updater), tickets, adapter="acme/support", cut=3, batch="batch", replayed=replayed
        )
        assert bool(asked) is rehearse
    assert set(asked) <= rows.keys()


@pytest.mark.parametrize(
    ("rises", "earlier", "too_far"),
    [
        ((0.05, 0.0), (0.0, 0.0), False),
        ((0.70, 0.0), (0.0, 0.0), True),
        ((0.70, 0.0), (0.71, 0.0), False),
        ((0.0, 0.4), (0.0, 0.0), True),
        ((math.nan, 0.0), (0.0, 0.0), True),
        ((0.7, 0.0), (math.nan, 0.0), True),
    ],
)
def test_a_pass_may_lower_a_rise_that_is_past_the_share(
    updater: Updater, rises: tuple[float, float], earlier: tuple[float, float], too_far: bool
) -> None:
    recipe = replace(RECIPE, max_answer_rise_nats=0.5)
    measurer = Measurer(updater.lora, 0, updater.general, recipe, updater.compute, None, None, ignore_step)
    assert measurer.too_far(rises, earlier) is too_far


def test_contradicting_corrections_end_and_held_out_ones_are_trained_too(
    updater: Updater, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "MAX_CORRECTION_STEPS", 6)
    both = [tiny.correction(n, "How much is the Ember plan?", f"It costs {n} euros.") for n in range(8)]
    patient = replace(updater, recipe=replace(RECIPE, correction_passes=100))
    once = replace(updater, recipe=replace(RECIPE, correction_passes=0))
    more, less = run(patient, first(updater), both), run(once, first(updater), both)
    assert more.gate.held_out_examples
    assert more.gate.held_out_after == less.gate.held_out_after, "measured before any further pass"
    assert less.gate.steps < more.gate.steps <= less.gate.steps + 6 + 3


def test_replay_draws_of_further_passes_and_of_all_tries_count(updater: Updater) -> None:
    """An update's identity must differ where a draw had to leave out an example that is being forgotten."""
    parent = run(updater, first(updater), corrections(4)).state
    ticket = [tiny.correction(90, "Who owns the shop?", "It is owned by Nectar and sons.")]

    def missing(recipe: Recipe) -> tuple[int, int]:
        done = replace(updater, recipe=recipe).update(
            parent, ticket, adapter="acme/support", cut=7, batch="batch", replayed=lambda _: None
        )
        return done.gate.replay_missing or 0, done.gate.tries or 1

    (once, _), (passes, _) = (missing(replace(RECIPE, correction_passes=count)) for count in (0, 16))
    assert 0 < once < passes
    refused, tries = missing(replace(RECIPE, correction_passes=0, min_gain_nats=50.0, gentler_tries=2))
    assert (tries, refused) == (3, refused)
    assert refused > once


def test_a_recipe_recorded_without_the_fields_takes_no_further_pass_and_no_further_try() -> None:
    newer = {"correction_passes", "gentler_tries", "correction_check_steps", "rehearse_update"}
    recorded = Recipe.recorded({name: value for name, value in RECIPE.config().items() if name not in newer})
    assert (recorded.correction_passes, recorded.correction_check_steps, recorded.rehearse_update) == (0, 1, False)
    assert recorded.gentler_tries == 0


def test_corrections_keep_the_average_where_the_gate_would_refuse_the_trained_weights(
    updater: Updater, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaging = replace(updater, recipe=replace(RECIPE, slow_average=0.8, max_general_rise_nats=3.0))
    parent = after_documents(averaging, 2)
    monkeypatch.setattr(Measurer, "refused", lambda *_: True)
    done = run(averaging, parent, corrections(20), 3)
    assert done.outcome == "promoted"
    assert done.state.optimizer is not None
    assert done.state.optimizer[AVERAGED].item() == 3
