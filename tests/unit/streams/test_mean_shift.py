"""The detector of changed losses: how soon it finds a change, and how rarely it reports one that is not there."""

from __future__ import annotations

import math
from statistics import median

import numpy as np
import pytest

from perennial.streams.curate.detectors import LOSS_THRESHOLD, LOSS_WINDOW
from perennial.streams.curate.drift import DriftMonitor
from perennial.streams.curate.mean_shift import MIN_AFTER, MIN_BEFORE, MeanShift, largest_change


def autoregressive(rho: float, count: int, seed: int) -> np.ndarray:
    """Return values with standard deviation 1 whose neighbours correlate by rho."""
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal(count) * math.sqrt(1 - rho * rho)
    found, value = np.empty(count), float(rng.standard_normal())
    for index, step in enumerate(steps):
        found[index] = value = rho * value + step
    return found


def alarms(losses: np.ndarray) -> list[int]:
    """Return the numbers of examples at which curate's monitor reports drift of the base loss."""
    monitor = DriftMonitor(512)
    found = []
    for number, loss in enumerate(losses.tolist(), 1):
        if monitor.update(base_loss=loss, live_loss=None, text=None, rating=None):
            found.append(number)
        if number % 16 == 0:
            monitor.canonicalise()
    return found


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_ten_thousand_steady_losses_raise_at_most_one_alarm_on_average(rho):
    counts = [len(alarms(4.7 + 0.4 * autoregressive(rho, 10_000, seed))) for seed in range(8)]
    assert sum(counts) <= len(counts)


@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("size", [1.0, -1.0])
def test_a_step_of_one_deviation_is_found_within_64_examples_in_the_median(rho, size):
    delays = []
    for seed in range(60):
        losses = autoregressive(rho, 1100, 1000 + seed)
        change = 400 + 7 * seed % 200
        losses[change:] += size
        found = [at - change for at in alarms(4.7 + 0.4 * losses) if at > change]
        delays.append(min(found, default=math.inf))
    assert median(delays) <= 64


def test_a_step_of_three_deviations_is_found_in_the_second_block_after_it():
    losses = 4.7 + 0.4 * autoregressive(0.0, 500, 3)
    losses[400:] += 1.2
    assert next(at for at in alarms(losses) if at > 400) <= 400 + MIN_AFTER * 8


def test_the_decision_does_not_depend_on_the_unit():
    inputs = np.random.default_rng(1).standard_normal(100)
    inputs[70:] += 1.0
    plain, scaled = largest_change(inputs), largest_change(1e-3 * inputs + 7)
    assert plain is not None
    assert scaled is not None
    assert scaled.errors == pytest.approx(plain.errors)
    assert scaled.after - scaled.before == pytest.approx(1e-3 * (plain.after - plain.before))
    assert scaled.deviation == pytest.approx(1e-3 * plain.deviation)


def test_the_statistic_is_that_of_its_definition():
    """Against the two means, their residuals and the autocorrelation of these, written out for each place."""
    rng = np.random.default_rng(2)
    inputs = autoregressive(0.6, 60, 5) + 1.5 * (np.arange(60) >= 44) + rng.standard_normal()
    errors = {}
    for cut in range(30, 60 - MIN_AFTER + 1):
        parts = [inputs[:cut] - inputs[:cut].mean(), inputs[cut:] - inputs[cut:].mean()]
        squares = sum(float(part @ part) for part in parts)
        found = sum(float(part[1:] @ part[:-1]) for part in parts) / squares
        rho = min(0.9, max(0.0, found + (1 + 4 * found) / 60))
        variance = squares / 58 * (1 + rho) / (1 - rho) * (1 / cut + 1 / (60 - cut))
        errors[cut] = abs(inputs[:cut].mean() - inputs[cut:].mean()) / math.sqrt(variance)
    change = largest_change(inputs)
    assert change is not None
    assert change.errors == pytest.approx(max(errors.values()))
    best = max(errors, key=errors.__getitem__)
    assert change.before == pytest.approx(inputs[:best].mean())


@pytest.mark.parametrize("inputs", [[], [1.0] * (MIN_BEFORE + MIN_AFTER - 1), [3.25] * 100])
def test_too_few_inputs_and_constant_ones_have_no_change(inputs):
    assert largest_change(np.array(inputs)) is None
    detector = MeanShift(LOSS_THRESHOLD, LOSS_WINDOW)
    for value in inputs:
        detector.update(value)
    assert not detector.drift_detected


def test_a_monitor_that_is_rebuilt_at_every_example_decides_like_one_that_never_is():
    often, never = DriftMonitor(512), DriftMonitor(512)
    losses = 4.7 + 0.4 * autoregressive(0.3, 2000, 9)
    losses[1500:] += 0.4
    found: list[list[object]] = [[], []]
    for loss in losses.tolist():
        for monitor, shifts in zip((often, never), found, strict=True):
            shifts.extend(monitor.update(base_loss=loss, live_loss=None, text=None, rating=None))
        often.canonicalise()
    assert found[0]
    assert found[0] == found[1]
