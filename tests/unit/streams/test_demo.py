from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perennial.streams.cli.demo.forgetting import PEOPLE, Statuses, peculiar
from perennial.streams.cli.demo.report import DemoReport, Forgetting, draw, print_forgetting
from perennial.streams.cli.demo.run import measured_points
from perennial.streams.events.models import RetentionProgressed

DIGEST = "sha256:" + 64 * "a"


def forgetting(**other: Any) -> Forgetting:
    losses = {
        "base": {"erased": 5.4, "expired": 5.1, "rest": 4.6},
        "before": {"erased": 4.0, "expired": 3.9, "rest": 4.0},
        "after": {"erased": 5.2, "expired": 4.9, "rest": 4.0},
        "never": {"erased": 5.2, "expired": 4.9, "rest": 4.0},
    }
    for model in losses:
        losses[model] |= other.pop(model, {})
    fields: dict[str, Any] = {
        "losses": losses, "after_sha256": DIGEST, "never_sha256": DIGEST, "exact": True, "readable_before": 2,
        "readable": [], "erase_s": 12.0, "expire_s": 9.0, "updates": 10,
    }  # fmt: skip
    return Forgetting(**fields | other)


def report(now: dict[str, float], answers: dict[str, str]) -> DemoReport:
    base = {"a": 4.0, "b": 4.0, "general": 3.0}
    return DemoReport(
        domains=("a", "b"), base=base, first=now, now=now, curve={0: base, 3: now}, change_at=3, drift_at=[3], drifts=[],
        latencies=[{"cut_to_served": 1.0}], first_promoted_s=20.0, outcomes={"promoted": 3},
        answers_before=dict.fromkeys(answers, "?"), answers=answers, wanted={"q": "right", "r": "right"},
        forgetting=forgetting(),
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


def test_forgetting_that_worked_misses_nothing_and_says_so():
    text = StringIO()
    print_forgetting(forgetting(), Console(file=text, width=120))
    assert forgetting().missed() == []
    assert "bit-equal to a model that never saw them: yes" in text.getvalue()
    row = next(line for line in text.getvalue().splitlines() if "the erased document" in line)
    assert [cell.strip() for cell in row.split("│")[2:6]] == ["5.400", "4.000", "5.200", "5.200"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"after": {"erased": 4.9}}, "the erased document: 0.300 nats from the never-saw-it level"),
        ({"after": {"expired": 5.0}}, "the expired document: 0.100 nats from"),
        ({"after": {"expired": float("nan")}}, "the expired document: nan nats from"),
        ({"before": {"erased": 5.1}}, "nothing to forget"),
        ({"after": {"rest": 4.2}, "never": {"rest": 4.2}}, "loss on the rest rose by 0.200"),
        ({"base": {"rest": 4.0}}, "the rest was forgotten too"),
        ({"never_sha256": "sha256:" + 64 * "b"}, "which never saw the two"),
        ({"readable": ["blobs/sha256/ab"]}, "still readable in blobs/sha256/ab"),
        ({"readable_before": 0}, "was not found in the store before"),
    ],
)
def test_each_way_not_to_forget_is_named(wrong: dict[str, Any], said: str):
    (line,) = forgetting(**wrong).missed()
    assert said in line


def test_other_bits_on_a_gpu_are_no_miss():
    other = forgetting(exact=False, never_sha256="sha256:" + 64 * "b")
    text = StringIO()
    print_forgetting(other, Console(file=text, width=120))
    assert other.missed() == []
    assert "never saw them: no, as is usual on a GPU" in text.getvalue()


def test_peculiar_documents_are_the_same_every_time_and_share_no_secret():
    one, two = peculiar("clara"), peculiar("bruno")
    assert one == peculiar("clara")
    assert one.secret not in two.text
    assert two.secret not in one.text
    assert one.text.count(one.secret) > 8
    assert one.text.isascii(), "its words must be found in JSON as they are"


def test_statuses_are_told_once_and_end_by_kind():
    def event(request_id: str, kind: str, state: str) -> RetentionProgressed:
        return RetentionProgressed(
            request_id=request_id, adapter=PEOPLE, kind=kind, state=state, at=datetime(2026, 1, 1, tzinfo=UTC)
        )

    statuses = Statuses()
    told = [statuses.add(event("a", "erase", state)) for state in ("accepted", "accepted", "closed")]
    assert told == [True, False, True]
    assert statuses.add(event("b", "expire", "accepted"))
    assert statuses.ended("expire") is None
    assert statuses.ended("erase").request_id == "a"
