from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from perennial.streams.cli.demo.forgetting import PEOPLE
from perennial.streams.cli.demo.learned_examples import LearnedExamples
from perennial.streams.cli.demo.measure import measured_points
from perennial.streams.cli.demo.persons import person_document
from perennial.streams.cli.demo.picture import draw
from perennial.streams.cli.demo.progress import STAGES, DemoProgress, spoken
from perennial.streams.cli.demo.report import DemoReport, Forgetting, print_forgetting, print_report
from perennial.streams.cli.demo.run import _output_folder
from perennial.streams.cli.demo.watcher import RequestStatuses
from perennial.streams.events.models import RetentionProgressed
from perennial.streams.settings import SettingsError

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
    assert row.removeprefix("the erased document").split() == ["5.400", "4.000", "5.200", "5.200"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"after": {"erased": 4.9}}, "the erased document: its loss differs by 0.300 nats"),
        ({"after": {"expired": 5.0}}, "the expired document: its loss differs by 0.100 nats"),
        ({"after": {"expired": float("nan")}}, "the expired document: its loss differs by nan nats"),
        ({"before": {"erased": 5.1}}, "nothing to forget"),
        ({"after": {"rest": 4.2}, "never": {"rest": 4.2}}, "loss on the rest rose by 0.200"),
        ({"base": {"rest": 4.0}}, "the rest was forgotten too"),
        ({"never_sha256": "sha256:" + 64 * "b"}, "the model that never saw the two"),
        ({"readable": ["blobs/sha256/ab"]}, "still readable in blobs/sha256/ab"),
        ({"readable_before": 0}, "was not found in the store before forgetting"),
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


def test_person_documents_are_the_same_every_time_and_share_no_secret():
    one, two = person_document("clara"), person_document("bruno")
    assert one == person_document("clara")
    assert one.secret not in two.text
    assert two.secret not in one.text
    assert one.text.count(one.secret) > 8
    assert one.text.isascii(), "its words must be found in JSON as they are"


def test_repeated_statuses_are_left_out_and_the_last_one_counts():
    def event(request_id: str, kind: str, state: str) -> RetentionProgressed:
        return RetentionProgressed(
            request_id=request_id, adapter=PEOPLE, kind=kind, state=state, at=datetime(2026, 1, 1, tzinfo=UTC)
        )

    statuses = RequestStatuses()
    added = [statuses.add(event("a", "erase", state)) for state in ("accepted", "accepted", "closed")]
    assert added == [True, False, True]
    assert statuses.last(PEOPLE, "expire") is None
    assert statuses.add(event("b", "expire", "accepted"))
    assert statuses.last(PEOPLE, "erase").state == "closed"
    assert statuses.last("acme/other", "erase") is None


def test_a_drift_is_placed_by_the_examples_seen_before_it():
    def version(learned: int, skipped: int, outcome: str) -> tuple[str, Any]:
        return "", SimpleNamespace(learned=[0] * learned, skipped=[0] * skipped, outcome=outcome)

    ledger = LearnedExamples(registry=None, adapter="a")  # type: ignore[arg-type]
    ledger.versions = [version(8, 0, "promoted"), version(0, 6, "refused"), version(7, 1, "promoted")]
    assert [ledger.promoted_within(examples) for examples in (7, 8, 14, 21, 22, 99)] == [0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("terminal", [False, True])
def test_no_line_of_the_report_needs_more_than_80_columns_or_is_cut(terminal: bool):
    class Out(StringIO):
        def isatty(self) -> bool:
            return terminal

    text = Out()
    made = report({"a": 3.6, "b": 3.5, "general": 3.1}, {"q": "right", "r": "right"})
    print_report(made, Console(file=text, width=80, force_terminal=False))
    tables = [line for line in text.getvalue().splitlines() if "  " in line.strip()]
    assert len(tables) > 8
    assert max(map(len, tables)) <= 80
    assert text.getvalue().count("…") == 1, "only the digest of the weights is shortened"
    assert "not shown at this width" not in text.getvalue()


def test_the_time_left_follows_from_the_work_that_is_done():
    now = 0.0
    progress = DemoProgress(Console(file=StringIO()), {"a": 30.0, "b": 10.0}, clock=lambda: now)
    assert progress.left_s == 40.0, "before anything is done it is the time on two quiet cores"
    now = 60.0
    progress.update("a", 0.5, "half of a")
    assert progress.share == 0.375
    assert progress.left_s == pytest.approx(100.0), "this machine needs four times as long"
    progress.update("a", 0.2, "a part never goes back")
    assert progress.share == 0.375
    progress.update("a", 1, "a is done")
    progress.update("b", 2, "b is done")
    assert (progress.share, progress.left_s) == (1.0, 0.0)


def test_progress_is_printed_where_there_is_no_terminal():
    now, text = 0.0, StringIO()
    with DemoProgress(Console(file=text, width=80), {"a": 100.0}, clock=lambda: now) as progress:
        progress.update("a", 0.1, "working")
        now = 20.0
        progress.update("a", 0.2, "working")
        progress.update("a", 0.3, "working")
    assert text.getvalue() == "  20.0 s working: 20% of the demo done, about 1 min 20 s left\n"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "5 s"), (43, "45 s"), (60, "1 min"), (93, "1 min 30 s"), (119, "2 min"), (250, "4 min")]
)
def test_times_are_spoken_no_more_exactly_than_they_are_known(seconds: float, words: str):
    assert spoken(seconds) == words


def test_every_stage_of_the_demo_has_a_weight():
    assert all(seconds > 0 for seconds in STAGES.values())


def test_case_06_a_folder_for_the_plot_that_is_a_file_is_found_before_the_demo_runs(tmp_path, monkeypatch):
    """The demo ended in a traceback after minutes."""
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SettingsError, match="the folder for the plot is not usable"):
            _output_folder(out)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _output_folder(Path("~/out")) == tmp_path / "out"
