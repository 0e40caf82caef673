"""Delays and false alarms of one arm on series of one kind. Worker processes import it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from perennial.learner.training.replay_buffer import seeded_random
from tests.benchmarks.drift.arms import ARMS
from tests.benchmarks.drift.series import HORIZON, NORMALS, SPELL, Change, Floats, noise, series, steady

NOISES: Final = (*NORMALS, "real")
SIZES: Final = (0.5, 1.0, 2.0, 3.0)
DEPENDENT: Final = "AR .9"
"""Noise of which 64 examples hold too little evidence of a shift of one standard deviation, for any detector."""
STEADY_EXAMPLES: Final = 10_000


@dataclass(frozen=True)
class Row:
    """What one arm did on series of one kind.

    Attributes:
        arm: its name.
        noise: what the losses vary like.
        false_per_10k: alarms per 10,000 examples without a change.
        delays: by shape and size of the change, the delays in examples, `inf` where it was missed.
    """

    arm: str
    noise: str
    false_per_10k: float
    delays: dict[tuple[Change, float], list[float]]


def delays(alarms: Sequence[int], changes: Iterable[int], horizon: int) -> list[float]:
    """Return the number of examples from each change to the first alarm within the horizon; `inf` where there is none.

    Args:
        alarms: numbers of examples, from 1.
        changes: numbers of examples before each change.
        horizon: examples.
    """
    return [min((at - change for at in alarms if 0 < at - change <= horizon), default=math.inf) for change in changes]


def measure(arm: str, kind: str, real: Sequence[Floats], steady_runs: int, runs: int) -> Row:
    """Run one arm on series of one kind; the series are the same for every arm."""

    def rng_of(*seeds: object) -> np.random.Generator:
        return np.random.default_rng(seeded_random("drift", kind, *seeds).getrandbits(64))

    def alarms(losses: Floats, *seeds: object) -> list[int]:
        return ARMS[arm](losses, rng_of("arm", *seeds))

    false = 0
    for run in range(steady_runs):
        rng = rng_of("steady", run)
        false += len(alarms(steady(lambda count, r=rng: noise(kind, count, r, real), STEADY_EXAMPLES), "steady", run))
    found: dict[tuple[Change, float], list[float]] = {}
    wanted: list[tuple[Change, float]] = [("sudden", size) for size in SIZES]
    for change, size in [*wanted, ("gradual", 1.0), ("recurring", 1.0)]:
        horizon = SPELL if change == "recurring" else HORIZON
        places = found.setdefault((change, size), [])
        for run in range(runs if change != "recurring" else max(1, runs // 4)):
            rng = rng_of(change, size, run)
            given = series(change, size, lambda count, r=rng: noise(kind, count, r, real), rng)
            places += delays(alarms(given.losses, change, size, run), given.changes, horizon)
    return Row(arm, kind, false / steady_runs * 10_000 / STEADY_EXAMPLES, found)


def median(values: Sequence[float]) -> float:
    """Return the median, where a missed change counts as infinitely late."""
    return sorted(values)[(len(values) - 1) // 2]
