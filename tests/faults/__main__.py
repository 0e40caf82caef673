"""Make every fault on real services: `python -m tests.faults [--runs 1] [--all] [pytest arguments]`.

Prints a table of what each fault did; the last line is JSON. With --all the other tests run beside the faults: they need
the CPU while the faults mostly wait.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.report import PROPERTY, Row, merged, summary, table

PARALLEL = ("-n", "4", "--dist", "loadscope")


class Collector:
    """A pytest plugin that collects the rows of all tests, also of those that ran in other processes."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        properties: list[tuple[str, Any]] = report.user_properties
        self.rows += [Row(**fields) for name, fields in properties if name == PROPERTY]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1, help="kills at each failpoint")
    parser.add_argument("--all", action="store_true", help="run all other tests, too")
    arguments, more = parser.parse_known_args()
    os.environ["PERENNIAL_FAULT_RUNS"] = str(arguments.runs)
    collector = Collector()
    folder = Path(__file__).parent
    paths = [str(folder.parent if arguments.all else folder)]
    # `make test-vllm` runs these: a server of vLLM next to this many processes would only measure the load.
    apart = f"--ignore={folder.parent / 'vllm'}"
    code = pytest.main([*PARALLEL, apart, *paths, *more], plugins=[collector])
    rows = merged(collector.rows)
    print(f"\n{table(rows)}\n{summary(rows)}")
    bad = any(row.lost or row.learned_twice or row.stale_publishes or row.service_gap_s for row in rows)
    return int(code) or int(bad or not rows)


if __name__ == "__main__":
    sys.exit(main())
