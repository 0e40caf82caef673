"""Docstrings of installed packages as documents, each for good either trained or held out.

The packages are parsed and never imported. A whole source file is held out or none of it, because the docstrings of one
file share sentences: a held-out document must not be a trained one in other words.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Final

from perennial.learner.model.text_cache import cached_texts
from perennial.streams.cli.demo.texts import docstrings_by_file, package_files

MOST_TEXTS: Final = 2_400
"""Docstrings that are collected per package: enough for every seed, and parsed in seconds."""
HELD_OUT_PERCENT: Final = 20
_SKIPPED: Final = frozenset({"tests", "testing", "test"})


@cache
def package_texts(package: str, *, held_out: bool) -> tuple[str, ...]:
    """Return the docstrings of a package that may be trained, or those that are held out, in a fixed order.

    Args:
        package: Name of the installed package.
        held_out: True for those of the held-out files.

    Raises:
        NotFoundError: The package is not installed.
    """
    root, files = package_files(package, _SKIPPED)
    pairs = cached_texts(lambda: _collect(root, files), root, files, Path(__file__))
    return tuple(text for file, text in pairs if is_held_out(f"{package}/{file}") is held_out)


def is_held_out(file: str) -> bool:
    """Return True if the documents of a source file are never trained.

    Args:
        file: Package and path in it, which decide alone.
    """
    return int.from_bytes(hashlib.sha256(f"held out: {file}".encode()).digest()[:8]) % 100 < HELD_OUT_PERCENT


def _collect(root: Path, files: list[Path]) -> tuple[tuple[str, str], ...]:
    """Return (path in the package, docstring) pairs, each docstring once, of as many files as are needed."""
    found: dict[str, str] = {}
    for path, pairs in docstrings_by_file(files):
        for _, text in pairs:
            found.setdefault(text, str(path.relative_to(root)))
        if len(found) >= MOST_TEXTS:
            break
    return tuple((name, text) for text, name in found.items())
