"""The benchmark of drift: the changes are where it says, and delays are counted from there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.benchmarks.drift.arms import ARMS, DUMMY_EVERY
from tests.benchmarks.drift.measure import delays, median
from tests.benchmarks.drift.real_text import embedding_alarms
from tests.benchmarks.drift.series import DEVIATION, NORMALS, RAMP, SPELL, noise, series


@pytest.mark.parametrize("name", [*NORMALS, "real"])
def test_noise_has_mean_0_deviation_1_and_the_correlation_that_it_is_named_by(name):
    real = [np.random.default_rng(5).exponential(size=400)]
    values = noise(name, 100_000, np.random.default_rng(1), real)
    assert abs(values.mean()) < 0.05
    assert values.std() == pytest.approx(1, abs=0.05)
    wanted = float(name.removeprefix("AR ")) if name.startswith("AR") else 0.0
    assert float((values[1:] * values[:-1]).mean()) == pytest.approx(wanted, abs=0.05)


def silence(count: int) -> np.ndarray:
    return np.zeros(count)


@pytest.mark.parametrize("change", ["sudden", "gradual", "recurring"])
def test_a_change_is_where_the_series_says(change):
    given = series(change, 2.0, silence, np.random.default_rng(3))
    start = given.changes[0]
    losses = (given.losses - given.losses[0]) / DEVIATION
    assert not losses[:start].any()
    if change == "gradual":
        assert losses[start] == pytest.approx(2.0 / RAMP)
        assert losses[start + RAMP // 2 - 1] == pytest.approx(1.0)
        assert losses[start + RAMP :] == pytest.approx(2.0)
    else:
        assert losses[start : start + SPELL] == pytest.approx(2.0)
    if change == "recurring":
        assert [losses[place] for place in given.changes] == pytest.approx([2.0, 0.0, 2.0, 0.0])


def test_delays_count_from_each_change_to_the_first_alarm_within_the_horizon():
    assert delays([3, 10, 25, 300], [9, 20, 100], 50) == [1, 5, math.inf]
    assert median([1, math.inf, 3]) == 3
    assert median([1, math.inf, math.inf]) == math.inf


@pytest.mark.parametrize("arm", sorted(ARMS))
def test_every_arm_is_quiet_without_a_change_and_finds_a_large_one(arm):
    rng = np.random.default_rng(7)
    steady = 4.7 + DEVIATION * rng.standard_normal(800)
    moved = np.concatenate([steady, 6.5 + DEVIATION * rng.standard_normal(600)])
    if arm == "dummy":
        alarms = ARMS[arm](moved, rng)
        assert np.diff(alarms).tolist() == [DUMMY_EVERY] * (len(alarms) - 1)
        assert len(alarms) in {2, 3}
        return
    assert ARMS[arm](steady, rng) == []
    assert 800 < ARMS[arm](moved, rng)[0] <= 864


def test_the_embedding_test_finds_another_centre_and_nothing_else():
    rng = np.random.default_rng(2)
    steady = rng.standard_normal((600, 16)) * np.arange(1, 17)
    assert embedding_alarms(steady, rng) == []
    moved = np.concatenate([steady[:300], steady[300:] + np.arange(1, 17)])
    assert 300 < embedding_alarms(moved, rng)[0] <= 332
