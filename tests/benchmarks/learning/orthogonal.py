"""O-LoRA: each block trains a LoRA of its own over those of the earlier blocks, which are frozen and stay in the sum.

A penalty keeps the new A orthogonal to the earlier ones (Wang et al. 2023, arXiv 2310.14152, equations 7 and 8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Final

import torch

from perennial.learner.model.lora import Lora
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.compute import ComputeAlone
from perennial.learner.training.trainer import TrainConfig, TrainResult

PENALTY_WEIGHT: Final = 0.5
"""Weight of the penalty that the paper uses in most of its experiments."""


def orthogonality_gradient(earlier: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the sum of the squares of `earlier @ new.T` with respect to `new`, (r, inputs).

    Args:
        earlier: Rows of A of all earlier blocks, (R, inputs).
        new: Rows of A of this block, (r, inputs).
    """
    return 2 * (new @ earlier.T) @ earlier


class OrthogonalCompute(ComputeAlone):
    """Trains the last rows of each A with a penalty on their products with the frozen rows before them.

    Args:
        weight: Weight of the penalty beside the loss, which is in nats per token.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight

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
        # One backward pass per step: the hooks add the penalty's gradient once in each.
        config = replace(config, packed_tokens=0, micro_rows=max(map(len, steps), default=1))
        with lock or nullcontext():
            lora.select()  # hooks need parameters that take gradients
            hooks = [
                parameter.register_post_accumulate_grad_hook(self._hook(config.frozen_rank))
                for name, parameter in lora.parameters.items()
                if config.frozen_rank and ".lora_A." in name
            ]
        try:
            return super().train(lora, weights, optimizer, steps, config, lock, on_step)
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, frozen_rank: int) -> Callable[[torch.Tensor], None]:
        def add_penalty(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                with torch.no_grad():
                    earlier, new = parameter[:frozen_rank], parameter[frozen_rank:]
                    parameter.grad[frozen_rank:] += self._weight * orthogonality_gradient(earlier, new)

        return add_penalty
