"""Figures of continual learning from measured losses. Pure functions; every loss is in nats per token, lower is better.

R[i][j] is the loss on held-out documents of the domain of block j after block i was learned, `start[j]` the loss of the
frozen base on them, T the number of blocks. The definitions are those of the papers named, with the sign turned where
they are for accuracies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Matrix = Sequence[Sequence[float]]


def mean_loss(texts: Sequence[Sequence[float]]) -> float:
    """Return nats per token over all texts, each given as (nats, tokens): long texts count for more."""
    return sum(nats for nats, _ in texts) / sum(tokens for _, tokens in texts)


def loss_matrix(record: Mapping[str, Any]) -> list[list[float]]:
    """Return R of a record, one row per stage; a run that was measured only at its end has one row."""
    return [[mean_loss(stage["held_out"][domain]) for domain in record["domains"]] for stage in record["stages"]]


def average_loss(r: Matrix) -> float:
    """Return AA: the mean loss over all domains at the end (Lopez-Paz and Ranzato 2017, arXiv 1706.08840)."""
    return float(np.mean(r[-1]))


def backward_transfer(r: Matrix) -> float:
    """Return BWT = 1/(T-1) Σ_{j<T} (R[j][j] - R[T][j]): negative where later blocks raised the loss (1706.08840)."""
    last = len(r) - 1
    return float(np.mean([r[j][j] - r[last][j] for j in range(last)])) if last else 0.0


def gain_of_blocks(r: Matrix, start: Sequence[float]) -> float:
    """Return the mean gain of each domain but the last right after its own block: 1/(T-1) Σ_{j<T} (start[j] - R[j][j])."""
    last = len(r) - 1
    return float(np.mean([start[j] - r[j][j] for j in range(last)])) if last else 0.0


def backward_transfer_pct(transfer: float, gain: float) -> float:
    """Return BWT relative to the gain of the domains right after their own blocks, in per cent.

    100 · Σ_{j<T} (R[j][j] - R[T][j]) / Σ_{j<T} (start[j] - R[j][j]): -100 means that everything was forgotten. Published
    BWT is in points of accuracy; this is the nearest that losses have. Means over runs are divided, not averaged after
    the division, because a small gain of one run would outweigh the others.

    Args:
        transfer: `backward_transfer`, or its mean over runs.
        gain: `gain_of_blocks`, or its mean over the same runs.
    """
    return 100 * transfer / gain if gain else 0.0


def forgetting(r: Matrix) -> float:
    """Return F: how far the loss of a domain ends above its best since its block (Chaudhry et al. 2018, 1801.10112)."""
    last = len(r) - 1
    return float(np.mean([r[last][j] - min(r[i][j] for i in range(j, last)) for j in range(last)])) if last else 0.0


def forward_transfer(r: Matrix, start: Sequence[float]) -> float:
    """Return FWT = 1/(T-1) Σ_{j>1} (start[j] - R[j-1][j]): what earlier blocks did for a domain (1706.08840)."""
    return float(np.mean([start[j] - r[j - 1][j] for j in range(1, len(r))])) if len(r) > 1 else 0.0


def worst_dip(domains: Sequence[str], updates: Sequence[Mapping[str, float]], blocks: Sequence[str]) -> float:
    """Return the largest rise of a watched loss above its value right after the domain's block.

    It sees what measurements at the ends of blocks miss (the stability gap, De Lange et al. 2022, arXiv 2205.13452).

    Args:
        domains: Domains in the order of their blocks.
        updates: Watched loss by domain after each update.
        blocks: Domain of the block of each update.
    """
    worst = 0.0
    for domain in domains:
        own = [n for n, block in enumerate(blocks) if block == domain]
        if own:
            after = [update[domain] for update in updates[own[-1] :]]
            worst = max(worst, max(after) - after[0])
    return worst


def prequential_loss(updates: Sequence[Mapping[str, float]]) -> float:
    """Return the loss of each micro-batch before it was learned, nats per token (Dawid 1984)."""
    return sum(u["before"] for u in updates) / sum(u["text_tokens"] for u in updates) if updates else 0.0


def tflops(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the operations of updates or rebuilds in 10^12, by the formulas of `learner.costs.operations`.

    Args:
        parts: Each with `training_flops` and `measuring_flops`.
    """
    return {f"{kind}_tflops": sum(part[f"{kind}_flops"] for part in parts) / 1e12 for kind in ("training", "measuring")}


def gflops_per_1000_tokens(spent_tflops: float, tokens: float) -> float:
    """Return the operations per 1,000 trained tokens in 10^9.

    Args:
        spent_tflops: Operations of training and of the gate's measurements, in 10^12.
        tokens: Trained tokens.
    """
    return 1e3 * spent_tflops / (tokens / 1e3)


def general_recovery(ours: float, sequential: float, joint: float) -> float:
    """Return GR = (M - sequential) / (joint - sequential) of average losses: 0 as sequential, 1 as joint training."""
    return (ours - sequential) / (joint - sequential) if joint != sequential else 0.0


def paired_bootstrap(
    runs: Sequence[Sequence[Sequence[float]]], resamples: int = 4_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Return the mean of paired differences and its percentile interval (Efron and Tibshirani 1993, chapter 13).

    Resampled are the runs, and within each drawn run the documents of every domain. The domains are those of the
    stream and are not drawn. Each document counts once, each domain the same.

    Args:
        runs: Differences by run (one seed and order), domain and document.
        resamples: Number of resamples.
        seed: Seed of the draws.
        level: Share of the resampled means inside the interval.

    Returns:
        Mean, lower and upper end.
    """
    rng = np.random.default_rng(seed)
    arrays = [[np.asarray(domain, dtype=float) for domain in run] for run in runs]
    # (runs, resamples): means of each run under its own draws of documents
    means = np.array(
        [
            np.mean(
                [d[rng.integers(0, len(d), (resamples, len(d)))].mean(axis=1) for d in domains], axis=0
            )
            for domains in arrays
        ]
    )  # fmt: skip
    drawn = rng.integers(0, len(arrays), (resamples, len(arrays)))
    resampled = means[drawn, np.arange(resamples)[:, None]].mean(axis=1)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean([np.mean([d.mean() for d in run]) for run in arrays])), float(low), float(high)


def document_losses(stage: Mapping[str, Any], domains: Sequence[str]) -> list[list[float]]:
    """Return the loss of each held-out document of a stage, nats per token, by domain."""
    return [[nats / tokens for nats, tokens in stage["held_out"][domain]] for domain in domains]


def general_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[list[float]]:
    """Return the same as `differences` for the held-out general texts, as one domain."""
    pairs = zip(one["stages"][-1]["general"], other["stages"][-1]["general"], strict=True)
    return [[a / tokens - b / tokens for (a, tokens), (b, _) in pairs]]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[list[float]]:
    """Return the loss of each held-out document at the end of one run minus that at the end of another, by domain."""
    domains = sorted(one["domains"])
    pairs = zip(document_losses(one["stages"][-1], domains), document_losses(other["stages"][-1], domains), strict=True)
    return [[a - b for a, b in zip(left, right, strict=True)] for left, right in pairs]


def stale_share(asked: Sequence[Mapping[str, Any]], wording: str) -> float | None:
    """Return the share of questions in which an earlier value has a lower loss than the current one.

    Args:
        asked: Losses of the choices by question: the current value, the `earlier` ones, those of other facts.
        wording: `answers` or `documents`.

    Returns:
        A share, 0 to 1; None where nothing that had an earlier value was asked.
    """
    found = [(a[wording][0], a[wording][1 : 1 + a["earlier"]]) for a in asked if a["earlier"]]
    return float(np.mean([min(earlier) < current for current, earlier in found])) if found else None


def stale_differences(one: Mapping[str, Any], other: Mapping[str, Any], wording: str) -> list[list[float]]:
    """Return for each question right after an update 1, 0 or -1: stale in one run less stale in another, as one domain.

    Args:
        one: Record of a run.
        other: Record of another on the same stream, whose updates ask the same questions.
        wording: `answers` or `documents`.
    """
    pairs = zip(_asked_after_updates(one), _asked_after_updates(other), strict=True)
    shares = [(stale_share([a], wording), stale_share([b], wording)) for a, b in pairs]
    return [[a - b for a, b in shares if a is not None and b is not None]]


def _asked_after_updates(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [asked for update in record["updates"] for asked in update["asked"]]


def right_share(asked: Sequence[Mapping[str, Any]], wording: str) -> float | None:
    """Return the share of questions in which the current value has the lowest loss of all choices; None for none."""
    return float(np.mean([a[wording][0] <= min(a[wording]) for a in asked])) if asked else None
