"""Find partitions that yield nothing although the broker holds further records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kafka import TopicPartition


@dataclass
class _Standstill:
    """A partition whose position does not move: where it stands, since when, and how often it was reported."""

    position: int
    since_s: float
    reports: int = 0


class StallWatch:
    """Compares positions with the broker's ends at every look.

    Example:
        >>> watch, first = StallWatch(), TopicPartition("examples", 0)
        >>> watch.look(0, 20, {first: 5}, {first: 7})
        {}
        >>> watch.look(20, 20, {first: 5}, {first: 9})
        {TopicPartition(topic='examples', partition=0): 1}
        >>> watch.look(21, 20, {first: 6}, {first: 9})
        {}
    """

    def __init__(self) -> None:
        self._still: dict[TopicPartition, _Standstill] = {}

    def look(
        self,
        now_s: float,
        stall_s: float,
        positions: Mapping[TopicPartition, int | None],
        ends: Mapping[TopicPartition, int],
    ) -> dict[TopicPartition, int]:
        """Return the partitions that have stood still for too long, and how often each was reported at this position.

        The time until a further report doubles with every report.

        Args:
            now_s: A monotonic clock, in seconds.
            stall_s: Seconds without a record after which a partition is reported.
            positions: The position in each partition that is being read, None where it is not known. Partitions that
                are left out, because they are paused, start afresh.
            ends: The offset behind the last record of each partition.
        """
        reported = {}
        for partition in self._still.keys() - positions.keys():
            del self._still[partition]
        for partition, position in positions.items():
            at = -1 if position is None else position
            if ends.get(partition, 0) <= at:
                self._still.pop(partition, None)
                continue
            still = self._still.get(partition)
            if still is None or still.position != at:
                self._still[partition] = _Standstill(at, now_s)
            elif now_s - still.since_s >= stall_s * 2**still.reports:
                still.reports += 1
                still.since_s = now_s
                reported[partition] = still.reports
        return reported
