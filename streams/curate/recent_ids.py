"""The last example ids of an adapter, and how far back they reach. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from perennial.streams.events.high_water_marks import NO_MARKS, HighWaterMarks, Position
from perennial.streams.events.models import ExampleAccepted

RECENT_IDS: Final = 4096


class RecentIds:
    """The last RECENT_IDS example ids, of which the first 8 bytes are kept.

    Two different ids share these bytes with a probability of 2**-52 per new example.

    Args:
        data: ids that `to_bytes` returned.
    """

    def __init__(self, data: bytes = b"") -> None:
        loaded = np.frombuffer(data, dtype="<u8").astype(np.uint64)[-RECENT_IDS:]
        self._ring: NDArray[np.uint64] = np.zeros(max(64, len(loaded)), dtype=np.uint64)
        self._ring[: len(loaded)] = loaded
        self._added = len(loaded)

    def __contains__(self, example_id: str) -> bool:
        return bool((self._ring[: min(self._added, len(self._ring))] == _id_key(example_id)).any())

    def add(self, example_id: str) -> bool:
        """Add an id as the newest. Return False if it was present already; it is then present twice."""
        key = _id_key(example_id)
        held = min(self._added, len(self._ring))
        is_new = not bool((self._ring[:held] == key).any())
        if self._added == len(self._ring) < RECENT_IDS:
            grown = np.zeros(min(RECENT_IDS, 2 * held), dtype=np.uint64)
            grown[:held] = self._ring
            self._ring = grown
        self._ring[self._added % len(self._ring)] = key
        self._added += 1
        if self._added == 2 * RECENT_IDS:
            self._added = RECENT_IDS
        return is_new

    def to_bytes(self) -> bytes:
        """Return the ids from oldest to newest, each as 8 bytes in little-endian order."""
        if self._added <= len(self._ring):
            return self._ring[: self._added].astype("<u8").tobytes()
        return np.roll(self._ring, -(self._added % len(self._ring))).astype("<u8").tobytes()


def _id_key(example_id: str) -> np.uint64:
    return np.uint64(int(example_id[:16], 16))


@dataclass(frozen=True)
class Reach:
    """How far back the recent ids reach: every covered example above the floor had its id added since `floor_added`.

    Attributes:
        added: number of ids added so far.
        floor: the high-water marks when `floor_added` ids had been added.
        floor_added: see `floor`.
        next_floor: later high-water marks, which become the floor once the present one is out of reach.
        next_added: number of ids that had been added then.
    """

    added: int = 0
    floor: HighWaterMarks = NO_MARKS
    floor_added: int = 0
    next_floor: HighWaterMarks = NO_MARKS
    next_added: int = 0

    @classmethod
    def from_here(cls, marks: HighWaterMarks) -> Reach:
        """Return the reach of an adapter of which nothing is known but its marks: none of them is above the floor."""
        return cls(floor=marks, next_floor=marks)

    def remembers(self, example: ExampleAccepted, added: int) -> bool:
        """Return whether the id of this covered example is among the recent ids, if it was ever taken.

        Args:
            example: the example.
            added: number of ids added by now.
        """
        return added - self.floor_added <= RECENT_IDS and not self.floor.covers(example.origin)

    def after(self, marks: HighWaterMarks, added: int) -> Reach:
        """Return the reach after a cut that covers `marks`.

        Args:
            marks: the high-water marks after the cut.
            added: number of ids added by now.
        """
        floor, floor_added, next_floor, next_added = self.floor, self.floor_added, self.next_floor, self.next_added
        if added - floor_added > RECENT_IDS:
            floor, floor_added = next_floor, next_added
        if added - floor_added > RECENT_IDS:  # a single cut had more ids than are kept
            floor, floor_added = marks, added
        if added - next_added >= RECENT_IDS // 2:
            next_floor, next_added = marks, added
        return Reach(added, floor, floor_added, next_floor, next_added)

    def lowered(self, partition: str, position: Position | None) -> Reach:
        """Return the reach where the floor of a partition is not above a position; None removes it."""

        def below(floor: HighWaterMarks) -> HighWaterMarks:
            at = floor.at(partition)
            return (
                floor
                if at is None or (position is not None and at <= position)
                else floor.replaced(partition, position)
            )

        return replace(self, floor=below(self.floor), next_floor=below(self.next_floor))

    def dump(self) -> dict[str, Any]:
        """Return the reach as JSON values."""
        return {
            "added": self.added, "floor_added": self.floor_added, "next_added": self.next_added,
            "floor": dump_marks(self.floor), "next_floor": dump_marks(self.next_floor),
        }  # fmt: skip

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Reach:
        """Return the reach that `dump` returned.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: it is not of that form.
        """
        return cls(
            int(data["added"]), load_marks(data["floor"]), int(data["floor_added"]),
            load_marks(data["next_floor"]), int(data["next_added"]),
        )  # fmt: skip


NEW_REACH: Final = Reach()


def dump_marks(marks: HighWaterMarks) -> dict[str, dict[str, int]]:
    """Return marks as JSON values, in the form in which manifests and jobs store them."""
    return {"marks": marks.offsets, "epochs": marks.epochs}


def load_marks(data: Mapping[str, Any]) -> HighWaterMarks:
    """Return the marks that `dump_marks` returned; without `epochs`, every epoch is 0.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: they are not of that form.
    """
    offsets = {str(partition): int(offset) for partition, offset in data["marks"].items()}
    epochs = {str(partition): int(epoch) for partition, epoch in data.get("epochs", {}).items()}
    return HighWaterMarks(offsets, epochs)
