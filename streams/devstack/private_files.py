"""Folders and logs that only this user may read: documents, models and credentials are stored in them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Final

PRIVATE_UMASK: Final = 0o077
"""The umask of every child process: files 0600, folders 0700."""
_FOLDER_MODE: Final = 0o700
_FILE_MODE: Final = 0o600


def private_folder(
    path: Path, on_progress: Callable[[str], None] = lambda _line: None, *, ours: Collection[str] | None = None
) -> Path:
    """Make a folder that only this user may enter, and tighten one that exists.

    HAZARD: a user may name a folder that is shared with other programs, such as /tmp or a project's folder. `ours`
    keeps it as it is.

    Args:
        path: The folder; missing parents are made, too.
        on_progress: Called with one line of text where an existing folder is tightened.
        ours: Names of the entries that this project makes in the folder; it is tightened only where it has no other
            entries. None: it is this project's in any case.

    Returns:
        The folder.

    Raises:
        OSError: The folder cannot be made, or belongs to another user.
    """
    for parent in reversed(path.parents):
        parent.mkdir(exist_ok=True, mode=_FOLDER_MODE)
    try:
        path.mkdir(mode=_FOLDER_MODE)
    except FileExistsError:
        if not path.is_dir():
            raise
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & PRIVATE_UMASK and (ours is None or {entry.name for entry in path.iterdir()} <= set(ours)):
            path.chmod(mode & ~PRIVATE_UMASK)
            on_progress(f"other users could read {path} (mode {mode:04o}): now only this user can")
    return path


def open_private_log(path: Path) -> IO[bytes]:
    """Open a log file to append to; a new one is readable for this user only."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _FILE_MODE), "ab")
