"""A clock that nothing is deleted too early by: what the wall clock showed all through a settling time. Pure."""

from __future__ import annotations

from collections import deque
from typing import Final

MAX_GAP_MS: Final = 60_000


class ClockGuard:
    """Wall time that believes a step forward only after it stood for `settle_ms`, and a step back at once.

    It follows the offset of the wall clock from the monotonic one, taking the least that was seen in the settling
    time: so however the clock is set, what it gives is never ahead of the wall, nor of a clock that was set back
    within the settling time. last_ms: what it gave last before a restart; what is more than MAX_GAP_MS later counts
    as a step forward, for a restart cannot tell a pause from a clock set forward. None: the first start ever.
    """

    def __init__(self, settle_ms: int, last_ms: int | None, wall_ms: int, monotonic_ms: int) -> None:
        self._settle_ms = settle_ms
        self._offsets: deque[tuple[int, int]] = deque()  # (seen at, offset), both rising
        if last_ms is not None and wall_ms > last_ms + MAX_GAP_MS:
            self._offsets.append((monotonic_ms, last_ms - monotonic_ms))
        self.now_ms(wall_ms, monotonic_ms)

    def now_ms(self, wall_ms: int, monotonic_ms: int) -> int:
        """The time to judge by, from what both clocks show now."""
        offset = wall_ms - monotonic_ms
        while self._offsets and self._offsets[-1][1] > offset:
            self._offsets.pop()
        if not self._offsets or self._offsets[-1][1] < offset:
            self._offsets.append((monotonic_ms, offset))
        # the second has stood since it was seen, so once that is long enough the first says nothing more
        while len(self._offsets) > 1 and self._offsets[1][0] <= monotonic_ms - self._settle_ms:
            self._offsets.popleft()
        return monotonic_ms + self._offsets[0][1]

    @property
    def settled(self) -> bool:
        """Whether it shows the wall's own time."""
        return len(self._offsets) == 1
