"""What the demo found: the table, the picture, and what counts as a miss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from streams.cli.latency import summarise

MIN_GAIN_NATS = 0.3
MAX_GENERAL_RISE_NATS = 0.15
MAX_FIRST_PROMOTED_S = 60.0


@dataclass(frozen=True)
class Report:
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
        return {**asdict(self), "stages": stages, "corrected": self.corrected, "missed": self.missed()}


def print_report(report: Report, console: Console) -> None:
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
    latency = Table("stage", "p50 s", "p95 s", "n", title="from publish to served", title_justify="left")
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
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(report.outcomes.items()) if count)
    first = f"{report.first_promoted_s:.1f} s after the start" if report.first_promoted_s is not None else "never"
    console.print(f"examples: {outcomes}   drift detections: {len(report.drifts)}   first version promoted: {first}")


def draw(report: Report, path: Path) -> None:
    """The life of the adapter as a picture: loss by version, one line per domain, dashed where the base stands."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
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
