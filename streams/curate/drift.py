"""Drift of one adapter's stream: four signals, their detectors, and when a detection is worth a cut. Pure.

The signals: loss under the frozen base and under the live adapter (nats per token), divergence of the vocabulary,
and rating errors. Three traps of river's detectors are closed here: one NaN disables ADWIN and Page-Hinkley for good
(no value that is not finite reaches a detector), ADWIN depends on scale (values are standardised against a frozen
reference), and autocorrelated losses raise false alarms (values go in as means of blocks).

Detectors are never stored. What they were fed is kept as plain numbers, and `canonicalise` rebuilds them from it; a
process that does so at every cut and one that was restored from that cut are in the same state.

Rule for cutting, `Shift.cuts`: a loss that moved by LOUD or more of the reference's standard deviations cuts alone;
a smaller one cuts only if another family of signals (vocabulary, ratings) spoke within AGREE_EXAMPLES, before or after.
Vocabulary or ratings never cut alone: a new subject that the model already predicts well needs no update.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from river.drift import ADWIN, PageHinkley
from river.drift.binary import HDDMW

Signal = Literal["base_loss", "live_loss", "vocabulary", "rating"]

LOSS_BLOCK: Final = 8
LOSS_REFERENCE: Final = 16
WORD_BINS: Final = 256
WORD_BLOCK: Final = 128
VOCABULARY_BLOCKS: Final = 16
CLIP: Final = 8.0
LOUD: Final = 0.5
AGREE_EXAMPLES: Final = 128
AFTER_INPUTS: Final = 4
_WORD = re.compile(r"\w+")


class Detector(Protocol):
    """What river's detectors have in common; the flag lives for one update."""

    @property
    def drift_detected(self) -> bool:
        """Whether the last update found drift."""
        ...

    def update(self, x: float) -> Any:
        """Take one value; a NaN would disable the detector for good."""
        ...


@dataclass(frozen=True)
class Shift:
    """One detection. before, after: means in the signal's own unit. cuts: whether it is worth a micro-batch."""

    signal: Signal
    detector: str
    before: float
    after: float
    cuts: bool


@dataclass(frozen=True)
class _Plan:
    """How one signal is fed: values per block, blocks in the reference (0: fed as they are), inputs kept."""

    signal: Signal
    detector: str
    make: Callable[[], Detector]
    block: int
    reference: int
    kept_per_window: int = 1


def _adwin() -> Detector:
    detector: Detector = ADWIN(delta=0.02, clock=1, min_window_length=4, grace_period=8)
    return detector


def _page_hinkley() -> Detector:
    detector: Detector = PageHinkley(min_instances=2, delta=0.5, threshold=12.0, mode="up")
    return detector


def _hddm_w() -> Detector:
    detector: Detector = HDDMW()
    return detector


_PLANS: Final = (
    _Plan("base_loss", "ADWIN", _adwin, LOSS_BLOCK, LOSS_REFERENCE, LOSS_BLOCK // 2),
    _Plan("live_loss", "ADWIN", _adwin, LOSS_BLOCK, LOSS_REFERENCE, LOSS_BLOCK // 2),
    _Plan("vocabulary", "PageHinkley", _page_hinkley, 1, VOCABULARY_BLOCKS, LOSS_BLOCK // 2),
    _Plan("rating", "HDDM_W", _hddm_w, 1, 0, LOSS_BLOCK),  # river copies its state twice per update: 0.1 ms each
)


class _Feed:
    """One signal's way from values to detections; bounded by the window, the block and the reference."""

    def __init__(self, plan: _Plan, window: int) -> None:
        self.plan = plan
        self.kept: deque[float] = deque(maxlen=max(1, window // plan.kept_per_window))
        self.block: list[float] = []
        self.reference: list[float] = []
        self.centre, self.spread = 0.0, 1.0
        self.detector = plan.make()
        self.fed = False

    def _freeze(self) -> None:
        """Mean and standard deviation of a full reference, with a floor: a constant signal must not divide by zero."""
        if self.plan.reference and len(self.reference) == self.plan.reference:
            self.centre = statistics.fmean(self.reference)
            self.spread = max(statistics.stdev(self.reference), 1e-3 * abs(self.centre), 1e-9)

    def add(self, value: float) -> tuple[float, float, float] | None:
        """Take one finite value. (before, after, shift in standard deviations of values) where drift was found."""
        self.block.append(value)
        if len(self.block) < self.plan.block:
            return None
        mean = statistics.fmean(self.block)
        self.block = []
        if len(self.reference) < self.plan.reference:
            self.reference.append(mean)
            self._freeze()
            return None
        self.kept.append(mean)
        self.fed = True
        self.detector.update(self._scaled(mean))
        if not self.detector.drift_detected:
            return None
        recent = list(self.kept)[-AFTER_INPUTS:]
        after = statistics.fmean(recent)
        if self.plan.reference:
            before = self.centre
            moved = abs(after - before) / (self.spread * math.sqrt(self.plan.block))
        else:
            before, moved = statistics.fmean(self.kept), 0.0
        self.reset()
        return before, after, moved

    def reset(self) -> None:
        """Forget all: the values that follow are the new reference."""
        self.kept.clear()
        self.block = []
        self.reference = []
        self.centre, self.spread = 0.0, 1.0
        self.detector = self.plan.make()

    def rebuild(self) -> None:
        """Make the detector again from what was kept; detections while replaying were already reported."""
        self.detector = self.plan.make()
        self.fed = False
        for mean in self.kept:
            self.detector.update(self._scaled(mean))

    def _scaled(self, mean: float) -> float:
        return max(-CLIP, min(CLIP, (mean - self.centre) / self.spread))

    def state(self) -> dict[str, list[float]]:
        return {"kept": list(self.kept), "block": list(self.block), "reference": list(self.reference)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.kept.extend(float(v) for v in state["kept"])
        self.block = [float(v) for v in state["block"]][: self.plan.block]
        self.reference = [float(v) for v in state["reference"]][: self.plan.reference]
        self._freeze()
        self.rebuild()


class _Vocabulary:
    """Hashed unigrams in blocks of WORD_BLOCK words; each block's divergence from a frozen reference histogram."""

    def __init__(self) -> None:
        self.reference: NDArray[np.int64] = np.zeros(WORD_BINS, dtype=np.int64)
        self.block = [0] * WORD_BINS
        self.words = 0

    def add(self, text: str) -> list[float]:
        """The divergences (nats) of the blocks that this text completes, at most one per WORD_BLOCK words."""
        found = []
        for word in _WORD.findall(text.lower()):
            self.block[crc32(word.encode("utf-8", "replace")) % WORD_BINS] += 1
            self.words += 1
            if self.words % WORD_BLOCK == 0:
                block = np.array(self.block, dtype=np.int64)
                if self.words <= VOCABULARY_BLOCKS * WORD_BLOCK:
                    self.reference += block
                else:
                    found.append(jensen_shannon_nats(block, self.reference))
                self.block = [0] * WORD_BINS
        return found

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]  # no subclass: the three fields are made anew

    def state(self) -> dict[str, Any]:
        return {"reference": self.reference.tolist(), "block": list(self.block), "words": self.words}

    def load(self, state: Mapping[str, Any]) -> None:
        if not len(state["reference"]) == len(state["block"]) == WORD_BINS:
            raise ValueError(f"histograms of {len(state['reference'])} and {len(state['block'])} bins, not {WORD_BINS}")
        self.reference = np.array(state["reference"], dtype=np.int64)
        self.block = [int(count) for count in state["block"]]
        self.words = int(state["words"])


class DriftMonitor:
    """The detectors of one adapter. window: detector inputs kept per signal; memory is bounded by it.

    refused counts values that were not finite. seen counts calls of `update`.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.seen = 0
        self.refused = 0
        self._feeds: dict[str, _Feed] = {plan.signal: _Feed(plan, window) for plan in _PLANS}
        self._words = _Vocabulary()
        self._last: dict[str, int] = {}  # family -> `seen` at its latest detection

    def update(
        self, *, base_loss: float | None, live_loss: float | None, text: str | None, rating: float | None
    ) -> list[Shift]:
        """Take one example; what is None or not finite is left out. Detections in the order of the signals."""
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
            feed = self._feeds[signal]
            found = feed.add(value)
            if found is None:
                continue
            before, after, moved = found
            if signal == "vocabulary":
                self._words.reset()
            shifts.append(Shift(signal, feed.plan.detector, before, after, self._cuts(signal, moved)))
        return shifts

    def _cuts(self, signal: Signal, moved: float) -> bool:
        family = "loss" if signal.endswith("_loss") else signal
        self._last[family] = self.seen
        if family == "loss" and moved >= LOUD:
            return True
        recent = {name for name, at in self._last.items() if self.seen - at < AGREE_EXAMPLES}
        return "loss" in recent and len(recent) > 1

    def reset_live(self) -> None:
        """A swap moved the live loss: start its reference anew, or the update would trigger the next."""
        self._feeds["live_loss"].reset()

    def canonicalise(self) -> None:
        """Rebuild every detector from the kept inputs, as `from_state` does."""
        for feed in self._feeds.values():
            if feed.fed:
                feed.rebuild()

    def state(self) -> dict[str, Any]:
        """Plain numbers for JSON; with it `from_state` makes a monitor like this one after `canonicalise`."""
        return {
            "seen": self.seen,
            "refused": self.refused,
            "last": dict(self._last),
            "signals": {name: feed.state() for name, feed in self._feeds.items()},
            "words": self._words.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], window: int) -> DriftMonitor:
        """A monitor from what `state` gave. Raises KeyError, TypeError or ValueError where it is something else."""
        monitor = cls(window)
        monitor.seen, monitor.refused = int(state["seen"]), int(state["refused"])
        monitor._last = {str(name): int(at) for name, at in state["last"].items()}
        for name, feed in monitor._feeds.items():
            feed.load(state["signals"][name])
        monitor._words.load(state["words"])
        return monitor


def jensen_shannon_nats(left: NDArray[np.int64], right: NDArray[np.int64]) -> float:
    """Divergence of two histograms of counts (bins,), 0 to ln 2. Source: Lin 1991, doi 10.1109/18.61115."""
    p, q = left / left.sum(), right / right.sum()
    middle = (p + q) / 2

    def relative_entropy(of: NDArray[np.float64]) -> float:
        some = of > 0
        return float(np.sum(of[some] * np.log(of[some] / middle[some])))

    return (relative_entropy(p) + relative_entropy(q)) / 2
