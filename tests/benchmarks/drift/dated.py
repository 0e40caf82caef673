"""Dated documentation: one period after another, one service after another, and the same documents shuffled.

The text is botocore's, see tests/benchmarks/learning/releases.py. The shuffled documents are the control: they have no change,
so what is found there at the same places is found by chance.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any, Final

import numpy as np

from perennial.learner.training.replay_buffer import seeded_random
from perennial.storage.errors import NotFoundError
from tests.benchmarks.drift.arms import dummy, plain_adwin, scaled_adwin
from tests.benchmarks.drift.boundaries import (
    Matched,
    boundaries_of,
    found_pct,
    match_marks,
    pooled_per_10k,
    step_between,
)
from tests.benchmarks.drift.learning import Learned, learned_marks
from tests.benchmarks.drift.measure import median
from tests.benchmarks.drift.real_text import Domain, score_domains, shuffled, watch
from tests.benchmarks.learning.releases import LATEST, PERIODS, botocore_data, entries

WITHIN: Final = 128
"""Documents after a boundary in which a mark belongs to it."""
MIN_OF_SERVICE: Final = 200
"""Documents from which a service is part of the stream `services`."""
OF_SERVICE: Final = 360
"""Documents of each service, at most: the same share of the stream for all."""
OF_SEGMENT: Final = 160
"""Documents of each period that an adapter learns, at most: a few more than the reference of a loss takes."""
ONE_SERVICE: Final = "ec2"
STREAMS: Final = ("periods", "periods of ec2", "services")
SERVICE_ARMS: Final = ("service", "service, losses", "service, cuts")

Marks = dict[str, list[int]]


@dataclass
class Compared:
    """What one arm did on the runs of a stream.

    Attributes:
        runs: on the stream.
        chance: on the shuffled documents, as if the boundaries were there, too.
        control: on the shuffled documents, which have no boundary.
    """

    runs: list[Matched] = field(default_factory=list)
    chance: list[Matched] = field(default_factory=list)
    control: list[Matched] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return what the last line says."""
        late = median([delay for run in self.runs for delay in run.delays])
        return {
            "found_pct": round(found_pct(self.runs), 1), "by_chance_pct": round(found_pct(self.chance), 1),
            "median_delay_examples": None if math.isinf(late) else late,
            "false_per_10k": round(pooled_per_10k(self.runs), 2),
            "control_per_10k": round(pooled_per_10k(self.control), 2),
        }  # fmt: skip

    def cells(self) -> list[str]:
        """Return the cells of a table; the first one also has the number of runs that found the first boundary, the second …"""
        every = [delay for run in self.runs for delay in run.delays]
        delays = sorted(filter(math.isfinite, every))
        by_place = [str(sum(map(math.isfinite, at))) for at in zip(*(run.delays for run in self.runs), strict=True)]
        return [
            f"{found_pct(self.runs):.0f} % of {len(every)} ({', '.join(by_place)})",
            f"{median(delays):.0f} ({delays[0]:.0f}–{delays[-1]:.0f})" if delays else "-",
            _rate(self.runs), f"{found_pct(self.chance):.0f} %", _rate(self.control),
        ]  # fmt: skip


Table = dict[str, Compared]


@dataclass(frozen=True)
class Dated:
    """All documents, in the order of the periods, and within a period in that of the files.

    Attributes:
        domain: the documents with their losses.
        periods: period of each document.
        services: service of each document.
    """

    domain: Domain
    periods: tuple[str, ...]
    services: tuple[str, ...]


@dataclass(frozen=True)
class Segment:
    """Documents of one kind that arrive one after another.

    Attributes:
        name: the period or the service.
        indices: numbers of the documents, in order of arrival.
    """

    name: str
    indices: tuple[int, ...]


def load_dated(threads: int, *, titles: bool) -> Dated:
    """Return the documents, scored under the shipped base.

    Args:
        threads: CPU threads of the model.
        titles: True for documents that begin with the names of the service and of what they are about.

    Raises:
        NotFoundError: botocore is not installed.
    """
    found = [
        (period, entry.service, f"{entry.title}\n{entry.texts[period]}" if titles else entry.texts[period])
        for period in (*PERIODS, LATEST) for entry in entries(botocore_data()) if period in entry.texts
    ]  # fmt: skip
    periods, services, texts = zip(*found, strict=True)
    (domain,) = score_domains({"releases": texts}, threads)
    return Dated(domain, periods, services)


def segments(
    stream: str, periods: Sequence[str], services: Sequence[str], seed: int, *, mixed: bool, most: int | None = None
) -> list[Segment]:
    """Return the segments of a stream in order.

    Args:
        stream: one of `STREAMS`.
        periods: period of each document, in order.
        services: service of each document.
        seed: draws the order of the services, which documents of a segment are taken, and their order.
        mixed: True for documents of a segment in a drawn order, False for the order of the files.
        most: documents of each segment, at most; None: all, of a service `OF_SERVICE`.
    """
    places: dict[str, list[int]] = {}
    for index, (period, service) in enumerate(zip(periods, services, strict=True)):
        if stream != "periods of ec2" or service == ONE_SERVICE:
            places.setdefault(service if stream == "services" else period, []).append(index)
    if stream == "services":
        places = {name: indices for name, indices in sorted(places.items()) if len(indices) >= MIN_OF_SERVICE}
        names = list(places)
        seeded_random("services", seed).shuffle(names)
        places = {name: places[name] for name in names}
        most = most or OF_SERVICE
    found = []
    for name, indices in places.items():
        drawn = [indices[at] for at in shuffled(len(indices), "dated", stream, name, seed)][:most]
        found.append(Segment(name, tuple(drawn if mixed else sorted(drawn))))
    return found


def all_marks(domain: Domain, indices: Sequence[int], seed: int) -> Marks:
    """Return the marks of every arm on some documents in order, by its name."""
    alarms = watch([(domain, indices)], seed)
    losses = domain.losses[list(indices)]
    rng = np.random.default_rng(seed)
    return {
        **dict(zip(SERVICE_ARMS, (alarms.any, alarms.losses, alarms.cuts), strict=True)),
        "plain ADWIN": alarms.adwin, "ADWIN, scaled": scaled_adwin(losses, rng), "mean embedding": alarms.embedding,
        "dummy": dummy(losses, rng),
    }  # fmt: skip


def in_order(found: Sequence[Segment]) -> list[int]:
    """Return the documents of some segments, one segment after another."""
    return [index for segment in found for index in segment.indices]


def control(found: Sequence[Segment], seed: int) -> list[int]:
    """Return the same documents in a drawn order."""
    every = in_order(found)
    return [every[at] for at in shuffled(len(every), "control", seed)]


def compare(marks_of: Callable[[Sequence[int], int], Marks], by_run: Sequence[list[Segment]], within: int) -> Table:
    """Return by arm what it does on each run and on its control.

    Args:
        marks_of: returns the marks by arm, of the numbers of documents in order and a seed.
        by_run: the segments of each run.
        within: documents after a boundary in which a mark belongs to it.
    """
    table: Table = {}
    for seed, found in enumerate(by_run):
        indices, mixed = in_order(found), control(found, seed)
        boundaries = boundaries_of([len(segment.indices) for segment in found])
        for arm, marks in marks_of(indices, seed).items():
            table.setdefault(arm, Compared()).runs.append(match_marks(marks, boundaries, within, len(indices)))
        for arm, marks in marks_of(mixed, seed).items():
            table[arm].chance.append(match_marks(marks, boundaries, within, len(mixed)))
            table[arm].control.append(match_marks(marks, [], within, len(mixed)))
    return table


def print_steps(dated: Dated) -> dict[str, float]:
    """Print by how much the mean loss changes at each boundary; return the largest in standard deviations by stream."""
    losses = dated.domain.losses
    print("\n| stream | from | to | documents | nats a token | change (95 %) | in sd |\n" + "|---" * 7 + "|")
    largest: dict[str, float] = {}
    for stream in STREAMS:
        found = segments(stream, dated.periods, dated.services, 0, mixed=False, most=len(losses))
        pairs = itertools.combinations(found, 2) if stream == "services" else itertools.pairwise(found)
        for one, two in pairs:
            before, after = losses[list(one.indices)], losses[list(two.indices)]
            step = step_between(before, after)
            in_sd = step.nats / step.deviation
            largest[stream] = max(largest.get(stream, 0.0), abs(in_sd))
            print(
                f"| {stream} | {one.name} | {two.name} | {len(before)}, {len(after)} | {before.mean():.3f}, "
                f"{after.mean():.3f} | {step.nats:+.3f} ± {1.96 * step.error:.3f}{'' if step.is_clear else ' (none)'} | {in_sd:+.2f} |"
            )
    return largest


def print_table(title: str, table: Table, within: int) -> None:
    """Print what every arm found, and what it reports of the control."""
    heads = ("arm", f"found within {within}", "delay", "elsewhere per 10k", "by chance", "shuffled per 10k")
    print(f"\n{title}\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for arm, compared in table.items():
        print("| " + " | ".join([arm, *compared.cells()]) + " |", flush=True)


def _rate(runs: Sequence[Matched]) -> str:
    rates = [run.per_10k for run in runs]
    return f"{pooled_per_10k(runs):.1f} ({min(rates):.1f}–{max(rates):.1f})"


def run_dated(processes: int, runs: int, learners: int, within: int, *, titles: bool) -> dict[str, Any] | None:
    """Measure and print; return what the last line says, or None where the text is not installed.

    Args:
        processes: CPU threads that score, and processes that learn.
        runs: orders of the documents of each stream.
        learners: adapters that learn each stream and its control.
        within: documents after a boundary in which a mark belongs to it.
        titles: True for documents that begin with the names of the service and of what they are about.
    """
    try:
        began = time.monotonic()
        dated = load_dated(processes, titles=titles)
    except NotFoundError as error:
        print(f"releases: skipped: {error}", flush=True)
        return None
    print(f"{len(dated.periods)} dated documents scored: {time.monotonic() - began:.0f} s", flush=True)
    found: dict[str, Any] = {"within": within, "runs": runs, "learners": learners, "titles": titles}
    steps = print_steps(dated)
    marks_of = partial(all_marks, dated.domain)
    for stream in STREAMS:
        for mixed in (True, False):
            # Without a drawn order within the periods all seeds give one stream.
            count = runs if mixed or stream == "services" else 1
            by_run = [segments(stream, dated.periods, dated.services, seed, mixed=mixed) for seed in range(count)]
            table = compare(marks_of, by_run, within)
            order = "shuffled within each segment" if mixed else "order of the files within each segment"
            print_table(f"{stream}, {order}, {count} runs", table, within)
            if mixed:
                found[stream.replace(" ", "_")] = {
                    "largest_step_sd": round(steps[stream], 2), **table["service"].figures(),
                }  # fmt: skip
    if learners:
        found["learning"] = _learn(dated, processes, learners, within)
    return found


def learner_runs(dated: Dated, learners: int) -> list[list[Segment]]:
    """Return the segments that each adapter learns: the periods, in order."""
    return [
        segments("periods", dated.periods, dated.services, seed, mixed=True, most=OF_SEGMENT)
        for seed in range(learners)
    ]  # fmt: skip


def _learn(dated: Dated, processes: int, learners: int, within: int) -> dict[str, Any]:
    """Print what is reported while an adapter learns the periods, beside the same documents under the base alone."""
    texts = [each.example.text or "" for each in dated.domain.scored]
    runs = learner_runs(dated, learners)
    jobs = [
        (tuple(order), seed) for seed, found in enumerate(runs) for order in (in_order(found), control(found, seed))
    ]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        results = list(
            pool.map(learned_marks, [[texts[at] for at in order] for order, _ in jobs], [seed for _, seed in jobs])
        )
    known = dict(zip(jobs, results, strict=True))

    def both(indices: Sequence[int], seed: int) -> Marks:
        return learned_arms(known[tuple(indices), seed], seed) | all_marks(dated.domain, indices, seed)

    table = compare(both, runs, within)
    print_live_steps(runs, [known[tuple(in_order(found)), seed] for seed, found in enumerate(runs)])
    print_table(f"periods, at most {OF_SEGMENT} documents of each, {learners} runs", table, within)
    return table["service, learning"].figures()


def learned_arms(learned: Learned, seed: int) -> Marks:
    """Return the marks of the service while an adapter learned, and those of ADWIN on the live loss."""
    live, rng = np.array(learned.live, dtype=np.float64), np.random.default_rng(seed)
    return {
        "service, learning": learned.any, "service, learning, losses": learned.losses,
        "service, learning, cuts": learned.cuts, "plain ADWIN, live loss": plain_adwin(live, rng),
        "ADWIN, scaled, live loss": scaled_adwin(live, rng),
    }  # fmt: skip


def print_live_steps(runs: Sequence[list[Segment]], learned: Sequence[Learned]) -> None:
    """Print by how much the mean live loss changes at each boundary."""
    print(f"\npromoted updates by run: {' '.join(str(each.promoted) for each in learned)}")
    for place, (one, two) in enumerate(itertools.pairwise(runs[0])):
        steps = []
        for found, each in zip(runs, learned, strict=True):
            start, middle, end = [0, *boundaries_of([len(s.indices) for s in found]), len(each.live)][place : place + 3]
            losses = np.array(each.live, dtype=np.float64)
            steps.append(step_between(losses[start:middle], losses[middle:end]))
        shown = ", ".join(
            f"{step.nats:+.3f} ± {1.96 * step.error:.3f} ({step.nats / step.deviation:+.2f} sd)" for step in steps
        )
        print(f"live loss from {one.name} to {two.name}, by run: {shown}")
