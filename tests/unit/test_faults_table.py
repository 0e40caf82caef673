"""docs/faults.md: every test that the table names exists."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::([\w*]+)`", (ROOT / "docs/faults.md").read_text("utf-8"))))


def test_the_table_names_tests():
    assert len(NAMED) > 50


@pytest.mark.parametrize(("file", "pattern"), NAMED, ids=[f"{file}::{pattern}" for file, pattern in NAMED])
def test_a_test_that_the_table_names_exists(file, pattern):
    functions = [
        node.name for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    assert any(name.startswith("test_") and fnmatch(name, pattern) for name in functions)
