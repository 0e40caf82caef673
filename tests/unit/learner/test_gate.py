"""The gate's decisions: what is held out, and what is refused for which reason."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perennial.learner.training import gate
from perennial.learner.training.gate import GateLimits

LIMITS = GateLimits(min_gain_nats=0.0, max_general_rise_nats=0.15)


@given(st.lists(st.text(min_size=1, max_size=8), max_size=40), st.floats(min_value=0, max_value=1))
def test_documents_are_held_out_whole_and_never_all_of_them(names: list[str], share: float) -> None:
    held = gate.hold_out(names, share)
    assert {names[i] for i in held}.isdisjoint({name for i, name in enumerate(names) if i not in held})
    assert gate.hold_out(names, share) == held
    if len(names) < 4 or len(set(names)) < 2 or share == 0:
        assert not held
    else:
        assert 0 < len({names[i] for i in held}) <= max(1, len(set(names)) // 2)


def test_about_the_share_is_held_out() -> None:
    names = [f"doc-{n}" for n in range(2000)]
    assert len(gate.hold_out(names, 0.2)) == pytest.approx(400, abs=60)


@pytest.mark.parametrize(
    ("before", "after", "promote"),
    [
        ([3.0, 2.0, 4.0], [2.5, 1.4, 3.6], True),
        ([3.0, 2.0, 4.0], [3.5, 2.6, 4.4], False),
        ([3.0, 2.0], [3.0, 2.0], False),
        ([], [], False),
        ([3.0], [math.nan], False),
        ([3.0, math.inf], [2.0, 2.0], False),
    ],
)
def test_new_examples_must_lose_less(before: list[float], after: list[float], promote: bool) -> None:
    assert gate.judge_gain(gate.gain(before, after), LIMITS).promote is promote


def test_a_fall_that_few_tokens_cannot_tell_from_noise_passes_but_a_clear_rise_does_not() -> None:
    before = [3.0, 2.0, 5.0, 1.0] * 20
    noise = [was + (0.4 if n % 2 else -0.39) for n, was in enumerate(before)]
    assert gate.judge_gain(gate.gain(before, noise), LIMITS).promote
    worse = [was + (0.6 if n % 2 else -0.1) for n, was in enumerate(before)]
    assert gate.judge_gain(gate.gain(before, worse), LIMITS).reason == "no-gain"
    strict = GateLimits(min_gain_nats=0.5, max_general_rise_nats=0.15)
    assert gate.judge_gain(gate.gain(before, noise), strict).reason == "no-gain"


def test_the_noise_of_few_tokens_does_not_excuse_a_large_rise() -> None:
    before = [3.0, 2.0, 5.0, 1.0, 4.0, 2.5, 3.5, 1.5, 6.0, 2.2, 0.4]
    harmed = [was + (6.0 if n % 2 else -0.8) for n, was in enumerate(before)]
    measured = gate.gain(before, harmed)
    assert measured.after_nats - measured.before_nats > 2.0
    assert gate.judge_gain(measured, LIMITS).promote, "a recipe without a bound goes on as it did"
    bounded = GateLimits(min_gain_nats=0.0, max_general_rise_nats=0.15, max_noise_nats=0.5)
    assert gate.judge_gain(measured, bounded).reason == "no-gain"
    slightly = gate.gain(before, [was + (1.2 if n % 2 else -0.5) for n, was in enumerate(before)])
    assert slightly.after_nats > slightly.before_nats
    assert gate.judge_gain(slightly, bounded).promote


def test_general_loss_may_rise_up_to_its_bound() -> None:
    assert gate.judge_general(3.0, gate.Gain(3.1, 3.149, 0.0), LIMITS).promote
    assert gate.judge_general(3.0, gate.Gain(3.1, 3.151, 0.0), LIMITS).reason == "general-rise"
    assert gate.judge_general(3.0, gate.Gain(3.1, math.nan, 0.0), LIMITS).reason == "not-finite"


def test_an_update_that_brings_general_loss_down_passes_though_it_is_still_past_the_bound():
    assert gate.judge_general(3.0, gate.Gain(3.3, 3.2, 0.0), LIMITS).promote
    assert gate.judge_general(3.0, gate.Gain(3.2, 3.3, 0.0), LIMITS).reason == "general-rise"


def test_the_pressure_is_the_used_up_part_of_the_allowed_rise():
    bound = LIMITS.max_general_rise_nats
    assert gate.general_loss_pressure(3.0, 2.9, LIMITS) == 0
    assert gate.general_loss_pressure(3.0, 3.0 + gate.FULL_PRESSURE_SHARE * bound / 2, LIMITS) == pytest.approx(0.5)
    assert gate.general_loss_pressure(3.0, 3.0 + bound, LIMITS) == 1
    assert gate.general_loss_pressure(3.0, math.nan, LIMITS) == 1
    assert gate.general_loss_pressure(math.nan, 3.0, LIMITS) == 1


@pytest.mark.parametrize(
    ("norms", "losses", "finite", "noop", "reason"),
    [
        ([0.5, 2.0], [3.0, 2.0], True, False, "ok"),
        ([0.5, math.nan], [3.0, 2.0], True, False, "not-finite"),
        ([0.5, math.inf], [3.0, 2.0], True, False, "not-finite"),
        ([0.5, 2.0], [3.0, math.nan], True, False, "not-finite"),
        ([0.5, 2.0], [math.inf, 2.0], True, False, "not-finite"),
        ([0.5], [3.0], False, False, "not-finite"),
        ([0.5, 1e4], [3.0, 2.0], True, False, "gradient-explosion"),
        ([0.5], [3.0], True, True, "no-op"),
    ],
)
def test_broken_training_is_refused_before_anything_is_measured(
    norms: list[float], losses: list[float], finite: bool, noop: bool, reason: str
) -> None:
    assert gate.judge_training(norms, losses, finite=finite, noop=noop).reason == reason


ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(ANY_FLOAT, ANY_FLOAT), min_size=1, max_size=6))
@example([(math.inf, 1.0), (1.0, math.inf)])  # the falls are inf and -inf, whose sum math.fsum refuses
@example([(1e308, -1e308), (1e308, 1.0)])
@example([(1e200, 1.0), (1.0, 1.0)])
def test_a_gain_of_figures_that_are_not_finite_is_refused_and_raises_nothing(pairs: list[tuple[float, float]]) -> None:
    """Any float may be measured under broken weights: the gate says `not-finite`, and no function raises."""
    before, after = [list(side) for side in zip(*pairs, strict=True)]
    measured = gate.gain(before, after)
    verdict = gate.judge_gain(measured, LIMITS)
    general = gate.judge_general(before[0], measured, LIMITS)
    assert 0 <= gate.general_loss_pressure(before[0], gate.mean(after), LIMITS) <= 1
    if not all(map(math.isfinite, (*before, *after))):
        assert (verdict.promote, verdict.reason) == (False, "not-finite")
        assert (general.promote, general.reason) == (False, "not-finite")


def test_a_general_loss_that_is_not_finite_is_refused_whichever_one_it_is() -> None:
    for broken in (math.nan, math.inf, -math.inf):
        assert gate.judge_general(broken, gate.Gain(3.1, 3.0, 0.0), LIMITS).reason == "not-finite"
        assert gate.judge_general(3.0, gate.Gain(broken, 3.0, 0.0), LIMITS).reason == "not-finite"
        assert gate.judge_general(3.0, gate.Gain(3.1, broken, 0.0), LIMITS).reason == "not-finite"


def test_limits_that_are_not_numbers_let_nothing_through() -> None:
    broken = GateLimits(math.nan, math.nan)
    assert gate.judge_gain(gate.Gain(3.0, 2.0, 0.0), broken).reason == "no-gain"
    assert gate.judge_general(3.0, gate.Gain(3.0, 3.1, 0.0), broken).reason == "general-rise"


@pytest.mark.parametrize(
    ("value", "figure"), [(1.23456789, 1.234568), (math.nan, None), (math.inf, None), (-math.inf, None), (3.0, 3.0)]
)
def test_figures_fit_json(value: float, figure: float | None) -> None:
    assert gate.rounded(value) == figure
