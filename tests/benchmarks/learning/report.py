"""The report of a comparison: a table, intervals, plots and the last line, from the records of the runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.benchmarks.learning import figures
from tests.benchmarks.learning.comparison import Record, Records

GOALS: Final[Mapping[str, tuple[float, float]]] = {
    "general_recovery": (0.9, np.inf),
    "bwt_pct": (-2.3, np.inf),  # a rise of what was learned before is no forgetting
    "over_replay_low": (0.0, np.inf),
    "general_rise_nats": (-np.inf, 0.05),
    "stale_pct": (0.0, 5.0),
    "refused_for_good_pct": (0.0, 1.0),
}
"""Smallest and largest value that meets a goal."""
COLUMNS: Final = (
    ("AA", "average_loss", 3), ("BWT", "bwt", 3), ("BWT %", "bwt_pct", 1), ("F", "forgetting", 3), ("FWT", "fwt", 3),
    ("dip", "worst_dip", 3), ("preq.", "prequential", 3), ("general", "general_rise", 3), ("GR", "recovery", 2),
    ("stale %", "stale_pct", 1), ("stale end %", "stale_end_pct", 1), ("right %", "right_pct", 1),
    ("right end %", "right_end_pct", 1),
    ("stale rebuilt %", "stale_rebuilt_pct", 1), ("right rebuilt %", "right_rebuilt_pct", 1),
    ("own", "own_loss", 3), ("learned %", "learned_pct", 1), ("p>.5 %", "learned_tokens_pct", 1),
    ("refused %", "refused_pct", 1),
    ("tokens", "tokens", 0), ("train TFLOP", "training_tflops", 3), ("measure TFLOP", "measuring_tflops", 3),
    ("GFLOP/1k", "gflops_per_1000_tokens", 1), ("rebuild TFLOP", "rebuild_tflops", 3), ("s", "seconds", 0),
)  # fmt: skip
OPERATIONS: Final = ("training_tflops", "measuring_tflops", "gflops_per_1000_tokens", "rebuild_tflops")
"""Figures of `operations` in the last line."""
WORDING: Final = "documents"
"""Wording in which revised facts are asked for: that of the documents, or `answers`, which no document has."""


def figures_of(record: Record, frozen: Record) -> dict[str, float]:
    """Return the figures of one run; those that its stream or its way of learning does not have are left out.

    Args:
        record: The run.
        frozen: The run of the frozen base on the same stream.
    """
    updates = record["updates"]
    found = {
        "general_rise": figures.mean_loss(record["stages"][-1]["general"])
        - figures.mean_loss(frozen["stages"][-1]["general"]),
        "tokens": float(sum(update["tokens"] for update in updates)),
        "seconds": float(record["seconds"]),
        **figures.tflops(updates),
    }
    rebuilds = [stage["rebuild"] for stage in record["stages"] if "rebuild" in stage]
    if rebuilds:
        found["rebuild_tflops"] = sum(figures.tflops(rebuilds).values())
    if record["domains"]:
        found |= _of_held_out(record, frozen)
    if updates and all("block" in update for update in updates):
        found |= _of_updates(updates)
        if record["domains"]:
            found["worst_dip"] = figures.worst_dip(
                record["domains"], [update["watched"] for update in updates], [update["block"] for update in updates]
            )
    found |= _of_questions([asked for update in updates for asked in update["asked"]], "")
    found |= _of_questions(record["stages"][-1].get("asked", ()), "_end")
    rebuilt = [asked for stage in record["stages"] for asked in stage.get("asked_rebuilt", ())]
    found |= _of_questions(rebuilt, "_rebuilt")
    return found


def _of_held_out(record: Record, frozen: Record) -> dict[str, float]:
    r = figures.loss_matrix(record)
    start = dict(zip(frozen["domains"], figures.loss_matrix(frozen)[-1], strict=True))
    found = {"average_loss": figures.average_loss(r)}
    if len(r) == len(record["domains"]) > 1:
        of_blocks = [start[domain] for domain in record["domains"]]
        found |= {
            "bwt": figures.backward_transfer(r),
            "gain_of_blocks": figures.gain_of_blocks(r, of_blocks),
            "forgetting": figures.forgetting(r),
            "fwt": figures.forward_transfer(r, of_blocks),
        }
    return found


def _of_updates(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    examples = sum(update["examples"] for update in updates)
    tokens = sum(update["text_tokens"] for update in updates)
    refused = sum(update["examples"] for update in updates if update["outcome"] == "refused")
    own_tokens = sum(update.get("own_tokens", 0) for update in updates)
    of_copies = {"own_loss": sum(update["own_after"] for update in updates) / own_tokens} if own_tokens else {}
    return {
        "prequential": figures.prequential_loss(updates),
        "learned_pct": 100 * sum(update["learned"] for update in updates) / examples,
        "learned_tokens_pct": 100 * sum(update["learned_tokens"] for update in updates) / tokens,
        "refused_pct": 100 * refused / examples,
        **of_copies,
    }


def _of_questions(asked: Sequence[Mapping[str, Any]], when: str) -> dict[str, float]:
    shares = {"stale": figures.stale_share(asked, WORDING), "right": figures.right_share(asked, WORDING)}
    return {f"{name}{when}_pct": 100 * share for name, share in shares.items() if share is not None}


def means(records: Records) -> dict[str, dict[str, float]]:
    """Return the mean of each figure over seeds and orders, by arm, with the number of runs as `runs`.

    Ratios are ratios of these means.
    """
    by_arm: dict[str, dict[tuple[int, int], dict[str, float]]] = {}
    for (arm, seed, order), record in records.items():
        frozen = records.get(("frozen", seed, order))
        if frozen is not None:
            by_arm.setdefault(arm, {})[seed, order] = figures_of(record, frozen)
    found: dict[str, dict[str, float]] = {}
    for arm, runs in by_arm.items():
        names = dict.fromkeys(name for run in runs.values() for name in run)
        found[arm] = {"runs": len(runs)} | {name: _mean(runs.values(), name) for name in names}
        if "bwt" in names:
            found[arm]["bwt_pct"] = figures.backward_transfer_pct(found[arm]["bwt"], found[arm]["gain_of_blocks"])
        if found[arm]["tokens"]:
            spent = found[arm]["training_tflops"] + found[arm]["measuring_tflops"]
            found[arm]["gflops_per_1000_tokens"] = figures.gflops_per_1000_tokens(spent, found[arm]["tokens"])
        ends = [by_arm.get(name, {}) for name in ("sequential", "joint")]
        common = [pair for pair in runs if all(pair in end for end in ends)]
        if common:
            losses = [_mean([end[pair] for pair in common], "average_loss") for end in (runs, *ends)]
            found[arm]["recovery"] = figures.general_recovery(*losses)
    return found


def _mean(runs: Iterable[Mapping[str, float]], name: str) -> float:
    return float(np.mean([run[name] for run in runs if name in run]))


def compared(records: Records, one: str, other: str, *, general: bool = False) -> tuple[float, float, float] | None:
    """Return by how much the loss of one arm at the end is above that of another: mean and 95 % interval, nats per token.

    Args:
        records: Runs.
        one: Name of an arm.
        other: Name of the other.
        general: True for the general texts, False for the held-out documents of the domains.

    Returns:
        Mean, lower and upper end; None where no seed and order was run by both.
    """
    pairs = [(seed, order) for arm, seed, order in records if arm == one and (other, seed, order) in records]
    if not pairs or not (general or records[one, *pairs[0]]["domains"]):
        return None
    differ = figures.general_differences if general else figures.differences
    return figures.paired_bootstrap([differ(records[one, *pair], records[other, *pair]) for pair in sorted(pairs)])


def compared_stale(records: Records, one: str, other: str) -> tuple[float, float, float] | None:
    """Return by how much the share of stale answers of one arm is above that of another: mean and 95 % interval, per cent.

    Args:
        records: Runs.
        one: Name of an arm.
        other: Name of the other.

    Returns:
        Mean, lower and upper end; None where nothing was asked, or no seed and order was run by both.
    """
    pairs = [(seed, order) for arm, seed, order in records if arm == one and (other, seed, order) in records]
    found = [
        figures.stale_differences(records[one, *pair], records[other, *pair], WORDING)
        for pair in sorted(pairs)
        if records[one, *pair]["updates"]
    ]
    if not found or not all(domain for run in found for domain in run):
        return None
    mean, low, high = figures.paired_bootstrap(found)
    return 100 * mean, 100 * low, 100 * high


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the figures as a Markdown table, one arm a line; columns that no arm has are left out."""
    columns = [column for column in COLUMNS if any(column[1] in values for values in found.values())]
    lines = [
        "| arm | runs | " + " | ".join(title for title, _, _ in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for arm, values in found.items():
        cells = [f"{values[name]:.{digits}f}" if name in values else "" for _, name, digits in columns]
        lines.append(f"| {arm} | {values['runs']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def last_line(by_stream: Mapping[str, Records], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures that the last line shows, with the goals that are missed.

    Args:
        by_stream: Runs by stream.
        more: What was run.
    """
    found = {stream: means(records) for stream, records in by_stream.items()}
    ours = {stream: arms.get("ours", {}) for stream, arms in found.items()}
    domains = ours.get("domains", {})
    over = compared(by_stream.get("domains", {}), "replay", "ours")
    refused = [values["refused_pct"] for values in ours.values() if "refused_pct" in values]
    line: dict[str, Any] = {
        "general_recovery": domains.get("recovery"), "bwt_pct": domains.get("bwt_pct"),
        "over_replay_low": over[1] if over else None, "over_replay_high": over[2] if over else None,
        "general_rise_nats": domains.get("general_rise"), "learned_pct": domains.get("learned_pct"),
        "stale_pct": ours.get("revisions", {}).get("stale_pct"),
        "stale_rebuilt_pct": ours.get("revisions", {}).get("stale_rebuilt_pct"),
        "stale_releases_pct": ours.get("releases", {}).get("stale_pct"),
        "stale_releases_rebuilt_pct": ours.get("releases", {}).get("stale_rebuilt_pct"),
        # The worst stream: a mean over streams would hide that one kind of text is refused.
        "refused_for_good_pct": max(refused) if refused else None,
    }  # fmt: skip
    line = {name: None if value is None else round(value, 3) for name, value in line.items()} | dict(more)
    line["operations"] = {
        stream: {
            arm: {name: round(values[name], 4) for name in OPERATIONS if name in values} for arm, values in arms.items()
        }
        for stream, arms in found.items()
    }
    line["missed"] = [
        name for name, (low, high) in GOALS.items() if line.get(name) is not None and not low <= line[name] <= high
    ]
    return line


def intervals(records: Records, arms: Sequence[str]) -> list[str]:
    """Return one line per arm with what it has minus what `ours` has: losses at the end, and stale answers after updates."""
    lines = []
    for arm in arms:
        parts = []
        for name, general in (("held-out", False), ("general", True)):
            found = None if arm == "ours" else compared(records, arm, "ours", general=general)
            if found is not None:
                mean, low, high = found
                verdict = "ours is better" if low > 0 else "ours is worse" if high < 0 else "no difference shown"
                parts.append(f"{name} {mean:+.4f} [{low:+.4f}, {high:+.4f}] ({verdict})")
        stale = None if arm == "ours" else compared_stale(records, arm, "ours")
        if stale is not None:
            mean, low, high = stale
            parts.append(f"stale answers {mean:+.1f} [{low:+.1f}, {high:+.1f}] %")
        if parts:
            lines.append(f"{arm} - ours, nats: {', '.join(parts)}")
    return lines


def plot(records: Records, folder: Path) -> list[Path]:
    """Draw R of each arm as a heat map, and loss against general rise; return the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    by_arm: dict[str, list[Record]] = {}
    for (arm, _, order), record in sorted(records.items()):
        if order == 1 and len(record["stages"]) == len(record["domains"]) > 1:
            by_arm.setdefault(arm, []).append(record)
    paths = []
    if by_arm:
        figure, axes = plt.subplots(1, len(by_arm), figsize=(2.6 * len(by_arm), 3), squeeze=False)
        r = {arm: np.mean([figures.loss_matrix(record) for record in runs], axis=0) for arm, runs in by_arm.items()}
        low, high = min(m.min() for m in r.values()), max(m.max() for m in r.values())
        for axis, (arm, matrix) in zip(axes[0], r.items(), strict=True):
            axis.imshow(matrix, vmin=low, vmax=high, cmap="viridis_r")
            for (row, column), value in np.ndenumerate(matrix):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="white", fontsize=7)
            domains = by_arm[arm][0]["domains"]
            axis.set_title(arm, fontsize=8)
            axis.set_xticks(range(len(domains)), domains, rotation=60, fontsize=7)
            axis.set_yticks(range(len(domains)), [f"after {domain}" for domain in domains], fontsize=6)
        figure.suptitle("R[i,j]: held-out loss of domain j after block i, nats per token, order 1", fontsize=9)
        figure.tight_layout()
        paths.append(folder / "matrix.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    found = means(records)
    if found:
        figure, axis = plt.subplots(figsize=(6, 4))
        for arm, values in found.items():
            axis.scatter(values["general_rise"], values["average_loss"], s=25)
            axis.annotate(
                arm, (values["general_rise"], values["average_loss"]), fontsize=7, xytext=(4, 2),
                textcoords="offset points",
            )  # fmt: skip
        axis.set_xlabel("rise of the loss on general text, nats per token")
        axis.set_ylabel("held-out loss of all domains at the end")
        figure.tight_layout()
        paths.append(folder / "tradeoff.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths
