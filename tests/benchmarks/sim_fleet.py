"""Simulate a fleet of adapters on one device: who is learned when, by the order in which waiting jobs fill the passes.

`python -m tests.benchmarks.sim_fleet [--quick] [--device h200-1.2b]`: documents arrive by a Poisson process, their
adapters by a Zipf law, and are cut into micro-batches by curate's rules (768 tokens or 30 s). Time is simulated; the queue
is the learner's own (`learner/roles/fair_queue.py`), and a pass takes what passes of its size took on a real device. The
same arrivals go through

- `fair`: the fair queue, over as many jobs as the learner holds in memory;
- `fair, 256 in memory`: the same over 256 jobs, with the rest in the order of the log;
- `in order`: passes in the order of cuts, first come first served;
- `one by one`: the same without passes, as the learner worked before;
- `timers`: each adapter is trained on all that it has every ten minutes, without cuts.

Each runs without and with a flood: for ten minutes one tenant publishes several times what the device can learn. The age at
learning is the time from an example's publication to the end of the pass that trained it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from perennial.learner.roles.fair_queue import FairQueue, QueueEntry
from perennial.learner.roles.job_figures import JobFigures, tenant_of
from perennial.streams.settings import Settings

ADAPTERS = (1_000, 100_000)
TENANTS = 97
ZIPF = 1.0
"""The n-th adapter gets documents at a rate of 1 / n ** ZIPF."""
DURATION_S = 3_600.0
FLOOD_FROM, FLOOD_UNTIL = 1 / 4, 5 / 12
"""Shares of the time at which the flood begins and ends."""
FLOOD, FLOOD_ADAPTERS, FLOOD_FACTOR = "flood", 200, 4.0
"""The flooding tenant, its adapters, and how many times as much as all others together it publishes."""
LOAD = 0.7
"""Share of the device's time that the fleet takes in passes of all their places, without the flood."""
DOCUMENT_TOKENS, DOCUMENT_SIGMA = 120, 0.6
"""Median and spread (log-normal) of a document's tokens."""
DRIFTING, DRIFT_NATS = 0.02, 1.0
"""Share of the adapters whose text is new to them, and the rise of their loss by which curate sees it."""
TIMER_S = 600.0
PLACES = 16
IN_MEMORY, IN_MEMORY_BEFORE = 32_768, 256
UNIT_TOKENS = 807
"""Tokens that the measured passes trained for each adapter: 4,300 a step for 16 adapters, in 3 steps."""


@dataclass(frozen=True)
class Device:
    """What passes take on a device.

    Attributes:
        fixed_s: seconds of a pass besides its adapters.
        unit_s: seconds for each `UNIT_TOKENS` trained tokens; an adapter takes one unit at least.
        alone_s: seconds of an update by the learner before passes, whatever its size: launching the kernels takes them.
        usd_per_hour: rent that the costs assume; not measured.
        source: where the seconds come from.
    """

    fixed_s: float
    unit_s: float
    alone_s: float
    usd_per_hour: float
    source: str

    def pass_s(self, units: float) -> float:
        """Return the seconds of a pass."""
        return self.fixed_s + self.unit_s * units


DEVICES = {
    "h200-135m": Device(0.051, 0.0221, 1.093, 3.0, "H200, 135M: 1, 4, 16 together .073, .144, .404 s"),
    "h200-1.2b": Device(0.039, 0.0266, 0.741, 3.0, "H200, 1.2B: 1, 4, 16 together .066, .145, .465 s"),
    "h200-8b": Device(0.104, 0.1023, 1.651, 3.0, "H200, 8B: 1, 4 together .206, .513 s"),
    "cpu-shipped": Device(
        0.0, 0.140, 0.224, 0.1, "two busy CPU cores, shipped base: 1, 4, 16 together .140, .661, 2.239 s"
    ),
}
"""Lines through the figures of docs/experiments, "Many adapters in one pass"; seconds include moving the weights."""


class Job(NamedTuple):
    """A micro-batch that was cut.

    Attributes:
        cut_s: when.
        adapter: its adapter.
        tokens: its tokens.
        published: when each of its examples was published, ascending.
        drift_nats: rise of the loss that curate saw.
    """

    cut_s: float
    adapter: str
    tokens: int
    published: tuple[float, ...]
    drift_nats: float


@dataclass(frozen=True)
class Arrivals:
    """Documents, ascending by time: when, of which adapter (its index), and how many tokens."""

    at_s: np.ndarray
    adapter: np.ndarray
    tokens: np.ndarray
    names: list[str]
    drifts: np.ndarray


def arrivals_of(adapters: int, per_s: float, duration_s: float, *, flood: bool, seed: int = 0) -> Arrivals:
    """Return the documents of one run; the fleet's are the same with the flood as without.

    Args:
        adapters: how many adapters the fleet has.
        per_s: documents per second of the fleet.
        duration_s: for how long documents arrive.
        flood: True to add the documents of the flooding tenant.
        seed: of all random choices.
    """
    rng = np.random.default_rng(seed)
    names = [f"tenant-{number % TENANTS}/user-{number}" for number in range(adapters)]
    weights = 1.0 / np.arange(1, adapters + 1) ** ZIPF
    count = rng.poisson(per_s * duration_s)
    at_s = np.sort(rng.uniform(0, duration_s, count))
    which = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.uniform(size=count))
    tokens = _tokens(rng, count)
    drifts = rng.uniform(size=adapters) < DRIFTING
    if flood:
        began_s, ended_s = FLOOD_FROM * duration_s, FLOOD_UNTIL * duration_s
        more = rng.poisson(per_s * FLOOD_FACTOR * (ended_s - began_s))
        names += [f"{FLOOD}/user-{number}" for number in range(FLOOD_ADAPTERS)]
        at_s = np.concatenate([at_s, rng.uniform(began_s, ended_s, more)])
        which = np.concatenate([which, rng.integers(adapters, adapters + FLOOD_ADAPTERS, more)])
        tokens = np.concatenate([tokens, _tokens(rng, more)])
        drifts = np.concatenate([drifts, np.zeros(FLOOD_ADAPTERS, bool)])
        order = np.argsort(at_s, kind="stable")
        at_s, which, tokens = at_s[order], which[order], tokens[order]
    return Arrivals(at_s, which, tokens, names, drifts)


def _tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(DOCUMENT_TOKENS), DOCUMENT_SIGMA, count), 8, 2_000).astype(int)


def cut(arrivals: Arrivals, max_tokens: int, max_age_s: float) -> list[Job]:
    """Return the micro-batches that curate cuts by size and age, in the order of their cuts."""
    pending: dict[int, tuple[list[float], list[int]]] = {}
    due: deque[tuple[float, int, float]] = deque()  # when the oldest document, published then, is too old
    jobs: list[Job] = []

    def close(adapter: int, now_s: float) -> None:
        times, sizes = pending.pop(adapter)
        rise = DRIFT_NATS if arrivals.drifts[adapter] else 0.0
        jobs.append(Job(now_s, arrivals.names[adapter], sum(sizes), tuple(times), rise))

    def close_due(now_s: float) -> None:
        while due and due[0][0] <= now_s:
            at_s, adapter, since_s = due.popleft()
            if adapter in pending and pending[adapter][0][0] == since_s:
                close(adapter, at_s)

    for now_s, adapter, tokens in zip(
        arrivals.at_s.tolist(), arrivals.adapter.tolist(), arrivals.tokens.tolist(), strict=True
    ):
        close_due(now_s)
        times, sizes = pending.setdefault(adapter, ([], []))
        if not times:
            due.append((now_s + max_age_s, adapter, now_s))
        times.append(now_s)
        sizes.append(tokens)
        if sum(sizes) >= max_tokens:
            close(adapter, now_s)
    close_due(float("inf"))
    return jobs


def by_timers(arrivals: Arrivals, every_s: float, seed: int = 0) -> list[Job]:
    """Return one micro-batch per adapter and timer, with all documents since the timer before."""
    phases = [random.Random(f"{seed}/{name}").uniform(0, every_s) for name in arrivals.names]
    pending: dict[tuple[float, int], tuple[list[float], list[int]]] = {}
    for now_s, adapter, tokens in zip(
        arrivals.at_s.tolist(), arrivals.adapter.tolist(), arrivals.tokens.tolist(), strict=True
    ):
        fires_s = phases[adapter] + every_s * np.ceil((now_s - phases[adapter]) / every_s)
        times, sizes = pending.setdefault((float(fires_s), adapter), ([], []))
        times.append(now_s)
        sizes.append(tokens)
    return [
        Job(fires_s, arrivals.names[adapter], sum(sizes), tuple(times), 0.0)
        for (fires_s, adapter), (times, sizes) in sorted(pending.items())
    ]


class Order(Protocol):
    """Decides which waiting jobs fill the next pass."""

    def __len__(self) -> int:
        """Return how many jobs wait."""

    def add(self, job: Job) -> None:
        """Let a job wait."""

    def take(self, places: int, now_s: float) -> list[Job]:
        """Take the jobs of the next pass, of different adapters."""


class InOrder:
    """First come first served; the jobs of an adapter one pass after the other."""

    def __init__(self) -> None:
        self._heads: list[tuple[int, str]] = []
        self._jobs: dict[str, deque[tuple[int, Job]]] = {}
        self._seq = self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, job: Job) -> None:
        waiting = self._jobs.setdefault(job.adapter, deque())
        waiting.append((self._seq, job))
        if len(waiting) == 1:
            heapq.heappush(self._heads, (self._seq, job.adapter))
        self._seq += 1
        self._size += 1

    def take(self, places: int, now_s: float) -> list[Job]:
        adapters = [heapq.heappop(self._heads)[1] for _ in range(min(places, len(self._heads)))]
        taken = []
        for adapter in adapters:
            waiting = self._jobs[adapter]
            taken.append(waiting.popleft()[1])
            if waiting:
                heapq.heappush(self._heads, (waiting[0][0], adapter))
            else:
                del self._jobs[adapter]
        self._size -= len(taken)
        return taken


class Fair:
    """The learner's queue."""

    def __init__(self, settings: Settings) -> None:
        tenants = settings.tenants
        self._queue: FairQueue[Job] = FairQueue(tenants.weight, tenants.tokens_per_hour)

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, job: Job) -> None:
        self._queue.add(job, JobFigures(job.adapter, job.tokens, job.published[0], job.drift_nats))

    def take(self, places: int, now_s: float) -> list[Job]:
        taken: dict[str, Job] = {}
        while len(taken) < places:
            entry: QueueEntry[Job] | None = self._queue.next(taken.keys(), now_s)
            if entry is None:
                break
            self._queue.start(entry, now_s)
            taken[entry.adapter] = entry.job
        return list(taken.values())


@dataclass
class Outcome:
    """What came of one run.

    Attributes:
        busy_s: seconds for which passes ran.
        ended_s: when the last pass ended.
        passes: how many there were.
        updates: how many jobs they trained.
        ages_s: age at learning of each example of the fleet.
        drifted_s: the same, of adapters that drift.
        flood_s: the same, of the flooding tenant.
        waited: for each job of the fleet, how many passes began between its cut and its own pass.
        lone: the same, of jobs whose tenant had nothing waiting when they were cut.
        behind: of the same jobs, how many of these passes trained updates of the flooding tenant.
        flooded: how many passes did.
    """

    busy_s: float = 0.0
    ended_s: float = 0.0
    passes: int = 0
    updates: int = 0
    ages_s: array[float] = field(default_factory=lambda: array("d"))
    drifted_s: array[float] = field(default_factory=lambda: array("d"))
    flood_s: array[float] = field(default_factory=lambda: array("d"))
    waited: array[int] = field(default_factory=lambda: array("l"))
    lone: array[int] = field(default_factory=lambda: array("l"))
    behind: array[int] = field(default_factory=lambda: array("l"))
    flooded: int = 0


def run(jobs: Sequence[Job], order: Order, places: int, in_memory: int, seconds_of: Callable[[Sequence[Job]], float],
        ) -> Outcome:  # fmt: skip
    """Let the jobs wait and train on simulated time.

    Args:
        jobs: in the order of their cuts, which is the order of the log.
        order: which of those in memory are next.
        places: adapters per pass.
        in_memory: how many jobs the learner reads ahead.
        seconds_of: returns how long a pass takes.
    """
    result, now_s, read = Outcome(), 0.0, 0
    cut_in: dict[tuple[str, float], tuple[int, int, bool]] = {}  # passes until a job's cut, flooded ones; was it alone?
    waiting: Counter[str] = Counter()
    noted = 0
    while read < len(jobs) or len(order):
        while noted < len(jobs) and jobs[noted].cut_s <= now_s:
            tenant = tenant_of(jobs[noted].adapter)
            cut_in[jobs[noted].adapter, jobs[noted].cut_s] = result.passes, result.flooded, not waiting[tenant]
            waiting[tenant] += 1
            noted += 1
        while read < noted and len(order) < in_memory:
            order.add(jobs[read])
            read += 1
        if not len(order):
            now_s = jobs[read].cut_s
            continue
        taken = order.take(places, now_s)
        seconds = seconds_of(taken)
        now_s += seconds
        for job in taken:
            began_in, flooded, lone = cut_in.pop((job.adapter, job.cut_s))
            ages_s, tenant = [now_s - at_s for at_s in job.published], tenant_of(job.adapter)
            waiting[tenant] -= 1
            if tenant == FLOOD:
                result.flood_s.extend(ages_s)
                continue
            result.ages_s.extend(ages_s)
            result.waited.append(result.passes - began_in)
            if lone:
                result.lone.append(result.passes - began_in)
                result.behind.append(result.flooded - flooded)
            if job.drift_nats:
                result.drifted_s.extend(ages_s)
        result.busy_s += seconds
        result.passes += 1
        result.flooded += any(tenant_of(job.adapter) == FLOOD for job in taken)
        result.updates += len(taken)
        result.ended_s = now_s
    return result


def percentile(values: array[Any], share: float) -> float:
    """Return a percentile, 0 without values."""
    return round(float(np.percentile(np.frombuffer(values, values.typecode), share)), 1) if values else 0.0


def figures(result: Outcome, adapters: int, places: int, device: Device, duration_s: float) -> dict[str, float]:
    """Return the figures of a run as the table and the JSON name them."""
    days = duration_s / 86_400
    device_s = result.busy_s / days / adapters
    return {
        "age_p50_s": percentile(result.ages_s, 50), "age_p95_s": percentile(result.ages_s, 95),
        "drifted_p50_s": percentile(result.drifted_s, 50), "flood_p95_s": percentile(result.flood_s, 95),
        "waited_p95_passes": percentile(result.waited, 95), "lone_max_passes": percentile(result.lone, 100),
        "behind_flood_max": percentile(result.behind, 100),
        "places_used": round(result.updates / result.passes / places, 3),
        "device_share": round(result.busy_s / max(duration_s, result.ended_s), 3),
        "device_s_per_adapter_day": round(device_s, 3),
        "usd_per_adapter_day": round(device_s / 3_600 * device.usd_per_hour, 6),
        "updates": result.updates, "examples": len(result.ages_s) + len(result.flood_s),
    }  # fmt: skip


def simulate(
    adapters: int, device: Device, *, flood: bool, duration_s: float = DURATION_S
) -> dict[str, dict[str, float]]:
    """Run all orders over the same documents; return their figures by name.

    Args:
        adapters: how many adapters the fleet has.
        device: what passes take.
        flood: True for the run with the flooding tenant.
        duration_s: for how long documents arrive.
    """
    settings = Settings.of(env_file=None)
    new_share = 1 - settings.training.replay_share - settings.training.general_share

    def units(job: Job) -> float:
        return max(1.0, job.tokens / new_share / UNIT_TOKENS)

    def cuts(documents: Arrivals) -> list[Job]:
        return cut(documents, settings.curate.max_batch_tokens, settings.curate.max_age_s)

    per_s = LOAD / (device.fixed_s / PLACES + device.unit_s)  # if every document were cut alone
    for _ in range(3):  # documents that share a cut take less of the device
        found = cuts(arrivals_of(adapters, per_s, duration_s, flood=False))
        per_s *= LOAD * duration_s / sum(device.unit_s * units(job) + device.fixed_s / PLACES for job in found)
    documents = arrivals_of(adapters, per_s, duration_s, flood=flood)
    jobs = cuts(documents)
    timers = by_timers(documents, TIMER_S)

    def together(jobs: Sequence[Job]) -> float:
        return device.pass_s(sum(map(units, jobs)))

    def alone(jobs: Sequence[Job]) -> float:
        return device.alone_s * len(jobs)

    runs: dict[str, tuple[Sequence[Job], Order, int, int, Callable[[Sequence[Job]], float]]] = {
        "fair": (jobs, Fair(settings), PLACES, IN_MEMORY, together),
        "fair, 256 in memory": (jobs, Fair(settings), PLACES, IN_MEMORY_BEFORE, together),
        "in order": (jobs, InOrder(), PLACES, len(jobs), together),
        "one by one": (jobs, InOrder(), 1, len(jobs), alone),
        "timers": (timers, InOrder(), PLACES, len(timers), together),
    }
    outcomes = {}
    for name, (what, order, places, in_memory, seconds_of) in runs.items():
        result = run(what, order, places, in_memory, seconds_of)
        outcomes[name] = figures(result, adapters, places, device, duration_s)
    outcomes["fair"]["documents_per_s"] = round(per_s, 1)
    return outcomes


def report(adapters: int, flood: bool, found: dict[str, dict[str, float]]) -> None:
    """Print a table of the runs over one fleet."""
    per_s = found["fair"]["documents_per_s"]
    print(f"\n{adapters:,} adapters, {per_s} documents/s, {'with' if flood else 'without'} a flood")
    columns = ("age_p50_s", "age_p95_s", "drifted_p50_s", "flood_p95_s", "waited_p95_passes", "lone_max_passes", "behind_flood_max",
               "places_used", "device_share", "device_s_per_adapter_day", "usd_per_adapter_day")  # fmt: skip
    print("| order | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name, values in found.items():
        print(f"| {name} | " + " | ".join(f"{values[column]:g}" for column in columns) + " |", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the simulation and print the summary; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small fleets, for tests")
    parser.add_argument("--device", choices=DEVICES, default="h200-1.2b", help="whose pass costs")
    options = parser.parse_args(arguments)
    device, began = DEVICES[options.device], time.perf_counter()
    print(f"{options.device}: {device.source}")
    fleets: dict[str, dict[str, dict[str, float]]] = {}
    for adapters in (100, 1_000) if options.quick else ADAPTERS:
        for flood in (False, True):
            found = simulate(adapters, device, flood=flood, duration_s=300.0 if options.quick else DURATION_S)
            report(adapters, flood, found)
            fleets[f"{adapters}{'-flood' if flood else ''}"] = found
    print(json.dumps({
        "benchmark": "fleet", "device": options.device, "seconds": round(time.perf_counter() - began, 1), "fleets": fleets,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
