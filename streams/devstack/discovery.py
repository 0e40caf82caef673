"""Find a running `perennial up` through a small file that it writes into its data folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.devstack.folder_lock import FolderLockedError, is_locked, lock_folder
from perennial.streams.settings import Settings, SettingsError, load_settings

ANNOUNCEMENT_FILES = ("up.json", "up.tmp", "up.lock")
"""What `perennial up` writes into its data folder for other commands."""
_FACTS, _TEMPORARY, _LOCK = ANNOUNCEMENT_FILES
_CLAIM_WAIT_S = 2.0
"""A command that only looks holds the lock for a moment, too."""


def _path(data_dir: Path) -> Path:
    return data_dir / _FACTS


def claim(data_dir: Path) -> int:
    """Take the lock that says that `perennial up` runs in a data folder, and remove what an earlier one announced.

    The lock and not a process id decides: the kernel releases it however the process ends, and a process id is given to
    another process in time, at once in a container.

    Args:
        data_dir: The data folder, which exists.

    Returns:
        A file descriptor; the lock is held until it is closed.

    Raises:
        SettingsError: `perennial up` runs there already.
    """
    try:
        lock = lock_folder(data_dir / _LOCK, _CLAIM_WAIT_S)
    except FolderLockedError as error:
        facts = running(data_dir) or {}
        raise SettingsError(
            "perennial already runs in this data folder",
            got=", ".join([str(error.got), *([f"Kafka at {facts['kafka']}"] if facts.get("kafka") else [])]),
            remedy="use that one, stop it, or name another --data-dir",
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, b"%d" % os.getpid(), 0)
    withdraw(data_dir)
    return lock


def announce(data_dir: Path, **facts: object) -> None:
    """Write what runs, so that other commands find it. Call `claim` before.

    Args:
        data_dir: data folder of this `perennial up`.
        **facts: addresses and ports, by the names that `running` returns.
    """
    temporary = data_dir / _TEMPORARY
    temporary.write_text(json.dumps({"pid": os.getpid(), **facts}), encoding="utf-8")
    temporary.replace(_path(data_dir))


def withdraw(data_dir: Path) -> None:
    """Remove the file that `announce` wrote."""
    _path(data_dir).unlink(missing_ok=True)


def running(data_dir: Path) -> dict[str, object] | None:
    """Return what `perennial up` announced in this data folder, or None where none runs or none is ready yet.

    Raises:
        SettingsError: The data folder belongs to another user.
    """
    try:
        if not is_locked(data_dir / _LOCK):
            return None
        facts = json.loads(_path(data_dir).read_text("utf-8"))
    except PermissionError as error:
        raise SettingsError(
            "the data folder belongs to another user", got=str(error.filename),
            allowed="the data folder of a `perennial up` of this user",
            remedy="set PERENNIAL_KAFKA and PERENNIAL_STORE, or PERENNIAL_DATA_DIR to a folder of your own",
        ) from error  # fmt: skip
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def connected_settings(**overrides: object) -> Settings:
    """Load the settings, with broker and store of a running `perennial up` where none are set.

    Args:
        **overrides: settings by their flat names.

    Raises:
        SettingsError: a setting is not usable, or the data folder belongs to another user.
    """
    settings = load_settings(**overrides)
    if settings.kafka.bootstrap and settings.store.uri:
        return settings
    facts = running(settings.store.data_dir) or {}
    set_here = {
        "kafka": settings.kafka.bootstrap,
        "store": settings.store.uri,
        "topic_prefix": settings.kafka.topic_prefix,
    }
    found = {name: facts[name] for name, value in set_here.items() if facts.get(name) and not value}
    if "store" in found:
        found["s3"] = S3Settings.from_env({**os.environ, **_s3_variables(facts.get("s3"))})
    return settings.replace(**found)


def _s3_variables(announced: object) -> dict[str, str]:
    """Return the variables that lead to the MinIO of a running `perennial up`. They name the files with its keys."""
    return {
        str(name): value
        for name, value in (announced.items() if isinstance(announced, dict) else ())
        if isinstance(value, str) and (str(name).startswith("PERENNIAL_S3_") or name == "AWS_SESSION_TOKEN")
    }
