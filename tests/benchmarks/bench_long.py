"""Let one adapter learn for a long time, and measure whether its updates and its store grow.

`python -m tests.benchmarks.bench_long [--updates 1000] [--keep-versions 256]`: consecutive updates of four documents each,
through the learner's own code over a store in a folder, without Kafka, with the settings that users get. After every 50
updates old versions are collected as `perennial gc` collects them. The cost of an update is its processor time per trained
token, so that longer documents do not count as growth, and the median of the first fifth (without the first ten updates)
is compared with that of the last fifth. The store is compared after a collection at half of the updates and at the end;
micro-batches and manifests, which stay because forgetting trains from them, are listed apart: they grow by what is learned.
The last line is JSON; the exit code is 1 where a goal was missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from perennial.learner.forgetting.collect_versions import collect_versions
from perennial.learner.model.base import load_base
from perennial.learner.model.turns import FairLock
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.learner.versions.version_writer import VersionWriter, make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.demo.texts import package_docstrings
from perennial.streams.settings import load_settings
from tests import jobs, tiny

ADAPTER = "bench/long"
DOCUMENTS = 4
COLLECT_EVERY = 50
WARM_UP = 10
GOALS = {"cost_growth_pct": 5.0, "store_growth_pct": 5.0}
TEXTS = {"sympy": 2000, "scipy": 1000, "torch": 1000}


@dataclass(frozen=True)
class Update:
    """The figures of one update.

    Attributes:
        outcome: What became of it.
        cpu_ms_per_token: Processor time per trained token.
        wall_s: Seconds.
    """

    outcome: str
    cpu_ms_per_token: float
    wall_s: float


def documents() -> Iterator[str]:
    """Yield the documents, one package's after another, so that the subject changes."""
    for package, count in TEXTS.items():
        for _, text in package_docstrings(package, count):
            yield text


def state_bytes(registry: Registry, folder: Path) -> tuple[int, int]:
    """Return the bytes of weights, optimizers and replay indices that the store holds, and of everything."""
    states: set[str] = set()
    for _, version in registry.versions(ADAPTER):
        manifest = registry.manifest(ADAPTER, version)
        states.update(ref.digest for ref in (manifest.weights, manifest.optimizer, manifest.replay) if ref)
    of_states = sum(path.stat().st_size for digest in states if (path := folder / blob_key(digest)).exists())
    return of_states, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def learn(writer: VersionWriter, cut: int, texts: Iterator[str]) -> Update:
    """Let the adapter learn the next documents."""
    first = DOCUMENTS * (cut - 1)
    examples = [tiny.document(first + number, next(texts), ADAPTER) for number in range(DOCUMENTS)]
    job = jobs.update(writer.registry.store, cut, examples, adapter=ADAPTER)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    result = UpdateExecutor(writer).update(job, "live")
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    tokens = result.manifest.tokens if result.manifest else 0
    return Update(result.outcome, 1000 * cpu_s / max(1, tokens), wall_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=1000, help="at most 1,000: there are so many documents")
    parser.add_argument("--keep-versions", type=int, default=load_settings().store.keep_versions)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="perennial-bench-"))
    updates: list[Update] = []
    sizes: dict[int, tuple[int, int]] = {}
    try:
        settings = load_settings()
        base = load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
        store = DirectoryStore(folder, fsync=False)
        writer = make_version_writer(settings, store, base, FairLock())
        texts = documents()
        for cut in range(1, arguments.updates + 1):
            updates.append(learn(writer, cut, texts))
            if cut % COLLECT_EVERY:
                continue
            collect_versions(writer.registry, ADAPTER, arguments.keep_versions)
            sizes[cut] = state_bytes(writer.registry, folder)
            recent = updates[-COLLECT_EVERY:]
            print(
                f"{cut:>5} updates: {statistics.median(u.cpu_ms_per_token for u in recent):.3f} ms of processor time a token, "
                f"{statistics.median(u.wall_s for u in recent):.2f} s an update, states {sizes[cut][0] / 1e6:.1f} MB, "
                f"store {sizes[cut][1] / 1e6:.1f} MB, {dict(Counter(u.outcome for u in recent))}",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    summary = summary_of(updates, sizes)
    missed = [f"{name} {summary[name]} > {goal}" for name, goal in GOALS.items() if not summary[name] <= goal]
    for miss in missed:
        print(f"missed: {miss}")
    print(json.dumps(summary))
    sys.exit(1 if missed else 0)


def summary_of(updates: list[Update], sizes: dict[int, tuple[int, int]]) -> dict[str, float]:
    """Return the figures of the last line."""
    fifth = max(1, len(updates) // 5)
    early = statistics.median(u.cpu_ms_per_token for u in updates[WARM_UP:fifth] or updates)
    late = statistics.median(u.cpu_ms_per_token for u in updates[-fifth:])
    last = max(sizes)
    half = min(sizes, key=lambda cut: abs(cut - last / 2))
    return {
        "updates": len(updates),
        "promoted": sum(u.outcome == "promoted" for u in updates),
        "cost_growth_pct": round(100 * (late / early - 1), 1),
        "store_growth_pct": round(100 * (sizes[last][0] / sizes[half][0] - 1), 1),
        "whole_store_growth_pct": round(100 * (sizes[last][1] / sizes[half][1] - 1), 1),
        "kept_bytes_per_update": round((sizes[last][1] - sizes[last][0]) / len(updates)),
    }


if __name__ == "__main__":
    main()
