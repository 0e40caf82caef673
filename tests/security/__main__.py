"""Try every forbidden act at real services: `python -m tests.security [pytest arguments]`.

The last line is JSON: how many acts were tried, how many of them were refused, and how many were allowed wrongly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.collected import Collector
from tests.security.acts import PROPERTY, Acts, merged

ROOT = Path(__file__).parent
PATHS = (ROOT,)
"""Tests that try forbidden acts. Add the module here that uses the fixture `acts` in another folder."""
PARALLEL = ("-n", "2", "--dist", "loadscope")


def main() -> int:
    collector = Collector(PROPERTY, Acts)
    code = pytest.main([*PARALLEL, *map(str, PATHS), *sys.argv[1:]], plugins=[collector])
    total = merged(collector.found)
    for line in (*total.wrong, *total.failed):
        print(line)
    print(total.summary())
    return int(code) or int(bool(total.wrong or total.failed) or not total.tried)


if __name__ == "__main__":
    sys.exit(main())
