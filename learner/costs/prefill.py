"""Measure how long a base takes to read a request before it answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from perennial.learner.model.loss import autocast

if TYPE_CHECKING:
    from perennial.learner.model.base import Base


def prefill_seconds(
    base: Base, tokens: int, seconds: float = 2.0, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median time of a forward pass over a request, in seconds: keys and values are kept, one token predicted.

    Args:
        base: The frozen base.
        tokens: Length of the request, at least 1 and at most `base.max_positions`.
        seconds: How long to measure; there are at least two passes, of which the first is not counted.
        clock: A monotonic clock, in seconds.
    """
    size = len(base.tokenizer)
    ids = torch.tensor([[(7 * number + 3) % size for number in range(tokens)]], device=base.device)  # (1, T)

    def once() -> None:
        with torch.no_grad(), autocast(base.device, base.compute_dtype):
            base.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.float().sum().item()

    once()
    times: list[float] = []
    end = clock() + seconds
    while not times or clock() < end:
        began = clock()
        once()
        times.append(clock() - began)
    return statistics.median(times)
