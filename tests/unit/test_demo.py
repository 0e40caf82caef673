from pathlib import Path

from streams.cli.demo import measured_points
from streams.cli.demo_report import Report, draw


def report(now: dict[str, float], answers: dict[str, str]) -> Report:
    base = {"a": 4.0, "b": 4.0, "general": 3.0}
    return Report(
        domains=("a", "b"), base=base, first=now, now=now, curve={0: base, 3: now}, change_at=3, drift_at=[3], drifts=[],
        latencies=[{"cut_to_served": 1.0}], first_promoted_s=20.0, outcomes={"promoted": 3},
        answers_before=dict.fromkeys(answers, "?"), answers=answers, wanted={"q": "right", "r": "right"},
    )  # fmt: skip


def test_points_include_the_base_the_change_and_the_last():
    points = measured_points(37, 19)
    assert {0, 19, 37} <= set(points)
    assert len(points) <= 16
    assert measured_points(1, 0) == [0, 1]


def test_what_was_learned_is_no_miss():
    good = report({"a": 3.6, "b": 3.5, "general": 3.1}, {"q": " right", "r": "right "})
    assert good.missed() == []
    assert good.learned_anything


def test_each_bound_that_is_missed_is_named():
    bad = report({"a": 3.8, "b": 4.1, "general": 3.2}, {"q": "wrong", "r": "right"})
    assert len(bad.missed()) == 4
    assert not report({"a": 4.0, "b": 4.1, "general": 3.0}, {"q": "", "r": ""}).learned_anything


def test_the_picture_is_a_png(tmp_path: Path):
    draw(report({"a": 3.6, "b": 3.5, "general": 3.1}, {"q": "right", "r": "right"}), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
