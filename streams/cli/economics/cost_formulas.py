"""The formulas of `perennial economics`; docs/economics.md explains them and names their sources. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from perennial.learner.costs.operations import FORWARD, FROZEN_TRAINING, LORA_TRAINING, WeightCounts

JOULES_PER_KWH: Final = 3.6e6
ASSUMED_WATTS: Final = {"cpu": 20.0, "cuda": 700.0}
"""Power of a device whose energy is not measured: two cores of a server, and the limit of an H100's board."""
ASSUMED_USD_PER_HOUR: Final = {"cpu": 0.10, "cuda": 3.00}
"""Rent of a virtual machine with two cores, and of an H100."""
USD_PER_KWH: Final = 0.15

RECORDED, MEASURED, DERIVED, FORMULA = "recorded", "measured here", "derived", "formula"
"""Where a figure is from: the learner's record of the update; a measurement of this command; another figure's rate or an
assumed power; the formulas alone."""


@dataclass(frozen=True)
class Yardstick:
    """A model and a device that are not here: their figures come from the formulas alone.

    Attributes:
        title: What they are, for people.
        counts: Weights of the model, and of a LoRA on all its linear layers.
        flops_per_s: Operations per second that the device reaches.
        device: Kind of device, for prices and power.
        positions: Longest context.
    """

    title: str
    counts: WeightCounts
    flops_per_s: float
    device: str
    positions: int


YARDSTICKS: Final = {
    "8b": Yardstick(
        # 32 layers of 4096: q and o 4096², k and v 4096·1024, three of 4096·14336; rank 16; vocabulary 128,256.
        "Llama 3.1 8B with rank 16 on an H100 at 40 % of 989 TFLOP/s (bf16)",
        WeightCounts(frozen=6_979_321_856, lora=41_943_040, head=525_336_576), 0.4 * 989e12, "cuda", 131_072,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """What the command is told, or assumes.

    Attributes:
        usd_per_hour: Rent of the device.
        usd_per_kwh: Price of electricity.
        watts: Power of the device where its energy is not measured.
        request_tokens: Tokens of a request and its answer, which meet the LoRA.
    """

    usd_per_hour: float
    usd_per_kwh: float
    watts: float
    request_tokens: int


@dataclass(frozen=True)
class Cost:
    """What something costs.

    Attributes:
        tokens: Tokens that are trained or read.
        flops: Floating-point operations, by formula.
        seconds: Time of the device; None where nothing says how fast it is.
        seconds_from: Where the time is from.
        joules: Energy of the device; None where the time is not known.
        joules_from: Where the energy is from: `nvml`, `rapl`, or `derived` from the time and an assumed power.
    """

    tokens: int
    flops: float
    seconds: float | None
    seconds_from: str
    joules: float | None = None
    joules_from: str = DERIVED

    def with_energy(self, watts: float) -> Cost:
        """Return the cost with its energy derived from the time, where it is not measured."""
        if self.joules is not None or self.seconds is None:
            return self
        return replace(self, joules=self.seconds * watts, joules_from=DERIVED)

    def rent_usd(self, assumed: Assumptions) -> float | None:
        """Return the price of the device's time."""
        return None if self.seconds is None else self.seconds / 3600 * assumed.usd_per_hour

    def electricity_usd(self, assumed: Assumptions) -> float | None:
        """Return the price of the energy. It is part of a rent: the two are not to be added."""
        return None if self.joules is None else self.joules / JOULES_PER_KWH * assumed.usd_per_kwh


def total_cost(costs: Sequence[Cost]) -> Cost:
    """Return the sum of costs; a figure that one of them lacks is not known of the sum."""
    seconds, joules = [cost.seconds for cost in costs], [cost.joules for cost in costs]
    return Cost(
        sum(cost.tokens for cost in costs),
        sum(cost.flops for cost in costs),
        _sum(seconds),
        " and ".join(sorted({cost.seconds_from for cost in costs})),
        _sum(joules),
        " and ".join(sorted({cost.joules_from for cost in costs})),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def training_flops_per_token(counts: WeightCounts) -> int:
    """Return the operations of a trained token: forward and backward, frozen weights without gradients of their own."""
    return FROZEN_TRAINING * (counts.frozen + counts.head) + LORA_TRAINING * counts.lora


def context_flops(counts: WeightCounts, tokens: int) -> float:
    """Return the operations of reading tokens before the answer: a forward pass without the output layer."""
    return float(FORWARD * counts.frozen * tokens)


def serving_flops(counts: WeightCounts, tokens: int) -> float:
    """Return the operations that an adapter adds to a request of so many tokens, its answer included."""
    return float(FORWARD * counts.lora * tokens)


@dataclass(frozen=True)
class RetrainPlan:
    """How often a retraining trains each token: what one update by the same recipe would do with all examples at once.

    Further passes over corrections are not in it.

    Attributes:
        epochs: Number of times that each row is trained.
        least_rows: Least number of rows of an update.
        general_share: Share of rows that are general text, 0 to 1. Nothing is replayed: all examples are new.
    """

    epochs: float = 1.0
    least_rows: int = 0
    general_share: float = 0.0

    def tokens(self, example_tokens: Sequence[int]) -> int:
        """Return the tokens that are trained.

        Args:
            example_tokens: Tokens of each example that is kept.
        """
        if not example_tokens:
            return 0
        kept = sum(example_tokens)
        passes = self.epochs / (1 - min(self.general_share, 0.99))
        return math.ceil(max(kept * passes, self.least_rows * kept / len(example_tokens)))


def break_even(cost: float | None, saved_per_request: float | None) -> int | None:
    """Return after how many requests a cost is made up for; None where never, or where a figure is not known."""
    if cost is None or saved_per_request is None or saved_per_request <= 0:
        return None
    return math.ceil(cost / saved_per_request)
