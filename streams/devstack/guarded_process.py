"""Start a server as a child of process_guard.py, so that it ends when its owner ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from perennial.streams.devstack import process_guard
from perennial.streams.devstack.private_files import PRIVATE_UMASK, open_private_log


def start_guarded(
    command: Sequence[str],
    *,
    log_path: Path,
    folder: Path,
    lock: int,
    grace_s: float,
    owner_pid: int | None = None,
    remove: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command under a guard, in a session of its own: Ctrl-C at the terminal reaches only the owner.

    What the command writes is readable for this user only.

    Args:
        command: the command to run.
        log_path: file to which its output is appended.
        folder: working directory.
        lock: descriptor that the command inherits; the caller closes its own copy.
        grace_s: seconds between SIGTERM and SIGKILL when the guard ends the command.
        owner_pid: process whose end ends the command; None: this process.
        remove: folder to delete when the owner has ended; None: none.
        environment: variables of the command; None: those of this process.

    Returns:
        The guard's process; SIGTERM to it ends the command gracefully. `command_pid` gives the command's process id.
    """
    guard = [sys.executable, "-I", "-S", process_guard.__file__]
    arguments = [str(owner_pid or os.getpid()), str(grace_s), str(lock), str(remove or "")]
    with open_private_log(log_path) as log:
        return subprocess.Popen(
            [*guard, *arguments, *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=folder, env=environment,
            pass_fds=(lock,), start_new_session=True, umask=PRIVATE_UMASK,
        )  # fmt: skip


def command_pid(guard: subprocess.Popen[bytes]) -> int:
    """Wait until a guard has started its command. Return the command's process id, 0 where it could not start.

    Call it once, and keep the guard's process before: an interrupt while waiting must not lose it.
    """
    if guard.stdout is None:
        return 0
    with guard.stdout as pipe:
        return int(pipe.readline() or 0)
