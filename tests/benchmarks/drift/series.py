"""Series of losses with a change that is put in at a known place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Change = Literal["none", "sudden", "gradual", "recurring"]
RAMP: Final = 200
"""Examples over which a gradual change grows."""
SPELL: Final = 400
"""Examples of each spell of a recurring change."""
EARLIEST: Final = 400
"""Examples before a change, at least; up to 200 more are drawn."""
HORIZON: Final = 600
"""Examples after a change within which it must be found."""
NORMALS: Final = ("iid", "AR .5", "AR .9", "skewed")
MEAN: Final = 4.7
DEVIATION: Final = 0.4
"""Mean and standard deviation of the losses, in nats per token: those of docstrings under the shipped base."""


@dataclass(frozen=True)
class Series:
    """One series.

    Attributes:
        losses: nats per token (n,).
        changes: places at which the mean begins to change.
    """

    losses: Floats
    changes: tuple[int, ...]


def noise(name: str, count: int, rng: np.random.Generator, real: Sequence[Floats] = ()) -> Floats:
    """Return values with mean 0 and standard deviation 1.

    Args:
        name: `iid`, `AR .5`, `AR .9`, `skewed` (gamma), or `real` (drawn from the losses of one domain).
        count: how many.
        rng: where they come from.
        real: losses of each domain.
    """
    if name == "iid":
        return rng.standard_normal(count)
    if name == "skewed":
        return (rng.gamma(2.0, 1.0, count) - 2.0) / math.sqrt(2.0)
    if name == "real":
        domain = real[int(rng.integers(len(real)))]
        return rng.choice((domain - domain.mean()) / domain.std(), count)
    rho = float(name.removeprefix("AR "))
    drawn = rng.standard_normal(count) * math.sqrt(1 - rho * rho)
    found = np.empty(count)
    value = float(rng.standard_normal())
    for index, step in enumerate(drawn.tolist()):
        value = rho * value + step
        found[index] = value
    return found


def series(change: Change, size: float, noise_of: Callable[[int], Floats], rng: np.random.Generator) -> Series:
    """Return a series with a change.

    Args:
        change: its shape.
        size: by how much the mean rises, in standard deviations of one loss.
        noise_of: returns so many values of noise.
        rng: draws the place of the change.
    """
    start = EARLIEST + int(rng.integers(200))
    if change == "none":
        raise ValueError("a series without a change has no place of a change")
    spells = 4 if change == "recurring" else 1
    count = start + (spells * SPELL if change == "recurring" else HORIZON)
    after = np.arange(count) - start
    level = np.zeros(count)
    if change == "sudden":
        level[start:] = size
    elif change == "gradual":
        level[start:] = size * np.minimum(1.0, (after[start:] + 1) / RAMP)
    else:
        level[start:] = size * (after[start:] // SPELL % 2 == 0)
    places = tuple(start + SPELL * spell for spell in range(spells))
    return Series(MEAN + DEVIATION * (noise_of(count) + level), places)


def steady(noise_of: Callable[[int], Floats], count: int) -> Floats:
    """Return a series without a change, in nats per token."""
    return MEAN + DEVIATION * noise_of(count)
