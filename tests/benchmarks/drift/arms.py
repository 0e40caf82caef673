"""What looks for the changes: the service with its defaults, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from river.drift import ADWIN

from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.curate.detectors import detectors
from perennial.streams.curate.drift import DriftMonitor
from perennial.streams.settings import load_settings
from tests.benchmarks.drift.series import DEVIATION, Floats

EXAMPLES_PER_CUT: Final = 12
"""Short documents in a micro-batch of the default size. The detectors are rebuilt at every cut."""
DUMMY_EVERY: Final = 500
LIVE_GAIN_NATS: Final = 0.3
LIVE_NOISE: Final = 0.2 * DEVIATION
"""Noise of the live loss beside that of the base, in nats per token."""

Arm = Callable[[Floats, np.random.Generator], list[int]]
"""Returns the numbers of examples after which drift was reported, from 1."""


def service(losses: Floats, rng: np.random.Generator, *, cuts_only: bool = False) -> list[int]:
    """Feed a series to curate's drift monitor, as base loss and, with some noise of its own, as live loss."""
    policy = CutPolicy.of(load_settings(env_file=None))
    monitor = DriftMonitor(policy.window, detectors(policy.drift_threshold))
    live = losses - LIVE_GAIN_NATS + LIVE_NOISE * rng.standard_normal(len(losses))
    alarms = []
    for number, (of_base, of_live) in enumerate(zip(losses.tolist(), live.tolist(), strict=True), 1):
        found = monitor.update(base_loss=of_base, live_loss=of_live, text=None, rating=None)
        if any(shift.cuts or not cuts_only for shift in found):
            alarms.append(number)
        if number % EXAMPLES_PER_CUT == 0:
            monitor.canonicalise()
    return alarms


def service_cuts(losses: Floats, rng: np.random.Generator) -> list[int]:
    """As `service`, but only what is worth a micro-batch by itself."""
    return service(losses, rng, cuts_only=True)


def alarms_of(detector: Any, losses: Iterable[float]) -> list[int]:
    """Return the numbers of the values at which a detector of river reports drift."""
    alarms = []
    for number, loss in enumerate(losses, 1):
        detector.update(loss)
        if detector.drift_detected:
            alarms.append(number)
    return alarms


def plain_adwin(losses: Floats, _: np.random.Generator) -> list[int]:
    """River's ADWIN with its defaults, on the losses as they are."""
    return alarms_of(ADWIN(), losses.tolist())


def scaled_adwin(losses: Floats, _: np.random.Generator) -> list[int]:
    """River's ADWIN with its defaults, on losses in standard deviations of the first 128."""
    first = losses[:128]
    return alarms_of(ADWIN(), ((losses - first.mean()) / first.std()).tolist())


def dummy(losses: Floats, rng: np.random.Generator) -> list[int]:
    """Report drift every 500 examples, whatever they are."""
    return list(range(1 + int(rng.integers(DUMMY_EVERY)), len(losses) + 1, DUMMY_EVERY))


ARMS: Final[dict[str, Arm]] = {
    "service": service,
    "service, cuts": service_cuts,
    "plain ADWIN": plain_adwin,
    "ADWIN, scaled": scaled_adwin,
    "dummy": dummy,
}
