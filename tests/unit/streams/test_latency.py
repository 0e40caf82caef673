from datetime import UTC, datetime, timedelta

import pytest

from perennial.streams.cli.demo.latency import quantile, stage_seconds, summarise

START = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_stage_lasts_from_one_moment_to_the_next():
    moments = {name: START + timedelta(seconds=at) for name, at in
               {"published": 0, "cut": 3, "received": 3.5, "trained": 5, "promoted": 5.25, "served": 6}.items()}  # fmt: skip
    seconds = stage_seconds(moments)
    assert seconds["published_to_cut"] == 3
    assert seconds["received_to_trained"] == 1.5
    assert seconds["cut_to_served"] == 3
    assert sum(v for k, v in seconds.items() if k not in {"cut_to_served", "published_to_served"}) == 6


def test_a_missing_moment_leaves_its_stages_out():
    assert stage_seconds({"cut": START, "served": START + timedelta(seconds=2)}) == {"cut_to_served": 2.0}


@pytest.mark.parametrize(("values", "share", "wanted"), [([], 0.5, 0), ([4], 0.95, 4), (list(range(101)), 0.95, 95)])
def test_quantile(values, share, wanted):
    assert quantile(values, share) == pytest.approx(wanted)


def test_summary_counts_what_was_there():
    assert summarise([{"a": 1.0}, {"a": 3.0, "b": 2.0}]) == {"a": (2.0, pytest.approx(2.9), 2), "b": (2.0, 2.0, 1)}
