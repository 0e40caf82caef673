"""The layout and the prose of the source: what CONTRIBUTING.md and docs/architecture.md promise of it."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("storage", "streams", "learner")
FILES = sorted(path for folder in (*ROOMS, "tools") for path in (ROOT / folder).rglob("*.py"))
MAX_MODULES, MAX_LINES = 13, 500
SAME_NAME = {
    "agent": "the Faust agents of curate and retain",
    "service": "the loops of intake and retain",
    "topics": "the command `perennial topics` and what it calls",
}
SAME_CLASS = {"BlobRef": "the wire's form and the manifest's form of one thing"}
NOT_A_SUMMARY = re.compile(r"(What|Whether|Where|When|How|Who|Which|The|A|An)\b")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_folder_holds_more_modules_than_one_can_overlook():
    counts: dict[str, int] = defaultdict(int)
    for path in FILES:
        counts[short(path.parent)] += path.name not in {"__init__.py", "__main__.py"}
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_every_file_can_be_read_in_a_sitting():
    assert {short(path): n for path in FILES if (n := path.read_text("utf-8").count("\n")) > MAX_LINES} == {}


def test_no_two_modules_have_one_name_for_different_things():
    named: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        if path.stem not in {"__init__", "__main__"}:
            named[path.stem].append(short(path))
    assert {name: paths for name, paths in named.items() if len(paths) > 1 and name not in SAME_NAME} == {}


def test_no_two_public_classes_have_one_name():
    named: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                named[node.name].append(short(path))
    assert {name: paths for name, paths in named.items() if len(paths) > 1 and name not in SAME_CLASS} == {}


def test_the_package_holds_the_rooms():
    for room in ROOMS:
        link = ROOT / "perennial" / room
        assert link.is_symlink()
        assert link.resolve() == ROOT / room
    assert (ROOT / "perennial" / "py.typed").exists()


def functions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, first line of the docstring) of functions that are no properties."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(isinstance(mark, ast.Name) and mark.id == "property" for mark in node.decorator_list):
            continue
        summary = (ast.get_docstring(node) or "").partition("\n")[0]
        if summary:
            yield f"{short(path)}:{node.lineno} {node.name}", summary


@pytest.mark.parametrize("room", [*ROOMS, "tools"])
def test_a_summary_says_what_a_function_does(room):
    found = [
        f"{place}: {summary}"
        for path in FILES
        if short(path).startswith(f"{room}/")
        for place, summary in functions(path)
        if NOT_A_SUMMARY.match(summary)
    ]
    assert found == []
