"""Watch one adapter's stream for drift, and decide which drift is worth a micro-batch. No I/O.

`DriftMonitor` turns each example into values of signals (losses, vocabulary, ratings), prepares the values and feeds
them to the detectors. streams/curate/detectors.py has the detectors and the recipe for another one.

Detectors are never stored. Their last inputs are kept as plain numbers, and `canonicalise` rebuilds the detectors from
them. A process that does so at every cut and a process that was restored from that cut are therefore in the same state.

A detection cuts a micro-batch (`Shift.cuts`) if
- a loss moved by LOUD or more standard deviations of its reference, or
- a loss moved by less, and another family of signals (vocabulary, ratings) reported drift within AGREE_EXAMPLES
  examples, before or after.
Vocabulary and ratings never cut alone: a new subject that the model already predicts well needs no update.

To add a signal: add its name to `detectors.Signal` and its family to FAMILIES, let `DriftMonitor.update` take its
value, pass the value in `MicroBatcher._watch`, and give it a row in `detectors.DETECTORS`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from perennial.streams.curate.detectors import DETECTORS, VOCABULARY_REFERENCE, DetectorSpec, Signal
from perennial.streams.curate.mean_shift import MeanShift

WORD_BINS: Final = 256
"""Bins of the histograms of hashed words."""
WORD_BLOCK: Final = 128
"""Words per histogram that is compared with the reference."""
CLIP: Final = 8.0
"""An input counts as at most so many standard deviations away from the reference."""
LOUD: Final = 0.5
"""Shift of a loss, in standard deviations of single values, from which it is worth a micro-batch by itself."""
AGREE_EXAMPLES: Final = 128
"""Number of examples within which two families of signals must report drift to count together."""
AFTER_INPUTS: Final = 4
"""Number of latest inputs whose mean is reported as the level after a shift."""
FAMILIES: Final[Mapping[Signal, str]] = {
    "base_loss": "loss",
    "live_loss": "loss",
    "vocabulary": "vocabulary",
    "rating": "rating",
}
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Shift:
    """One detection.

    Attributes:
        signal: the signal that moved.
        detector: the name of the detector that reported it.
        before: mean of the signal before, in its own unit.
        after: mean of the latest inputs, in the same unit.
        cuts: True if the shift is worth a micro-batch.

    Example:
        >>> shift = Shift("base_loss", "MeanShift", before=3.0, after=4.5, cuts=True)
        >>> shift.after - shift.before
        1.5
    """

    signal: Signal
    detector: str
    before: float
    after: float
    cuts: bool


class _Feed:
    """Prepare one signal's values for one detector, and keep the inputs that rebuild it.

    Memory is bounded by the window, the block and the reference.
    """

    def __init__(self, spec: DetectorSpec, window: int) -> None:
        self.spec = spec
        self.kept: deque[float] = deque(maxlen=max(1, window // spec.values_per_kept))
        self.block: list[float] = []
        self.reference: list[float] = []
        self.centre, self.spread = 0.0, 1.0
        self.detector = spec.make()
        self.fed = False  # whether it got an input since it was rebuilt

    def add(self, value: float) -> tuple[float, float, float] | None:
        """Take one finite value.

        Returns:
            If drift was found: mean before, mean after, and the shift in standard deviations of single values.
        """
        self.block.append(value)
        if len(self.block) < self.spec.block:
            return None
        mean = statistics.fmean(self.block)
        self.block = []
        if len(self.reference) < self.spec.reference:
            self.reference.append(mean)
            self._freeze_reference()
            self._feed_reference()
            return None
        self.kept.append(mean)
        self.fed = True
        self.detector.update(self._scaled(mean))
        if not self.detector.drift_detected:
            return None
        after = statistics.fmean(list(self.kept)[-AFTER_INPUTS:])
        change = self.detector.change if isinstance(self.detector, MeanShift) else None
        if change is not None:
            # The detector's inputs are clipped, and a large change would look like the largest that is let through.
            before, after = (
                self.centre + self.spread * change.before,
                statistics.fmean(list(self.kept)[-change.inputs :]),
            )
            moved = abs(change.after - change.before) / (change.deviation * math.sqrt(self.spec.block))
        elif self.spec.reference:
            before = self.centre
            moved = abs(after - before) / (self.spread * math.sqrt(self.spec.block))
        else:
            before, moved = statistics.fmean(self.kept), 0.0
        self.reset()
        return before, after, moved

    def _freeze_reference(self) -> None:
        """Compute mean and standard deviation once the reference is full."""
        if self.spec.reference and len(self.reference) == self.spec.reference:
            self.centre = statistics.fmean(self.reference)
            # The floor keeps a constant signal from dividing by zero.
            self.spread = max(statistics.stdev(self.reference), 1e-3 * abs(self.centre), 1e-9)

    def _feed_reference(self) -> None:
        """Feed the inputs of the reference to a detector that takes them, once it is full."""
        if self.spec.feed_reference and len(self.reference) == self.spec.reference:
            for mean in self.reference:
                self.detector.update(self._scaled(mean))

    def _scaled(self, mean: float) -> float:
        return max(-CLIP, min(CLIP, (mean - self.centre) / self.spread))

    def reset(self) -> None:
        """Discard everything. The values that follow are the new reference."""
        self.kept.clear()
        self.block = []
        self.reference = []
        self.centre, self.spread = 0.0, 1.0
        self.detector = self.spec.make()

    def rebuild(self) -> None:
        """Replace the detector by a new one that is fed the kept inputs. Its detections were reported already."""
        self.detector = self.spec.make()
        self.fed = False
        self._feed_reference()
        for mean in self.kept:
            self.detector.update(self._scaled(mean))

    def state(self) -> dict[str, list[float]]:
        return {"kept": list(self.kept), "block": list(self.block), "reference": list(self.reference)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.kept.extend(float(v) for v in state["kept"])
        self.block = [float(v) for v in state["block"]][: self.spec.block]
        self.reference = [float(v) for v in state["reference"]][: self.spec.reference]
        self._freeze_reference()
        self.rebuild()


class _Vocabulary:
    """Count hashed words in blocks of WORD_BLOCK, and compare each block with a frozen reference histogram."""

    def __init__(self) -> None:
        self.reference: NDArray[np.int64] = np.zeros(WORD_BINS, dtype=np.int64)
        self.block = [0] * WORD_BINS
        self.words = 0

    def add(self, text: str) -> list[float]:
        """Return the divergences (nats) of the blocks that this text completes, at most one per WORD_BLOCK words."""
        found = []
        for word in _WORD.findall(text.lower()):
            self.block[crc32(word.encode("utf-8", "replace")) % WORD_BINS] += 1
            self.words += 1
            if self.words % WORD_BLOCK == 0:
                block = np.array(self.block, dtype=np.int64)
                if self.words <= VOCABULARY_REFERENCE * WORD_BLOCK:
                    self.reference += block
                else:
                    found.append(jensen_shannon_nats(block, self.reference))
                self.block = [0] * WORD_BINS
        return found

    def state(self) -> dict[str, Any]:
        return {"reference": self.reference.tolist(), "block": list(self.block), "words": self.words}

    def load(self, state: Mapping[str, Any]) -> None:
        if not len(state["reference"]) == len(state["block"]) == WORD_BINS:
            raise ValueError(f"histograms of {len(state['reference'])} and {len(state['block'])} bins, not {WORD_BINS}")
        self.reference = np.array(state["reference"], dtype=np.int64)
        self.block = [int(count) for count in state["block"]]
        self.words = int(state["words"])


class DriftMonitor:
    """Watch the signals of one adapter and report drift.

    The first examples make the reference of each signal; drift is a move away from it. After a detection the signal
    gets a new reference from the examples that follow.

    Args:
        window: values per signal that are kept to rebuild its detectors. A larger window lets a restored monitor
            remember more of a slow drift, and costs memory, bytes of stored state and time at every cut.
        detectors: the detectors and what they watch.

    Attributes:
        seen: number of examples taken.
        refused: number of values that were not finite and therefore not fed.

    Example:
        A base loss that rises from 3 to 5 nats per token is found, and is worth a micro-batch:

        >>> import random
        >>> rng, monitor, found = random.Random(0), DriftMonitor(window=512), []
        >>> for number in range(500):
        ...     loss = rng.gauss(3.0 if number < 400 else 5.0, 0.5)
        ...     found += monitor.update(base_loss=loss, live_loss=None, text=None, rating=None)
        >>> [(shift.signal, shift.detector, shift.cuts) for shift in found]
        [('base_loss', 'MeanShift', True)]

        The state is plain numbers, from which an equal monitor can be made:

        >>> monitor.canonicalise()
        >>> DriftMonitor.from_state(monitor.state(), window=512).state() == monitor.state()
        True
    """

    def __init__(self, window: int, detectors: Sequence[DetectorSpec] = DETECTORS) -> None:
        self.window = window
        self.seen = 0
        self.refused = 0
        self._feeds: dict[str, _Feed] = {}  # by their key in the stored state
        self._feeds_of: dict[Signal, list[_Feed]] = {signal: [] for signal in FAMILIES}
        self._words = _Vocabulary()
        self._last: dict[str, int] = {}  # family: `seen` at its latest detection
        for spec in detectors:
            for signal in spec.signals:
                feed = _Feed(spec, window)
                self._feeds[f"{signal}/{spec.name}" if self._feeds_of[signal] else signal] = feed
                self._feeds_of[signal].append(feed)

    def update(
        self, *, base_loss: float | None, live_loss: float | None, text: str | None, rating: float | None
    ) -> list[Shift]:
        """Take one example. Values that are None or not finite are left out.

        Args:
            base_loss: loss under the frozen base, in nats per token.
            live_loss: loss under the live adapter, in nats per token.
            text: the text, for the vocabulary.
            rating: the rating, from -1 to 1; below 0 counts as an error.

        Returns:
            The detections, in the order of the signals.
        """
        self.seen += 1
        values: list[tuple[Signal, float]] = []
        if base_loss is not None:
            values.append(("base_loss", base_loss))
        if live_loss is not None:
            values.append(("live_loss", live_loss))
        if text:
            values.extend(("vocabulary", value) for value in self._words.add(text))
        if rating is not None:
            values.append(("rating", rating if not math.isfinite(rating) else float(rating < 0)))
        shifts = []
        for signal, value in values:
            if not math.isfinite(value):
                self.refused += 1
                continue
            for feed in self._feeds_of[signal]:
                found = feed.add(value)
                if found is not None:
                    before, after, moved = found
                    shifts.append(Shift(signal, feed.spec.name, before, after, self._cuts(signal, moved)))
                    if signal == "vocabulary":
                        self._restart_vocabulary()
        return shifts

    def _restart_vocabulary(self) -> None:
        """Start a new reference histogram, and reset its detectors: their values were measured against the old one."""
        self._words = _Vocabulary()
        for feed in self._feeds_of["vocabulary"]:
            feed.reset()

    def _cuts(self, signal: Signal, moved: float) -> bool:
        family = FAMILIES[signal]
        self._last[family] = self.seen
        if family == "loss" and moved >= LOUD:
            return True
        recent = {name for name, at in self._last.items() if self.seen - at < AGREE_EXAMPLES}
        return "loss" in recent and len(recent) > 1

    def reset_live(self) -> None:
        """Discard the reference of the live loss, because a new live version moved the loss.

        Without it, every update would look like drift and trigger the next update.
        """
        for feed in self._feeds_of["live_loss"]:
            feed.reset()

    def canonicalise(self) -> None:
        """Rebuild every detector from its kept inputs, as `from_state` does."""
        for feed in self._feeds.values():
            if feed.fed:
                feed.rebuild()

    def state(self) -> dict[str, Any]:
        """Return plain numbers for JSON, from which `from_state` makes an equal monitor once `canonicalise` ran."""
        return {
            "seen": self.seen,
            "refused": self.refused,
            "last": dict(self._last),
            "signals": {key: feed.state() for key, feed in self._feeds.items()},
            "words": self._words.state(),
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], window: int, detectors: Sequence[DetectorSpec] = DETECTORS
    ) -> DriftMonitor:
        """Return a monitor from what `state` returned.

        A detector that was added to the table since then starts empty. The inputs of one that was removed are dropped.

        Raises:
            KeyError, TypeError, ValueError: it is not such a state.
        """
        monitor = cls(window, detectors)
        monitor.seen, monitor.refused = int(state["seen"]), int(state["refused"])
        monitor._last = {str(name): int(at) for name, at in state["last"].items()}
        signals = dict(state["signals"])
        for key, feed in monitor._feeds.items():
            if key in signals:
                feed.load(signals[key])
        monitor._words.load(state["words"])
        return monitor


def jensen_shannon_nats(left: NDArray[np.int64], right: NDArray[np.int64]) -> float:
    """Return the Jensen-Shannon divergence of two histograms, from 0 (proportional) to ln 2 (disjoint).

    Args:
        left: counts (bins,), not all zero.
        right: counts (bins,), not all zero.

    Source: Lin 1991, Divergence Measures Based on the Shannon Entropy, doi 10.1109/18.61115.

    Example:
        >>> jensen_shannon_nats(np.array([3, 1, 0]), np.array([6, 2, 0]))
        0.0
        >>> round(jensen_shannon_nats(np.array([1, 0]), np.array([0, 1])), 4)
        0.6931
    """
    p, q = left / left.sum(), right / right.sum()
    middle = (p + q) / 2

    def relative_entropy(of: NDArray[np.float64]) -> float:
        some = of > 0
        return float(np.sum(of[some] * np.log(of[some] / middle[some])))

    return (relative_entropy(p) + relative_entropy(q)) / 2
