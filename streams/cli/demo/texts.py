"""Real text for the demo and the benchmarks: docstrings of packages that are installed anyway, parsed, not imported."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path

from perennial.storage.errors import NotFoundError

_MIN_CHARS, _MAX_CHARS = 200, 4_000


@cache
def package_docstrings(package: str, count: int, max_chars: int = _MAX_CHARS) -> tuple[tuple[str, str], ...]:
    """Return (dotted name, docstring) pairs of an installed package in an order that is random but always the same.

    Args:
        package: Name of the package.
        count: How many docstrings to return; each text is returned once.
        max_chars: Longest docstring; the shortest has 200 characters.

    Raises:
        NotFoundError: The package is not installed, or has fewer docstrings.
    """
    root, files = package_files(package, skipped={"tests"})
    found: dict[str, str] = {}
    for path, pairs in docstrings_by_file(files, max_chars):
        module = ".".join((package, *path.relative_to(root).parts)).removesuffix(".py").removesuffix(".__init__")
        for name, text in pairs:
            found.setdefault(text, f"{module}{name}")
        if len(found) >= count:
            chosen = [(name, text) for text, name in found.items()][:count]
            return tuple(sorted(chosen, key=lambda pair: _order(pair[1])))
    raise NotFoundError("too few docstrings", got=f"{len(found)} in {package}", allowed=f"at least {count}")


def package_files(package: str, skipped: Collection[str]) -> tuple[Path, list[Path]]:
    """Return the folder of an installed package, and its source files in an order that is random but always the same.

    Args:
        package: Name of the package, which is not imported.
        skipped: Names of folders whose files are left out.

    Raises:
        NotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotFoundError("no such package is installed", got=package, remedy="install it, or name another")
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [path for path in root.rglob("*.py") if not set(skipped).intersection(path.relative_to(root).parts)]
    return root, sorted(files, key=lambda path: _order(str(path.relative_to(root))))


def docstrings_by_file(
    files: Sequence[Path], max_chars: int = _MAX_CHARS
) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
    """Yield each file with its docstrings of 200 characters or more, as (name, text) pairs.

    A name is empty for the module, and begins with a dot for what is in it. Files that do not parse are left out.

    Args:
        files: Source files, which are parsed one by one as they are asked for.
        max_chars: Longest docstring.
    """
    from perennial.learner.model.general_text import docstrings_of

    for path in files:
        try:
            pairs = list(docstrings_of(path.read_bytes(), ""))
        except (SyntaxError, ValueError):
            continue  # a template, or a file for another Python version
        yield path, [(name, text) for name, text in pairs if _MIN_CHARS <= len(text) <= max_chars]


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
