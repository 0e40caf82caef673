"""Marks of detectors against the known boundaries of a stream's segments. Pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.drift.measure import delays
from tests.benchmarks.drift.series import Floats


@dataclass(frozen=True)
class Matched:
    """What the marks of one arm on one stream are worth.

    Attributes:
        delays: Examples from each boundary to the first mark after it, `inf` where there is none in time.
        elsewhere: Marks that follow no boundary.
        examples_elsewhere: Examples that follow no boundary.
    """

    delays: tuple[float, ...]
    elsewhere: int
    examples_elsewhere: int

    @property
    def per_10k(self) -> float:
        """Marks elsewhere per 10,000 examples elsewhere; 0 where there are no such examples."""
        return 10_000 * self.elsewhere / self.examples_elsewhere if self.examples_elsewhere else 0.0


def boundaries_of(sizes: Sequence[int]) -> list[int]:
    """Return the number of examples before each boundary.

    Args:
        sizes: Examples of each segment, in order.
    """
    return list(itertools.accumulate(sizes))[:-1]


def match_marks(marks: Sequence[int], boundaries: Sequence[int], within: int, examples: int) -> Matched:
    """Match marks to the boundaries that they follow.

    A mark belongs to the latest boundary before it if at most `within` examples lie between them. Of several marks after one
    boundary the first one is its delay, and the others count neither as found nor as elsewhere.

    Args:
        marks: Numbers of examples, from 1.
        boundaries: Examples before each boundary, rising.
        within: Examples after a boundary in which a mark belongs to it.
        examples: Examples of the stream.
    """
    spans = [min(within, end - start) for start, end in itertools.pairwise([*boundaries, examples])]
    inside = {at for at, span in zip(boundaries, spans, strict=True) for at in range(at + 1, at + span + 1)}
    found = tuple(
        delay for at, span in zip(boundaries, spans, strict=True) for delay in delays(marks, [at], span)
    )  # fmt: skip
    return Matched(found, sum(mark not in inside for mark in marks), examples - len(inside))


def pooled_per_10k(runs: Sequence[Matched]) -> float:
    """Return marks elsewhere per 10,000 examples elsewhere over all runs."""
    return Matched((), sum(run.elsewhere for run in runs), sum(run.examples_elsewhere for run in runs)).per_10k


def found_pct(runs: Sequence[Matched]) -> float:
    """Return the percentage of boundaries, over all runs, that a mark followed in time."""
    every = [delay for run in runs for delay in run.delays]
    return 100 * sum(map(math.isfinite, every)) / len(every)


@dataclass(frozen=True)
class Step:
    """The change of the mean loss at a boundary.

    Attributes:
        nats: Mean after minus mean before, in nats per token.
        error: Its standard error, for independent losses.
        deviation: Standard deviation of one loss around its segment's mean.
    """

    nats: float
    error: float
    deviation: float

    @property
    def is_clear(self) -> bool:
        """Return True if the 95 % interval of the change does not hold 0."""
        return abs(self.nats) > 1.96 * self.error


def step_between(before: Floats, after: Floats) -> Step:
    """Return the change of the mean loss from one segment to the next.

    Args:
        before: Losses of the segment before, in nats per token (n,).
        after: Losses of the segment after (m,).
    """
    error = math.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    squares = ((before - before.mean()) ** 2).sum() + ((after - after.mean()) ** 2).sum()
    deviation = math.sqrt(squares / (len(before) + len(after) - 2))
    return Step(float(after.mean() - before.mean()), error, deviation)
