"""Set what SIGINT and SIGTERM do in this process, whatever the parent process handed on.

A shell without job control starts a background command with SIGINT ignored. Python keeps an inherited "ignore", and so
do the children of that process: without these functions Ctrl-C would never reach them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def interrupt_on_stop_signals() -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt in the main thread, so that `finally` blocks stop children.

    Call it first in a foreground command, from the main thread.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_on_stop_signals() -> None:
    """Let SIGINT and SIGTERM end this process at once, for a child process that has nothing to clean up yet."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while the body runs, and raise them afterwards.

    HAZARD: an interrupt inside Popen, or between it and the assignment of its result, loses the only reference to a
    child that already runs: nobody stops it. Python runs handlers in the main thread, so other threads need no hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda n, _frame: arrived.append(n)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for held in arrived:
            signal.raise_signal(held)
