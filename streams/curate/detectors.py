"""The drift detectors, and the table of the signals that each of them watches.

To add a detector:

1. Write a function here that returns a new one: an object with `update(x)` and `drift_detected` (the protocol
   `Detector`; every detector of river.drift fits). Its docstring has the idea, the parameters with their consequence,
   an example that runs, and the paper.
2. Append a row in `detectors`. Append it at the end: the first row of a signal keeps its inputs in the stored state under
   the signal's name, later rows under `signal/name`, so that a state stored before your change can still be restored.
   The new detector starts empty then.
3. Run `pytest tests/unit/streams/test_drift.py tests/unit/test_doctests.py`. The tests feed every row of the table with
   a steady stream, a change, and a rebuild from the kept inputs.
4. Add its delay and its false alarms to the table in docs/experiments/README.md.

The name of the row appears in drift.detected events and in the metric perennial_drift_total. A detector only reports;
streams/curate/drift.py decides whether a report is worth a micro-batch, and has the recipe for adding a signal.

Two traps of river's detectors are closed before values reach them: one NaN disables ADWIN and Page-Hinkley for good
(values that are not finite are dropped), and their thresholds depend on the scale (values are standardised against a frozen
reference). A third one, losses that depend on the losses just before them, is why losses have `MeanShift` and not ADWIN:
decision 0063. `make bench-drift` compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from river.drift import PageHinkley
from river.drift.binary import HDDMW

from perennial.streams.curate.mean_shift import MIN_BEFORE, MeanShift

Signal = Literal["base_loss", "live_loss", "vocabulary", "rating"]
"""What is watched: loss under the frozen base and under the live adapter (nats per token), divergence of the vocabulary
(nats), and rating errors (1: the rating is negative, 0: it is not)."""

LOSS_BLOCK: Final = 8
LOSS_REFERENCE: Final = MIN_BEFORE
LOSS_WINDOW: Final = 128
"""Blocks in which a change of a loss is looked for."""
LOSS_THRESHOLD: Final = 4.3
"""Standard errors from which a change of a loss is drift, if PERENNIAL_DRIFT_THRESHOLD does not say otherwise."""
VOCABULARY_REFERENCE: Final = 16


class Detector(Protocol):
    """The methods that DriftMonitor calls on a detector. The detectors of river.drift have it."""

    @property
    def drift_detected(self) -> bool:
        """True if the last update found drift; it holds until the next update."""
        ...

    def update(self, x: float) -> Any:
        """Take one finite value."""
        ...


@dataclass(frozen=True)
class DetectorSpec:
    """One row of the table: a detector, what it watches, and how its inputs are prepared.

    A larger block or reference makes detections later and false alarms rarer. After a detection, block, reference and
    detector are discarded, and the values that follow are the new reference.

    Attributes:
        name: the detector's name in events and metrics.
        make: returns a new detector.
        signals: the signals that it watches, each with a detector of its own.
        block: number of values whose mean is one input.
        reference: number of first inputs that are not fed but give the mean and the standard deviation by which the
            later ones are standardised. 0: inputs are fed as they are.
        feed_reference: The inputs of the reference are fed, too, once it is full.
        values_per_kept: The last `window // values_per_kept` inputs are kept to rebuild the detector, where `window` is
            PERENNIAL_DETECTOR_WINDOW. Every cut rebuilds it, so choose a larger number for a detector with slow
            updates.

    Example:
        A detector that looks at the live loss alone, example by example:

        >>> from river.drift import KSWIN
        >>> spec = DetectorSpec("KSWIN", lambda: KSWIN(seed=1), ("live_loss",), block=1, reference=16)
        >>> detector = spec.make()
        >>> found = []
        >>> for number in range(200):
        ...     _ = detector.update(float(number % 5) + 5.0 * (number >= 120))
        ...     if detector.drift_detected:
        ...         found.append(number)
        >>> 120 <= found[0] < 150
        True
    """

    name: str
    make: Callable[[], Detector]
    signals: tuple[Signal, ...]
    block: int = 1
    reference: int = 0
    values_per_kept: int = 1
    feed_reference: bool = False


def page_hinkley() -> Detector:
    """Return Page-Hinkley: it sums how far values exceed their running mean, and raises an alarm when the sum is large.

    It watches for a rise only: a vocabulary that comes closer to the reference is no drift. `delta` is the excess per
    input that it tolerates, and `threshold` the sum that raises the alarm. Both are in standard deviations of the
    reference, because inputs are standardised. A larger threshold means fewer and later alarms.

    Source: Page 1954, Continuous Inspection Schemes, doi 10.1093/biomet/41.1-2.100.

    Example:
        >>> detector = page_hinkley()
        >>> alarms = []
        >>> for number in range(80):
        ...     _ = detector.update((-1.0) ** number + 4.0 * (number >= 40))
        ...     if detector.drift_detected:
        ...         alarms.append(number)
        >>> alarms[0]
        43
    """
    detector: Detector = PageHinkley(min_instances=2, delta=0.5, threshold=12.0, mode="up")
    return detector


def hddm_w() -> Detector:
    """Return HDDM_W: an alarm when the weighted mean of errors (0 or 1) is well above its lowest value so far.

    Recent errors weigh more, so it also finds a rate of errors that rises slowly. How far above is too far
    follows from the allowed share of false alarms. It has no parameter here: river's defaults allow 0.1 %.

    Source: Frías-Blanco et al. 2015, Online and Non-Parametric Drift Detection Methods Based on Hoeffding's Bounds,
    doi 10.1109/TKDE.2014.2345382.

    Example:
        >>> detector = hddm_w()
        >>> alarms = []
        >>> for number in range(400):
        ...     _ = detector.update(float(number % (10 if number < 200 else 2) == 0))
        ...     if detector.drift_detected:
        ...         alarms.append(number)
        >>> 200 <= alarms[0] < 260
        True
    """
    detector: Detector = HDDMW()
    return detector


def detectors(loss_threshold: float) -> tuple[DetectorSpec, ...]:
    """Return the table of the detectors.

    Args:
        loss_threshold: standard errors from which a change of a loss is drift.

    Example:
        >>> [spec.name for spec in detectors(4.2)]
        ['MeanShift', 'PageHinkley', 'HDDM_W']
    """
    return (
        DetectorSpec(
            "MeanShift", lambda: MeanShift(loss_threshold, LOSS_WINDOW), ("base_loss", "live_loss"), LOSS_BLOCK,
            LOSS_REFERENCE, LOSS_BLOCK // 2, feed_reference=True,
        ),
        DetectorSpec("PageHinkley", page_hinkley, ("vocabulary",), 1, VOCABULARY_REFERENCE, LOSS_BLOCK // 2),
        # river copies HDDM_W's state twice per update, which takes 0.1 ms: fewer inputs are kept.
        DetectorSpec("HDDM_W", hddm_w, ("rating",), 1, 0, LOSS_BLOCK),
    )  # fmt: skip


DETECTORS: Final = detectors(LOSS_THRESHOLD)
