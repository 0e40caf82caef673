"""The README agrees with the code: the settings tables are generated, the make targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.generate_readme_table import TABLES

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


@pytest.mark.parametrize("mark", sorted(TABLES))
def test_a_settings_table_is_that_of_the_settings(mark):
    shown = README.split(f"<!-- {mark} -->\n")[1].split(f"<!-- /{mark} -->")[0]
    assert shown == TABLES[mark](), "run `make schema`"


def test_every_make_target_that_is_named_exists():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"`?make ([a-z-]+)", README)) - {"are"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
