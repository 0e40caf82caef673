"""Measure what grows: operations over many versions of one adapter, over many adapters, and the memory of the roles.

`python -m tests.benchmarks.bench_scale [--quick]` writes synthetic objects in the real formats into a store in memory
that counts its calls, and runs the real code over them: update, forget, explain, listing, subscriber start, calendar
round, curate restore. A table of seconds and store calls; the last line is JSON: `forget_calls_growth` is the store
calls of forgetting a recent example at the largest number of versions over those at the smallest, and
`resident_bytes_per_adapter` the memory that curate, retain and the learner keep for an adapter.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.storage.objects.object_store import put_blob
from perennial.storage.registry.manifest import BlobRef
from perennial.storage.registry.quarantine import QuarantineEntry, update_quarantine
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapters import adapter_rows
from perennial.streams.cli.explain import explain_examples
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.client.testing import MemoryBackend, small_weights
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.models import ExampleScored, ForgetRequested, Selector
from perennial.streams.retain.adapter_calendar import AdapterCalendar
from perennial.streams.retain.request_store import load_in_force
from perennial.streams.retain.store_facts import StoreFacts
from perennial.streams.settings import Settings
from tests import jobs, tiny
from tests.memory_store import MemoryStore
from tests.synthetic import extend_history, registry_of, write_adapter
from tests.unit.learner.test_versions import ADAPTER, local_learner, now

VERSIONS = (100, 1_000, 10_000)
ADAPTERS = (1_000, 10_000, 100_000)
RECENT = 3
"""How many updates before the newest one learned the example that is forgotten."""
_REAL_UPDATES = 6
_NOW_MS = 1_800_000_000_000
_MEMORY_ADAPTERS = 100
_CURATE_EXAMPLES = 6_000
"""So many that curate's windows are full."""


@dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
        what: The operation.
        size: The number of versions, or of adapters.
        seconds: How long it took.
        calls: How many calls of the store it made.
    """

    what: str
    size: int
    seconds: float
    calls: int


class Bench:
    """Collects figures.

    Attributes:
        figures: All figures so far.
    """

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    @contextmanager
    def measure(self, store: MemoryStore, what: str, size: int) -> Iterator[None]:
        """Time what happens inside, and count its store calls."""
        before, began = sum(store.calls.values()), time.perf_counter()
        yield
        figure = Figure(what, size, time.perf_counter() - began, sum(store.calls.values()) - before)
        self.figures.append(figure)
        print(f"{what:<44} {size:>8,} {figure.seconds:>10.4f} s {figure.calls:>9,} calls", flush=True)

    def calls(self, what: str, size: int) -> int:
        """Return the store calls of a measured operation."""
        return next(figure.calls for figure in self.figures if (figure.what, figure.size) == (what, size))


def history_of(store: MemoryStore, versions: int) -> int:
    """Write an adapter with that many versions; the newest ones by real updates. Return the next document's number."""
    learner = local_learner(store)
    learner.update(jobs.update(store, 0, [tiny.document(0, "first text")]), "live")
    extend_history(store, ADAPTER, versions - _REAL_UPDATES - 1)
    learner = local_learner(store)
    for number in range(versions - _REAL_UPDATES, versions):
        learner.update(jobs.update(store, number, [tiny.document(number, f"real text {number}")]), "live")
    return versions


def over_versions(bench: Bench, versions: int) -> None:
    """Measure the operations on one adapter with that many versions."""
    store = MemoryStore()
    number = history_of(store, versions)
    learner = local_learner(store)
    with bench.measure(store, "update", versions):
        learner.update(jobs.update(store, number, [tiny.document(number, "one more text")]), "live")
    with bench.measure(store, "calendar: one adapter, cold", versions):
        facts = _facts(store)
        AdapterCalendar(facts, 0).look(ADAPTER, load_in_force(store), expiring=False, now_ms=_NOW_MS)
    with bench.measure(store, "explain one document", versions):
        found = explain_examples(registry_of(store), ADAPTER, "live", f"doc-{versions - RECENT}")
    assert len(found) == 1
    with bench.measure(store, "adapters history, newest 20", versions):
        registry = registry_of(store)
        rows = [registry.manifest(ADAPTER, v).outcome for _, v in registry.versions(ADAPTER, limit=20)]
    assert len(rows) == 20
    with bench.measure(store, "subscriber start", versions):
        _start_subscriber(store, ADAPTER)
    with bench.measure(store, "forget a recent example", versions):
        _forget(store, f"doc-{versions - RECENT}")
    _quarantine(store, f"doc-{number + 1}")
    learner = local_learner(store)
    with bench.measure(store, "update with a quarantined example", versions):
        examples = [tiny.document(number + 1, "to be left out"), tiny.document(number + 2, "to be learned")]
        learner.update(jobs.update(store, number + 1, examples), "live")


def far_back(bench: Bench, versions: int) -> None:
    """Measure the forgetting of the first example: every update is trained again."""
    store = MemoryStore()
    history_of(store, versions)
    with bench.measure(store, "forget the first example (replays all)", versions):
        _forget(store, "doc-0")


def over_adapters(bench: Bench, adapters: int) -> None:
    """Measure the operations over that many adapters."""
    store = MemoryStore()
    weights = small_weights(0)
    ref = BlobRef(digest=put_blob(store, weights), size_bytes=len(weights))
    names = [f"tenant-{n % 97}/user-{n}" for n in range(adapters)]
    for name in names:
        write_adapter(store, name, ref)
    with bench.measure(store, "adapters ls", adapters):
        assert len(adapter_rows(registry_of(store), "live")) == adapters
    facts, in_force = _facts(store), load_in_force(store)
    calendar = AdapterCalendar(facts, 0)
    for round_name in ("cold", "warm"):
        with bench.measure(store, f"calendar: round over all adapters, {round_name}", adapters):
            for name in facts.adapters():
                calendar.look(name, in_force, expiring=False, now_ms=_NOW_MS)
    with bench.measure(store, "subscriber start (of many adapters)", adapters):
        _start_subscriber(store, names[-1])
    state = _curate_states(names[-1:], _CURATE_EXAMPLES)[names[-1]]
    store.put_if_absent(f"state/curate/{names[-1]}", state)
    with bench.measure(store, "curate restore of one adapter", adapters):
        MicroBatcher.restore(names[-1], _policy(), store.get(f"state/curate/{names[-1]}").data)


def memory(adapters: int = _MEMORY_ADAPTERS) -> dict[str, int]:
    """Return the bytes that each role keeps in memory per adapter, measured as Python allocates them."""
    store = MemoryStore()
    weights = small_weights(0)
    ref = BlobRef(digest=put_blob(store, weights), size_bytes=len(weights))
    names = [f"tenant-{n % 97}/user-{n}" for n in range(adapters)]
    for name in names:
        write_adapter(store, name, ref)
    in_force = load_in_force(store)
    states = _curate_states(names, _CURATE_EXAMPLES)

    def curate() -> object:
        return [MicroBatcher.restore(name, _policy(), states[name]) for name in names]

    def calendar() -> object:
        facts = _facts(store)
        made = AdapterCalendar(facts, 0)
        for name in made.order(_NOW_MS):
            made.look(name, in_force, expiring=False, now_ms=_NOW_MS)
        return facts, made

    def learner() -> object:
        registry: Registry = registry_of(store)
        for name in names:
            registry.head(name)
        return registry

    kept = {"curate": curate, "retain": calendar, "learner": learner}
    return {role: _allocated(made, adapters) for role, made in kept.items()}


def _allocated(make: Callable[[], object], adapters: int) -> int:
    make()  # what is loaded once, such as modules and caches of a fixed size, does not count
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    kept = make()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return max(0, after - before) // adapters


def _facts(store: MemoryStore) -> StoreFacts:
    return StoreFacts(Settings.of(), store, None)


def _policy() -> CutPolicy:
    return CutPolicy.of(Settings.of())


def _curate_states(adapters: Sequence[str], examples: int) -> dict[str, bytes]:
    """Return curate's state of each adapter after that many examples, cut in micro-batches of 64."""
    rng, stands_in = random.Random(0), "one/adapter"
    batcher: MicroBatcher[int] = MicroBatcher(stands_in, _policy())
    for number in range(examples):
        scored = ExampleScored(
            example=tiny.document(number, "some text", adapter=stands_in), tokens=4, live_version="sha256:" + "0" * 64,
            live_generation=1, base_loss_nats=5 + rng.gauss(0, 0.3), live_loss_nats=4 + rng.gauss(0, 0.3),
        )  # fmt: skip
        batcher.offer(scored, number, 0)
        if number % 64 == 63:
            batcher.apply(batcher.cut(datetime(2026, 1, 1, tzinfo=UTC), "size"))
    state = batcher.fence().state
    return {name: state.replace(stands_in.encode(), name.encode()) for name in adapters}


def _start_subscriber(store: MemoryStore, adapter: str) -> None:
    settings = Settings.of(poll_s=0.05, kafka="")
    with Subscriber(adapter, MemoryBackend(), store=store, settings=settings) as subscriber:
        assert subscriber.wait_for(generation=1, timeout_s=30)


def _forget(store: MemoryStore, document_id: str) -> None:
    _quarantine(store, document_id)
    job = ForgetRequested(
        job_id=f"job-{document_id}", request_id=document_id, kind="erase", adapter=ADAPTER, until_ms=_NOW_MS,
        selector=Selector(document_ids=[document_id]),
    )  # fmt: skip
    result = ForgetExecutor(local_learner(store), now, lambda _: None).forget(job, "live")
    assert result.completion is not None, result
    result.completion.record(store)


def _quarantine(store: MemoryStore, document_id: str) -> None:
    selector = Selector(document_ids=[document_id]).model_dump(mode="json", exclude_none=True)
    entry = QuarantineEntry(
        request_id=document_id, job_id=f"job-{document_id}", kind="erase", selector=selector, example_ids=[],
        until_ms=_NOW_MS, suppress=True,
    )  # fmt: skip
    update_quarantine(store, ADAPTER, lambda found: found.with_entry(entry))


def run(versions: tuple[int, ...], adapters: tuple[int, ...], memory_adapters: int) -> dict[str, Any]:
    """Run the benchmark; return the summary.

    Args:
        versions: Numbers of versions, ascending.
        adapters: Numbers of adapters, ascending.
        memory_adapters: Over how many adapters memory is measured.
    """
    bench, began = Bench(), time.perf_counter()
    for size in versions:
        over_versions(bench, size)
    far_back(bench, versions[0])
    for size in adapters:
        over_adapters(bench, size)
    per_adapter = memory(memory_adapters)

    def growth(what: str) -> float:
        return round(bench.calls(what, versions[-1]) / bench.calls(what, versions[0]), 2)

    return {
        "benchmark": "scale", "versions": list(versions), "adapters": list(adapters),
        "forget_calls_growth": growth("forget a recent example"),
        "sweep_calls_growth": growth("update with a quarantined example"),
        "update_calls_growth": growth("update"), "explain_calls_growth": growth("explain one document"),
        "calendar_calls_growth": growth("calendar: one adapter, cold"),
        "resident_bytes_per_adapter": sum(per_adapter.values()),
        "resident_bytes_by_role": per_adapter, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print the summary; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for tests")
    options = parser.parse_args(arguments)
    summary = run((32, 320), (50,), 20) if options.quick else run(VERSIONS, ADAPTERS, _MEMORY_ADAPTERS)
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
