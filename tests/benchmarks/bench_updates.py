"""Time whole updates of many adapters, gate included: in shared passes, and one after another with PEFT's layers.

`python -m tests.benchmarks.bench_updates [--adapters 16] [--documents 1] [--cuts 4] [--base shipped]`. Each adapter has a
micro-batch of its own per cut. Both arms learn the same documents from the same states with the service's own settings
and code, without Kafka; they take turns, and the first cut, which warms up, is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from perennial.learner.model.base import load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.turns import FairLock
from perennial.learner.training.state import TrainingState
from perennial.learner.training.update import Updater, UpdateResult
from perennial.learner.versions.version_writer import VersionWriter, make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli.demo.texts import package_docstrings
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.settings import load_settings
from tests import tiny


@dataclass(frozen=True)
class Timed:
    """The figures of one cut of all adapters.

    Attributes:
        wall_s: Seconds.
        cpu_s: Seconds of processor time.
        tokens: Tokens that were trained.
        shared_by: Most adapters in one pass.
    """

    wall_s: float
    cpu_s: float
    tokens: int
    shared_by: int


class Arm:
    """Adapters that learn in one of the two ways."""

    def __init__(self, writers: Sequence[VersionWriter], adapters: int, *, shared: bool) -> None:
        self.writers, self.shared = writers, shared
        lora = writers[0].updater.lora
        self.states = [TrainingState(lora.initial_weights(name(number), 0)) for number in range(adapters)]

    def learn(self, cut: int, documents: Sequence[Sequence[ExampleAccepted]]) -> Timed:
        """Let each adapter learn its documents."""

        def update(number: int) -> UpdateResult:
            writer = self.writers[number if self.shared else 0]
            make_deterministic(writer.threads)
            updater = with_passes(writer.updater_of(None), shared=self.shared)
            with updater.compute.joining():
                return updater.update(
                    self.states[number], documents[number], adapter=name(number), cut=cut,
                    batch="sha256:" + "0" * 64, replayed=lambda *_: None,
                )  # fmt: skip

        began, began_cpu = time.perf_counter(), time.process_time()
        results = self.of_all(update)
        timed = (time.perf_counter() - began, time.process_time() - began_cpu)
        self.states = [result.state for result in results]
        return Timed(*timed, sum(result.tokens for result in results), max(result.pass_adapters for result in results))

    def of_all(self, update: Callable[[int], UpdateResult]) -> list[UpdateResult]:
        """Return the results of all adapters, computed at once or one after another."""
        numbers = range(len(self.states))
        if not self.shared:
            return [update(number) for number in numbers]
        with ThreadPoolExecutor(len(self.states)) as threads:
            return list(threads.map(update, numbers))


def name(number: int) -> str:
    return f"bench/{number}"


def with_passes(updater: Updater, *, shared: bool) -> Updater:
    return replace(updater, recipe=replace(updater.recipe, shared_passes=shared))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--documents", type=int, default=1, help="documents per adapter and cut")
    parser.add_argument("--cuts", type=int, default=4)
    parser.add_argument("--base", default="shipped")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="perennial-bench-"))
    settings = load_settings(base=arguments.base, pass_adapters=arguments.adapters)
    try:
        base = load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
        writer = make_version_writer(settings, DirectoryStore(folder), base, FairLock())
        writers = [writer, *(writer.sibling(f"bench-{number}") for number in range(1, arguments.adapters))]
        texts = iter(package_docstrings("sympy", arguments.adapters * arguments.documents * arguments.cuts))
        arms = {shared: Arm(writers, arguments.adapters, shared=shared) for shared in (False, True)}
        timed: dict[bool, list[Timed]] = {False: [], True: []}
        for cut in range(1, arguments.cuts + 1):
            documents = [
                [tiny.document(100 * cut + n, next(texts)[1], name(number)) for n in range(arguments.documents)]
                for number in range(arguments.adapters)
            ]
            for shared in (False, True) if cut % 2 else (True, False):
                figures = arms[shared].learn(cut, documents)
                timed[shared].append(figures)
                print(
                    f"cut {cut} {'shared passes' if shared else 'one by one':<14}{figures.wall_s:>8.2f} s"
                    f"{figures.cpu_s:>8.2f} s of processor time, {figures.tokens} tokens, "
                    f"at most {figures.shared_by} adapters in a pass",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    pairs = list(zip(timed[False], timed[True], strict=True))[1:]
    wall = [alone.wall_s / together.wall_s for alone, together in pairs]
    cpu = [alone.cpu_s / together.cpu_s for alone, together in pairs]
    print(
        json.dumps(
            {
                "base": arguments.base, "device": base.device.type, "cores": os.cpu_count(),
                "adapters": arguments.adapters, "updates_together": round(statistics.median(wall), 2),
                "updates_together_low": round(min(wall), 2), "updates_together_high": round(max(wall), 2),
                "processor_time": round(statistics.median(cpu), 2), "n": len(pairs),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
