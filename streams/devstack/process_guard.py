"""End a child process when its owner dies. A script that imports only the standard library.

Run as `python -I -S process_guard.py OWNER_PID GRACE_S LOCK_FD REMOVE COMMAND...`. The guard starts COMMAND and writes
its process id as one line to standard output. It ends COMMAND (SIGTERM, after GRACE_S seconds SIGKILL) on SIGTERM,
SIGINT or SIGHUP, or once the process OWNER_PID has ended; in that last case it also deletes the folder REMOVE, unless
REMOVE is empty.

Why a process of its own: on Linux PR_SET_PDEATHSIG fires when the *thread* that forked ends, so a broker started from a
short-lived thread would be killed while its owner lives. The guard forks from its only thread, and watches the owner by
process id, which also works where there is no such signal. COMMAND gets PR_SET_PDEATHSIG too, so that it does not
outlive a guard that was itself killed. COMMAND inherits LOCK_FD: the lock on its data folder is free exactly when
COMMAND has ended.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.5
PR_SET_PDEATHSIG = 1
_WAKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def main(arguments: list[str]) -> int:
    """Run the command to its end.

    Args:
        arguments: OWNER_PID, GRACE_S, LOCK_FD, REMOVE and the command, as the module's docstring says.

    Returns:
        The command's exit status; 128 + n where signal n ended it.
    """
    owner, grace_s, lock_fd, remove = int(arguments[0]), float(arguments[1]), int(arguments[2]), arguments[3]
    born = start_time(owner)
    wake = _wake_on_signals()
    child = subprocess.Popen(
        arguments[4:],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=(lock_fd,),
        preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509  # safe: this process has one thread
    )
    os.write(1, b"%d\n" % child.pid)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader sees the end of the pipe
    signals: set[int] = set()
    deadline: float | None = None
    orphaned = False
    while child.poll() is None:
        readable, _, _ = select.select([wake], [], [], POLL_S)
        if readable:
            signals |= set(os.read(wake, 64)) - {signal.SIGCHLD}
        orphaned = orphaned or not alive(owner, born)
        if deadline is None and (signals or orphaned):
            child.terminate()
            deadline = time.monotonic() + grace_s
        elif deadline is not None and time.monotonic() > deadline:
            child.kill()
    if remove and (orphaned or not alive(owner, born)):
        shutil.rmtree(remove, ignore_errors=True)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def alive(pid: int, born: str | None) -> bool:
    """Return whether a process still runs: it has not ended, is no zombie, and its id was not given to another.

    Args:
        pid: process id.
        born: the process's `start_time`; None where it is not known.
    """
    if os.getppid() == pid:
        return True
    if Path("/proc/self/stat").exists():
        now = start_time(pid)
        return now is not None and born in {None, now}
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def start_time(pid: int) -> str | None:
    """Return a live process's start time in ticks since boot (proc(5), field 22); None without process or /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _wake_on_signals() -> int:
    """Return a pipe that becomes readable on a signal, also on one that this process inherited as ignored or blocked."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _WAKING:
        signal.signal(number, lambda *_: None)  # COMMAND gets the system's own handling: exec resets handlers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAKING)
    return reader


def _die_with(guard: int) -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # the guard died before the request
            os._exit(1)

    return ask


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
