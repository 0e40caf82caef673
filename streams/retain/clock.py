"""Wall clock that ignores sudden forward jumps, so that a misconfigured clock cannot expire data early. Pure."""

from __future__ import annotations

from collections import deque
from typing import Final

MAX_GAP_MS: Final = 60_000


class ClockGuard:
    """The guarded clock: it follows a jump forward only after the jump lasted for `settle_ms`, and a jump back at once.

    The guard watches the difference between the wall clock and the monotonic clock. Guarded time is the monotonic clock
    plus the smallest difference of the last `settle_ms`. So it is never ahead of the wall clock, and a jump forward
    that is taken back within `settle_ms` has no effect on it.

    Args:
        settle_ms: How long a jump forward must last, in milliseconds.
        last_ms: The guarded time that was saved before a restart; None at the first start ever. If the wall clock is
            more than MAX_GAP_MS later, that counts as a jump forward, because nobody can tell a long pause from a clock
            that was set. So after a longer pause nothing expires by the new time for `settle_ms`.
        wall_ms: The wall clock now, in milliseconds since 1970.
        monotonic_ms: The monotonic clock now.
    """

    def __init__(self, settle_ms: int, last_ms: int | None, wall_ms: int, monotonic_ms: int) -> None:
        self._settle_ms = settle_ms
        self._offsets: deque[tuple[int, int]] = deque()  # (seen at, wall - monotonic), both rising
        if last_ms is not None and wall_ms > last_ms + MAX_GAP_MS:
            self._offsets.append((monotonic_ms, last_ms - monotonic_ms))
        self.now_ms(wall_ms, monotonic_ms)

    def now_ms(self, wall_ms: int, monotonic_ms: int) -> int:
        """Return the guarded time in milliseconds since 1970.

        Args:
            wall_ms: The wall clock now, in milliseconds since 1970.
            monotonic_ms: The monotonic clock now.
        """
        offset = wall_ms - monotonic_ms
        while self._offsets and self._offsets[-1][1] > offset:
            self._offsets.pop()
        if not self._offsets or self._offsets[-1][1] < offset:
            self._offsets.append((monotonic_ms, offset))
        # The first difference is the smallest; the second is the smallest of those seen after it. Once the second is
        # old enough, the first is older than the settling time and no longer counts.
        while len(self._offsets) > 1 and self._offsets[1][0] <= monotonic_ms - self._settle_ms:
            self._offsets.popleft()
        return monotonic_ms + self._offsets[0][1]
