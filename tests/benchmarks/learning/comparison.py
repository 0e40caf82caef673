"""A comparison: which runs it has, and how they are done several at a time, each once."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from perennial.streams.curate.cutting.policy import CutPolicy
from tests.benchmarks.learning.arms import OURS, Arm
from tests.benchmarks.learning.generated import revision_stream, ticket_stream
from tests.benchmarks.learning.releases import release_stream
from tests.benchmarks.learning.results import Results, RunKey
from tests.benchmarks.learning.runs import Budget, Run
from tests.benchmarks.learning.streams import DOMAINS, TUNING_DOMAINS, Stream, domain_stream
from tests.benchmarks.learning.world import World

Record = dict[str, Any]
Records = dict[tuple[str, int, int], Record]
"""Records by arm, seed and order."""
PACKAGES: Final = {"domains": DOMAINS, "tuning": TUNING_DOMAINS}
STREAMS: Final = ("domains", "templates", "revisions", "releases")


@dataclass(frozen=True)
class Size:
    """The size of a comparison.

    Attributes:
        batches: Micro-batches per block.
        held_out: Held-out documents per domain.
        seeds: Seeds.
        orders: Orders of the blocks.
        tickets: Tickets of one template.
        facts: Facts that are revised.
        revisions: Times that each fact is revised.
        release_batches: Micro-batches per period of `releases`, whose updates are rebuilt after each period.
    """

    batches: int
    held_out: int
    seeds: tuple[int, ...]
    orders: tuple[int, ...]
    tickets: int = 36
    facts: int = 24
    revisions: int = 4
    release_batches: int = 3


@dataclass
class Comparison:
    """Runs of several arms on one stream.

    Args:
        world: Base and passes.
        results: Finished runs.
        stream: Name of the stream.
        arms: The arms; `OURS` always runs, because the others spend as many tokens.
        size: How much.
        at_once: Runs at the same time.
        until_s: Monotonic time from which no run is begun.
        say: Called with a line for people.

    Attributes:
        unfinished: Runs that were not done because the time was over.
    """

    world: World
    results: Results
    stream: str
    arms: Sequence[Arm]
    size: Size
    at_once: int
    until_s: float = float("inf")
    say: Callable[[str], None] = print
    _streams: dict[tuple[int, int], Stream] = field(default_factory=dict)
    _began_s: float = field(default_factory=time.monotonic)
    unfinished: int = 0
    _done: float = 0.0
    _all: float = 0.0

    def run(self) -> Records:
        """Do the runs that are not done yet, and return the records of all that are."""
        pairs = [(seed, order) for seed in self.size.seeds for order in self.size.orders]
        for seed, order in pairs:
            self._streams[seed, order] = self._make_stream(seed, order)
        arms = [OURS, *(arm for arm in self.arms if arm.name != OURS.name and self._fits(arm))]
        # Runs without a budget first: the others wait for those of `OURS`, which are begun before them.
        planned = [
            (arm, *pair) for matched in (False, True) for pair in pairs for arm in arms if arm.matched is matched
        ]
        self._all = sum(self._cost(arm) for arm, _, _ in planned)
        workers: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(self.at_once):
            workers.put(number)
        futures: dict[tuple[str, int, int], Future[Record | None]] = {}
        with ThreadPoolExecutor(self.at_once) as threads:
            for arm, seed, order in planned:
                reference = futures.get((OURS.name, seed, order)) if arm.matched else None
                futures[arm.name, seed, order] = threads.submit(self._one, arm, seed, order, reference, workers)
            found = {key: future.result() for key, future in futures.items()}
        self.unfinished = sum(record is None for record in found.values())
        return {key: record for key, record in found.items() if record is not None}

    def _fits(self, arm: Arm) -> bool:
        """Return True if the arm says something about the stream: what is revised must come in its order."""
        return self.stream in PACKAGES or arm.learns in {"stream", "nothing"}

    def _make_stream(self, seed: int, order: int) -> Stream:
        if self.stream == "templates":
            return ticket_stream(seed, order, self.size.tickets)
        if self.stream == "revisions":
            return revision_stream(seed, order, self.size.facts, self.size.revisions)
        policy = CutPolicy.of(OURS.settings(self.world.base.name))
        if self.stream == "releases":
            return release_stream(
                seed, order, self.world.tokens_of, policy, self.size.release_batches, self.size.held_out
            )
        return domain_stream(
            self.stream, PACKAGES[self.stream], seed, order, self.world.tokens_of, policy, self.size.batches,
            self.size.held_out,
        )  # fmt: skip

    def _one(
        self, arm: Arm, seed: int, order: int, reference: Future[Record | None] | None, workers: queue.SimpleQueue[int]
    ) -> Record | None:
        """Return the record of one run: the stored one, a new one, or None where the time is over."""
        budget = None
        if reference is not None:
            spent = reference.result()
            if spent is None:
                return None
            budget = Budget.of_run(spent)
        stream = self._streams[seed, order]
        key = self.key(arm, stream, budget)
        record = self.results.find(key)
        if record is not None:
            self._all -= self._cost(arm)
            return record
        if time.monotonic() >= self.until_s:
            return None
        worker = workers.get()
        try:
            made = Run(self.world, arm, stream, worker, budget).run()
        finally:
            workers.put(worker)
        record = self.results.add(key, made)
        self._say_done(arm, key, record)
        return record

    def key(self, arm: Arm, stream: Stream, budget: Budget | None) -> RunKey:
        """Return what identifies a run of an arm on a stream."""
        settings = arm.settings(self.world.base.name)
        recipe = arm.recipe(settings, self.world.base.compute_dtype)
        digest = RunKey.digest_of(
            self.world.code, self.world.base.digest, recipe.config(), asdict(CutPolicy.of(settings)), arm.learns,
            arm.reptile, arm.orthogonality, stream.digest, len(self.world.general_rows), asdict(budget) if budget else None,
        )  # fmt: skip
        return RunKey(arm.name, stream.name, stream.seed, stream.order, self.world.base.name, digest)

    def _cost(self, arm: Arm) -> float:
        """Return the cost of a run, in runs of one pass over the stream."""
        blocks = len(PACKAGES.get(self.stream, ()))
        return {"nothing": 0.1, "retrieval": 0.15, "cumulative": (blocks + 1) / 2}.get(arm.learns, 1.0)

    def _say_done(self, arm: Arm, key: RunKey, record: Record) -> None:
        self._done += self._cost(arm)
        passed_s = time.monotonic() - self._began_s
        left_s = passed_s * max(0.0, self._all - self._done) / self._done
        tokens = sum(update["tokens"] for update in record["updates"])
        self.say(
            f"{key.stream} {key.arm:<28} seed {key.seed} order {key.order}: {len(record['updates'])} updates, "
            f"{tokens} tokens, {record['seconds']:.0f} s; about {left_s / 60:.1f} minutes left"
        )
