"""Measure the seconds from publish to cut, trained, promoted and served, through every role on a real broker.

`python -m tests.benchmarks.bench_loop [--updates 100] [--per-s 1.5] [--adapters 64]` publishes documents at a steady rate
that does not depend on the roles (an open loop, so a slow update cannot hide the wait of those behind it). With one
adapter, a subscriber in this process loads each version into a model. With more, or `--backend directory`, the documents
are dealt out to the adapters in turn, and a subscriber of each writes its versions into a folder. With `--protected` all
clients speak TLS and SCRAM-SHA-512, and records, versions and events are signed and verified. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from perennial.learner.model.base import load_base
from perennial.learner.model.lora import LoraConfig
from perennial.learner.serving.peft_backend import PeftBackend
from perennial.storage.registry.registry import AliasState
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.demo.follow import Follower
from perennial.streams.cli.demo.latency import stage_seconds, summarise
from perennial.streams.cli.demo.learned_examples import LearnedExamples
from perennial.streams.cli.demo.texts import package_docstrings
from perennial.streams.client.backend import Backend
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.devstack.stack import Stack
from perennial.streams.events.adapter_events import AdapterPromoted
from perennial.streams.events.fields import Event
from perennial.streams.settings import Settings, load_settings
from tests.benchmarks.protection import protected_broker


class Times:
    """Pairs each promoted version's event with the time at which it was served."""

    def __init__(self) -> None:
        self.events: dict[tuple[str, int], AdapterPromoted] = {}
        self.served: dict[tuple[str, int], datetime] = {}

    def on_event(self, event: Event) -> None:
        if isinstance(event, AdapterPromoted):
            self.events[event.adapter, event.generation] = event

    def on_activate(self, adapter: str, state: AliasState, _stage_s: Mapping[str, float]) -> None:
        self.served[adapter, state.generation] = datetime.now(UTC)

    def rows(self) -> list[dict[str, float]]:
        """Return the stages of each version, those that were promoted first in front."""
        found = [key for key in self.events if key in self.served]
        found.sort(key=lambda key: self.events[key].published_at)
        return [stage_seconds({**self.events[key].stage_at, "served": self.served[key]}) for key in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100, help="promoted and served updates to measure")
    parser.add_argument("--per-s", type=float, default=1.5, help="documents published per second")
    parser.add_argument("--adapters", type=int, default=1, help="adapters that the documents are dealt out to")
    parser.add_argument("--backend", choices=("peft", "directory"), help="default: peft with one adapter")
    parser.add_argument("--protected", action="store_true", help="TLS, SCRAM and signatures")
    parser.add_argument("--limit-s", type=float, default=900.0, help="give up after so many seconds")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="perennial-bench-"))
    protection = ExitStack()
    if arguments.protected:
        os.environ.update(protection.enter_context(protected_broker(folder)))
    settings = load_settings(
        data_dir=folder, store="", metrics_port=0, **({} if arguments.protected else {"kafka": ""})
    )
    stack = Stack(settings, folder, on_progress=lambda line: print(line, flush=True))
    times = Times()
    stop = threading.Event()
    adapters = [f"bench/loop-{number}" for number in range(arguments.adapters)]
    subscribers: list[Subscriber] = []
    try:
        stack.start()
        settings = stack.settings
        backend = made_backend(settings, folder, arguments.backend or ("directory" if adapters[1:] else "peft"))
        follower = Follower(settings, ("adapter-updates",), times.on_event)
        for adapter in adapters:
            on_activate = partial(times.on_activate, adapter)
            subscribers.append(
                Subscriber(adapter, backend, settings=settings, replica="bench", on_activate=on_activate)
            )
            subscribers[-1].start()
        publishing = threading.Thread(target=publish, args=(settings.kafka.bootstrap, arguments.per_s, adapters, stop))
        publishing.start()
        deadline = time.monotonic() + arguments.limit_s
        reported = 0
        while len(times.served) <= arguments.updates and time.monotonic() < deadline:
            time.sleep(0.5)
            if len(times.served) >= reported + 10:
                reported = len(times.served)
                print(f"{reported} updates served", flush=True)
        stop.set()
        publishing.join()
        for subscriber in subscribers:
            subscriber.close()
        follower.close()
        counts: Counter[str] = Counter()
        shared: list[int] = []
        for adapter in adapters:
            ledger = LearnedExamples(open_registry(settings), adapter)
            ledger.refresh()
            counts.update(ledger.counts)
            shared += shared_passes(settings, adapter)
    finally:
        stop.set()
        stack.stop()
        protection.close()
        shutil.rmtree(folder, ignore_errors=True)
    report(times.rows()[1:], counts, shared, arguments.per_s)  # the first update is slower, because it warms up


def made_backend(settings: Settings, folder: Path, kind: str) -> Backend:
    """Return the backend that the subscribers share."""
    if kind == "directory":
        return DirectoryBackend(folder / "served")
    base = load_base(settings.model.base, settings.model.device, 1)
    return PeftBackend(base, LoraConfig(settings.training.rank, settings.training.alpha))


def shared_passes(settings: Settings, adapter: str) -> list[int]:
    """Return how many adapters shared a pass with each version of the adapter, itself included."""
    registry = open_registry(settings)
    return [registry.manifest(adapter, version).pass_adapters for _, version in registry.versions(adapter)]


def publish(kafka: str, per_s: float, adapters: Sequence[str], stop: threading.Event) -> None:
    """Publish each document once, at a steady rate, to one adapter after another, until `stop` is set."""
    texts = package_docstrings("sympy", 4000)
    started = time.monotonic()
    with Publisher(kafka) as publisher:
        for number, (name, text) in enumerate(texts):
            if stop.wait(max(0.0, started + number / per_s - time.monotonic())):
                return
            publisher.document(adapter=adapters[number % len(adapters)], document_id=name, text=text)


def report(rows: list[dict[str, float]], counts: Mapping[str, int], shared: Sequence[int], per_s: float) -> None:
    """Print the table and, as the last line, the JSON."""
    summary = summarise(rows)
    print(f"\n{'stage':<24}{'p50 s':>9}{'p95 s':>9}{'n':>6}")
    for name, (p50, p95, n) in summary.items():
        print(f"{name.replace('_to_', ' -> '):<24}{p50:>9.3f}{p95:>9.3f}{n:>6}")
    print(f"examples: {dict(counts)}; {per_s} documents/s published; {os.cpu_count()} cores")
    print(f"adapters that shared a pass, by version: {dict(sorted(Counter(shared).items()))}")
    p50, p95, n = summary.get("cut_to_served", (0.0, 0.0, 0))
    print(json.dumps({"updates": n, "cut_to_served_p50_s": round(p50, 3), "cut_to_served_p95_s": round(p95, 3)}))


if __name__ == "__main__":
    main()
