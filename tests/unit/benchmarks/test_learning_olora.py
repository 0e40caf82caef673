"""O-LoRA in the learning benchmark: earlier parts stay as they are, and the penalty is the one of the paper."""

from __future__ import annotations

import pytest
import torch

from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.personal.layered_lora import LayeredCompute, LayeredLora
from perennial.learner.training.personal.stacking import SharedPart
from perennial.learner.training.trainer import TrainConfig
from tests import tiny
from tests.benchmarks.learning.orthogonal import OrthogonalCompute, orthogonality_gradient

CONFIG = LoraConfig(4, 8)
STEPS = [[TokenRow(tuple(range(5 + n, 25 + n)), 1) for n in range(4)]] * 12


def test_the_gradient_is_that_of_the_squared_products():
    earlier, new = torch.randn(6, 10), torch.randn(4, 10, requires_grad=True)
    (earlier @ new.T).square().sum().backward()
    torch.testing.assert_close(orthogonality_gradient(earlier, new.detach()), new.grad)


def layered(base, name: str) -> LayeredLora:
    below = Lora(base, CONFIG, f"{name}-below")
    weights = below.initial_weights("earlier", 0)
    weights = {key: torch.ones_like(t) / 8 if ".lora_B." in key else t for key, t in weights.items()}
    return LayeredLora(base, CONFIG, SharedPart(CONFIG, weights), name)


def overlap(lora: LayeredLora, own) -> float:
    return sum(
        float((lora.shared.weights[name] @ tensor.T).square().sum())
        for name, tensor in own.items()
        if ".lora_A." in name
    )


def trained(base, weight: float, micro_rows: int = 16):
    lora = layered(base, f"weight-{weight:.0f}-{micro_rows}")
    config = TrainConfig(learning_rate=0.02, clip_norm=1.0, pad=2, warmup_steps=1, micro_rows=micro_rows)
    start = lora.initial_weights("new", 0)
    made = LayeredCompute(OrthogonalCompute(weight)).train(lora, start, None, STEPS, config, None, lambda: None)
    return lora, start, made


def test_the_penalty_turns_the_new_rows_away_from_the_earlier_ones_which_stay():
    base = tiny.base()
    with_penalty, start, made = trained(base, 50.0)
    before = overlap(with_penalty, start)
    without, _, plain = trained(base, 0.0)
    assert overlap(with_penalty, made.weights) < 0.2 * before
    assert overlap(without, plain.weights) > 0.5 * before
    for name, tensor in with_penalty.stacked.weights().items():
        axis = 0 if ".lora_A." in name else 1
        assert torch.equal(tensor.narrow(axis, 0, CONFIG.rank), with_penalty.shared.weights[name]), name
    assert plain.losses[-1] < plain.losses[0]


def test_the_penalty_counts_once_a_step_however_many_rows_a_pass_has():
    base = tiny.base()
    one, several = (trained(base, 5.0, micro_rows)[2] for micro_rows in (16, 1))
    assert one.norms == pytest.approx(several.norms)


def test_no_hook_outlives_the_training():
    lora, _, _ = trained(tiny.base(), 5.0)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in lora.parameters.values())
