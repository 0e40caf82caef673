"""The benchmark of drift on dated documents: marks are matched to boundaries, and the control has the same documents."""

from __future__ import annotations

import itertools
import json
import math
import sys

import numpy as np
import pytest

from perennial.streams.events.models import ExampleScored
from tests.benchmarks.drift import __main__ as command
from tests.benchmarks.drift.boundaries import (
    Matched,
    boundaries_of,
    found_pct,
    match_marks,
    pooled_per_10k,
    step_between,
)
from tests.benchmarks.drift.dated import (
    OF_SERVICE,
    Compared,
    compare,
    control,
    in_order,
    learned_arms,
    print_live_steps,
    segments,
)
from tests.benchmarks.drift.learning import Learned, LiveScorer
from tests.benchmarks.drift.real_text import service_marks
from tests.benchmarks.learning import releases
from tests.benchmarks.learning.streams import document
from tests.benchmarks.learning.world import World

PERIODS = ["2014-09"] * 230 + ["2015-06"] * 100 + ["latest"] * 500
SERVICES = ["ec2"] * 180 + ["rds"] * 50 + ["ec2"] * 100 + ["ec2"] * 200 + ["rds"] * 200 + ["small"] * 100


def test_boundaries_lie_between_segments():
    assert boundaries_of([3, 2, 5]) == [3, 5]
    assert boundaries_of([3]) == []


def test_a_mark_belongs_to_the_latest_boundary_before_it_if_it_is_near():
    found = match_marks([5, 12, 15, 60, 71, 99], [10, 50, 70], within=8, examples=100)
    assert found.delays == (2, math.inf, 1), "15 is a second mark after the first boundary, 60 is too late"
    assert found.elsewhere == 3
    assert found.examples_elsewhere == 100 - 3 * 8
    assert found.per_10k == pytest.approx(10_000 * 3 / 76)


@pytest.mark.parametrize(("mark", "delays"), [(10, (math.inf,)), (11, (1,)), (18, (8,)), (19, (math.inf,))])
def test_the_first_example_after_a_boundary_has_delay_1_and_the_last_one_that_counts_has_within(mark, delays):
    found = match_marks([mark], [10], within=8, examples=100)
    assert found.delays == delays
    assert found.elsewhere == (delays == (math.inf,))


def test_a_mark_after_the_next_boundary_is_not_found_for_the_one_before():
    found = match_marks([14], [10, 12], within=8, examples=15)
    assert found.delays == (math.inf, 2)
    assert found.examples_elsewhere == 15 - 2 - 3, "the second window ends with the stream"


def test_without_boundaries_every_mark_is_elsewhere():
    assert match_marks([4, 5], [], within=8, examples=10) == Matched((), 2, 10)


def test_runs_are_pooled_and_not_averaged():
    runs = [Matched((1, math.inf), 1, 100), Matched((3, 4), 0, 900)]
    assert pooled_per_10k(runs) == 10
    assert found_pct(runs) == 75
    assert Matched((), 0, 0).per_10k == 0


def test_a_step_of_the_mean_has_an_interval():
    rng = np.random.default_rng(0)
    before, after = rng.normal(5, 0.4, 300), rng.normal(5.4, 0.4, 200)
    step = step_between(before, after)
    assert step.nats == pytest.approx(0.4, abs=0.1)
    assert step.deviation == pytest.approx(0.4, abs=0.05)
    assert step.error == pytest.approx(0.4 * math.sqrt(1 / 300 + 1 / 200), rel=0.1)
    assert step.is_clear
    assert not step_between(before, before[::-1]).is_clear


def test_segments_are_periods_in_order_or_services_in_a_drawn_one():
    periods = segments("periods", PERIODS, SERVICES, 0, mixed=True)
    assert [(segment.name, len(segment.indices)) for segment in periods] == [
        ("2014-09", 230), ("2015-06", 100), ("latest", 500),
    ]  # fmt: skip
    assert sorted(in_order(periods)) == list(range(len(PERIODS)))
    of_one = segments("periods of ec2", PERIODS, SERVICES, 0, mixed=False)
    assert {SERVICES[index] for index in in_order(of_one)} == {"ec2"}
    assert in_order(of_one) == sorted(in_order(of_one)), "the order of the files"
    orders = set()
    for seed in range(8):
        services = segments("services", PERIODS, SERVICES, seed, mixed=True)
        orders.add(tuple(segment.name for segment in services))
        assert {segment.name: len(segment.indices) for segment in services} == {"ec2": OF_SERVICE, "rds": 250}
    assert len(orders) == 2


def test_a_seed_draws_the_order_and_the_cap_takes_some_of_each_segment():
    first, again, other = (segments("periods", PERIODS, SERVICES, seed, mixed=True, most=60) for seed in (0, 0, 1))
    assert first == again != other
    assert [len(segment.indices) for segment in first] == [60, 60, 60]
    for segment in first:
        assert {PERIODS[index] for index in segment.indices} == {segment.name}


def test_the_control_has_the_same_documents_and_no_order():
    found = segments("periods", PERIODS, SERVICES, 0, mixed=True)
    mixed = control(found, 0)
    assert sorted(mixed) == sorted(in_order(found))
    assert mixed != in_order(found)
    changes = sum(PERIODS[one] != PERIODS[two] for one, two in itertools.pairwise(mixed))
    assert changes > 200


def test_an_arm_that_sees_the_period_finds_each_boundary_and_its_control_is_counted_whole():
    found = segments("periods", PERIODS, SERVICES, 0, mixed=True)

    def marks_of(indices, _):
        ordered = list(indices) == in_order(found)
        return {"oracle": [231, 331] if ordered else [1, 240], "silent": []}

    table = compare(marks_of, [found], within=50)
    assert table["oracle"].cells() == ["100 % of 2 (1, 1)", "1 (1–1)", "0.0 (0.0–0.0)", "50 %", "24.1 (24.1–24.1)"]
    assert table["oracle"].figures() == {
        "found_pct": 100, "by_chance_pct": 50, "median_delay_examples": 1, "false_per_10k": 0,
        "control_per_10k": round(10_000 * 2 / 830, 2),
    }  # fmt: skip
    assert table["silent"].figures()["median_delay_examples"] is None
    assert table["silent"].cells()[:2] == ["0 % of 2 (0, 0)", "-"]
    assert isinstance(table["silent"], Compared)


def test_the_next_document_is_scored_after_what_was_cut_is_learned():
    learned: list[int] = []
    seen: list[int] = []

    def scored():
        for number in range(100):
            seen.append(len(learned))
            example = document(number, f"a plain document, number {number}", f"{number}")
            yield ExampleScored(example=example, tokens=100, base_loss_nats=4.0, live_loss_nats=None)

    marks = service_marks(scored(), lambda examples: learned.append(len(examples)))
    assert marks == ([], [], [])
    assert learned == [8] * 12, "768 tokens a micro-batch"
    assert [seen[at] for at in (7, 8, 15, 16)] == [0, 1, 1, 2]


def test_the_live_losses_are_watched_and_their_steps_printed_by_boundary(capsys):
    (found,) = [segments("periods", PERIODS, SERVICES, 0, mixed=True)]
    rng = np.random.default_rng(1)
    live = [(4.0 if number < 330 else 5.0) + 0.3 * rng.standard_normal() for number in range(830)]
    learned = Learned([340], [], [], live, 7)
    arms = learned_arms(learned, 0)
    assert arms["service, learning"] == [340]
    assert 330 < arms["plain ADWIN, live loss"][0] <= 400
    print_live_steps([found], [learned])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "promoted updates by run: 7"
    assert lines[2].startswith("live loss from 2014-09 to 2015-06, by run: ")
    assert float(lines[2].split(": ")[1].split(" ")[0]) == pytest.approx(0, abs=0.15)
    assert float(lines[3].split(": ")[1].split(" ")[0]) == pytest.approx(1, abs=0.15)


@pytest.mark.slow(20)
def test_the_live_loss_is_that_of_the_latest_promoted_version():
    adapter = LiveScorer(World.load("shipped", threads=1, runs=1, general=0), seed=0)
    text = "The shelf takes at most ten books, and the keeper of the reading room is asked before it is moved."
    examples = [document(number, f"{text} Shelf {number}.", f"{number}") for number in range(8)]
    with adapter.updater.compute.joining():
        (before,) = adapter.scored(examples[:1])
        adapter.learn(examples)
        (after,) = adapter.scored(examples[:1])
    assert (before.live_loss_nats, before.live_version) == (None, None)
    assert adapter.promoted == after.live_generation == 1
    assert after.base_loss_nats == before.base_loss_nats
    assert after.live_loss_nats < after.base_loss_nats
    assert adapter.live_losses == [before.base_loss_nats, after.live_loss_nats]


def test_without_the_text_the_stream_is_skipped_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(releases, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["drift", "--stream", "releases"])
    command.main()
    out = capsys.readouterr().out
    assert "releases: skipped: the stream `releases` needs botocore" in out
    assert json.loads(out.splitlines()[-1]) == {"releases": None}


def test_an_unknown_stream_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["drift", "--stream", "injected,dated"])
    with pytest.raises(SystemExit):
        command.arguments()
    assert "no such stream: dated; allowed: injected, releases" in capsys.readouterr().err
