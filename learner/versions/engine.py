"""Identify the engine, that is, what computes a version's weights."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch

from perennial.streams.settings import code_version


def code_digest() -> str:
    """Return a name for the code that decides a version's bytes: release, digest of its source files, torch version."""
    room = Path(__file__).parents[1]
    total = sha256()
    for folder in ("model", "together", "training"):
        for path in sorted((room / folder).glob("*.py")):
            total.update(f"{folder}/{path.name}\n".encode() + path.read_bytes())
    return f"perennial {code_version()} {total.hexdigest()[:16]} torch {torch.__version__}"
