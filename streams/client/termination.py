"""Let a program that does not handle SIGTERM itself finish cleanly what it runs in its main thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Termination:
    """Says whether SIGTERM came.

    A plain attribute, because the handler runs in the thread that looks at it: it could wait for ever for the lock of
    a `threading.Event` on which this thread waits.

    Attributes:
        requested: SIGTERM came.
    """

    requested: bool = False


@contextmanager
def sigterm_deferred() -> Iterator[Termination]:
    """Note a SIGTERM, and let it end the program after the block.

    Nothing is changed in another thread than the main one, or where the program handles SIGTERM itself.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield termination
        return

    def note(_number: int, _frame: object) -> None:
        termination.requested = True

    signal.signal(signal.SIGTERM, note)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if termination.requested:
            signal.raise_signal(signal.SIGTERM)
