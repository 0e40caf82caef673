"""Progress of the demo: what goes on now, the share of the work that is done, and the time that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

STAGES: Mapping[str, float] = {
    "start": 15.0,
    "first domain": 32.0,
    "second domain": 32.0,
    "corrections": 30.0,
    "people": 10.0,
    "erase": 8.0,
    "comparison": 6.0,
    "expire": 15.0,
    "measuring": 15.0,
    "stop": 5.0,
}
"""Seconds that each part of the demo took on two quiet cores: the weights of the parts in the whole."""

_EARLY = 0.05
_LINE_EVERY_S = 15.0


class DemoProgress:
    """The one live display of the demo. Thread-safe, for some parts of the demo run side by side.

    At a terminal it is a bar below the printed lines; elsewhere a line of text every 15 seconds.

    Args:
        console: Where to print.
        stages: Names of the parts, and how long each takes compared with the others.
        clock: Clock in seconds.
    """

    def __init__(
        self, console: Console, stages: Mapping[str, float] = STAGES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._clock = clock
        self._stages = dict(stages)
        self._done = dict.fromkeys(stages, 0.0)
        self._lock = threading.Lock()
        self._began = self._last_line = clock()
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(),
            TextColumn("{task.fields[left]}"), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=1.0, left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, stage: str, share: float, doing: str) -> None:
        """Record how far one part is.

        Args:
            stage: Name of the part.
            share: Share of that part that is done, from 0 to 1; it never goes back.
            doing: What goes on, in a few words.
        """
        with self._lock:
            self._done[stage] = max(self._done[stage], min(1.0, share))
            left = f"about {spoken(self.left_s)} left"
            self._bar.update(self._task, completed=self.share, description=doing, left=left)
            now = self._clock()
            if not self._console.is_terminal and now - self._last_line >= _LINE_EVERY_S:
                self._last_line = now
                line = f"{now - self._began:6.1f} s {doing}: {self.share:.0%} of the demo done, {left}"
                self._console.print(line, highlight=False, soft_wrap=True)

    @property
    def share(self) -> float:
        """Share of the whole work that is done, from 0 to 1."""
        done = sum(weight * self._done[stage] for stage, weight in self._stages.items())
        return done / sum(self._stages.values())

    @property
    def left_s(self) -> float:
        """Seconds that are left, if the rest goes as fast on this machine as the part that is done.

        Before a twentieth is done that speed is not known, and the time on two quiet cores is given.
        """
        if self.share < _EARLY:
            return sum(self._stages.values()) * (1 - self.share)
        return (self._clock() - self._began) * (1 - self.share) / self.share


def spoken(seconds: float) -> str:
    """Return a time in words, no more exact than an estimate is: `20 s`, `1 min 30 s`, `4 min`."""
    if seconds < 60:
        return f"{max(5, round(seconds / 5) * 5)} s"
    if seconds < 180:
        minutes, rest = divmod(round(seconds / 10) * 10, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{round(seconds / 60)} min"
