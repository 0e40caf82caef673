"""Docstrings of installed packages as documents, each for good either trained or held out.

The packages are parsed and never imported. A whole source file is held out or none of it, because the docstrings of one
file share sentences: a held-out document must not be a trained one in other words.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Final

from perennial.learner.model.general_text import docstrings_of
from perennial.learner.model.text_cache import cached_texts
from perennial.storage.errors import NotFoundError

MIN_CHARS, MAX_CHARS = 200, 4_000
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
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotFoundError("no such package is installed", got=package, remedy="install it, or name another")
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [path for path in root.rglob("*.py") if not _SKIPPED.intersection(path.relative_to(root).parts)]
    files.sort(key=lambda path: _digest(str(path.relative_to(root))))
    pairs = cached_texts(lambda: _collect(root, files), root, files, Path(__file__))
    return tuple(text for file, text in pairs if is_held_out(f"{package}/{file}") is held_out)


def is_held_out(file: str) -> bool:
    """Return True if the documents of a source file are never trained.

    Args:
        file: Package and path in it, which decide alone.
    """
    return int.from_bytes(_digest(f"held out: {file}")[:8]) % 100 < HELD_OUT_PERCENT


def _collect(root: Path, files: list[Path]) -> tuple[tuple[str, str], ...]:
    """Return (path in the package, docstring) pairs, each docstring once, of as many files as are needed."""
    found: dict[str, str] = {}
    for path in files:
        name = str(path.relative_to(root))
        try:
            for _, text in docstrings_of(path.read_bytes(), "module"):
                if MIN_CHARS <= len(text) <= MAX_CHARS:
                    found.setdefault(text, name)
        except (SyntaxError, ValueError):
            continue  # a template, or a file for another Python version
        if len(found) >= MOST_TEXTS:
            break
    return tuple((name, text) for text, name in found.items())


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
