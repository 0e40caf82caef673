"""Say what a long command does: in place at a terminal, as a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status

from perennial.streams.cli.terminal.printable import printable_lines

EVERY_S = 5.0


class StepLine:
    """Shows the newest text on standard error. A context manager.

    Args:
        console: Where it is shown; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._printed_s = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, text: str) -> None:
        """Show a text; not at a terminal, it is printed if the last one was printed a few seconds ago."""
        if self._status is not None:
            self._status.update(printable_lines(text))
        elif time.monotonic() - self._printed_s >= EVERY_S:
            self._printed_s = time.monotonic()
            self._console.print(printable_lines(text), markup=False)
