"""Set what SIGINT and SIGTERM do in this process, whatever the parent process handed on.

A shell without job control starts a background command with SIGINT ignored. Python keeps an inherited "ignore", and so
do the children of that process: without these functions Ctrl-C would never reach them.
"""

from __future__ import annotations

import signal

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
