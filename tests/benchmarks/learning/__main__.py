"""Compare what the service learns and forgets with what practitioners would do.

`python -m tests.benchmarks.learning [--form short|full|tune] [--arms a,b] [--set name=value] …`; docs/learning says what is
measured. Finished runs are kept, so the same command goes on where it was stopped. The last line is JSON; the exit code
is 0 also where goals are missed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from perennial.learner.bases.sources import SHIPPED_NAME
from perennial.storage.errors import NotFoundError
from tests.benchmarks.learning import report
from tests.benchmarks.learning.arms import ARMS, FULL, RATES_FILE, SHORT, Arm, changed
from tests.benchmarks.learning.comparison import STREAMS, Comparison, Records, Size
from tests.benchmarks.learning.figures import average_loss, loss_matrix
from tests.benchmarks.learning.releases import botocore_data
from tests.benchmarks.learning.results import Results
from tests.benchmarks.learning.world import World

FOLDER: Final = Path(__file__).parents[3] / "out" / "learning"
TUNED: Final = ("sequential", "replay", "joint", "replay+ema", "replay+reptile")
RATES: Final = ("5e-4", "1e-3", "2e-3", "4e-3")
GENERAL_TEXTS: Final = 64


def arguments() -> argparse.Namespace:
    """Return the parsed arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=("short", "full", "tune"), default="short")
    parser.add_argument("--arms", help=f"of {', '.join(ARMS)}; default: those of the form")
    parser.add_argument("--rates", default=",".join(RATES), help="learning rates to try in the form `tune`")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE,…",
                        help="an arm more: ours with these settings, or reptile=")  # fmt: skip
    parser.add_argument("--seeds", type=int, help="number of seeds; short 2, full 5, tune 1, of other bases 1")
    parser.add_argument("--orders", type=int, help="number of orders; short 1, full 2, tune 1")
    parser.add_argument("--stream", default=",".join(STREAMS), help=f"of {', '.join(STREAMS)}; default: all")
    parser.add_argument(
        "--batches", type=int, help="micro-batches per block; default 8, of releases 3, of other bases 1"
    )
    parser.add_argument("--held-out", type=int, help="held-out documents per domain; default 24, of other bases 6")
    parser.add_argument("--base", default="shipped", help="the base, as PERENNIAL_BASE")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the model")
    parser.add_argument("--at-once", type=int, default=5, help="runs at the same time, in shared passes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    parser.add_argument("--results", type=Path, default=FOLDER / "runs.jsonl", help="file of finished runs")
    parser.add_argument("--plots", type=Path, default=FOLDER, help="folder for the plots")
    return parser.parse_args()


def main() -> None:
    """Run what the arguments ask for."""
    given = arguments()
    began = time.monotonic()
    tuning = given.form == "tune"
    seeds, orders = {"short": (2, 1), "full": (5, 2), "tune": (1, 1)}[given.form]
    size = _size(given, seeds, orders)
    arms = _arms(given, tuning=tuning)
    streams = ["tuning"] if tuning else given.stream.split(",")
    unknown = [name for name in streams if name not in (*STREAMS, "tuning")]
    if unknown:
        sys.exit(f"no such stream: {', '.join(unknown)}; allowed: {', '.join(STREAMS)}")
    streams = _installed(streams)
    world, results = World.load(given.base, given.threads, given.at_once, GENERAL_TEXTS), Results(given.results)
    until_s = began + 60 * given.minutes
    by_stream: dict[str, Records] = {}
    unfinished = 0
    for stream in streams:
        comparison = Comparison(world, results, stream, arms, size, given.at_once, until_s, _say)
        by_stream[stream] = records = comparison.run()
        unfinished += comparison.unfinished
        print(f"\n{stream}\n{report.table(report.means(records))}")
        for line in report.intervals(records, [arm.name for arm in arms]):
            print(line)
        print(flush=True)
    if tuning:
        print(json.dumps(_choose_rates(by_stream["tuning"], given.base, write=not unfinished)))
        return
    for path in report.plot(by_stream["domains"], given.plots) if "domains" in by_stream else ():
        print(f"plot: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    more: dict[str, Any] = {
        "seeds": len(size.seeds), "orders": len(size.orders), "base": given.base, "form": given.form,
        "seconds": round(time.monotonic() - began), "unfinished": unfinished,
    }  # fmt: skip
    print(json.dumps(report.last_line(by_stream, more)))


def _size(given: argparse.Namespace, seeds: int, orders: int) -> Size:
    """Return the size of the form; it is smaller on other bases, whose steps take seconds."""
    small = given.base != SHIPPED_NAME
    batches, held_out = (1, 6) if small else (8, 24)
    size = Size(
        given.batches or batches, given.held_out or held_out,
        tuple(range(given.seeds or (1 if small else seeds))), tuple(range(1, 1 + (given.orders or orders))),
    )  # fmt: skip
    if given.batches or small:
        size = replace(size, release_batches=given.batches or batches)
    return replace(size, tickets=12, facts=8, revisions=2) if small else size


def _installed(streams: list[str]) -> list[str]:
    """Return the streams without `releases` where its text is not installed, and say so."""
    try:
        if "releases" in streams:
            botocore_data()
    except NotFoundError as error:
        _say(f"releases: skipped: {error}")
        return [name for name in streams if name != "releases"]
    return streams


def _say(line: str) -> None:
    print(line, flush=True)


def _arms(given: argparse.Namespace, *, tuning: bool) -> list[Arm]:
    """Return the arms to run, with the frozen base and `ours`, which the figures need."""
    if tuning:
        names = given.arms.split(",") if given.arms else list(TUNED)
        found = [changed(f"learning_rate={rate}", ARMS[name]) for name in names for rate in given.rates.split(",")]
    else:
        names = given.arms.split(",") if given.arms else list(FULL if given.form == "full" else SHORT)
        unknown = [name for name in names if name not in ARMS]
        if unknown:
            sys.exit(f"no such arm: {', '.join(unknown)}; allowed: {', '.join(ARMS)}")
        found = [ARMS[name] for name in names] + [changed(text) for text in given.set]
    needed = [ARMS[name] for name in ("frozen", "ours") if name not in {arm.name for arm in found}]
    return [*needed, *found]


def _choose_rates(records: Records, base: str, *, write: bool) -> dict[str, Any]:
    """Return for each arm the rate with the lowest loss over all domains at the end, and keep it if all runs are done."""
    losses: dict[str, dict[str, list[float]]] = {}
    for (name, _, _), record in records.items():
        arm, _, rate = name.partition(" learning_rate=")
        if rate:
            losses.setdefault(arm, {}).setdefault(rate, []).append(average_loss(loss_matrix(record)))
    kept = json.loads(RATES_FILE.read_text("utf-8")) if RATES_FILE.exists() else {}
    tried = kept.setdefault("losses", {}).setdefault(base, {})
    for arm, of in losses.items():
        tried.setdefault(arm, {}).update({rate: round(sum(found) / len(found), 4) for rate, found in of.items()})
    chosen = {arm: float(min(of, key=of.__getitem__)) for arm, of in tried.items() if arm != "ours"}
    if "joint" in chosen:
        chosen["cumulative"] = chosen["joint"]
    kept.setdefault("rates", {})[base] = chosen
    if write and losses:
        command = shlex.join(["python", "-m", "tests.benchmarks.learning", *_without_places(sys.argv[1:])])
        kept["commands"] = [*kept.get("commands", []), command]
        RATES_FILE.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    return {"rates": chosen, "losses": tried, "written": write}


def _without_places(given: list[str]) -> list[str]:
    """Return command line arguments without those that say where files are."""
    places = {"--results", "--plots"}
    return [
        argument
        for before, argument in zip(["", *given], given, strict=False)
        if before not in places and argument.partition("=")[0] not in places
    ]


if __name__ == "__main__":
    main()
