"""Judge whether a role makes progress: it is stalled if work waits and nothing moved for too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

DEFAULT_STALL_S: Final = 120.0


@dataclass(frozen=True)
class HealthReport:
    """The body of /healthz.

    Attributes:
        status: "starting" until the role first reports whether work waits; then "ok" or "stalled"; "maintenance" while
            the role pauses for `perennial topics repartition`.
        role: the name of the role.
        work_waits: True if there is work to do.
        lag_events: events that are published and not yet handled, over all topics.
        seconds_without_progress: how long work has waited without progress; 0 if none waits.
        stall_s: the time after which this counts as stalled, in seconds.
    """

    status: Literal["starting", "ok", "stalled", "maintenance"]
    role: str
    work_waits: bool
    lag_events: int
    seconds_without_progress: float
    stall_s: float

    @property
    def healthy(self) -> bool:
        """True unless the role is stalled."""
        return self.status != "stalled"


class Health:
    """Collect what a role reports about its work, and judge it.

    The time without progress starts when work begins to wait, so an idle role is never stalled. If more work arrives,
    the time goes on. A loop that has turned once and then does not turn for `stall_s` is stalled even if no work is
    known to wait: it may be blocked in the call that would find the work. Thread-safe.

    Args:
        role: the name of the role.
        stall_s: time without progress after which the role is stalled, in seconds.
        clock: a monotonic clock, in seconds.

    Example:
        >>> now = 0.0
        >>> health = Health("learner", stall_s=120, clock=lambda: now)
        >>> health.report().status
        'starting'
        >>> health.lag("adapter-jobs", 3)
        >>> now = 121.0
        >>> health.report().status
        'stalled'
        >>> health.progress()
        >>> health.report().status
        'ok'
    """

    def __init__(
        self, role: str, stall_s: float = DEFAULT_STALL_S, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.role = role
        self.stall_s = stall_s
        self._clock = clock
        self._lock = threading.Lock()
        self._lag_events: dict[str, int] = {}
        self._waiting = False
        self._started = False
        self._maintenance = False
        self._ticks: dict[str, float] = {}  # when each loop turned last
        self._still_since: float | None = None  # when work began to wait, or last made progress; None: no work waits

    def progress(self) -> None:
        """Note that an event was handled to its end."""
        with self._lock:
            self._started = True
            if self._still_since is not None:
                self._still_since = self._clock()

    def waiting(self, waits: bool) -> None:
        """Note whether there is work that `lag` does not count. The first call also ends the status "starting"."""
        with self._lock:
            self._waiting = waits
            self._update_waiting()

    def maintenance(self, paused: bool) -> None:
        """Note whether the role pauses for a command. The time without progress begins again when it goes on."""
        with self._lock:
            self._maintenance = paused
            if self._still_since is not None:
                self._still_since = self._clock()
            self._ticks.clear()  # the loops begin anew

    def tick(self, loop: str) -> None:
        """Note that a loop of the role turned.

        Args:
            loop: the loop's name; several roles may share this process.
        """
        with self._lock:
            self._ticks[loop] = self._clock()

    def lag(self, topic: str, events: int) -> None:
        """Note how many events of a topic are published and not yet handled. Work waits while any are."""
        with self._lock:
            self._lag_events[topic] = events
            self._update_waiting()

    def _update_waiting(self) -> None:
        self._started = True
        if not (self._waiting or any(n > 0 for n in self._lag_events.values())):
            self._still_since = None
        elif self._still_since is None:
            self._still_since = self._clock()

    def report(self) -> HealthReport:
        """Return the judgement as of now."""
        with self._lock:
            now = self._clock()
            still_s = 0.0 if self._still_since is None else max(0.0, now - self._still_since)
            still_s = max([still_s, *(now - at for at in self._ticks.values() if now - at >= self.stall_s)])
            status: Literal["starting", "ok", "stalled"] = "ok" if self._started else "starting"
            return HealthReport(
                status="maintenance" if self._maintenance else "stalled" if still_s >= self.stall_s else status,
                role=self.role,
                work_waits=self._still_since is not None,
                lag_events=sum(self._lag_events.values()),
                seconds_without_progress=round(still_s, 3),
                stall_s=self.stall_s,
            )
