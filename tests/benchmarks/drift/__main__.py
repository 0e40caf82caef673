"""How soon drift is found, and how often it is reported where there is none.

`python -m tests.benchmarks.drift`; docs/experiments/README.md has the tables. The service's own detectors with default
settings look at series of losses with a change that was put in, and at documents of one domain after another, beside a
dummy, plain ADWIN and a test of mean embeddings. `--stream releases` is dated documentation, period by period. The last line is JSON; the exit code is 0 also where goals are missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, Final

from tests.benchmarks.drift.arms import ARMS
from tests.benchmarks.drift.dated import WITHIN, run_dated
from tests.benchmarks.drift.measure import DEPENDENT, NOISES, SIZES, Row, delays, measure, median
from tests.benchmarks.drift.real_text import BEFORE, Domain, load_domains, shuffled, watch

STREAMS: Final = ("injected", "releases")


def shown(values: Sequence[float]) -> str:
    """Return median, 95th percentile, and share of missed ones in percent."""
    ordered = sorted(values)
    at = [ordered[(len(ordered) - 1) // 2], ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]]
    missed = 100 * sum(map(math.isinf, values)) / len(values)
    return " ".join("-" if math.isinf(value) else f"{value:.0f}" for value in at) + (
        f" ({missed:.0f} %)" if missed else ""
    )


def print_series(rows: Sequence[Row]) -> None:
    """Print the table of the series."""
    heads = ["arm", "noise", "false per 10k", *(f"{size:g} sd" for size in SIZES), "1 sd over 200", "1 sd on and off"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print(
            "| " + " | ".join([row.arm, row.noise, f"{row.false_per_10k:.2f}", *map(shown, row.delays.values())]) + " |"
        )


def print_texts(domains: Sequence[Domain], orders: int) -> None:
    """Print what is found where a domain follows another, and what is reported where none does."""
    names = ("any", "losses", "cuts", "adwin", "embedding")
    for order in ("shuffled", "order of the files"):
        found: dict[str, list[float]] = {name: [] for name in names}
        for first, second in itertools.permutations(domains, 2):
            for seed in range(orders if order == "shuffled" else 1):
                alarms = watch(
                    [(domain, _part(domain, index, order, seed)) for index, domain in enumerate((first, second))], seed
                )
                for name in names:
                    found[name] += delays(getattr(alarms, name), [BEFORE], 10**9)
        false, count = dict.fromkeys(names, 0), 0
        for domain in domains:
            for seed in range(4 * orders if order == "shuffled" else 1):
                all_of_it = shuffled(len(domain.scored), "text", domain.name, seed)
                alarms = watch([(domain, all_of_it if order == "shuffled" else sorted(all_of_it))], seed)
                count += len(all_of_it)
                for name in names:
                    false[name] += len(getattr(alarms, name))
        print(
            f"\ndocuments of one domain after {BEFORE} of another, {order}: delay; alarms in {count} documents of one domain alone"
        )
        for name in names:
            print(f"  {name:<10} {shown(found[name]):<20} {false[name]}")


def _part(domain: Domain, index: int, order: str, seed: int) -> list[int]:
    """Return which documents come first or second."""
    found = (
        shuffled(len(domain.scored), "text", domain.name, seed)
        if order == "shuffled"
        else list(range(len(domain.scored)))
    )
    return found[:BEFORE] if index == 0 else found[BEFORE:]


def arguments() -> argparse.Namespace:
    """Return the parsed arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stream", default="injected", help=f"of {', '.join(STREAMS)}, separated by commas")
    parser.add_argument("--steady", type=int, default=40, help="series of 10,000 examples without a change, by noise")
    parser.add_argument("--runs", type=int, default=60, help="series with a change, by noise, shape and size")
    parser.add_argument("--orders", type=int, default=2, help="orders of the documents of each pair of domains")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dated-runs", type=int, default=20, help="orders of the dated documents")
    parser.add_argument("--learners", type=int, default=0, help="adapters that learn each dated stream; minutes each")
    parser.add_argument("--within", type=int, default=WITHIN, help="documents after a dated boundary that count as its")
    parser.add_argument("--untitled", action="store_true", help="dated documents without the name of their service")
    given = parser.parse_args()
    given.stream = given.stream.split(",")
    unknown = sorted(set(given.stream) - set(STREAMS))
    if unknown:
        parser.error(f"no such stream: {', '.join(unknown)}; allowed: {', '.join(STREAMS)}")
    return given


def run_injected(given: argparse.Namespace) -> dict[str, Any]:
    """Measure series with a change that was put in, and domains one after another; return what the last line says."""
    began = time.monotonic()
    domains = load_domains(given.processes)
    print(
        f"{sum(len(domain.scored) for domain in domains)} documents scored: {time.monotonic() - began:.0f} s",
        flush=True,
    )
    real = [domain.losses for domain in domains]
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        job = partial(measure, real=real, steady_runs=given.steady, runs=given.runs)
        rows = list(pool.map(job, *zip(*itertools.product(ARMS, NOISES), strict=True)))
    print_series(rows)
    print_texts(domains, given.orders)
    ours = [row for row in rows if row.arm == "service"]
    by_noise = {row.noise: median(row.delays["sudden", 1.0]) for row in ours}
    missed = [delay for row in ours if row.noise != DEPENDENT for delay in row.delays["sudden", 1.0]]
    return {
        # The worst of the kinds of noise.
        "median_delay_examples": max(delay for name, delay in by_noise.items() if name != DEPENDENT),
        "false_alarms_per_10k": round(max(row.false_per_10k for row in ours), 2),
        "missed_pct": round(100 * sum(map(math.isinf, missed)) / len(missed), 1),
        "median_delay_examples_ar_9": None if math.isinf(by_noise[DEPENDENT]) else by_noise[DEPENDENT],
        "n": given.runs,
    }


def main() -> None:
    """Measure, print the tables, and the figures that goals are set for."""
    given = arguments()
    began = time.monotonic()
    line = run_injected(given) if "injected" in given.stream else {}
    if "releases" in given.stream:
        line["releases"] = run_dated(
            given.processes, given.dated_runs, given.learners, given.within, titles=not given.untitled
        )
    print(f"\n{time.monotonic() - began:.0f} s")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
