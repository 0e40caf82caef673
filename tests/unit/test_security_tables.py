"""docs/security.md says what the tables in the code say, and the tool that writes it changes nothing."""

from __future__ import annotations

import re
import shutil

import pytest

from perennial.storage.access import store_table
from perennial.streams.kafka.access import acl_table
from tools import generate_security_tables as script
from tools.generate_readme_table import write

TEXT = script.DOCUMENT.read_text("utf-8")


@pytest.mark.parametrize("name", sorted(script.TABLES))
def test_a_table_is_that_of_the_code(name):
    shown = TEXT.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    assert shown == script.TABLES[name](), "run `make schema`"


def test_the_tool_changes_what_differs_and_nothing_else(tmp_path):
    copy = shutil.copy(script.DOCUMENT, tmp_path / "security.md")
    assert not write(copy, script.TABLES)
    copy.write_text(TEXT.replace("| `drift` |", "| `other` |"), "utf-8")
    assert write(copy, script.TABLES)
    assert copy.read_text("utf-8") == TEXT


def test_a_cell_says_what_the_role_may_do():
    row = next(line for line in script.topics_table().splitlines() if line.startswith("| `retention` "))
    cells = dict(zip(acl_table.ROLES, [cell.strip() for cell in row.split("|")[2:-1]], strict=True))
    assert (cells["streams"], cells["requester"], cells["learner"]) == ("read", "write", "")
    row = next(line for line in script.objects_table().splitlines() if line.startswith("| `blobs` "))
    cells = dict(zip(store_table.ROLES, [cell.strip() for cell in row.split("|")[2:-1]], strict=True))
    assert (cells["learner"], cells["subscriber"], cells["intake"]) == ("rwd", "r", "")


def test_every_role_is_named():
    roles = {*acl_table.ROLES, *store_table.ROLES}
    named = re.findall(r"^\| (\w+) \|", script.roles_table(), re.MULTILINE)
    assert set(named) == {*roles, "role"}
    assert len(named) == len(roles) + 1
