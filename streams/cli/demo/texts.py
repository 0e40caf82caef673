"""Real text for the demo and the benchmarks: docstrings of packages that are installed anyway, parsed, not imported."""

from __future__ import annotations

import hashlib
import importlib.util
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
    from perennial.learner.model.general_text import docstrings_of

    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotFoundError("no such package is installed", got=package, remedy="install it, or name another")
    root = Path(next(iter(spec.submodule_search_locations)))
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: _order(str(path.relative_to(root)))):
        parts = path.relative_to(root).parts
        if "tests" in parts:
            continue
        module = ".".join((package, *parts)).removesuffix(".py").removesuffix(".__init__")
        try:
            for name, text in docstrings_of(path.read_bytes(), module):
                if _MIN_CHARS <= len(text) <= max_chars:
                    found.setdefault(text, name)
        except (SyntaxError, ValueError):
            continue  # a template, or a file for another Python version
        if len(found) >= count:
            pairs = [(name, text) for text, name in found.items()][:count]
            return tuple(sorted(pairs, key=lambda pair: _order(pair[1])))
    raise NotFoundError("too few docstrings", got=f"{len(found)} in {package}", allowed=f"at least {count}")


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
