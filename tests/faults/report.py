"""The figures that every fault test records in the same way, and the table of all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

PROPERTY = "fault"


@dataclass(frozen=True)
class Row:
    """The figures of one fault.

    Attributes:
        fault: Its name.
        runs: How often it was made.
        lost: Acknowledged events that no manifest accounts for.
        learned_twice: Events that were learned more than once.
        stale_publishes: Published events that were wrong when they were published.
        recovery_s: The longest time from the end of the fault until everything acknowledged was accounted for.
        service_gap_s: Seconds in which the alias named nothing that could be served.
    """

    fault: str
    runs: int
    lost: int = 0
    learned_twice: int = 0
    stale_publishes: int = 0
    recovery_s: float = 0.0
    service_gap_s: float = 0.0


def merged(rows: Iterable[Row]) -> list[Row]:
    """Merge the rows of each fault: counts are added, the longest recovery is kept. Faults keep their order."""
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
            old.service_gap_s + row.service_gap_s,
        )
    return list(found.values())


def table(rows: Iterable[Row]) -> str:
    """Return the rows as text."""
    lines = [f"{'fault':<58}{'runs':>6}{'lost':>6}{'twice':>7}{'stale':>7}{'gap s':>7}{'recovery s':>12}"]
    lines += [
        f"{row.fault:<58}{row.runs:>6}{row.lost:>6}{row.learned_twice:>7}{row.stale_publishes:>7}"
        f"{row.service_gap_s:>7.1f}{row.recovery_s:>12.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def summary(rows: Iterable[Row]) -> str:
    """Return the sums over all rows as a line of JSON."""
    rows = list(rows)
    return json.dumps(
        {
            "faults": len(rows),
            "runs": sum(row.runs for row in rows),
            "lost": sum(row.lost for row in rows),
            "learned_twice": sum(row.learned_twice for row in rows),
            "stale_publishes": sum(row.stale_publishes for row in rows),
            "service_gap_s": round(sum(row.service_gap_s for row in rows), 1),
            "max_recovery_s": round(max((row.recovery_s for row in rows), default=0.0), 1),
        }
    )


def to_property(row: Row) -> tuple[str, dict[str, object]]:
    """Return the row as a pytest property, which reaches the process that prints the table."""
    return PROPERTY, asdict(row)
