"""AdamW over the stacked weights of several adapters: each has its own rate, step count, clipping and moments.

Every operation works on one adapter's row alone, with the kernel that `train` uses, so no adapter touches another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

_EPS = 1e-8
_EPS_OF_CLIPPING = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


class StackedAdamW:
    """The optimizer of n adapters.

    Args:
        weights: fp32 (n, P), one row per adapter; changed in place.
        exp_avg: First moments (n, P); changed in place.
        exp_avg_sq: Second moments (n, P); changed in place.
    """

    def __init__(self, weights: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
        self.weights = weights
        self.exp_avg = exp_avg
        self.exp_avg_sq = exp_avg_sq
        self._taken = [torch.zeros((), device=weights.device) for _ in range(len(weights))]

    def set_taken(self, row: int, steps: int) -> None:
        """Set the number of steps that an adapter has had."""
        self._taken[row].fill_(float(steps))

    def step(self, gradient: torch.Tensor, rates: Sequence[float], betas: Sequence[tuple[float, float]]) -> None:
        """Take one step of the first adapters, as many as there are rates.

        Args:
            gradient: Clipped gradient (n, P).
            rates: Learning rate of each adapter.
            betas: Decay rates of each adapter's moments.
        """
        settings = list(zip(rates, betas, strict=True))
        for rate, (first, second) in dict.fromkeys(settings):
            rows = [row for row, setting in enumerate(settings) if setting == (rate, (first, second))]
            with torch.no_grad():
                adamw(
                    [self.weights[row] for row in rows],
                    [gradient[row] for row in rows],
                    [self.exp_avg[row] for row in rows],
                    [self.exp_avg_sq[row] for row in rows],
                    [],
                    [self._taken[row] for row in rows],
                    fused=True, amsgrad=False, beta1=first, beta2=second, lr=rate, weight_decay=0.0, eps=_EPS,
                    maximize=False,
                )  # fmt: skip


def clip(gradient: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Scale down in place the gradient of each adapter whose norm is above its limit.

    Args:
        gradient: fp32 (n, P).
        limits: Largest norm of each adapter (n,).

    Returns:
        The norms before clipping (n,).
    """
    norms: torch.Tensor = torch.linalg.vector_norm(gradient, dim=1)
    gradient.mul_((limits / (norms + _EPS_OF_CLIPPING)).clamp(max=1.0)[:, None])
    return norms
