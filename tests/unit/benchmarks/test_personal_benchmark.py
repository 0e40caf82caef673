"""The benchmark of personal adapters: its people, its starts, and how examples are counted."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

from perennial.learner.training.personal.learned_starts import mean_of
from tests.benchmarks.personal.__main__ import Curve, ratio
from tests.benchmarks.personal.adapters import LearningAdapter, Quality
from tests.benchmarks.personal.starts import reptile_start
from tests.benchmarks.personal.users import (
    FAULTS,
    HOUSE,
    LATER_FAULTS,
    answer_to,
    canary,
    prompt_of,
    questions,
    secrets,
    taught,
    users,
)


def curve(*nats: float) -> Curve:
    qualities = [Quality(value, 0.0) for value in nats]
    return Curve(list(range(0, 2 * len(nats), 2)), qualities, cast("LearningAdapter", None))


def loss(quality: Quality) -> float:
    return -quality.nats


def test_new_users_want_the_opposite_in_pairs_and_nobody_wants_what_a_sibling_wants() -> None:
    new, siblings = users(4, 6, seed=3)
    for one, other in (new[:2], new[2:]):
        assert all(one.style[part] == 1 - other.style[part] for part in one.style)
    styles: list[Any] = [tuple(user.style.values()) for user in (*new, *siblings)]
    assert len(set(styles)) == 10
    assert len({user.name for user in (*new, *siblings)}) == 10


def test_each_part_of_a_style_shows_in_the_answer() -> None:
    (one, _), _ = users(2, 0, seed=0)
    answer = answer_to(("router", "is too loud"), one.style)
    for part, choice in one.style.items():
        assert answer_to(("router", "is too loud"), {**one.style, part: 1 - choice}) != answer
    assert answer_to(("router", "is too loud"), HOUSE) != answer


def test_held_out_questions_are_taught_to_nobody() -> None:
    asked, held_out, later = questions(seed=1, held_out=8)
    assert len(held_out) == 8
    assert not set(held_out) & set(asked)
    assert {fault for _, fault in (*asked, *held_out)} == set(FAULTS)
    assert {fault for _, fault in later} == set(LATER_FAULTS)
    examples = taught("acme/a", asked[:5], HOUSE, "turn")
    assert [example.prompt for example in examples] == [prompt_of(question) for question in asked[:5]]
    assert len({example.example_id for example in examples}) == 5


def test_a_canary_is_the_owners_alone() -> None:
    one, other = canary("acme/a", 0), canary("acme/b", 0)
    assert one.secret != other.secret
    assert one.secret in one.answer
    assert one.secret not in secrets("others", 0, 255)


def test_examples_are_counted_in_proportion_between_measurements() -> None:
    assert curve(5.0, 3.0, 2.0).examples_until(-4.0, loss) == pytest.approx(1.0)
    assert curve(5.0, 3.0, 2.0).examples_until(-2.0, loss) == pytest.approx(4.0)
    assert curve(1.0, 3.0, 2.0).examples_until(-2.0, loss) == 0.0
    assert curve(5.0, 6.0, 3.0).examples_until(-4.0, loss) == pytest.approx(3.0), "a rise in between counts nothing"
    assert curve(5.0, 3.0, 2.0).examples_until(-1.0, loss) == math.inf


def test_a_ratio_takes_what_was_never_reached_for_all_examples() -> None:
    share, low, high = ratio([2.0, math.inf], [8.0, 12.0], 12)
    assert share == pytest.approx(14 / 20)
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(1.0)


def test_a_start_moves_by_a_share_of_the_way_to_the_mean_of_own_parts() -> None:
    start = {"w": torch.tensor([0.0, 8.0])}
    parts = [{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([4.0, 4.0])}]
    assert torch.equal(mean_of(parts)["w"], torch.tensor([3.0, 2.0]))
    assert torch.equal(reptile_start(start, parts, 0.5)["w"], torch.tensor([1.5, 5.0]))
    assert torch.equal(reptile_start(start, parts, 1.0)["w"], mean_of(parts)["w"])
    assert torch.equal(start["w"], torch.tensor([0.0, 8.0])), "the start before is still there"
