"""Personal adapters: an own part over a shared one, both in one LoRA."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import Linear

from perennial.learner.model.base import Base
from perennial.learner.model.lora import AdapterError, Lora, LoraConfig, Tensors, to_safetensors
from perennial.learner.model.loss import row_token_losses
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.training.averaging.slow_average import AVERAGED, FAST
from perennial.learner.training.compute import Compute, ComputeAlone
from perennial.learner.training.personal.layered_lora import LayeredCompute, LayeredLora
from perennial.learner.training.personal.stacking import (
    SharedPart,
    compose,
    own_part,
    served_rank,
    stacked_config,
)
from perennial.learner.training.state import TrainingState, load_state, to_blobs
from perennial.learner.training.trainer import TrainConfig, TrainResult
from perennial.learner.training.update import Updater
from tests import tiny
from tests.unit.learner.test_gathered_passes import WAIT_S, gathered
from tests.unit.learner.test_train_together import alone, assert_like, jobs_over, ragged, trained_weights
from tests.unit.learner.test_update import RECIPE, documents, make, run

OWN, SHARED = LoraConfig(4, 8), LoraConfig(4, 8)
PLAN = TrainConfig(learning_rate=5e-3, clip_norm=0.5, pad=2, warmup_steps=2)
COMPUTES: list[Callable[[], Compute]] = [ComputeAlone, GatheredPasses]
computes = pytest.mark.parametrize("inner", COMPUTES)


def random_weights(base: Base, config: LoraConfig, seed: int) -> Tensors:
    """Return weights whose B is not zero, of a slot that is used for nothing else."""
    return trained_weights(Lora(base, config, f"drawn-{config.rank}-{config.alpha}"), "shared", seed)


def layered(base: Base, shared: SharedPart, own: LoraConfig = OWN, slot: str = "personal") -> LayeredLora:
    return LayeredLora(base, own, shared, slot)


def merged(base: Base, shared: SharedPart) -> Base:
    """Return a copy of a base without LoRA slots, in whose weights the product of a shared part is added up."""
    plain = replace(base, model=copy.deepcopy(base.model))
    modules = dict(plain.model.named_modules())
    for name, a in shared.weights.items():
        if ".lora_A." in name:
            module = modules[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]
            assert isinstance(module, Linear)
            b = shared.weights[name.replace(".lora_A.", ".lora_B.")]
            module.weight.data += shared.config.alpha / shared.config.rank * (b @ a)
    return plain


def product(weights: Tensors, config: LoraConfig, layer: str) -> torch.Tensor:
    a, b = (weights[f"{layer}.lora_{side}.weight"].double() for side in "AB")
    return config.alpha / config.rank * (b @ a)


def same(one: Tensors, other: Tensors) -> bool:
    return to_safetensors(one) == to_safetensors(other)


# ---- composition


@pytest.mark.parametrize("rank", [None, 8, 16])
@pytest.mark.parametrize("shared", [SHARED, LoraConfig(2, 4), LoraConfig(2, 3), LoraConfig(4, 32)])
def test_one_lora_computes_the_sum_of_both_products(shared: LoraConfig, rank: int | None) -> None:
    base = tiny.base()
    below, own = random_weights(base, shared, 1), random_weights(base, OWN, 2)
    stacked, config = compose(SharedPart(shared, below), own, OWN, rank), stacked_config(shared, OWN, rank)
    for name in own:
        if ".lora_A." in name:
            layer = name.removesuffix(".lora_A.weight")
            expected = product(below, shared, layer) + product(own, OWN, layer)
            torch.testing.assert_close(product(stacked, config, layer), expected, rtol=1e-6, atol=1e-9)
    assert same(own_part(stacked, shared.rank, OWN.rank), own), "the own part comes back bit by bit"


def test_a_shared_part_of_the_same_scale_is_stacked_as_it_is() -> None:
    base = tiny.base()
    below = random_weights(base, SHARED, 1)
    stacked = compose(SharedPart(SHARED, below), random_weights(base, OWN, 2), OWN)
    assert same(own_part(stacked, 0, SHARED.rank), below)


def test_a_filled_up_lora_is_a_plain_adapter_of_an_allowed_rank() -> None:
    base, rows = tiny.base(), ragged(4, random.Random(0))
    shared, own = SharedPart(SHARED, random_weights(base, SHARED, 1)), random_weights(base, OWN, 2)
    config = stacked_config(SHARED, OWN, served_rank(SHARED.rank + OWN.rank + 1))
    assert config == LoraConfig(16, 32)
    plain, over = Lora(base, config, "plain"), layered(base, shared)
    plain.load(compose(shared, own, OWN, config.rank))
    over.load(own)
    for one, other in zip(
        row_token_losses(plain, rows, pad=2, adapted=True), row_token_losses(over, rows, pad=2, adapted=True),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_parts_that_fit_no_lora_are_refused() -> None:
    base = tiny.base()
    with pytest.raises(AdapterError, match="do not fit one LoRA"):
        stacked_config(SHARED, OWN, 7)
    with pytest.raises(AdapterError, match="do not fit one LoRA"):
        stacked_config(LoraConfig(4, 8), LoraConfig(8, 12), 13)
    with pytest.raises(AdapterError, match="other tensors"):
        compose(SharedPart(SHARED, {}), random_weights(base, OWN, 2), OWN)
    with pytest.raises(AdapterError, match="another shape"):
        layered(base, SharedPart(SHARED, random_weights(base, LoraConfig(2, 4), 1)))
    with pytest.raises(AdapterError, match="no server takes"):
        served_rank(513)


# ---- training over a shared part


@computes
def test_an_own_part_trains_as_over_a_base_that_has_the_shared_part_in_its_weights(
    inner: Callable[[], Compute],
) -> None:
    base = tiny.base()
    shared = SharedPart(SHARED, random_weights(tiny.base(), SHARED, 1))
    plain = Lora(merged(base, shared), OWN, "plain")
    over = layered(base, shared)
    rng = random.Random(3)
    rows = [ragged(4, rng) for _ in range(4)]
    weights = trained_weights(plain, "own")
    made, expected = (
        _in_two_runs(compute, lora, weights, rows)
        for compute, lora in ((LayeredCompute(inner()), over), (inner(), plain))
    )
    assert_like(made, expected, 1e-4)
    assert same(over.own_part(over.stacked.weights()), made.weights), "the slot holds the new weights"
    assert same(own_part(over.stacked.weights(), 0, SHARED.rank), shared.weights), "the shared part keeps every bit"


def _in_two_runs(compute: Compute, lora: Lora, weights: Tensors, rows: list[list[TokenRow]]) -> TrainResult:
    half = compute.train(lora, weights, None, rows[:2], PLAN, None, lambda: None)
    return compute.train(lora, half.weights, half.optimizer, rows[2:], PLAN, None, lambda: None).after(half)


@computes
def test_the_loss_of_an_own_part_is_that_of_both(inner: Callable[[], Compute]) -> None:
    base, rows = tiny.base(), ragged(5, random.Random(1))
    shared = SharedPart(SHARED, random_weights(tiny.base(), SHARED, 1))
    plain, over = Lora(merged(base, shared), OWN, "plain"), layered(base, shared)
    own = trained_weights(plain, "own")
    measured = LayeredCompute(inner()).token_losses(over, own, rows, 2, None, lambda: None)
    expected = inner().token_losses(plain, own, rows, 2, None, lambda: None)
    for one, other in zip(measured, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_plain_slot_has_no_shared_part() -> None:
    lora = Lora(tiny.base(), OWN, "plain")
    with pytest.raises(TypeError, match="no shared part"):
        LayeredCompute(ComputeAlone()).token_losses(lora, lora.weights(), [], 2, None, lambda: None)


def test_own_and_whole_adapters_share_a_pass_and_each_is_trained_as_alone() -> None:
    base = tiny.base()
    lora = Lora(base, LoraConfig(8, 16), "whole")
    jobs = jobs_over(lora, 3)
    jobs[1] = replace(jobs[1], config=replace(jobs[1].config, frozen_rank=4))
    results = gathered(GatheredPasses(16, WAIT_S), lora, jobs)
    for job, result in zip(jobs, results, strict=True):
        assert isinstance(result, TrainResult)
        assert_like(result, alone(lora, job))
    frozen = results[1]
    assert isinstance(frozen, TrainResult)
    assert same(own_part(frozen.weights, 0, 4), own_part(dict(jobs[1].weights), 0, 4))


# ---- updates


def personal_updater(
    shared: SharedPart, share: float = 0.8, *, shared_passes: bool = True, slot: str = "personal"
) -> Updater:
    updater = make(replace(RECIPE, slow_average=share, shared_passes=shared_passes))
    return replace(updater, lora=layered(updater.lora.base, shared, slot=slot))


def begin(updater: Updater) -> TrainingState:
    return TrainingState(updater.lora.initial_weights("acme/support/user-42", 0))


def two_updates(updater: Updater, start: TrainingState | None = None) -> TrainingState:
    state = start or begin(updater)
    for cut in (1, 2):
        done = run(updater, state, documents(8, 8 * cut), cut)
        assert done.outcome == "promoted"
        assert done.probes == {}, "which shared version will be served beneath is not known"
        state = done.state
    return state


@pytest.mark.parametrize("shared_passes", [True, False])
def test_an_update_learns_an_own_part_and_leaves_the_shared_one(shared_passes: bool) -> None:
    shared = SharedPart(SHARED, random_weights(tiny.base(), SHARED, 1))
    updater = personal_updater(shared, shared_passes=shared_passes)
    state = two_updates(updater)
    assert {name: tuple(tensor.shape) for name, tensor in state.weights.items()} == updater.lora.shapes
    assert state.optimizer is not None
    assert AVERAGED in state.optimizer
    assert all(f"{FAST}{name}" in state.optimizer for name in state.weights)
    lora = updater.lora
    assert isinstance(lora, LayeredLora)
    assert same(own_part(lora.stacked.weights(), 0, SHARED.rank), shared.weights)
    refs, blobs = to_blobs(state)
    loaded = load_state(refs, lambda ref: blobs[ref.digest], lora.shapes)
    assert same(loaded.weights, state.weights), "the state is stored as that of an adapter that extends nothing"


def test_the_same_updates_over_the_same_shared_version_give_the_same_bits_whoever_trained_in_between() -> None:
    shared = SharedPart(SHARED, random_weights(tiny.base(), SHARED, 1))
    updater = personal_updater(shared)
    first = two_updates(updater)
    run(updater, begin(updater), [tiny.document(900, "another user teaches the opposite of all that")], 7)
    again = two_updates(updater)
    assert to_blobs(first)[1] == to_blobs(again)[1]
    other = two_updates(personal_updater(SharedPart(SHARED, random_weights(tiny.base(), SHARED, 2))))
    assert to_blobs(first)[1] != to_blobs(other)[1], "the shared version beneath is a part of what decides the bits"


def test_a_new_shared_version_reaches_the_served_weights_and_leaves_the_own_part() -> None:
    old = SharedPart(SHARED, random_weights(tiny.base(), SHARED, 1))
    new = SharedPart(SHARED, random_weights(tiny.base(), SHARED, 2))
    updater = personal_updater(old)
    state = two_updates(updater)
    lora = updater.lora
    assert isinstance(lora, LayeredLora)
    served = lora.over(new).compose(state.weights)
    assert same(own_part(served, 0, SHARED.rank), new.weights)
    assert same(own_part(served, SHARED.rank, OWN.rank), state.weights)
    assert lora.over(new).adapter_config() == lora.adapter_config()
