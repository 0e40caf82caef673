"""Set what SIGINT and SIGTERM do in this process, whatever the parent process handed on.

A shell without job control starts a background command with SIGINT ignored. Python keeps an inherited "ignore", and so
do the children of that process: without these functions Ctrl-C would never reach them.

HAZARD: a handler runs in the main thread between any two instructions, also inside the pure Python code of
threading.Event, Condition and Semaphore and of thread pools, while they hold their lock. A handler that sets an Event
then waits for a lock that its own thread holds, and one that raises leaves the lock held for ever: the process no
longer ends. So a handler here only notes the signal, and the program answers it where it chooses.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_held: list[int] = []
"""Signals that arrived in `stop_signals_at_checks` and were not answered yet."""


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
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM by a function while the body runs."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


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
    try:
        with _handled(lambda number, _frame: arrived.append(number)):
            yield
    finally:
        for held in arrived:
            signal.raise_signal(held)


@contextmanager
def stop_signals_at_checks() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt only where `check_stop_signals` is called, while the body runs.

    One that no check answered interrupts at the end of the body, unless another exception leaves it. A second signal
    interrupts at once: whoever presses Ctrl-C twice does not want to wait for a check.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _frame: FrameType | None) -> None:
        _held.append(number)
        if len(_held) > 1:
            raise KeyboardInterrupt

    _held.clear()
    with _handled(note):
        try:
            yield
            check_stop_signals()
        finally:
            _held.clear()


def check_stop_signals() -> None:
    """Raise KeyboardInterrupt where a signal arrived in `stop_signals_at_checks`; call it in every loop that waits."""
    if _held and threading.current_thread() is threading.main_thread():
        _held.clear()
        raise KeyboardInterrupt


@contextmanager
def event_on_stop_signals(*, interrupt_again: bool = False) -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set while the body runs. Call it from the main thread.

    The handler hands the signal to a thread, which sets the event. SimpleQueue.put may be called from a handler.

    Args:
        interrupt_again: a signal that arrives when the event is set raises KeyboardInterrupt.
    """
    stop = threading.Event()
    arrived: SimpleQueue[int] = SimpleQueue()

    def note(number: int, _frame: FrameType | None) -> None:
        if interrupt_again and stop.is_set():
            raise KeyboardInterrupt
        arrived.put(number)

    def forward() -> None:
        while arrived.get():
            stop.set()

    threading.Thread(target=forward, name="stop-signals", daemon=True).start()
    try:
        with _handled(note):
            yield stop
    finally:
        arrived.put(0)


def exit_interrupted(patience_s: float = 30.0) -> NoReturn:
    """End this process with status 130 after KeyboardInterrupt, also where a thread waits for ever.

    KeyboardInterrupt may have left a lock held, and Python waits at its end for every thread and every pool.

    Args:
        patience_s: seconds that threads and the functions registered with atexit may take.
    """
    timer = threading.Timer(patience_s, os._exit, (130,))
    timer.daemon = True
    timer.start()
    sys.exit(130)
