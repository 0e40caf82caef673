"""High-water marks: the position up to which each origin partition is covered, as (leader epoch, offset).

An offset alone does not name a record. After an unclean leader election, or where a broker that stopped uncleanly lost
the tail of its log, Kafka gives the same offsets again to other records, under a higher leader epoch. So positions are
compared by epoch first and by offset second: the same offset under a higher epoch is new.

Sources: KIP-101 and KIP-279 (leader epochs and log truncation), KIP-320 (consumers that compare epochs).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from perennial.streams.events.models import Origin

Position: TypeAlias = tuple[int, int]
"""Leader epoch and offset of a record in its origin partition."""


class HighWaterMarks:
    """The highest position per origin partition. Immutable.

    Args:
        offsets: the highest offset by origin partition key, as manifests and jobs store it under `marks`.
        epochs: the leader epoch of that offset by origin partition key, as they store it under `epochs`. A partition
            that is missing here has epoch 0, as in records that were written before epochs were stored.

    Example:
        >>> marks = HighWaterMarks({"p": 805}, {"p": 3})
        >>> marks.at("p")
        (3, 805)
        >>> merged = marks.merged(HighWaterMarks({"p": 796, "q": 2}, {"p": 4}))
        >>> merged.offsets, merged.epochs
        ({'p': 796, 'q': 2}, {'p': 4})
    """

    __slots__ = ("_positions",)

    def __init__(self, offsets: Mapping[str, int] | None = None, epochs: Mapping[str, int] | None = None) -> None:
        known = epochs or {}
        self._positions: dict[str, Position] = {
            partition: (known.get(partition, 0), offset) for partition, offset in (offsets or {}).items()
        }

    @classmethod
    def of(cls, origins: Iterable[Origin]) -> HighWaterMarks:
        """Return the marks of exactly these records."""
        return cls().raised(origins)

    @property
    def offsets(self) -> dict[str, int]:
        """The highest offset by origin partition key."""
        return {partition: offset for partition, (_, offset) in self._positions.items()}

    @property
    def epochs(self) -> dict[str, int]:
        """The leader epoch by origin partition key, without those that are 0."""
        return {partition: epoch for partition, (epoch, _) in self._positions.items() if epoch}

    def at(self, partition: str) -> Position | None:
        """Return the mark of an origin partition; None if nothing of it is covered."""
        return self._positions.get(partition)

    def covers(self, origin: Origin) -> bool:
        """Return whether the record is at or below the mark of its origin partition."""
        mark = self._positions.get(origin.partition_key())
        return mark is not None and (origin.leader_epoch, origin.offset) <= mark

    def covers_all(self, other: HighWaterMarks) -> bool:
        """Return whether every mark of `other` is at or below the mark of its partition here."""
        return all(
            partition in self._positions and position <= self._positions[partition]
            for partition, position in other._positions.items()
        )

    def raised(self, origins: Iterable[Origin]) -> HighWaterMarks:
        """Return the marks after these records are covered, too."""
        positions = dict(self._positions)
        for origin in origins:
            partition, position = origin.partition_key(), (origin.leader_epoch, origin.offset)
            positions[partition] = max(position, positions.get(partition, position))
        return self._from(positions)

    def merged(self, other: HighWaterMarks) -> HighWaterMarks:
        """Return the higher mark of each partition."""
        positions = dict(self._positions)
        for partition, position in other._positions.items():
            positions[partition] = max(position, positions.get(partition, position))
        return self._from(positions)

    def replaced(self, partition: str, position: Position | None) -> HighWaterMarks:
        """Return marks in which one partition has another mark, also a lower one; None removes its mark."""
        positions = {key: each for key, each in self._positions.items() if key != partition}
        if position is not None:
            positions[partition] = position
        return self._from(positions)

    def __iter__(self) -> Iterator[tuple[str, Position]]:
        return iter(sorted(self._positions.items()))

    def __len__(self) -> int:
        return len(self._positions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HighWaterMarks) and self._positions == other._positions

    def __hash__(self) -> int:
        return hash(frozenset(self._positions.items()))

    def __repr__(self) -> str:
        return f"HighWaterMarks({self.offsets!r}, {self.epochs!r})"

    @classmethod
    def _from(cls, positions: dict[str, Position]) -> HighWaterMarks:
        marks = cls()
        marks._positions = positions
        return marks


NO_MARKS = HighWaterMarks()
"""The marks of an adapter that has seen nothing."""
