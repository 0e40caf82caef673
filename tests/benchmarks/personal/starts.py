"""Starts of new personal adapters, learned over the own parts of their siblings.

All of them began with the same A, so the factors of several own parts can be averaged one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from perennial.learner.model.lora import Tensors
from perennial.learner.training.personal.learned_starts import mean_of


def reptile_start(start: Tensors, parts: Sequence[Tensors], step: float) -> Tensors:
    """Return θ + step · mean(θ_user - θ): the outer step of Reptile (Nichol et al. 2018, arXiv 1803.02999).

    Args:
        start: θ, from which the next personal adapter would begin so far.
        parts: θ_user, the own parts of personal adapters now, at least one.
        step: Size of the step, above 0 to 1; 1: their plain average.
    """
    mean = mean_of(parts)
    return {name: torch.lerp(tensor, mean[name], step) for name, tensor in start.items()}
