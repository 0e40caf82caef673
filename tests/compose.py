"""Reads docker-compose.yml as Compose does, for the features that the file uses: variables, merges, commands, mounts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "docker-compose.yml"
OVERLAY = ROOT / "examples/compose.overlay.yml"
ENTRYPOINT = ("perennial",)
"""Entrypoint of the project's image, as deploy/Dockerfile sets it."""
ROLE_SERVICES = ("intake", "streams", "scorer", "learner")

CREDENTIALS_SCRIPT = ROOT / "deploy/credentials.sh"
"""Writes the passwords that the file cannot do without."""

_VARIABLE = re.compile(
    r"\$\{(?P<name>[A-Z0-9_]+)(?::-(?P<default>[^}]*)|:\+(?P<instead>[^}]*)|:\?(?P<demand>[^}]*))?\}"
)


def variables(text: str) -> dict[str, str | None]:
    """Return the environment variables that the text uses, with their defaults."""
    return {match["name"]: match["default"] for match in _VARIABLE.finditer(text)}


def demanded(text: str) -> dict[str, str]:
    """Return the environment variables without which Compose refuses the text, with what it then says."""
    return {match["name"]: match["demand"] for match in _VARIABLE.finditer(text) if match["demand"]}


def load(env: Mapping[str, str] | None = None, path: Path = COMPOSE) -> dict[str, Any]:
    """Return a parsed compose file with its variables filled in.

    Args:
        env: Values of the variables. A variable that is demanded and not given is its own name in small letters.
        path: The file.

    Raises:
        KeyError: A variable has no value and no default.
    """
    values = env or {}

    def fill(match: re.Match[str]) -> str:
        if match["instead"] is not None:
            return match["instead"] if values.get(match["name"]) else ""
        stand_in = match["name"].lower() if match["demand"] else match["default"]
        given = values.get(match["name"]) or stand_in
        if given is None:
            raise KeyError(match["name"])
        return given

    text = path.read_text("utf-8")
    data: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(fill, text))
    return data


def environment(service: Mapping[str, Any]) -> dict[str, str]:
    """Return a service's environment; a variable that the file leaves empty is empty."""
    return {name: "" if value is None else value for name, value in service.get("environment", {}).items()}


def is_ours(service: Mapping[str, Any]) -> bool:
    """Return whether the service runs the image of the roles."""
    return bool(service["image"].startswith("perennial-lm:"))


def mounts(service: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Return each volume's source, its path in the container, and whether it is read-only."""
    found = []
    for entry in service.get("volumes", []):
        source, target, *mode = entry.split(":")
        found.append((source, target, mode == ["ro"]))
    return found


def writable(service: Mapping[str, Any]) -> set[str]:
    """Return the folders of the container that the service may write to although its root is read-only."""
    temporary = {entry.split(":")[0] for entry in service.get("tmpfs", [])}
    return temporary | {target for _, target, read_only in mounts(service) if not read_only}


def seconds(text: str) -> float:
    """Return the seconds of a duration such as 10s or 2m."""
    return float(text[:-1]) * {"s": 1, "m": 60}[text[-1]]
