"""The file of finished runs: one JSON object a line, so that a comparison goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunKey:
    """What identifies a run.

    Attributes:
        arm: Name of the arm.
        stream: Name of the stream.
        seed: Seed of the stream.
        order: Order of its blocks.
        base: Name of the base.
        digest: Digest of the code, the recipe, the texts and the budget.
    """

    arm: str
    stream: str
    seed: int
    order: int
    base: str
    digest: str

    @staticmethod
    def digest_of(*parts: object) -> str:
        """Return a digest of JSON values."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Results:
    """Finished runs by key, kept in a file. Thread-safe.

    Args:
        path: The file; made where there is none. A line that was cut off by a kill is ignored.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mutex = threading.Lock()
        self._found: dict[RunKey, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text("utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):
            path.write_text(f"{text}\n", "utf-8")  # or the next record would be a part of the broken line
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self._found[RunKey(**record["key"])] = record
            except (ValueError, KeyError, TypeError):
                continue

    def find(self, key: RunKey) -> dict[str, Any] | None:
        """Return the record of a run, None where it was not finished."""
        with self._mutex:
            return self._found.get(key)

    def add(self, key: RunKey, record: dict[str, Any]) -> dict[str, Any]:
        """Append the record of a run to the file, and return it with its key."""
        whole = {"key": asdict(key), **record}
        with self._mutex:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(whole)}\n")
                file.flush()
                os.fsync(file.fileno())
            self._found[key] = whole
        return whole
