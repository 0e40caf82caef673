"""Train and measure an own part with a shared adapter, frozen, beneath it.

The layers of the base get one slot for both parts. The own part is what callers see: weights, shapes, optimizer state and
averages are those of an adapter that extends nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from perennial.learner.model.base import Base
from perennial.learner.model.lora import Lora, LoraConfig, Tensors, check_weights, rank_axis
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.compute import Compute
from perennial.learner.training.personal.stacking import (
    SharedPart,
    compose,
    own_part,
    stacked_config,
)
from perennial.learner.training.trainer import MOMENTS, TrainConfig, TrainResult


class LayeredLora(Lora):
    """A slot whose own part can be trained, and whose shared part stays as it is.

    Args:
        base: Base to inject the layers into.
        own: Rank and alpha of the own part.
        shared: The shared part; it may be replaced between updates.
        slot: Name of the slot.

    Attributes:
        stacked: The same slot with the weights of both parts.
        own: Rank and alpha of the own part.
        shared: The shared part.

    Raises:
        AdapterError: The parts do not fit one LoRA, or the slot exists with another rank.
    """

    def __init__(self, base: Base, own: LoraConfig, shared: SharedPart, slot: str) -> None:
        super().__init__(base, stacked_config(shared.config, own), slot)
        self.stacked = Lora(base, self.config, slot)
        self.own = own
        stacked_shapes = self.shapes
        check_weights(shared.weights, shapes_of_rank(stacked_shapes, shared.config.rank))
        self.shared = shared
        self.shapes = shapes_of_rank(stacked_shapes, own.rank)

    def over(self, shared: SharedPart) -> LayeredLora:
        """Return the same slot over another version of the shared adapter.

        Raises:
            AdapterError: It has another rank, or belongs to another base.
        """
        return LayeredLora(self.base, self.own, shared, self.slot)

    def computing_in(self, dtype: torch.dtype | None) -> LayeredLora:
        """See `Lora.computing_in`."""
        same = copy.copy(self)
        same.compute_dtype = dtype
        same.stacked = self.stacked.computing_in(dtype)
        return same

    def compose(self, weights: Mapping[str, torch.Tensor]) -> Tensors:
        """Return an own part as it is served: as one LoRA with the shared part."""
        return compose(self.shared, weights, self.own)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy an own part into the slot, with the shared part beneath it.

        Raises:
            AdapterError: Names or shapes differ from those of an own part.
        """
        check_weights(weights, self.shapes)
        self.stacked.load(self.compose(weights))

    def weights(self) -> Tensors:
        """Return a copy of the own part, fp32 on the CPU."""
        return self.own_part(self.stacked.weights())

    def own_part(self, stacked: Mapping[str, torch.Tensor]) -> Tensors:
        """Return the own part of tensors that hold both."""
        return own_part(stacked, self.shared.config.rank, self.own.rank)

    def adapter_config(self) -> bytes:
        """Return the bytes of PEFT's `adapter_config.json` for what `compose` returns."""
        return self.stacked.adapter_config()


class LayeredCompute:
    """Trains and measures own parts in a `LayeredLora`, with the arithmetic of another compute.

    Args:
        inner: What computes both parts as one LoRA.
    """

    def __init__(self, inner: Compute) -> None:
        self._inner = inner

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
        """See `Compute.train`: gradients, norms and moments are those of the own part alone."""
        layered = _layered(lora)
        rank = layered.shared.config.rank
        made = self._inner.train(
            layered.stacked, layered.compose(weights), optimizer and _stacked_moments(optimizer, rank), steps,
            replace(config, frozen_rank=rank), lock, on_step,
        )  # fmt: skip
        moments = {
            f"{moment}.{name}": tensor
            for moment in MOMENTS
            for name, tensor in layered.own_part(_of_moment(made.optimizer, moment)).items()
        }
        others = {name: tensor for name, tensor in made.optimizer.items() if name.partition(".")[0] not in MOMENTS}
        return replace(made, weights=layered.own_part(made.weights), optimizer={**others, **moments})

    def token_losses(
        self,
        lora: Lora,
        weights: Mapping[str, torch.Tensor],
        rows: Sequence[TokenRow],
        pad: int,
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None],
    ) -> list[torch.Tensor]:
        """See `Compute.token_losses`: the losses under both parts."""
        layered = _layered(lora)
        return self._inner.token_losses(layered.stacked, layered.compose(weights), rows, pad, lock, on_step)

    def joining(self) -> AbstractContextManager[object]:
        """See `Compute.joining`."""
        return self._inner.joining()

    def alone(self) -> LayeredCompute:
        """See `Compute.alone`."""
        return LayeredCompute(self._inner.alone())


def _layered(lora: Lora) -> LayeredLora:
    if not isinstance(lora, LayeredLora):
        raise TypeError(f"a {type(lora).__name__} has no shared part")
    return lora


def shapes_of_rank(shapes: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the same tensors with another rank.

    Args:
        shapes: Shapes by PEFT name.
        rank: The rank.
    """
    return {name: (rank, shape[1]) if rank_axis(name) == 0 else (shape[0], rank) for name, shape in shapes.items()}


def _stacked_moments(optimizer: Mapping[str, torch.Tensor], shared_rank: int) -> Tensors:
    """Return an optimizer state of both parts: the moments of the shared part are zeros, for it is never trained."""
    found: Tensors = {}
    for name, tensor in optimizer.items():
        if name.partition(".")[0] not in MOMENTS:
            found[name] = tensor
            continue
        axis = rank_axis(name)
        shape = list(tensor.shape)
        shape[axis] = shared_rank
        found[name] = torch.cat([tensor.new_zeros(shape), tensor], axis)
    return found


def _of_moment(optimizer: Mapping[str, torch.Tensor], moment: str) -> Tensors:
    prefix = f"{moment}."
    return {name.removeprefix(prefix): tensor for name, tensor in optimizer.items() if name.startswith(prefix)}
