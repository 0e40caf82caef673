"""The gate: decides whether a candidate version may go live.

Pure functions: measured losses and norms go in, a verdict comes out. The limits are settings.

Broken weights give NaN and infinite figures. No function raises for them: such a figure is refused as `not-finite`.
Hazard: every comparison with NaN is false, so a check must be written so that a false comparison refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

GateReason = Literal[
    "ok", "not-finite", "gradient-explosion", "no-op", "no-gain", "general-rise", "degenerate", "collapse"
]

MAX_GRADIENT_NORM = 1e3
"""Far above any sane step (below 10 on real text): weights that give such a gradient are broken."""
MIN_EXAMPLES_TO_HOLD_OUT = 4
DECIMALS = 6
FULL_PRESSURE_SHARE = 0.6
"""Share of the allowed rise at which the pressure is 1: the rest absorbs the noise of the rotating anchors."""
MAX_DEGENERATE_SHARE = 1 / 3
NOISE_ERRORS = 3.0
"""So many standard errors of the mean fall count as noise."""


@dataclass(frozen=True)
class GateLimits:
    """The limits that the gate sets for a version.

    Attributes:
        min_gain_nats: Least fall of the held-out loss, nats per token.
        max_general_rise_nats: Largest rise of the general loss over the frozen base's, nats per token.
        max_answer_rise_nats: Largest rise of the loss on the base's own answers, nats per token; 0: not asked.
        max_noise_nats: Largest rise of the loss on new examples that counts as noise, nats per token; 0: any that is
            within `NOISE_ERRORS` standard errors.
    """

    min_gain_nats: float
    max_general_rise_nats: float
    max_answer_rise_nats: float = 0.0
    max_noise_nats: float = 0.0


@dataclass(frozen=True)
class GateVerdict:
    """Decision of the gate.

    Attributes:
        promote: True if the version may go live.
        reason: `ok`, or why not.
    """

    promote: bool
    reason: GateReason


def hold_out(document_ids: Sequence[str], share: float) -> frozenset[int]:
    """Choose the examples that are measured before they are learned, by document.

    All examples of one document are held out together: its text must not be measured after a part of it was trained.
    Nothing is held out where there are fewer than `MIN_EXAMPLES_TO_HOLD_OUT` examples or a single document, or where
    the share is 0. Otherwise at least one document is held out, and at most half of them.

    Args:
        document_ids: Document of each example.
        share: Wanted share of the documents, 0 to 1.

    Returns:
        Positions in `document_ids`.
    """
    documents = sorted(set(document_ids), key=lambda name: (_fraction(name), name))
    if len(document_ids) < MIN_EXAMPLES_TO_HOLD_OUT or len(documents) < 2 or share <= 0:
        return frozenset()
    count = sum(_fraction(name) < share for name in documents)
    chosen = set(documents[: max(1, min(count, len(documents) // 2))])
    return frozenset(index for index, name in enumerate(document_ids) if name in chosen)


def _fraction(name: str) -> float:
    """Return a number from 0 to below 1 that depends on the name alone."""
    return int.from_bytes(sha256(b"held-out:" + name.encode()).digest()[:8]) / 2**64


def judge_training(norms: Sequence[float], losses: Sequence[float], *, finite: bool, noop: bool) -> GateVerdict:
    """Refuse a training run whose weights, losses or gradients alone show that it failed.

    Args:
        norms: Gradient norm of each step, before clipping.
        losses: Loss of each step, nats per token.
        finite: True if all new weights and optimizer moments are finite.
        noop: True if training left the weights as they were, or if the adapter has no effect because every B is zero.
    """
    if not finite or not all(map(math.isfinite, (*norms, *losses))):
        return GateVerdict(promote=False, reason="not-finite")
    if any(norm > MAX_GRADIENT_NORM for norm in norms):
        return GateVerdict(promote=False, reason="gradient-explosion")
    if noop:
        return GateVerdict(promote=False, reason="no-op")
    return GateVerdict(promote=True, reason="ok")


@dataclass(frozen=True)
class Gain:
    """The loss of the same tokens before and after training. A figure that cannot be computed is NaN or infinite.

    Attributes:
        before_nats: Mean loss before, nats per token.
        after_nats: Mean loss after, nats per token.
        error_nats: Standard error of the mean fall, paired by token, nats per token.
    """

    before_nats: float
    after_nats: float
    error_nats: float


def gain(before: Sequence[float], after: Sequence[float]) -> Gain:
    """Compare the losses of the same tokens before and after training.

    Args:
        before: Loss of each token before, nats; empty for a gain of zero.
        after: Loss of each token after, nats, in the same order.

    Raises:
        ValueError: The two have different lengths.
    """
    count = len(before)
    if count == 0:
        return Gain(0.0, 0.0, 0.0)
    falls = [was - now for was, now in zip(before, after, strict=True)]
    return Gain(mean(before), mean(after), _standard_error(falls))


def _standard_error(figures: Sequence[float]) -> float:
    """Return the standard error of the mean of at least one figure; NaN or infinity where it cannot be computed."""
    center, count = mean(figures), len(figures)
    if not math.isfinite(center):
        return math.nan
    try:
        variance = math.fsum((figure - center) ** 2 for figure in figures) / max(1, count - 1)
    except OverflowError:
        return math.inf
    return math.sqrt(variance / count)


def mean(figures: Sequence[float]) -> float:
    """Return the mean of the figures: 0 for none, NaN where one of them or their sum is not finite."""
    if not all(map(math.isfinite, figures)):
        return math.nan
    try:
        return math.fsum(figures) / len(figures) if figures else 0.0
    except OverflowError:  # the sum of finite figures is beyond the largest float
        return math.nan


def judge_gain(measured: Gain, limits: GateLimits) -> GateVerdict:
    """Refuse an update whose loss on new examples did not fall enough; noise counts in the update's favour.

    A micro-batch holds out some hundred tokens of one or two documents. Once a stream is half learned, one update
    gains less than their noise, and a bare comparison would throw away every third good update and its examples. The
    fall must therefore be above `min_gain_nats` minus `NOISE_ERRORS` standard errors. Of eleven held-out tokens these
    may be two nats, which an update that harms stays within, so what counts as noise has a limit of its own.
    """
    if not all(map(math.isfinite, (measured.before_nats, measured.after_nats, measured.error_nats))):
        return GateVerdict(promote=False, reason="not-finite")
    fall = measured.before_nats - measured.after_nats
    noise = NOISE_ERRORS * measured.error_nats
    if limits.max_noise_nats > 0:
        noise = min(noise, limits.max_noise_nats)
    if not fall > limits.min_gain_nats - noise:
        return GateVerdict(promote=False, reason="no-gain")
    return GateVerdict(promote=True, reason="ok")


def general_loss_pressure(base_nats: float, before_nats: float, limits: GateLimits) -> float:
    """Return how much of the allowed rise of the general loss is used up, from 0 (none) to 1.

    The pressure is 1 from `FULL_PRESSURE_SHARE` of the allowed rise on, and where a loss is not finite.

    Args:
        base_nats: Loss of the anchor rows under the frozen base, nats per token.
        before_nats: Their loss under the previous version, nats per token.
        limits: Limits of the gate.
    """
    if not (math.isfinite(before_nats) and math.isfinite(base_nats)):
        return 1.0
    return min(1.0, max(0.0, before_nats - base_nats) / (FULL_PRESSURE_SHARE * limits.max_general_rise_nats))


def judge_general(base_nats: float, measured: Gain, limits: GateLimits) -> GateVerdict:
    """Refuse a version that raised the general loss, and to more than the allowed rise above the frozen base's.

    The anchors rotate, so a version that was under the limit may measure above it on the next rows. An update that
    lowers the general loss again must pass, or the adapter could never recover.

    Args:
        base_nats: Loss of the anchor rows under the frozen base, nats per token.
        measured: Their loss under the previous version and under the new one.
        limits: Limits of the gate.
    """
    if not all(map(math.isfinite, (base_nats, measured.before_nats, measured.after_nats))):
        return GateVerdict(promote=False, reason="not-finite")
    rise, step = measured.after_nats - base_nats, measured.after_nats - measured.before_nats
    if not (rise <= limits.max_general_rise_nats or step <= 0):
        return GateVerdict(promote=False, reason="general-rise")
    return GateVerdict(promote=True, reason="ok")


def judge_trial(asked: int, degenerate: int, *, finite: bool) -> GateVerdict:
    """Refuse a version whose trial answers are not finite, or of which more than a third are empty or end in a loop.

    Args:
        asked: Questions that the frozen base answers properly.
        degenerate: Those of them that the version does not.
        finite: True if every logit was finite.
    """
    if not finite:
        return GateVerdict(promote=False, reason="not-finite")
    if degenerate > asked * MAX_DEGENERATE_SHARE:
        return GateVerdict(promote=False, reason="degenerate")
    return GateVerdict(promote=True, reason="ok")


def judge_answers(rise: float, before: Callable[[], float], limits: GateLimits) -> GateVerdict:
    """Refuse a version that left the base's own answers, and further than the version before.

    Args:
        rise: By how much the loss on the base's answers is above the base's, mean over the questions, nats per token.
        before: Returns the same for the previous version; called only where the rise is above the limit.
        limits: Limits of the gate.
    """
    if not math.isfinite(rise):
        return GateVerdict(promote=False, reason="not-finite")
    if rise <= limits.max_answer_rise_nats or rise <= before():
        return GateVerdict(promote=True, reason="ok")
    return GateVerdict(promote=False, reason="collapse")


def rounded(value: float) -> float | None:
    """Return a figure as a manifest records it: `DECIMALS` decimals, None for NaN and infinity, which JSON lacks."""
    return round(value, DECIMALS) if math.isfinite(value) else None
