"""Compute how long each stage of an update took, from the times in its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from statistics import quantiles

STAGES: tuple[str, ...] = ("published", "cut", "received", "trained", "promoted", "served")
"""The moments of an update, in order; a stage lasts from one to the next."""


def stage_seconds(moments: Mapping[str, datetime]) -> dict[str, float]:
    """Return the seconds between neighbouring moments, and to `served` from `cut` and from `published`.

    Args:
        moments: Times by the names of `STAGES`; a stage with a missing end is left out.
    """
    result = {
        f"{a}_to_{b}": (moments[b] - moments[a]).total_seconds()
        for a, b in pairwise(STAGES)
        if a in moments and b in moments
    }
    if "cut" in moments and "served" in moments:
        result["cut_to_served"] = (moments["served"] - moments["cut"]).total_seconds()
    if "published" in moments and "served" in moments:
        result["published_to_served"] = (moments["served"] - moments["published"]).total_seconds()
    return result


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which the given share of the values is, interpolated between neighbours.

    Args:
        values: Any numbers; without any the result is 0.
        share: Share between 0 and 1.
    """
    if len(values) < 2:
        return values[0] if values else 0.0
    return quantiles(values, n=100, method="inclusive")[max(1, min(99, round(share * 100))) - 1]


def summarise(updates: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float, int]]:
    """Return the median, the 95th percentile and the number of values by stage, in the order of the flow.

    Args:
        updates: Seconds by stage, per update.
    """
    names = dict.fromkeys(name for update in updates for name in update)
    rows = {}
    for name in names:
        values = [update[name] for update in updates if name in update]
        rows[name] = (quantile(values, 0.5), quantile(values, 0.95), len(values))
    return rows
