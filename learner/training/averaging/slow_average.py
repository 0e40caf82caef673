"""The slow average: an adapter serves an average of the weights that its updates trained.

Training goes on from the weights of the last update, the fast weights, at a high learning rate. Served and judged is their
average, in which the noise of single updates cancels (Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407). The
factors A and B are averaged one by one: the fast weights of two updates lie so close that their products give the same
average, see docs/decisions/0060.

The fast weights and the number of averaged updates are stored in the optimizer state, under names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from perennial.learner.model.lora import Tensors
from perennial.storage.errors import IntegrityError

FAST = "fast."
"""Prefix of the fast weights' names in an optimizer state."""
AVERAGED = "averaged"


@dataclass(frozen=True)
class SlowAverage:
    """The average of an adapter before an update.

    Attributes:
        served: The average so far, which the parent serves.
        fast: Weights that the update trains from.
        updates: Number of updates that are averaged in `served`.
        share: Share of the average that an update keeps, 0 to below 1; 0: the trained weights are served.
    """

    served: Tensors
    fast: Tensors
    updates: int
    share: float

    @classmethod
    def of(cls, weights: Tensors, optimizer: Mapping[str, torch.Tensor] | None, share: float) -> SlowAverage:
        """Return the average of a state.

        Where the recipe begins to average, the weights so far count as one update. Where it ceases to, training goes on
        from the served weights: they are what the gate has judged.

        Args:
            weights: Weights that are served.
            optimizer: Optimizer state; None before the adapter's first promoted update.
            share: Share of the average that an update keeps.
        """
        if not share or optimizer is None:
            return cls(weights, weights, 0, share)
        if AVERAGED not in optimizer:
            return cls(weights, weights, 1, share)
        fast = {name: optimizer[FAST + name] for name in weights}
        return cls(weights, fast, int(optimizer[AVERAGED].item()), share)

    @property
    def kept(self) -> float:
        """Share of the average so far that the update keeps: at first less, so that each update counts the same."""
        return min(self.share, self.updates / (self.updates + 1))

    def with_update(self, fast: Tensors) -> Tensors:
        """Return what is served after an update; the same object where nothing of the average so far is kept.

        Args:
            fast: Weights that the update trained.
        """
        kept = self.kept
        if not kept:
            return fast
        return {name: kept * self.served[name].to(new.device) + (1 - kept) * new for name, new in fast.items()}

    def stored(self, served: Tensors, fast: Tensors, optimizer: Tensors) -> Tensors:
        """Return the optimizer state after an update, with the fast weights where the recipe averages.

        Args:
            served: Weights that are served after the update; `fast` itself where the average begins anew with it.
            fast: Weights that the update trained.
            optimizer: Moments and step count.
        """
        if not self.share:
            return optimizer
        count = torch.tensor([1.0 if served is fast else float(self.updates + 1)])
        return {**optimizer, **{FAST + name: tensor for name, tensor in fast.items()}, AVERAGED: count}


def stored_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that an average adds to an optimizer state.

    Args:
        shapes: Shape of each LoRA tensor by name.
    """
    return {**{FAST + name: shape for name, shape in shapes.items()}, AVERAGED: (1,)}


def check_count(optimizer: Mapping[str, torch.Tensor]) -> None:
    """Raise IntegrityError unless the number of averaged updates, where there is one, is whole and positive."""
    if AVERAGED not in optimizer:
        return
    count = float(optimizer[AVERAGED].item())
    if count < 1 or not count.is_integer():
        raise IntegrityError(
            "an optimizer state counts its averaged updates wrongly",
            got=count,
            allowed="a whole number from 1",
            remedy="restore the object from a backup",
        )
