"""Whether a candidate version may go live; pure: measured figures in, verdict out (limits are settings)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

GateReason = Literal["ok", "not-finite", "gradient-explosion", "no-op", "no-gain", "general-rise"]

MAX_GRADIENT_NORM = 1e3
"""Far above any sane step (below 10 on real text): the weights that such a gradient meets are broken."""
MIN_EXAMPLES_TO_HOLD_OUT = 4
DECIMALS = 6
ROOM = 0.6
"""Share of the bound at which the counterweight is full: the rest is for the noise of rotating anchors."""
NOISE_ERRORS = 3.0


@dataclass(frozen=True)
class GateLimits:
    """What the gate asks: the least fall of held-out loss, and the most rise of general loss over the base's."""

    min_gain_nats: float
    max_general_rise_nats: float


@dataclass(frozen=True)
class GateVerdict:
    """Whether to promote, and why not."""

    promote: bool
    reason: GateReason


def hold_out(document_ids: Sequence[str], share: float) -> frozenset[int]:
    """Positions of the examples that are measured before they are learned, chosen by document.

    All examples of one document go the same way: its text must not be measured after a part of it was trained.
    Fewer than 4 examples, or a share of 0, hold nothing out; otherwise at least one document is, and never all.
    """
    documents = sorted(set(document_ids), key=lambda name: (_fraction(name), name))
    if len(document_ids) < MIN_EXAMPLES_TO_HOLD_OUT or len(documents) < 2 or share <= 0:
        return frozenset()
    count = sum(_fraction(name) < share for name in documents)
    chosen = set(documents[: max(1, min(count, len(documents) // 2))])
    return frozenset(index for index, name in enumerate(document_ids) if name in chosen)


def _fraction(name: str) -> float:
    return int.from_bytes(sha256(b"held-out:" + name.encode()).digest()[:8]) / 2**64


def judge_training(norms: Sequence[float], *, finite: bool, noop: bool) -> GateVerdict:
    """Refuse what no measure is needed for: broken numbers, exploded gradients, an adapter that changes nothing."""
    if not finite or not all(math.isfinite(norm) for norm in norms):
        return GateVerdict(promote=False, reason="not-finite")
    if any(norm > MAX_GRADIENT_NORM for norm in norms):
        return GateVerdict(promote=False, reason="gradient-explosion")
    if noop:
        return GateVerdict(promote=False, reason="no-op")
    return GateVerdict(promote=True, reason="ok")


@dataclass(frozen=True)
class Gain:
    """By how much the loss per token fell on the same tokens, and the standard error of that mean (paired)."""

    before_nats: float
    after_nats: float
    error_nats: float


def gain(before: Sequence[float], after: Sequence[float]) -> Gain:
    """Compare the losses of the same tokens before and after; nothing measured is a gain of zero."""
    count = len(before)
    if count == 0:
        return Gain(0.0, 0.0, 0.0)
    falls = [was - now for was, now in zip(before, after, strict=True)]
    mean = math.fsum(falls) / count
    variance = math.fsum((fall - mean) ** 2 for fall in falls) / max(1, count - 1)
    return Gain(math.fsum(before) / count, math.fsum(after) / count, math.sqrt(variance / count))


def judge_gain(measured: Gain, limits: GateLimits) -> GateVerdict:
    """Refuse an update that did not lower the loss on what is new, as far as so few tokens can tell.

    A micro-batch holds out some hundred tokens of one or two documents. Once a stream is half learned one update
    gains less than their noise, and a bare comparison would throw away every third good update and its examples; so
    the fall must be above `min_gain_nats` less three standard errors.
    """
    if not all(map(math.isfinite, (measured.before_nats, measured.after_nats, measured.error_nats))):
        return GateVerdict(promote=False, reason="not-finite")
    fall = measured.before_nats - measured.after_nats
    if fall <= limits.min_gain_nats - NOISE_ERRORS * measured.error_nats:
        return GateVerdict(promote=False, reason="no-gain")
    return GateVerdict(promote=True, reason="ok")


def general_loss_pressure(base_nats: float, before_nats: float, limits: GateLimits) -> float:
    """How much of the room for a rise of general loss is used up already: 0 for none, 1 for all of it or more."""
    if not math.isfinite(before_nats):
        return 1.0
    return min(1.0, max(0.0, before_nats - base_nats) / (ROOM * limits.max_general_rise_nats))


def judge_general(base_nats: float, measured: Gain, limits: GateLimits) -> GateVerdict:
    """Refuse a version whose loss on general text is past the bound over the frozen base's and that raised it further.

    The anchors rotate, so a version that was under the bound may measure above it on the next rows. An update that
    brings it down again must pass, or the adapter could never come back.
    """
    if not math.isfinite(measured.after_nats):
        return GateVerdict(promote=False, reason="not-finite")
    rise, step = measured.after_nats - base_nats, measured.after_nats - measured.before_nats
    if rise > limits.max_general_rise_nats and step > 0:
        return GateVerdict(promote=False, reason="general-rise")
    return GateVerdict(promote=True, reason="ok")


def rounded(figures: Mapping[str, float | int | str | None]) -> dict[str, float | int | str | None]:
    """Figures for the manifest: 6 decimals; what is not finite becomes None, for JSON has no such number."""
    return {
        name: (round(value, DECIMALS) if math.isfinite(value) else None) if isinstance(value, float) else value
        for name, value in figures.items()
    }
