"""How updates train and measure an adapter: alone in a slot of the base, or in passes that other adapters share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

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
        return train(lora, weights, optimizer, steps, config, lock, on_step)

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
        lora.load(weights)
        return row_token_losses(lora, rows, pad=pad, adapted=True, lock=lock, on_step=on_step)

    def joining(self) -> AbstractContextManager[object]:
        """See `Compute.joining`: nothing waits."""
        return nullcontext()

    def alone(self) -> ComputeAlone:
        """Return this object."""
        return self
