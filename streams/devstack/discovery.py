"""Find a running `perennial up` through a small file that it writes into its data folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.settings import Settings, load_settings


def _path(data_dir: Path) -> Path:
    return data_dir / "up.json"


def announce(data_dir: Path, **facts: object) -> None:
    """Write what runs, so that other commands find it.

    Args:
        data_dir: data folder of this `perennial up`.
        **facts: addresses and ports, by the names that `running` returns.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    temporary = _path(data_dir).with_suffix(".tmp")
    temporary.write_text(json.dumps({"pid": os.getpid(), **facts}), encoding="utf-8")
    temporary.replace(_path(data_dir))


def withdraw(data_dir: Path) -> None:
    """Remove the file that `announce` wrote."""
    _path(data_dir).unlink(missing_ok=True)


def running(data_dir: Path) -> dict[str, object] | None:
    """Return what `perennial up` announced in this data folder, or None where it does not run."""
    try:
        facts: dict[str, object] = json.loads(_path(data_dir).read_text("utf-8"))
        pid = facts["pid"]
        if not isinstance(pid, int):
            return None
        os.kill(pid, 0)
    except (OSError, ValueError, KeyError):
        return None
    return facts


def connected_settings(**overrides: object) -> Settings:
    """Load the settings, with broker and store of a running `perennial up` where none are set.

    Args:
        **overrides: settings by their flat names.

    Raises:
        SettingsError: a setting is not usable.
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
