"""Measure the seconds from publish to cut, trained, promoted and served, through every role on a real broker.

`python -m tests.benchmarks.bench_loop [--updates 100] [--per-s 1.5]` publishes documents at a steady rate that does not
depend on the roles (an open loop, so a slow update cannot hide the wait of those behind it). A subscriber in this
process loads each version into a model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
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
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.devstack.stack import Stack
from perennial.streams.events.adapter_events import AdapterPromoted
from perennial.streams.events.fields import Event
from perennial.streams.settings import load_settings

ADAPTER = "bench/loop"


class Times:
    """Pairs each promoted version's event with the time at which it was served."""

    def __init__(self) -> None:
        self.events: dict[int, AdapterPromoted] = {}
        self.served: dict[int, datetime] = {}

    def on_event(self, event: Event) -> None:
        if isinstance(event, AdapterPromoted):
            self.events[event.generation] = event

    def on_activate(self, state: AliasState, _stage_s: Mapping[str, float]) -> None:
        self.served[state.generation] = datetime.now(UTC)

    def rows(self) -> list[dict[str, float]]:
        return [
            stage_seconds({**event.stage_at, "served": self.served[generation]})
            for generation, event in sorted(self.events.items())
            if generation in self.served
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100, help="promoted and served updates to measure")
    parser.add_argument("--per-s", type=float, default=1.5, help="documents published per second")
    parser.add_argument("--limit-s", type=float, default=900.0, help="give up after so many seconds")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="perennial-bench-"))
    settings = load_settings(data_dir=folder, kafka="", store="", metrics_port=0)
    stack = Stack(settings, folder, on_progress=lambda line: print(line, flush=True))
    times = Times()
    stop = threading.Event()
    try:
        stack.start()
        settings = stack.settings
        backend = PeftBackend(
            load_base(settings.model.base, settings.model.device, 1),
            LoraConfig(settings.training.rank, settings.training.alpha),
        )
        follower = Follower(settings, ("adapter-updates",), times.on_event)
        subscriber = Subscriber(ADAPTER, backend, settings=settings, replica="bench", on_activate=times.on_activate)
        subscriber.start()
        publishing = threading.Thread(target=publish, args=(settings.kafka.bootstrap, arguments.per_s, stop))
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
        subscriber.close()
        follower.close()
        ledger = LearnedExamples(open_registry(settings), ADAPTER)
        ledger.refresh()
    finally:
        stop.set()
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)
    report(times.rows()[1:], ledger, arguments.per_s)  # the first update is slower, because it warms up


def publish(kafka: str, per_s: float, stop: threading.Event) -> None:
    """Publish each document once, at a steady rate, until `stop` is set."""
    texts = package_docstrings("sympy", 4000)
    started = time.monotonic()
    with Publisher(kafka) as publisher:
        for number, (name, text) in enumerate(texts):
            if stop.wait(max(0.0, started + number / per_s - time.monotonic())):
                return
            publisher.document(adapter=ADAPTER, document_id=name, text=text)


def report(rows: list[dict[str, float]], ledger: LearnedExamples, per_s: float) -> None:
    """Print the table and, as the last line, the JSON."""
    summary = summarise(rows)
    print(f"\n{'stage':<24}{'p50 s':>9}{'p95 s':>9}{'n':>6}")
    for name, (p50, p95, n) in summary.items():
        print(f"{name.replace('_to_', ' -> '):<24}{p50:>9.3f}{p95:>9.3f}{n:>6}")
    print(f"examples: {dict(ledger.counts)}; {per_s} documents/s published; {os.cpu_count()} cores")
    p50, p95, n = summary.get("cut_to_served", (0.0, 0.0, 0))
    print(json.dumps({"updates": n, "cut_to_served_p50_s": round(p50, 3), "cut_to_served_p95_s": round(p95, 3)}))


if __name__ == "__main__":
    main()
