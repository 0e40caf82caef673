"""A drift detector for losses: has the mean changed somewhere in the window, given how much neighbours depend on each other?

At each input it compares the mean before with the mean after every place where the change may have been, in standard
errors. Losses that depend on the losses just before them carry less evidence than independent ones, so the standard error
follows from the autocorrelation that the window itself shows. The detector depends on nothing but its last inputs: one that
is made again from them decides alike.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

MIN_BEFORE: Final = 16
"""Inputs before a change, at least. The mean before is what changes are measured against."""
MIN_AFTER: Final = 2
"""Inputs after a change, at least: a single input of 8 long-tailed losses is far out now and then."""
MAX_AUTOCORRELATION: Final = 0.9
"""Bound of the estimate. The standard error grows without limit towards 1."""


@dataclass(frozen=True)
class MeanChange:
    """The place in a window where the means before and after differ most, in standard errors.

    Attributes:
        errors: difference of the means, in its standard errors.
        before: mean of the inputs before.
        after: mean of the inputs after.
        deviation: standard deviation of one input around these means.
        inputs: number of inputs after the place.
    """

    errors: float
    before: float
    after: float
    deviation: float
    inputs: int


def largest_change(inputs: NDArray[np.float64]) -> MeanChange | None:
    """Return the largest change of the mean in the later half; None if there are too few inputs, or they do not vary.

    A change in the earlier half was looked for when it was in the later one; to look for it again finds chance alone.

    Inputs count as an autoregressive series of order 1 around two means. Its autocorrelation is estimated for each place of
    the change by itself, because a change inside the window would look like autocorrelation. The estimate is too low in a
    short window and is corrected.

    Args:
        inputs: the window (n,), oldest first.

    Sources: Andrews 1993, Tests for Parameter Instability and Structural Change with Unknown Change Point, doi
    10.2307/2951764 (the largest statistic over all places). Kendall 1954, Note on Bias in the Estimation of
    Autocorrelation, doi 10.1093/biomet/41.3-4.403 (the correction).

    Example:
        >>> inputs = np.array([(-1.0) ** number + 4.0 * (number >= 40) for number in range(48)])
        >>> change = largest_change(inputs)
        >>> change.before, change.after, change.errors > 10
        (0.0, 4.0, True)
    """
    n = len(inputs)
    if n < MIN_BEFORE + MIN_AFTER:
        return None
    first = np.arange(max(MIN_BEFORE, n // 2), n - MIN_AFTER + 1)  # inputs before, by place: (places,)
    last = n - first
    x = inputs - inputs.mean()
    before = np.cumsum(x)[first - 1]
    after = -before  # the sum of all is 0
    mean_before, mean_after = before / first, after / last
    squares = float(x @ x) - first * mean_before**2 - last * mean_after**2
    if not squares.min() > 1e-18 * max(1.0, float(inputs @ inputs)):
        return None
    products = x[1:] * x[:-1]
    # Sum of (x[t] - mean) * (x[t + 1] - mean) over neighbours on the same side of the place.
    covariance = (
        products.sum() - products[first - 1]
        - mean_before * (2 * before - x[0] - x[first - 1]) + (first - 1) * mean_before**2
        - mean_after * (2 * after - x[first] - x[-1]) + (last - 1) * mean_after**2
    )  # fmt: skip
    found = covariance / squares
    rho = np.clip(found + (1 + 4 * found) / n, 0.0, MAX_AUTOCORRELATION)
    variance = squares / (n - 2)
    errors = np.abs(mean_after - mean_before) / np.sqrt(variance * (1 + rho) / (1 - rho) * (1 / first + 1 / last))
    place = int(np.argmax(errors))
    cut = int(first[place])
    return MeanChange(
        float(errors[place]), float(inputs[:cut].mean()), float(inputs[cut:].mean()),
        math.sqrt(float(variance[place])), n - cut,
    )  # fmt: skip


class MeanShift:
    """Report that the mean of the inputs changed, in either direction.

    The window needs no scale: the test is the same for inputs in any unit.

    Args:
        threshold: standard errors from which a difference of means is drift. A larger one means fewer and later alarms.
        window: number of latest inputs that are looked at. A test takes 50 microseconds at 128.

    Example:
        >>> detector = MeanShift(threshold=4.2, window=128)
        >>> alarms = []
        >>> for number in range(80):
        ...     detector.update((-1.0) ** number + 4.0 * (number >= 40))
        ...     if detector.drift_detected:
        ...         alarms.append(number)
        >>> alarms[0]
        41
    """

    def __init__(self, threshold: float, window: int) -> None:
        self._threshold = threshold
        self._inputs: deque[float] = deque(maxlen=window)
        self._change: MeanChange | None = None
        self._tested = False

    def update(self, x: float) -> None:
        """Take one finite value."""
        self._inputs.append(x)
        self._tested = False

    @property
    def change(self) -> MeanChange | None:
        """The largest change in the window; None if there is none. It is looked for when it is asked for."""
        if not self._tested:
            self._change = largest_change(np.array(self._inputs))
            self._tested = True
        return self._change

    @property
    def drift_detected(self) -> bool:
        """True if the change is worth a report. The caller resets the detector then."""
        change = self.change
        return change is not None and change.errors > self._threshold
