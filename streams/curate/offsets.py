"""Order acknowledgements: which deliveries of an input partition may be acknowledged now."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from perennial.storage.errors import IntegrityError

T = TypeVar("T")


class OffsetTracker(Generic[T]):
    """Release the deliveries of one input partition for acknowledgement in offset order and without holes.

    Hazard: Faust commits past a hole of one offset, and past any hole before its first commit. So a delivery may be
    acknowledged only when all deliveries below it are completed.

    Attributes:
        next_offset: the offset that must be delivered next; None before the first delivery.

    Example:
        >>> tracker = OffsetTracker()
        >>> [tracker.add(offset, f"event {offset}") for offset in (7, 8)]
        [True, True]
        >>> tracker.complete(8)
        >>> list(tracker.releasable())  # offset 7 is not completed yet
        []
        >>> tracker.complete(7)
        >>> list(tracker.releasable())
        ['event 7', 'event 8']
    """

    def __init__(self) -> None:
        self._open: deque[tuple[int, T]] = deque()
        self._completed: set[int] = set()
        self.next_offset: int | None = None

    def add(self, offset: int, item: T) -> bool:
        """Register a delivery.

        Args:
            offset: the offset of the delivery in the input partition.
            item: what `releasable` returns for this delivery.

        Returns:
            False if this offset was registered before; the item is then not kept.

        Raises:
            IntegrityError: the consumer skipped offsets.
        """
        if self.next_offset is not None and offset < self.next_offset:
            return False
        if self.next_offset is not None and offset > self.next_offset:
            raise IntegrityError(
                "the consumer skipped offsets",
                got=offset,
                allowed=self.next_offset,
                remedy="restart the role: it resumes at the committed offset, and nothing was acknowledged past it",
            )
        self.next_offset = offset + 1
        self._open.append((offset, item))
        return True

    def complete(self, offset: int) -> None:
        """Record that the delivery at this offset is processed and its result is stored."""
        self._completed.add(offset)

    def releasable(self) -> Iterator[T]:
        """Yield the items that may be acknowledged now, each once, in offset order."""
        while self._open and self._open[0][0] in self._completed:
            offset, item = self._open.popleft()
            self._completed.discard(offset)
            yield item
