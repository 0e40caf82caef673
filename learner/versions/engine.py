"""Identify the engine, that is, what computes a version's weights."""

from __future__ import annotations

from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from perennial.streams.settings import code_version

ON_GPU = ("liger-kernel", "triton")
"""Distributions whose kernels compute on a GPU; without the first, layers compute in PyTorch's own."""


def code_digest(*, on_gpu: bool = False, room: Path = Path(__file__).parents[1]) -> str:
    """Return a name for the code that decides a version's bytes: release, digest of its source files, library versions.

    Args:
        on_gpu: Whether the learner computes on a GPU.
        room: Folder of the source files.
    """
    total = sha256()
    for folder in ("bases", "model", "together", "training"):
        for path in sorted((room / folder).rglob("*.py")):
            total.update(f"{path.relative_to(room).as_posix()}\n".encode() + path.read_bytes())
    kernels = "".join(f" {name} {_installed(name)}" for name in ON_GPU) if on_gpu else ""
    return f"perennial {code_version()} {total.hexdigest()[:16]} torch {torch.__version__}{kernels}"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
