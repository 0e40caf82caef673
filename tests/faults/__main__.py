"""Make every fault on real services: `python -m tests.faults [--runs 1] [--all] [pytest arguments]`.

Prints a table of what each fault did; the last line is JSON. With --all the other tests run beside the faults: they need
the CPU while the faults mostly wait.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

from tests.collected import Collector
from tests.faults.report import PROPERTY, Row, merged, summary, table

PARALLEL = ("-n", "4", "--dist", "loadscope")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1, help="kills at each failpoint")
    parser.add_argument("--all", action="store_true", help="run all other tests, too")
    arguments, more = parser.parse_known_args()
    os.environ["PERENNIAL_FAULT_RUNS"] = str(arguments.runs)
    collector = Collector(PROPERTY, Row)
    folder = Path(__file__).parent
    paths = [str(folder.parent if arguments.all else folder)]
    # `make test-vllm` runs these: a server of vLLM next to this many processes would only measure the load.
    apart = f"--ignore={folder.parent / 'vllm'}"
    code = pytest.main([*PARALLEL, apart, *paths, *more], plugins=[collector])
    rows = merged(collector.found)
    print(f"\n{table(rows)}\n{summary(rows)}")
    bad = any(row.lost or row.learned_twice or row.stale_publishes or row.service_gap_s for row in rows)
    return int(code) or int(bad or not rows)


if __name__ == "__main__":
    sys.exit(main())
