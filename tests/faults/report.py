"""What a fault did, counted the same way by every fault test, and the table of them all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

PROPERTY = "fault"


@dataclass(frozen=True)
class Row:
    """One fault: how often it was made, events lost or learned twice, stale versions served, seconds to recover.

    recovery_s: the longest time from the end of the fault until everything acknowledged was accounted for.
    """

    fault: str
    runs: int
    lost: int = 0
    learned_twice: int = 0
    stale_publishes: int = 0
    recovery_s: float = 0.0


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row per fault, in the order of first sight: counts added, the longest recovery."""
    found: dict[str, Row] = {}
    for row in rows:
        old = found.get(row.fault, Row(row.fault, 0))
        found[row.fault] = Row(
            row.fault,
            old.runs + row.runs,
            old.lost + row.lost,
            old.learned_twice + row.learned_twice,
            old.stale_publishes + row.stale_publishes,
            max(old.recovery_s, row.recovery_s),
        )
    return list(found.values())


def table(rows: Iterable[Row]) -> str:
    """The rows as text."""
    lines = [f"{'fault':<58}{'runs':>6}{'lost':>6}{'twice':>7}{'stale':>7}{'recovery s':>12}"]
    lines += [
        f"{row.fault:<58}{row.runs:>6}{row.lost:>6}{row.learned_twice:>7}{row.stale_publishes:>7}{row.recovery_s:>12.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def summary(rows: Iterable[Row]) -> str:
    """The rows added up, as a line of JSON."""
    rows = list(rows)
    return json.dumps(
        {
            "faults": len(rows),
            "runs": sum(row.runs for row in rows),
            "lost": sum(row.lost for row in rows),
            "learned_twice": sum(row.learned_twice for row in rows),
            "stale_publishes": sum(row.stale_publishes for row in rows),
            "max_recovery_s": round(max((row.recovery_s for row in rows), default=0.0), 1),
        }
    )


def to_property(row: Row) -> tuple[str, dict[str, object]]:
    """How a test hands its row to the process that prints the table."""
    return PROPERTY, asdict(row)
