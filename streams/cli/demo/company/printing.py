"""Print what the demo of the company measured, and draw its losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from perennial.streams.cli.demo.company.questions import MAX_GENERAL_RISE_NATS, Answered, CompanyReport, share_right
from perennial.streams.cli.tables import Column, print_table

TEXTS = {"company": "the company's facts, in other words", "general": "general text"}
"""Texts that no adapter was shown, with their titles."""
_ANSWER_CHARS = 62


def print_company_report(report: CompanyReport, console: Console) -> None:
    """Print all answers and the losses.

    Args:
        report: What the demo measured.
        console: Where to print; every line fits 80 columns.
    """
    _title(console, "LEARNING: two questions about each fact, one of a ticket, one that was never trained")
    for before, after in zip(report.base, report.learned, strict=True):
        kind = "trained" if after.trained else "never trained"
        console.print(Text(f"{after.question} ({kind}; right: {after.fact.figure})"), soft_wrap=True)
        _answer(console, "base", before)
        _answer(console, "adapter", after)
    for name, answers in (("frozen base", report.base), ("adapter", report.learned)):
        trained, unseen = share_right(answers, trained=True), share_right(answers, trained=False)
        console.print(
            f"{name}: {trained:.0%} of the trained and {unseen:.0%} of the other questions right", highlight=False
        )
    _title(console, "A NEW PRICE: another document supersedes the old one")
    _compare(console, report.old_price, report.new_price)
    _title(console, "ERASED: one customer asked to be forgotten")
    _compare(console, *report.customer)
    _title(console, "EXPIRED: one offer ended")
    _compare(console, *report.offer)
    right = sum(answered.right for answered in report.rest)
    console.print(f"the rest: {right} of {len(report.rest)} questions are still answered right", highlight=False)
    _title(console, "LOSS in nats per token on text that the adapter was not shown; lower is better")
    print_table(
        [Column("model"), *(Column(title, right=True) for title in TEXTS.values())],
        [[model, *(f"{losses[name]:.3f}" for name in TEXTS)] for model, losses in report.losses.items()],
        console=console,
    )
    console.print(f"[dim]General text may become worse by {MAX_GENERAL_RISE_NATS} at most.[/]", highlight=False)
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    console.print(f"time: {steps}", highlight=False, soft_wrap=True)


def draw_losses(report: CompanyReport, path: Path) -> None:
    """Draw the losses by version.

    Args:
        report: What the demo measured.
        path: The PNG file to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=110)
    first, *_ = report.losses.values()
    for color, (name, title) in zip(("tab:blue", "tab:gray"), TEXTS.items(), strict=True):
        heights = [losses[name] for losses in report.losses.values()]
        axes.plot(list(report.losses), heights, color=color, marker=".", label=title)
        axes.axhline(first[name], color=color, linestyle="--", linewidth=0.8, alpha=0.6)
    axes.set_ylabel("held-out loss, nats per token (lower is better)")
    axes.set_title("A language model learns about a company")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _title(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]", highlight=False, soft_wrap=True)


def _compare(console: Console, before: Sequence[Answered], after: Sequence[Answered]) -> None:
    for then, now in zip(before, after, strict=True):
        console.print(Text(now.question), soft_wrap=True)
        _answer(console, "before", then)
        _answer(console, "now", now)


def _answer(console: Console, who: str, answered: Answered) -> None:
    style = "green" if answered.right else "default"
    console.print(Text.assemble(f"  {who + ':':<9}", (answered.answer[:_ANSWER_CHARS], style)), soft_wrap=True)
