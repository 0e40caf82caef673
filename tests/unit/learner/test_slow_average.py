"""The slow average: what is served is an average of trained weights, and training goes on from the trained ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from perennial.learner.model.lora import Tensors, to_safetensors
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.training.averaging.slow_average import AVERAGED, FAST, SlowAverage
from perennial.learner.training.measuring import Measurer
from perennial.learner.training.state import TrainingState, load_state, to_blobs
from perennial.learner.training.trainer import TrainResult, optimizer_from_bytes
from perennial.learner.training.update import Updater
from perennial.storage.errors import IntegrityError
from tests.unit.learner.test_update import RECIPE, documents, first, make, run

SHARE = 0.8
AVERAGING = replace(RECIPE, slow_average=SHARE)
PLAIN = replace(RECIPE, slow_average=0.0)


def fast_of(state: TrainingState) -> Tensors:
    assert state.optimizer is not None
    return {name.removeprefix(FAST): tensor for name, tensor in state.optimizer.items() if name.startswith(FAST)}


def learned(updater: Updater, updates: int, state: TrainingState | None = None) -> list[TrainingState]:
    states = [state or first(updater)]
    for cut in range(1, updates + 1):
        done = run(updater, states[-1], documents(8, 8 * cut), cut)
        assert done.outcome == "promoted"
        states.append(done.state)
    return states


def same(one: Tensors, other: Tensors) -> bool:
    return to_safetensors(one) == to_safetensors(other)


def test_the_first_updates_count_the_same_and_later_ones_as_the_share_says():
    fast = [{"w": torch.tensor([value])} for value in (1.0, 3.0, 8.0, 4.0, 9.0, 5.0, 2.0)]
    served, optimizer, means = {"w": torch.tensor([100.0])}, None, []
    for weights in fast:
        average = SlowAverage.of(served, optimizer, SHARE)
        served = average.with_update(weights)
        optimizer = average.stored(served, weights, {})
        means.append(served["w"].item())
    assert means[:5] == pytest.approx([1.0, 2.0, 4.0, 4.0, 5.0])
    assert means[5:] == pytest.approx([5.0, 4.4])


@pytest.mark.parametrize("shared_passes", [True, False])
def test_an_update_serves_the_average_and_the_next_one_trains_from_the_fast_weights(shared_passes: bool) -> None:
    updater = make(replace(AVERAGING, shared_passes=shared_passes))
    start, one, two, three = learned(updater, 3)
    assert same(one.weights, fast_of(one))
    for before, after, kept in ((one, two, 1 / 2), (two, three, 2 / 3)):
        fast = fast_of(after)
        assert same(
            after.weights, {name: kept * before.weights[name] + (1 - kept) * tensor for name, tensor in fast.items()}
        )
        moments = {name: tensor for name, tensor in (before.optimizer or {}).items() if not name.startswith(FAST)}
        plain = make(replace(PLAIN, shared_passes=shared_passes))
        cut = 2 if before is one else 3
        from_fast = TrainingState(fast_of(before), moments, before.replay_index)
        assert same(run(plain, from_fast, documents(8, 8 * cut), cut).state.weights, fast)
    assert start.optimizer is None


def test_what_is_measured_and_probed_is_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    updater = make(AVERAGING)
    parent = learned(updater, 1)[-1]
    measured: list[Tensors] = []
    losses = Measurer.losses
    monkeypatch.setattr(
        Measurer, "losses", lambda self, weights, *groups: (measured.append(weights), losses(self, weights, *groups))[1]
    )
    done = run(updater, parent, documents(8, 16), 2)
    assert same(measured[0], parent.weights)
    assert same(measured[-1], done.state.weights)
    assert not same(measured[-1], fast_of(done.state))
    assert not any(same(weights, fast_of(done.state)) for weights in measured)
    assert same(updater.lora.weights(), done.state.weights)


def test_a_pass_that_is_taken_back_leaves_the_average_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    updater = make(replace(AVERAGING, epochs=4, rows=4, held_out_share=0.0))
    parent = run(updater, first(updater), documents(16), 1).state
    seen: list[Tensors] = []

    def has_general_rise(self: Measurer, weights: Tensors, *_: object) -> bool:
        seen.append(weights)
        assert same(self.lora.weights(), weights)
        return len(seen) == 2

    monkeypatch.setattr(Measurer, "has_general_rise", has_general_rise)
    done = run(updater, parent, documents(16, 16), 2)
    assert len(seen) == 2
    assert same(done.state.weights, seen[0])
    assert same(updater.lora.weights(), seen[0])


def test_a_refused_update_leaves_both_copies_and_each_try_begins_from_the_same_fast_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = learned(make(AVERAGING), 2)[-1]
    begun: list[Tensors] = []
    train = GatheredPasses.train

    def recording(*args: Any) -> TrainResult:
        begun.append({name: tensor.clone() for name, tensor in args[2].items()})
        return train(*args)

    monkeypatch.setattr(GatheredPasses, "train", recording)
    strict = make(replace(AVERAGING, min_gain_nats=50.0, gentler_tries=2))
    done = run(strict, parent, documents(8, 24), 3)
    assert (done.outcome, done.gate.tries) == ("refused", 3)
    assert done.state is parent
    assert len(begun) == 3
    assert all(same(weights, fast_of(parent)) for weights in begun)


def test_a_recipe_without_an_average_stores_nothing_of_one() -> None:
    state = learned(make(PLAIN), 2)[-1]
    assert state.optimizer is not None
    assert AVERAGED not in state.optimizer
    assert fast_of(state) == {}


def test_the_weights_so_far_count_as_one_update_where_the_recipe_begins_to_average() -> None:
    before = learned(make(PLAIN), 2)[-1]
    done = run(make(AVERAGING), before, documents(8, 24), 3).state
    fast = fast_of(done)
    assert same(fast, run(make(PLAIN), before, documents(8, 24), 3).state.weights)
    assert same(done.weights, {name: 0.5 * before.weights[name] + 0.5 * tensor for name, tensor in fast.items()})
    assert (done.optimizer or {})[AVERAGED].item() == 2


def test_training_goes_on_from_what_is_served_where_the_recipe_ceases_to_average() -> None:
    before = learned(make(AVERAGING), 3)[-1]
    done = run(make(PLAIN), before, documents(8, 32), 4).state
    moments = {name: t for name, t in (before.optimizer or {}).items() if not name.startswith((FAST, AVERAGED))}
    alone = TrainingState(before.weights, moments, before.replay_index)
    assert same(done.weights, run(make(PLAIN), alone, documents(8, 32), 4).state.weights)
    assert AVERAGED not in (done.optimizer or {})
    assert fast_of(done) == {}


def test_a_state_with_an_average_reads_back_from_its_blobs() -> None:
    updater = make(AVERAGING)
    state = learned(updater, 2)[-1]
    refs, blobs = to_blobs(state)
    again = load_state(refs, lambda ref: blobs[ref.digest], updater.lora.shapes)
    assert to_blobs(again) == (refs, blobs)
    assert same(fast_of(again), fast_of(state))


def _without_a_tensor(state: Tensors) -> None:
    del state[next(name for name in state if name.startswith(FAST))]


def _of_another_shape(state: Tensors) -> None:
    state[next(name for name in state if name.startswith(FAST))] = torch.zeros(1)


def _without_the_count(state: Tensors) -> None:
    del state[AVERAGED]


def _with_a_foreign_tensor(state: Tensors) -> None:
    state[FAST + "foreign"] = torch.zeros(1)


def _not_finite(state: Tensors) -> None:
    name = next(name for name in state if name.startswith(FAST))
    state[name] = torch.full_like(state[name], math.nan)


def _counting(value: float) -> Callable[[Tensors], None]:
    return lambda state: state.update({AVERAGED: torch.tensor([value])})


@pytest.mark.parametrize(
    "damage",
    [
        _without_a_tensor, _of_another_shape, _without_the_count, _with_a_foreign_tensor, _not_finite, _counting(0.0),
        _counting(-1.0), _counting(1.5), _counting(math.inf), lambda state: state.update({AVERAGED: torch.ones(2)}),
    ],
)  # fmt: skip
def test_a_damaged_average_is_refused(damage: Callable[[Tensors], None]) -> None:
    updater = make(AVERAGING)
    state = dict(learned(updater, 1)[-1].optimizer or {})
    optimizer_from_bytes(to_safetensors(state), updater.lora.shapes)
    damage(state)
    with pytest.raises(IntegrityError):
        optimizer_from_bytes(to_safetensors(state), updater.lora.shapes)
