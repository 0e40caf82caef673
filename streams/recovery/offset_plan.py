"""Decide where each consumer group reads again after a restore, and count what no log holds any more. Pure.

An example goes through three logs: the input topics, `examples` and `scored-examples`. Curate's high-water marks drop what
the restored store has learned, so it is enough to read again from the last of these logs that still holds everything since
the backup. Scored examples cost no model to read again; so only where `scored-examples` is too short the scorer reads
`examples` again, and only where that is too short too, intake reads the input topics.

Jobs are not read again: those since the backup name micro-batches that the restored store does not hold, and curate cuts
their examples anew. Jobs from before wait in the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from perennial.streams.events.tenants import base_topic

MARGIN_MS: Final = 24 * 3_600_000
"""A log that begins so long before the newest trace of a store holds everything that the store lacks."""
STAGES: Final = (("curate", ("scored-examples",)), ("scorer", ("examples",)), ("intake", ("documents", "interactions")))
"""Which group reads which topics, from the last log to the first."""


@dataclass(frozen=True)
class LogRange:
    """A partition's log, and where its reader is to go on.

    Attributes:
        partition: The partition's number.
        begin: The first offset of the log.
        end: The offset behind its last record.
        wanted: The offset that the reader had committed when the store was as it is now; None where nobody knows.
        first_ms: When the first record was appended, in milliseconds since 1970; None for an empty log.
    """

    partition: int
    begin: int
    end: int
    wanted: int | None
    first_ms: int | None = None


@dataclass(frozen=True)
class OffsetPlan:
    """Offsets to commit, and records that are gone.

    Attributes:
        commits: The offset to commit, by group, topic and partition; groups and topics without the prefix.
        lost: Records since the backup that were deleted from the log that holds the most of them, by topic.
        unknown: Topics of which nobody knows whether such records were deleted.
    """

    commits: Mapping[str, Mapping[str, Mapping[int, int]]]
    lost: Mapping[str, int] = field(default_factory=dict)
    unknown: Sequence[str] = ()


def plan_offsets(logs: Mapping[str, Sequence[LogRange]], store_ms: int | None) -> OffsetPlan:
    """Return where the groups of examples and jobs go on.

    Args:
        logs: The logs by topic without the prefix.
        store_ms: The newest time that the store shows, in milliseconds since 1970; None where it shows none.
    """
    commits: dict[str, dict[str, dict[int, int]]] = {}
    gaps: list[tuple[bool, int, dict[str, int], list[str]]] = []
    for group, bases in STAGES:
        topics = [*bases, *(topic for topic in logs if topic not in bases and base_topic(topic) in bases)]
        commits[group] = {topic: {log.partition: _start(log) for log in logs.get(topic, ())} for topic in topics}
        lost = {topic: count for topic in topics if (count := sum(_lost(log) for log in logs.get(topic, ())))}
        unknown = [topic for topic in topics if any(_is_unknown(log, store_ms) for log in logs.get(topic, ()))]
        gaps.append((bool(unknown), sum(lost.values()), lost, unknown))
        if not (lost or unknown):
            break
    commits["learner"] = {"adapter-jobs": {log.partition: log.end for log in logs.get("adapter-jobs", ())}}
    _, _, lost, unknown = min(gaps, key=lambda gap: gap[:2])  # all these logs are read: what the fullest lacks is gone
    return OffsetPlan(commits, lost, unknown)


def _start(log: LogRange) -> int:
    return log.begin if log.wanted is None else min(max(log.wanted, log.begin), log.end)


def _lost(log: LogRange) -> int:
    return 0 if log.wanted is None else max(0, log.begin - log.wanted)


def _is_unknown(log: LogRange, store_ms: int | None) -> bool:
    if log.wanted is not None or log.begin == 0:
        return False
    return store_ms is None or log.first_ms is None or log.first_ms > store_ms - MARGIN_MS
