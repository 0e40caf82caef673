"""Starts of new personal adapters, learned over the own parts of their siblings.

All of them began with the same A, so the factors of several own parts can be averaged one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from perennial.learner.model.lora import Tensors


def average_of(parts: Sequence[Tensors]) -> Tensors:
    """Return the mean of own parts, factor by factor.

    Args:
        parts: Own parts by PEFT name, at least one.
    """
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def reptile_start(start: Tensors, parts: Sequence[Tensors], step: float) -> Tensors:
    """Return θ + step · mean(θ_user - θ): the outer step of Reptile (Nichol et al. 2018, arXiv 1803.02999).

    Args:
        start: θ, from which the next personal adapter would begin so far.
        parts: θ_user, the own parts of personal adapters now, at least one.
        step: Size of the step, above 0 to 1; 1: their plain average.
    """
    mean = average_of(parts)
    return {name: torch.lerp(tensor, mean[name], step) for name, tensor in start.items()}
