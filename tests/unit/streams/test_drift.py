"""Drift: what is reported, what is not, and that a restored monitor decides like the one that stored its state."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from perennial.streams.curate.detectors import DETECTORS, DetectorSpec
from perennial.streams.curate.drift import FAMILIES, DriftMonitor, Shift, jensen_shannon_nats

WINDOW = 512
SUBJECTS = [[f"{kind}{number}" for number in range(200)] for kind in ("law", "sea")]


def feed(monitor, count, *, loss=3.0, spread=0.5, subject=0, seed=0, ratings=None) -> list[tuple[int, Shift]]:
    rng = random.Random(seed)
    found = []
    for index in range(count):
        shifts = monitor.update(
            base_loss=rng.gauss(loss, spread), live_loss=rng.gauss(loss - 0.2, spread),
            text=" ".join(rng.choices(SUBJECTS[subject], k=40)),
            rating=None if ratings is None else (-1.0 if rng.random() < ratings else 1.0),
        )  # fmt: skip
        found += [(index, shift) for shift in shifts]
        if index % 32 == 31:
            monitor.canonicalise()
    return found


def test_a_steady_stream_raises_no_alarm():
    assert [feed(DriftMonitor(WINDOW), 2000, seed=seed, ratings=0.1) for seed in range(3)] == [[], [], []]


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_a_loss_that_moves_by_two_deviations_is_found_soon_and_cuts(direction):
    monitor = DriftMonitor(WINDOW)
    assert feed(monitor, 600) == []
    found = feed(monitor, 120, loss=3.0 + direction, seed=1)
    first = next(shift for _, shift in found if shift.signal == "base_loss")
    assert first.cuts
    assert (first.after - first.before) * direction > 0.2


def test_another_vocabulary_is_reported_but_does_not_cut_alone():
    monitor = DriftMonitor(WINDOW)
    feed(monitor, 600)
    found = feed(monitor, 60, subject=1, seed=1)
    assert [shift.signal for _, shift in found] == ["vocabulary"]
    assert not found[0][1].cuts
    assert found[0][1].after > found[0][1].before


def test_a_small_shift_of_loss_cuts_with_another_vocabulary_and_not_without():
    def first_loss(subject: int, seed: int) -> Shift | None:
        monitor = DriftMonitor(WINDOW)
        feed(monitor, 600, seed=seed)
        found = feed(monitor, 900, loss=3.18, subject=subject, seed=seed + 100)
        return next((shift for _, shift in found if shift.signal.endswith("_loss")), None)

    quiet = [shift.cuts for seed in range(4) if (shift := first_loss(0, seed))]
    assert quiet
    assert not all(quiet)


def test_rating_errors_that_grow_are_found():
    monitor = DriftMonitor(WINDOW)
    assert feed(monitor, 800, ratings=0.05) == []
    found = feed(monitor, 400, ratings=0.6, seed=2)
    assert ("rating", "HDDM_W") in {(shift.signal, shift.detector) for _, shift in found}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_no_detector(bad):
    clean, dirty = DriftMonitor(WINDOW), DriftMonitor(WINDOW)
    feed(clean, 300)
    feed(dirty, 300)
    for _ in range(20):
        assert dirty.update(base_loss=bad, live_loss=bad, text=None, rating=bad) == []
    assert dirty.refused == 60
    assert clean.state()["signals"] == dirty.state()["signals"]
    assert [s for _, s in feed(dirty, 200, loss=5.0, seed=3)] == [s for _, s in feed(clean, 200, loss=5.0, seed=3)]


def test_a_constant_signal_divides_by_nothing():
    monitor = DriftMonitor(WINDOW)
    assert feed(monitor, 400, spread=0.0) == []


@pytest.mark.parametrize("length", [5, 130, 333, 700])
def test_a_monitor_from_its_numbers_decides_like_the_one_that_gave_them(length):
    live = DriftMonitor(WINDOW)
    feed(live, length, seed=4, ratings=0.1)
    live.canonicalise()
    state = json.loads(json.dumps(live.state()))
    restored = DriftMonitor.from_state(state, WINDOW)
    assert restored.state() == live.state()
    assert feed(restored, 500, loss=3.6, subject=1, seed=5, ratings=0.5) == feed(
        live, 500, loss=3.6, subject=1, seed=5, ratings=0.5
    )
    assert restored.state() == live.state()


def test_a_swap_starts_the_live_loss_anew():
    monitor = DriftMonitor(WINDOW)
    feed(monitor, 600)
    monitor.reset_live()
    rng = random.Random(9)
    found = []
    for _ in range(300):  # the update halved the live loss: that is no drift
        found += monitor.update(base_loss=rng.gauss(3.0, 0.5), live_loss=rng.gauss(1.5, 0.5), text=None, rating=None)
    assert found == []


def test_memory_is_bounded_by_the_window():
    monitor = DriftMonitor(64)
    feed(monitor, 3000, ratings=0.1)
    assert max(len(v) for signal in monitor.state()["signals"].values() for v in signal.values()) <= 64
    assert len(json.dumps(monitor.state())) < 30_000


def test_divergence_is_zero_for_equals_and_ln_2_for_strangers():
    left, right = np.array([1, 3, 0, 0]), np.array([0, 0, 2, 2])
    assert jensen_shannon_nats(left, left) == 0.0
    assert jensen_shannon_nats(left, right) == pytest.approx(math.log(2))


# Every row of DETECTORS must pass these.

by_row = pytest.mark.parametrize("spec", DETECTORS, ids=lambda spec: spec.name)


def inputs(spec: DetectorSpec, count: int, *, moved: bool = False, seed: int = 0) -> list[float]:
    """Inputs as a feed gives them: standardised, or 0 and 1 where there is no reference."""
    rng = random.Random(seed)
    if spec.reference:
        return [rng.gauss(4.0 if moved else 0.0, 1.0) for _ in range(count)]
    return [float(rng.random() < (0.7 if moved else 0.05)) for _ in range(count)]


def alarms(detector, values: list[float]) -> list[int]:
    found = []
    for index, value in enumerate(values):
        detector.update(value)
        if detector.drift_detected:
            found.append(index)
    return found


@by_row
def test_a_detector_is_silent_on_a_steady_signal_and_soon_finds_one_that_moved(spec):
    false = 0
    for seed in range(5):
        steady = inputs(spec, 120, seed=seed)
        false += bool(alarms(spec.make(), steady))
        found = [at for at in alarms(spec.make(), steady + inputs(spec, 60, moved=True, seed=seed)) if at >= 120]
        assert found
        assert found[0] < 160
    assert false <= 1  # a false alarm is rare, not impossible


@by_row
def test_a_detector_that_is_made_again_from_its_inputs_goes_on_alike(spec):
    detector, rebuilt = spec.make(), spec.make()
    steady, rest = inputs(spec, 60), inputs(spec, 100) + inputs(spec, 60, moved=True)
    assert alarms(detector, steady) == alarms(rebuilt, steady)
    assert alarms(detector, rest) == alarms(rebuilt, rest)


@by_row
def test_a_row_names_signals_that_exist_and_keeps_inputs(spec):
    assert set(spec.signals) <= set(FAMILIES)
    assert spec.block > 0
    assert 0 < spec.values_per_kept <= WINDOW


def test_the_inputs_of_the_first_detector_of_a_signal_are_stored_under_its_name():
    """Stored states hold these keys: another one would lose what they remember."""
    assert list(DriftMonitor(WINDOW).state()["signals"])[:4] == ["base_loss", "live_loss", "vocabulary", "rating"]


def test_a_detector_that_is_added_starts_empty_on_an_earlier_state_and_reports_beside_the_others():
    eager = DetectorSpec("Eager", DETECTORS[0].make, ("base_loss",), block=2, reference=4)
    monitor = DriftMonitor(WINDOW)
    feed(monitor, 300)
    more = DriftMonitor.from_state(monitor.state(), WINDOW, (*DETECTORS, eager))
    assert more.state()["signals"]["base_loss/Eager"] == {"kept": [], "block": [], "reference": []}
    feed(more, 100, seed=1)
    found = {(shift.signal, shift.detector) for _, shift in feed(more, 120, loss=6.0, seed=2)}
    assert found >= {("base_loss", "MeanShift"), ("base_loss", "Eager"), ("live_loss", "MeanShift")}
    assert DriftMonitor.from_state(more.state(), WINDOW).state()["signals"].keys() == monitor.state()["signals"].keys()


def test_a_large_change_is_reported_in_its_own_size():
    monitor = DriftMonitor(WINDOW)
    assert feed(monitor, 600, spread=0.1) == []
    found = feed(monitor, 120, loss=8.0, spread=0.1, seed=1)
    first = next(shift for _, shift in found if shift.signal == "base_loss")
    assert first.before == pytest.approx(3.0, abs=0.2)
    assert first.after > 5.0, "at least half of the inputs after the place are new"
