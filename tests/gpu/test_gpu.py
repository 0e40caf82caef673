"""Learning on a CUDA device: the base in bf16, the adapter in fp32, and an update that lowers the loss."""

from __future__ import annotations

import os

import pytest
import torch

from perennial.learner.model.base import load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig, is_finite
from perennial.learner.model.loss import mean_nats, row_losses
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, text_rows
from perennial.learner.training.trainer import TrainConfig, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
TEXTS = [f"The blue parrot number {n} turns keys into small green boats at noon." for n in range(12)]


def made() -> tuple[Lora, ExampleTokenizer, list[TokenRow]]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    make_deterministic(2)
    lora = Lora(load_base("shipped", "cuda", 2), LoraConfig(rank=8, alpha=16))
    codec = ExampleTokenizer(lora.base.tokenizer)
    return lora, codec, [row for text in TEXTS for row in text_rows(text, codec, 64)]


def test_an_update_in_bf16_lowers_the_loss_and_keeps_the_adapter_in_fp32():
    lora, codec, rows = made()
    assert {p.dtype for n, p in lora.model.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    state = lora.initial_weights("acme/support", 0)
    config = TrainConfig(learning_rate=3e-3, clip_norm=1.0, pad=codec.pad, warmup_steps=2)
    lora.load(state)
    before = mean_nats(row_losses(lora, rows, pad=codec.pad, adapted=True))
    result = train(lora, state, None, [rows] * 12, config)
    lora.load(result.weights)
    after = mean_nats(row_losses(lora, rows, pad=codec.pad, adapted=True))
    assert after < before - 0.5
    assert is_finite(result.weights)
    assert {parameter.dtype for parameter in lora.parameters.values()} == {torch.float32}
    assert mean_nats(row_losses(lora, rows, pad=codec.pad, adapted=False)) == pytest.approx(before, abs=0.02)


def test_two_runs_on_one_device_agree_closely():
    lora, codec, rows = made()
    config = TrainConfig(learning_rate=3e-3, clip_norm=1.0, pad=codec.pad, warmup_steps=2)
    one, two = (train(lora, lora.initial_weights("a", 0), None, [rows] * 3, config).weights for _ in range(2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=1e-4)
