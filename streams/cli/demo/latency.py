"""How long each stage of an update took, from the times that its events carry; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from statistics import quantiles

STAGES: tuple[str, ...] = ("published", "cut", "received", "trained", "promoted", "served")
"""The moments of an update, in order; a stage lasts from one to the next."""


def stage_seconds(moments: Mapping[str, datetime]) -> dict[str, float]:
    """Seconds between neighbouring moments, and from cut to served; moments that are missing are left out."""
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
    """The value below which so large a share lies (0 < share < 1), interpolated between neighbours; 0 without values."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return quantiles(values, n=100, method="inclusive")[max(1, min(99, round(share * 100))) - 1]


def summarise(updates: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float, int]]:
    """p50, p95 and n by stage, in the order of the flow."""
    names = dict.fromkeys(name for update in updates for name in update)
    rows = {}
    for name in names:
        values = [update[name] for update in updates if name in update]
        rows[name] = (quantile(values, 0.5), quantile(values, 0.95), len(values))
    return rows
