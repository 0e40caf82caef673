"""Read the paths that a user gives, and name the folders that this project uses where none is given."""

from __future__ import annotations

import os
from pathlib import Path

from perennial.storage.errors import PerennialError


class UnknownHomeError(PerennialError):
    """The home folder in a path is not known."""

    exit_code = 2


def expand_path(path: str | Path) -> Path:
    """Return a path with its leading `~` or `~user` replaced by that home folder.

    Every path that a user gives goes through here, so that no two readers of one path see two folders, and no folder
    named `~` is made.

    Raises:
        UnknownHomeError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UnknownHomeError(
            got=str(path), allowed="~, or ~ and the name of a user", remedy="write the path out"
        ) from error  # fmt: skip


def _home(kind: str, fallback: str) -> Path:
    """Return this project's folder of a kind. A user of a container may have neither HOME nor an entry in passwd."""
    given = os.environ.get(kind)
    try:
        return (expand_path(given) if given else Path.home() / fallback) / "perennial"
    except RuntimeError:
        return Path(".perennial").absolute() / Path(fallback).name


def default_data_dir() -> Path:
    """Return the folder in which `perennial up` keeps topics and objects."""
    return _home("XDG_DATA_HOME", ".local/share")


def cache_dir() -> Path:
    """Return the folder for downloads: jars and server binaries."""
    return _home("XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """Return the folder for what a process must remember after a restart, and nobody edits."""
    return _home("XDG_STATE_HOME", ".local/state")
