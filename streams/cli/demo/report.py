"""What the demo found: the table, the picture, and what counts as a miss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from perennial.streams.cli.demo.latency import summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_GAIN_NATS = 0.3
MAX_GENERAL_RISE_NATS = 0.15
MAX_FIRST_PROMOTED_S = 60.0
MIN_MEMORY_NATS = 0.3
MAX_LEFT_NATS = 0.02
MAX_REST_RISE_NATS = 0.1
MODELS = {"base": "frozen base", "before": "before forgetting", "after": "after", "never": "never saw them"}
GROUPS = {"erased": "the erased document", "expired": "the expired document", "rest": "the rest"}


@dataclass(frozen=True)
class Forgetting:
    """What forgetting two documents came to. losses: nats per token, by model (MODELS) and text (GROUPS).

    exact: whether this device computes the same bits again. readable: files of the store with text of the two.
    expire_s: seconds from the end of the document's life to the end of its forgetting.
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
        """Whether the weights have the very bits of those that never saw the two."""
        return self.after_sha256 == self.never_sha256

    def missed(self) -> list[str]:
        """What is wrong with the forgetting, a line each."""
        lines = []
        base, before, after, never = (self.losses[model] for model in MODELS)
        for name in ("erased", "expired"):
            shown = never[name] - before[name]
            if shown < MIN_MEMORY_NATS:
                lines.append(
                    f"{GROUPS[name]}: seen costs {shown:.3f} nats less than never seen, {MIN_MEMORY_NATS} are asked for: "
                    "there was nothing to forget"
                )
            left = abs(after[name] - never[name])
            if not left <= MAX_LEFT_NATS:
                lines.append(
                    f"{GROUPS[name]}: {left:.3f} nats from the never-saw-it level, {MAX_LEFT_NATS} are allowed"
                )
        rise = after["rest"] - before["rest"]
        if not rise <= MAX_REST_RISE_NATS:
            lines.append(f"loss on the rest rose by {rise:.3f} nats, {MAX_REST_RISE_NATS} are allowed")
        if not after["rest"] < base["rest"]:
            lines.append("the rest was forgotten too: it costs no less than under the frozen base")
        if self.exact and not self.is_equal:
            lines.append(f"weights {self.after_sha256} are not {self.never_sha256}, which never saw the two")
        if not self.readable_before:
            lines.append("the text was not found in the store before it was forgotten: that it is gone says nothing")
        if self.readable:
            lines.append(f"text of the two is still readable in {', '.join(self.readable)}")
        return lines


@dataclass(frozen=True)
class DemoReport:
    """Losses in nats per token on held-out text: by the frozen base, after the first domain, and now."""

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
        """Questions that are answered exactly as corrected."""
        return sum(self.answers[question].strip() == right for question, right in self.wanted.items())

    @property
    def learned_anything(self) -> bool:
        """Whether any streamed domain costs less than under the frozen base."""
        return any(self.now[domain] < self.base[domain] for domain in self.domains)

    def missed(self) -> list[str]:
        """The bounds that were not met, a line each."""
        lines = []
        for domain in self.domains:
            gain = self.base[domain] - self.now[domain]
            if gain < MIN_GAIN_NATS:
                lines.append(f"{domain}: {gain:.3f} nats under the frozen base, {MIN_GAIN_NATS} are asked for")
        rise = self.now["general"] - self.base["general"]
        if rise > MAX_GENERAL_RISE_NATS:
            lines.append(f"general loss rose by {rise:.3f} nats, {MAX_GENERAL_RISE_NATS} are allowed")
        if self.corrected <= len(self.wanted) // 2:
            lines.append(f"{self.corrected} of {len(self.wanted)} questions are answered as corrected")
        return lines

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
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
    """The tables that a person reads."""
    table = Table(
        "held-out text", "frozen base", f"after {report.domains[0]}", "now", "now − base",
        title="loss in nats per token on documents that no adapter was shown", title_justify="left",
    )  # fmt: skip
    for name in (*report.domains, "general"):
        change = report.now[name] - report.base[name]
        good = change <= MAX_GENERAL_RISE_NATS if name == "general" else change <= -MIN_GAIN_NATS
        table.add_row(
            name, f"{report.base[name]:.3f}", f"{report.first[name]:.3f}", f"{report.now[name]:.3f}",
            f"[{'green' if good else 'red'}]{change:+.3f}[/]",
        )  # fmt: skip
    console.print(table)
    latency = Table(
        "stage",
        "p50 s",
        "p95 s",
        "n",
        title="from publish to served, a domain's documents all at once",
        title_justify="left",
    )
    for name, (p50, p95, n) in summarise(report.latencies).items():
        latency.add_row(name.replace("_to_", " → "), f"{p50:.2f}", f"{p95:.2f}", str(n))
    console.print(latency)
    answers = Table(
        "asked",
        "before",
        "now",
        "as corrected",
        title="the second adapter learned from corrections",
        title_justify="left",
    )
    for question, right in report.wanted.items():
        answer = report.answers[question].strip()
        answers.add_row(
            question,
            report.answers_before[question].strip()[:60],
            answer[:60],
            "[green]yes[/]" if answer == right else "[red]no[/]",
        )
    console.print(answers)
    print_forgetting(report.forgetting, console)
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(report.outcomes.items()) if count)
    first = f"{report.first_promoted_s:.1f} s after the start" if report.first_promoted_s is not None else "never"
    console.print(f"examples: {outcomes}   drift detections: {len(report.drifts)}   first version promoted: {first}")


def print_forgetting(forgetting: Forgetting, console: Console) -> None:
    """The table of what was forgotten, and the verdict on it."""
    table = Table(
        "text", *MODELS.values(), title="forgetting: loss in nats per token", title_justify="left",
    )  # fmt: skip
    for name, title in GROUPS.items():
        table.add_row(title, *(f"{forgetting.losses[model][name]:.3f}" for model in MODELS))
    console.print(table)
    equal = "[green]yes[/]" if forgetting.is_equal else "[red]no[/]" if forgetting.exact else "no, as is usual on a GPU"
    console.print(
        f"bit-equal to a model that never saw them: {equal} ({forgetting.after_sha256[:19]}…)", highlight=False
    )
    console.print(
        f"files of the store with their text: {forgetting.readable_before} before, {len(forgetting.readable)} after; "
        f"erased {forgetting.erase_s:.1f} s after it was asked for, "
        f"expired and forgotten {forgetting.expire_s:.1f} s after its time",
        highlight=False,
    )


def draw(report: DemoReport, path: Path) -> None:
    """The life of the adapter as a picture: loss by version, one line per domain, dashed where the base stands."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (axes, forgot) = plt.subplots(1, 2, figsize=(13, 5), dpi=110, width_ratios=(8, 5))
    _draw_forgetting(report.forgetting, forgot)
    versions = sorted(report.curve)
    for color, name in zip(("tab:blue", "tab:orange", "tab:gray"), (*report.domains, "general"), strict=False):
        axes.plot(versions, [report.curve[at][name] for at in versions], color=color, marker=".", label=name)
        axes.axhline(report.base[name], color=color, linestyle="--", linewidth=0.8, alpha=0.6)
    axes.axvline(report.change_at, color="black", linewidth=0.8)
    axes.annotate(
        f"{report.domains[1]} begins", (report.change_at, 0.98), xycoords=("data", "axes fraction"),
        xytext=(4, 0), textcoords="offset points", va="top", fontsize=8,
    )  # fmt: skip
    for index, at in enumerate(sorted(set(report.drift_at))):
        axes.axvline(at, color="magenta", linestyle=":", linewidth=1.2, label="drift detected" if index == 0 else None)
    axes.set_xlabel("promoted versions of the adapter (0: frozen base, dashed)")
    axes.set_ylabel("held-out loss, nats per token (lower is better)")
    axes.set_title("An adapter that lives through a change of domain")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _draw_forgetting(forgetting: Forgetting, axes: Axes) -> None:
    """A line per text over the models: what was learned comes back up, and stays down where it was not forgotten."""
    places = range(len(MODELS))
    for color, (name, title) in zip(("tab:red", "tab:purple", "tab:green"), GROUPS.items(), strict=True):
        heights = [forgetting.losses[model][name] for model in MODELS]
        axes.plot(places, heights, color=color, marker="o", label=title)
        above = -14 if name == "rest" else 6  # the lowest line: its figures and another's must not meet
        for place, height in zip(places, heights, strict=True):
            axes.annotate(
                f"{height:.2f}", (place, height), xytext=(0, above), textcoords="offset points", fontsize=8, ha="center"
            )
    axes.set_xticks(places, [title.replace(" ", "\n", 1) for title in MODELS.values()], fontsize=9)
    axes.set_xlim(-0.3, len(MODELS) - 0.7)
    axes.margins(y=0.12)
    axes.set_ylabel("loss on the text itself, nats per token")
    axes.set_title("One document erased, one expired")
    axes.grid(alpha=0.3)
    axes.legend(loc="center", bbox_to_anchor=(0.8, 0.3), fontsize=8)
