"""How updates train and measure an adapter: alone in a slot of the base, or in passes that other adapters share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from perennial.learner.costs.device_use import Reading, add_use
from perennial.learner.costs.operations import WeightCounts, measuring_flops, training_flops
from perennial.learner.model.lora import Lora
from perennial.learner.model.loss import row_token_losses
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.trainer import TrainConfig, TrainResult, train


class Compute(Protocol):
    """Trains and measures adapters.

    `ComputeAlone` uses PEFT's layers. `learner.together` has one whose passes several adapters share.
    """

    def train(
        self,
        lora: Lora,
        weights: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor] | None,
        steps: Sequence[Sequence[TokenRow]],
        config: TrainConfig,
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None],
    ) -> TrainResult:
        """Train an adapter as `trainer.train` does; afterwards the slot holds its new weights."""

    def token_losses(
        self,
        lora: Lora,
        weights: Mapping[str, torch.Tensor],
        rows: Sequence[TokenRow],
        pad: int,
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None],
    ) -> list[torch.Tensor]:
        """Return the losses of rows as `row_token_losses` does; afterwards the slot holds the weights."""

    def joining(self) -> AbstractContextManager[object]:
        """Return a context in which the thread is about to train: passes wait for it, for a bounded time."""

    def alone(self) -> Compute:
        """Return the same arithmetic in passes that no other adapter shares."""


class ComputeAlone:
    """Trains and measures with PEFT's layers, one adapter at a time."""

    def train(
        self,
        lora: Lora,
        weights: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor] | None,
        steps: Sequence[Sequence[TokenRow]],
        config: TrainConfig,
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None],
    ) -> TrainResult:
        """See `Compute.train`."""
        began = Reading.now(lora.base.device)
        trained = train(lora, weights, optimizer, steps, config, lock, on_step)
        counts = WeightCounts.of(lora)
        flops = sum(training_flops(counts, rows) for rows in steps)
        add_use(began.until_now(lora.base.device).share(1.0, training_flops=flops))
        return trained

    def token_losses(
        self,
        lora: Lora,
        weights: Mapping[str, torch.Tensor],
        rows: Sequence[TokenRow],
        pad: int,
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None],
    ) -> list[torch.Tensor]:
        """See `Compute.token_losses`."""
        began = Reading.now(lora.base.device)
        lora.load(weights)
        losses = row_token_losses(lora, rows, pad=pad, adapted=True, lock=lock, on_step=on_step)
        flops = measuring_flops(WeightCounts.of(lora), rows)
        add_use(began.until_now(lora.base.device).share(1.0, measuring_flops=flops))
        return losses

    def joining(self) -> AbstractContextManager[object]:
        """See `Compute.joining`: nothing waits."""
        return nullcontext()

    def alone(self) -> ComputeAlone:
        """Return this object."""
        return self
