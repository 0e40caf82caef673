"""Report of the demo: its bounds, what misses them, and the tables that it prints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.text import Text

from perennial.streams.cli.demo.latency import summarise
from perennial.streams.cli.tables import Column, print_table

MIN_GAIN_NATS = 0.3
MAX_GENERAL_RISE_NATS = 0.15
MIN_MEMORY_NATS = 0.3
MAX_LEFT_NATS = 0.02
MAX_REST_RISE_NATS = 0.1
MODELS = {"base": "frozen base", "before": "before forgetting", "after": "after", "never": "never saw them"}
"""Models whose loss is compared, with their titles."""
GROUPS = {"erased": "the erased document", "expired": "the expired document", "rest": "the rest"}
"""Texts on which they are compared, with their titles."""


@dataclass(frozen=True)
class Forgetting:
    """The figures measured while two documents were forgotten.

    Attributes:
        losses: Loss in nats per token, by model (`MODELS`) and text (`GROUPS`).
        after_sha256: Digest of the weights after forgetting.
        never_sha256: Digest of weights that were trained without the two documents.
        exact: Whether this device computes the same bits again.
        readable_before: Number of files in the store with text of the two documents, before forgetting.
        readable: Those files after forgetting.
        erase_s: Seconds from the request to its end.
        expire_s: Seconds from the expiry of the document to the end of its forgetting.
        updates: Number of updates that learned the documents.
    """

    losses: Mapping[str, Mapping[str, float]]
    after_sha256: str
    never_sha256: str
    exact: bool
    readable_before: int
    readable: Sequence[str]
    erase_s: float
    expire_s: float
    updates: int

    @property
    def is_equal(self) -> bool:
        """Whether the weights are bit-equal to those of the model that never saw the two documents."""
        return self.after_sha256 == self.never_sha256

    def missed(self) -> list[str]:
        """Return what is wrong with the forgetting, one line each."""
        lines = []
        base, before, after, never = (self.losses[model] for model in MODELS)
        for name in ("erased", "expired"):
            shown = never[name] - before[name]
            if shown < MIN_MEMORY_NATS:
                lines.append(
                    f"{GROUPS[name]}: having learned it lowers its loss by {shown:.3f} nats, {MIN_MEMORY_NATS} are "
                    "required: there was nothing to forget"
                )
            left = abs(after[name] - never[name])
            if not left <= MAX_LEFT_NATS:
                lines.append(
                    f"{GROUPS[name]}: its loss differs by {left:.3f} nats from that of a model that never saw it, "
                    f"{MAX_LEFT_NATS} are allowed"
                )
        rise = after["rest"] - before["rest"]
        if not rise <= MAX_REST_RISE_NATS:
            lines.append(f"loss on the rest rose by {rise:.3f} nats, {MAX_REST_RISE_NATS} are allowed")
        if not after["rest"] < base["rest"]:
            lines.append("the rest was forgotten too: its loss is not below that of the frozen base")
        if self.exact and not self.is_equal:
            lines.append(
                f"the weights {self.after_sha256} differ from {self.never_sha256} of the model that never saw the two"
            )
        if not self.readable_before:
            lines.append(
                "the text was not found in the store before forgetting, so its absence afterwards proves nothing"
            )
        if self.readable:
            lines.append(f"text of the two documents is still readable in {', '.join(self.readable)}")
        return lines


@dataclass(frozen=True)
class DemoReport:
    """The figures that the demo measured. Losses are means in nats per token on texts that no adapter was shown.

    Attributes:
        domains: The two domains in the order in which they were learned.
        base: Loss of the frozen base, by domain and `general`.
        first: Loss of the adapter after the first domain.
        now: Loss of the adapter at the end.
        curve: Losses by number of the promoted version; 0 is the frozen base.
        change_at: Number of the last version before the second domain.
        drift_at: For each drift of the adapter, the number of versions that were published before it.
        drifts: All drift events.
        latencies: Seconds by stage, for each update that was served.
        first_promoted_s: Seconds from the start of the demo to the first promoted version; None: there was none.
        outcomes: Number of examples by outcome.
        answers_before: Answers to the questions before the corrections.
        answers: Answers after them.
        wanted: The corrected answers.
        forgetting: What was measured while two documents were forgotten.
    """

    domains: Sequence[str]
    base: Mapping[str, float]
    first: Mapping[str, float]
    now: Mapping[str, float]
    curve: Mapping[int, Mapping[str, float]]
    change_at: int
    drift_at: Sequence[int]
    drifts: Sequence[Mapping[str, object]]
    latencies: Sequence[Mapping[str, float]]
    first_promoted_s: float | None
    outcomes: Mapping[str, int]
    answers_before: Mapping[str, str]
    answers: Mapping[str, str]
    wanted: Mapping[str, str]
    forgetting: Forgetting

    @property
    def corrected(self) -> int:
        """Number of questions that are answered exactly as corrected."""
        return sum(self.answers[question].strip() == right for question, right in self.wanted.items())

    @property
    def learned_anything(self) -> bool:
        """Whether the loss on any domain is below that of the frozen base."""
        return any(self.now[domain] < self.base[domain] for domain in self.domains)

    def missed(self) -> list[str]:
        """Return the bounds on learning that were not met, one line each."""
        lines = []
        for domain in self.domains:
            gain = self.base[domain] - self.now[domain]
            if gain < MIN_GAIN_NATS:
                lines.append(
                    f"{domain}: the loss is {gain:.3f} nats below the frozen base, {MIN_GAIN_NATS} are required"
                )
        rise = self.now["general"] - self.base["general"]
        if rise > MAX_GENERAL_RISE_NATS:
            lines.append(f"loss on general text rose by {rise:.3f} nats, {MAX_GENERAL_RISE_NATS} are allowed")
        if self.corrected <= len(self.wanted) // 2:
            lines.append(
                f"{self.corrected} of {len(self.wanted)} questions are answered as corrected, more than half are required"
            )
        return lines

    def as_dict(self) -> dict[str, object]:
        """Return the figures for JSON."""
        stages = {
            name: {"p50_s": p50, "p95_s": p95, "n": n} for name, (p50, p95, n) in summarise(self.latencies).items()
        }
        forgetting = {
            **asdict(self.forgetting), "is_equal": self.forgetting.is_equal, "missed": self.forgetting.missed(),
        }  # fmt: skip
        return {
            **asdict(self), "forgetting": forgetting, "stages": stages, "corrected": self.corrected,
            "missed": self.missed(),
        }  # fmt: skip


def print_report(report: DemoReport, console: Console) -> None:
    """Print the report for a person.

    Args:
        report: What the demo measured.
        console: Where to print; every table fits 80 columns.
    """
    first = report.domains[0]
    columns = [
        Column("unseen text", wraps=True),
        *(Column(name, right=True) for name in ("frozen base", f"after {first}", "now", "now - base")),
    ]
    rows: list[list[str | Text]] = []
    for name in (*report.domains, "general"):
        change = report.now[name] - report.base[name]
        good = change <= MAX_GENERAL_RISE_NATS if name == "general" else change <= -MIN_GAIN_NATS
        figures = [f"{losses[name]:.3f}" for losses in (report.base, report.first, report.now)]
        rows.append([name, *figures, Text(f"{change:+.3f}", "green" if good else "red")])
    _print_titled(
        console, "LEARNING: loss in nats per token on text that no adapter was shown; lower is better", columns, rows,
        f"The adapter learned {first}, then {report.domains[1]}. `general` is text of other kinds, on which it must not "
        f"become worse by more than {MAX_GENERAL_RISE_NATS}.",
    )  # fmt: skip
    timed = [Column("stage"), *(Column(name, right=True) for name in ("median s", "95 % s", "updates"))]
    _print_titled(
        console, "SPEED: from a published document to a served version", timed,
        [[name.replace("_to_", " to "), f"{p50:.2f}", f"{p95:.2f}", str(n)]
         for name, (p50, p95, n) in summarise(report.latencies).items()],
        "All documents of a domain were published at once, so most of the time is spent waiting in line.",
    )  # fmt: skip
    _print_answers(report, console)
    print_forgetting(report.forgetting, console)
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(report.outcomes.items()) if count)
    promoted_s = f"{report.first_promoted_s:.1f} s after the start" if report.first_promoted_s is not None else "never"
    _print_line(
        console, f"\nexamples: {outcomes}; changes of the text detected (drift): {len(report.drifts)}; "
        f"first version promoted: {promoted_s}",
    )  # fmt: skip


def _print_answers(report: DemoReport, console: Console) -> None:
    _print_line(console, "\n[bold]CORRECTIONS: answers before and after a second adapter learned corrected ones[/]")
    for question, right in report.wanted.items():
        before, answer = (
            " ".join(text.split()) for text in (report.answers_before[question], report.answers[question])
        )
        verdict = "[green]as corrected[/]" if report.answers[question].strip() == right else "[red]not as corrected[/]"
        _print_line(console, f"{question}")
        _print_line(console, Text(f"  before: {before[:68]}"))
        _print_line(console, Text.assemble(f"  now:    {answer[:50]}  ", Text.from_markup(f"({verdict})")))


def print_forgetting(forgetting: Forgetting, console: Console) -> None:
    """Print what was forgotten, and the verdict on it.

    Args:
        forgetting: What was measured.
        console: Where to print.
    """
    _print_titled(
        console, "FORGETTING: loss in nats per token on the documents themselves",
        [Column("text"), *(Column(title, right=True) for title in MODELS.values())],
        [[title, *(f"{forgetting.losses[model][name]:.3f}" for model in MODELS)] for name, title in GROUPS.items()],
        "After forgetting, a document must cost as much as under a model that never saw it.",
    )  # fmt: skip
    equal = "[green]yes[/]" if forgetting.is_equal else "[red]no[/]" if forgetting.exact else "no, as is usual on a GPU"
    _print_line(console, f"weights bit-equal to a model that never saw them: {equal} ({forgetting.after_sha256[:19]}…)")
    _print_line(
        console, f"files in the store with their text: {forgetting.readable_before} before, {len(forgetting.readable)} after; "
        f"erased {forgetting.erase_s:.1f} s after the request, forgotten {forgetting.expire_s:.1f} s after expiry",
    )  # fmt: skip


def _print_titled(
    console: Console, title: str, columns: Sequence[Column], rows: Sequence[Sequence[str | Text]], note: str
) -> None:
    _print_line(console, f"\n[bold]{title}[/]")
    print_table(columns, rows, console=console)
    _print_line(console, f"[dim]{note}[/]")


def _print_line(console: Console, line: str | Text) -> None:
    console.print(line, highlight=False, soft_wrap=True)


class _Figures(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


_R = TypeVar("_R", bound=_Figures)


def hand_over(
    report: _R,
    missed: Sequence[str],
    *,
    draw: Callable[[_R, Path], None],
    show: Callable[[_R, Console], None],
    out: Path,
    as_json: bool,
    console: Console,
    started: float | None,
) -> None:
    """Write the plot and the figures of a demo, print its tables, and say which claims were missed.

    Args:
        report: The figures.
        missed: The claims that did not hold.
        draw: Draws the plot into a file.
        show: Prints the tables.
        out: Folder for the plot and the figures; it exists.
        as_json: Print JSON instead of tables.
        console: Where lines about the run go.
        started: When the demo began, by the monotonic clock, to say that all claims held; None: do not say it.
    """
    picture, figures = out / "demo.png", out / "demo.json"
    draw(report, picture)
    figures.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        show(report, Console())
        console.print(f"picture: {picture}   figures: {figures}", highlight=False, soft_wrap=True, markup=False)
    for line in missed:
        console.print(f"[bold red]missed:[/] {line}", highlight=False, soft_wrap=True)
    if not missed and started is not None:
        console.print(f"everything that the demo claims held, in {time.monotonic() - started:.0f} s", highlight=False)
