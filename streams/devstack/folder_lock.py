"""Lock a data folder for one server at a time; the kernel releases the lock when the process that holds it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from perennial.storage.errors import PerennialError

_RETRY_S = 0.1


class FolderLockedError(PerennialError):
    """Another process holds the lock; `got` names it where it is known."""


def lock_folder(path: Path, wait_s: float = 0.0) -> int:
    """Take the exclusive lock on a file.

    Args:
        path: the lock file; made where it is missing. It may hold the process id of the holder as text.
        wait_s: how long to wait for another holder.

    Returns:
        An open file descriptor. The lock is held until it and all copies that child processes have are closed.

    Raises:
        FolderLockedError: another process still holds the lock after wait_s seconds.
        OSError: the file cannot be opened or locked.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_s
    try:
        while not (taken := _take(lock)) and time.monotonic() < deadline:
            time.sleep(_RETRY_S)
    except BaseException:
        os.close(lock)
        raise
    if taken:
        return lock
    holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
    os.close(lock)
    raise FolderLockedError(got=f"process {holder}" if holder else "a process that is just starting")


def is_locked(path: Path) -> bool:
    """Return True where a process holds the lock on a file. A missing file is not locked.

    Raises:
        OSError: the file cannot be opened.
    """
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        return not _take(lock, fcntl.LOCK_SH)
    finally:
        os.close(lock)


def _take(lock: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            return False
        raise
    return True
