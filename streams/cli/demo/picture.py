"""Draw what the demo measured: loss by version, and loss on the forgotten documents by model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from perennial.streams.cli.demo.report import GROUPS, MODELS, DemoReport, Forgetting

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(report: DemoReport, path: Path) -> None:
    """Draw loss by version with a line per domain (dashed: the frozen base), and next to it the forgetting.

    Args:
        report: What the demo measured.
        path: The PNG file to write.
    """
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
    """Draw a line per text over the models: it rises again where the text was forgotten, and stays low elsewhere."""
    positions = range(len(MODELS))
    for color, (name, title) in zip(("tab:red", "tab:purple", "tab:green"), GROUPS.items(), strict=True):
        heights = [forgetting.losses[model][name] for model in MODELS]
        axes.plot(positions, heights, color=color, marker="o", label=title)
        above = -14 if name == "rest" else 6  # the lowest line: its figures must not overlap those of another
        for position, height in zip(positions, heights, strict=True):
            axes.annotate(
                f"{height:.2f}",
                (position, height),
                xytext=(0, above),
                textcoords="offset points",
                fontsize=8,
                ha="center",
            )
    axes.set_xticks(positions, [title.replace(" ", "\n", 1) for title in MODELS.values()], fontsize=9)
    axes.set_xlim(-0.3, len(MODELS) - 0.7)
    axes.margins(y=0.12)
    axes.set_ylabel("loss on the text itself, nats per token")
    axes.set_title("One document erased, one expired")
    axes.grid(alpha=0.3)
    axes.legend(loc="center", bbox_to_anchor=(0.8, 0.3), fontsize=8)
