"""Compare erasures and expiries at random times with training from scratch without the forgotten examples.

`python -m tests.benchmarks.bench_forgetting [--examples 500] [--requests 20]` learns docstrings of an installed package
in micro-batches with the shipped base, through the learner's own code over a folder and without Kafka. In the second
half of the stream requests come in between. After each request the weights, optimizer state and replay index must have
the digests of a training from scratch on the remaining examples. The cost of a request is its time divided by that
training's, which is timed right after it. The last line is JSON.

With `--sharing 3`, two other adapters train in the same passes. Then only the number of rows beside the adapter's own
decides the last bits, so the comparison starts from the recorded state before the first use of what is forgotten, and
replays the adapter's updates alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.model.base import load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.loss import mean_nats, row_losses
from perennial.learner.model.tokenization import ExampleError, TokenRow
from perennial.learner.model.turns import FairLock
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.training.state import TrainingState
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.learner.versions.version_writer import VersionWriter, make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.object_store import put_blob
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.quarantine import QuarantineEntry, update_quarantine
from perennial.storage.registry.registry import Head
from perennial.streams.cli.demo.texts import package_docstrings
from perennial.streams.events.models import (
    Batch,
    BlobRef,
    ExampleAccepted,
    ForgetRequested,
    Origin,
    Selector,
    UpdateRequested,
)
from perennial.streams.settings import Settings, load_settings
from tests import scratch
from tests.local_learner import complete

ADAPTER = "bench/forgetting"
PACKAGE = "sympy"
HELD_OUT = 32
TEXT_CHARS = 80
"""Characters of each docstring that are learned, about one row: the benchmark measures updates, not long documents."""
START_MS = 1_700_000_000_000
KINDS = ("document", "subject", "source", "expiry")


@dataclass(frozen=True)
class Outcome:
    """The figures of one request.

    Attributes:
        kind: What kind of request it was, one of `KINDS`.
        examples: How many examples it matched.
        replayed: How many updates were rebuilt.
        cuts: How many updates training from scratch makes.
        forget_s: Seconds of the forgetting.
        scratch_s: Seconds of the training from scratch.
        is_equal: Whether both end in the same state.
        before_nats: Loss on held-out documents before the request, in nats per token.
        after_nats: The same after it.
    """

    kind: str
    examples: int
    replayed: int
    cuts: int
    forget_s: float
    scratch_s: float
    is_equal: bool
    before_nats: float
    after_nats: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="documents in the stream")
    parser.add_argument("--requests", type=int, default=20, help="erasures and expiries")
    parser.add_argument("--per-cut", type=int, default=32, help="documents per micro-batch")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model")
    parser.add_argument("--sharing", type=int, default=1, help="adapters that train in the same passes")
    parser.add_argument("--seed", type=int, default=0, help="determines the requests")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="perennial-bench-"))
    settings = load_settings(
        steps=2, rows=64, row_tokens=24, anchor_rows=4, replay_share=0.3, general_share=0.1, device="cpu",
        threads=arguments.threads, pass_adapters=arguments.sharing, pass_wait_ms=1_000,
    )  # fmt: skip
    try:
        bench = Bench(settings, folder, arguments.examples, arguments.per_cut, arguments.seed, arguments.sharing)
        outcomes = bench.run(arguments.requests)
        readable = bench.readable()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(outcomes, bench.outcomes, readable, bench.pass_adapters)
    if readable or not all(outcome.is_equal for outcome in outcomes):
        sys.exit(1)


class Bench:
    """A stream of documents, what of it was learned, and what was forgotten.

    Args:
        settings: Of the learner.
        folder: For the stores.
        examples: Documents in the stream.
        per_cut: Documents per micro-batch.
        seed: Determines documents and requests.
        sharing: Adapters that train in the same passes.
    """

    def __init__(self, settings: Settings, folder: Path, examples: int, per_cut: int, seed: int, sharing: int) -> None:
        self.rng = random.Random(f"forgetting {seed}")
        self.folder = folder
        self.store = DirectoryStore(folder / "store")
        self.writer: VersionWriter = make_version_writer(
            settings, self.store, load_base(settings.model.base, "cpu", settings.model.threads), FairLock()
        )
        self.others = [self.writer.sibling(f"other-{number}") for number in range(1, sharing)]
        self.states: dict[int, TrainingState] = {}
        self.pass_adapters: Counter[int] = Counter()
        self.forgetter = ForgetExecutor(self.writer, _now, lambda _: None)
        found = package_docstrings(PACKAGE, examples + HELD_OUT)
        texts = [(name, f"{name}: {text}"[:TEXT_CHARS]) for name, text in found]
        self.documents = [self.document(number, name, text) for number, (name, text) in enumerate(texts[:examples])]
        self.cuts = {
            number // per_cut: self.documents[number : number + per_cut] for number in range(0, examples, per_cut)
        }
        self.probe = [row for _, text in texts[examples:] for row in self.rows(text)]
        self.learned: list[ExampleAccepted] = []
        self.forgotten: set[str] = set()
        self.outcomes: Counter[str] = Counter()

    def document(self, number: int, name: str, text: str) -> ExampleAccepted:
        """Return a document with a random subject and source; every third has a lifetime."""
        return ExampleAccepted(
            adapter=ADAPTER, example_id=hashlib.sha256(name.encode()).hexdigest()[:32], kind="document",
            document_id=name, learn=True, text=text, subjects=[f"person-{self.rng.randrange(150)}"],
            source=f"wiki-{self.rng.randrange(60)}", retention_class="permanent" if number % 3 else "P30D",
            origin=Origin(
                cluster_id="bench", topic="documents", topic_id="bench", partition=0, offset=number,
                timestamp_ms=START_MS + 1000 * number,
            ),
        )  # fmt: skip

    def rows(self, text: str) -> list[TokenRow]:
        """Return the rows of a text that is never learned."""
        example = self.document(0, "held-out", text)
        try:
            return self.writer.updater.rows(example)
        except ExampleError:
            return []

    def run(self, requests: int) -> list[Outcome]:
        """Learn the stream with requests in between, and return the figures of each request."""
        done: list[Outcome] = []
        first = len(self.cuts) // 2
        for cut, examples in self.cuts.items():
            manifest = self.learn(cut, examples)
            self.outcomes[manifest.outcome] += 1
            self.pass_adapters[manifest.pass_adapters] += 1
            self.states[cut] = self.writer.state_at(self.writer.head(ADAPTER), ADAPTER)[0]
            self.learned += examples
            due = requests * (cut - first + 1) // (len(self.cuts) - first) if cut >= first else 0
            while len(done) < due:
                done.append(self.forget(len(done)))
                print(table_row(len(done), done[-1]), flush=True)
        return done

    def learn(self, cut: int, examples: Sequence[ExampleAccepted]) -> Manifest:
        """Learn a micro-batch, at the same time as the other adapters learn theirs."""
        together = threading.Barrier(1 + len(self.others))

        def of_thread(writer: VersionWriter, adapter: str) -> Manifest | None:
            make_deterministic(writer.threads)
            own = examples if adapter == ADAPTER else [of_other(example, adapter) for example in examples]
            job = self.job(cut, own, adapter)
            with writer.updater.compute.joining():
                together.wait()
                return UpdateExecutor(writer).update(job, "live").manifest

        adapters = [ADAPTER, *(f"{ADAPTER}-{number}" for number in range(len(self.others)))]
        with ThreadPoolExecutor(len(adapters)) as threads:
            made, *_ = threads.map(of_thread, [self.writer, *self.others], adapters)
        if made is None:
            raise RuntimeError(f"cut {cut} was learned before")
        return made

    def job(self, cut: int, examples: Sequence[ExampleAccepted], adapter: str) -> UpdateRequested:
        """Return the job of an update as curate would."""
        batch = Batch(adapter=adapter, cut=cut, examples=list(examples), skipped=[])
        body = batch.model_dump_json(by_alias=True).encode()
        return UpdateRequested(
            job_id=f"{adapter}-{cut}", adapter=adapter, cut=cut, examples=len(examples), skipped=0, tokens=0, reason="size",
            batch=BlobRef(digest=put_blob(self.store, body), size_bytes=len(body)),
            marks={examples[-1].origin.partition_key(): examples[-1].origin.offset},
            oldest_ms=examples[0].origin.timestamp_ms, newest_ms=examples[-1].origin.timestamp_ms, cut_at=_now(),
        )  # fmt: skip

    def request(self, number: int) -> tuple[str, ForgetRequested, set[str]]:
        """Return a request for something that was learned: its kind, its job, and the documents that it matches."""
        kind = KINDS[number % len(KINDS)]
        left = [example for example in self.learned if example.document_id not in self.forgotten]
        one = self.rng.choice(left)
        fields: dict[str, Any] = {"kind": "erase"}
        if kind == "document":
            fields["selector"] = Selector(document_ids=[one.document_id])
        elif kind == "subject":
            fields["selector"] = Selector(subjects=one.subjects)
        elif kind == "source":
            fields["selector"] = Selector(sources=[one.source or ""])
        else:
            expiring = [example for example in left if example.retention_class != "permanent"]
            ids = [example.example_id for example in self.rng.sample(expiring, 3)]
            fields = {"kind": "expire", "example_ids": ids, "suppress": False}
        job = ForgetRequested(
            job_id=f"job-{number}", request_id=f"request-{number}", adapter=ADAPTER,
            until_ms=self.learned[-1].origin.timestamp_ms, **fields,
        )  # fmt: skip
        return kind, job, {example.document_id for example in left if job.matches(example)}

    def forget(self, number: int) -> Outcome:
        """Run one request as retain and the learner do, then train from scratch without its examples."""
        kind, job, matched = self.request(number)
        entry = QuarantineEntry(
            request_id=job.request_id, job_id=job.job_id, kind=job.kind, until_ms=job.until_ms, suppress=job.suppress,
            example_ids=job.example_ids,
            selector=job.selector.model_dump(mode="json", exclude_none=True) if job.selector else None,
        )  # fmt: skip
        update_quarantine(self.store, ADAPTER, lambda found: found.with_entry(entry))
        before_nats = self.held_out_nats()
        began = time.perf_counter()
        done = self.forgetter.forget(job, "live")
        complete(self.store, done)
        forget_s = time.perf_counter() - began
        after_nats = self.held_out_nats()
        self.forgotten |= matched
        scratch_s, made = self.replay(matched) if self.others else self.scratch(number, self.forgotten)
        head = self.writer.registry.head(ADAPTER)
        return Outcome(
            kind, len(matched), self.replayed(), len(made.outcomes), forget_s, scratch_s,
            head is not None and made.equals(head.manifest), before_nats, after_nats,
        )  # fmt: skip

    def scratch(self, number: int, forgotten: Collection[str]) -> tuple[float, scratch.Scratch]:
        """Train from scratch on what was learned and not forgotten, in a store of its own; return seconds and result."""
        store = DirectoryStore(self.folder / f"scratch-{number}")
        known = {example.document_id for example in self.learned} - set(forgotten)
        cuts = {cut: [e for e in examples if e.document_id in known] for cut, examples in self.cuts.items()}
        began = time.perf_counter()
        made = scratch.train(self.writer.updater_of(None), store, ADAPTER, cuts)
        return time.perf_counter() - began, made

    def replay(self, matched: Collection[str]) -> tuple[float, scratch.Scratch]:
        """Train on from the recorded state before the first use of the documents; return seconds and result."""
        learned_by = {example.document_id for example in self.learned}
        cuts = {cut: examples for cut, examples in self.cuts.items() if examples[0].document_id in learned_by}
        first = min(cut for cut, examples in cuts.items() if any(e.document_id in matched for e in examples))
        later = {
            cut: [e for e in examples if e.document_id not in self.forgotten]
            for cut, examples in cuts.items() if cut >= first
        }  # fmt: skip
        updater = self.writer.updater_of(None)
        alone = replace(updater, shared=GatheredPasses())
        began = time.perf_counter()
        made = scratch.train(alone, self.store, ADAPTER, later, self.states.get(first - 1))
        seconds = time.perf_counter() - began
        self.states |= made.states
        return seconds, made

    def replayed(self) -> int:
        """Return how many updates the newest forgetting rebuilt."""
        registry = self.writer.registry
        head = registry.head(ADAPTER)
        count, version = 0, head.manifest.parent if head else None
        before = [v for _, v in registry.versions(ADAPTER) if registry.manifest(ADAPTER, v).kind == "forget"][1:]
        known = set(self.chain(before[0])) if before else set()
        while version is not None and version not in known:
            manifest = registry.manifest(ADAPTER, version)
            if manifest.kind != "replayed":
                break
            count, version = count + 1, manifest.head
        return count

    def chain(self, version: str | None) -> list[str]:
        """Return a version and all versions before it on its schedule."""
        found = []
        while version is not None:
            found.append(version)
            version = self.writer.registry.manifest(ADAPTER, version).schedule_parent
        return found

    def held_out_nats(self) -> float:
        """Return the loss of the newest version on documents that are never learned, in nats per token."""
        head = self.writer.registry.head(ADAPTER)
        if head is None:
            raise ValueError("nothing was learned")
        updater = self.writer.updater
        state, _ = self.writer.state_at(Head(head.seq, head.version, head.manifest), ADAPTER)
        updater.lora.load(state.weights)
        return mean_nats(row_losses(updater.lora, self.probe, pad=updater.codec.pad, adapted=True))

    def readable(self) -> int:
        """Return how many forgotten documents can still be found in a blob of the store."""
        blobs = [path.read_bytes() for path in (self.folder / "store/blobs").rglob("*") if path.is_file()]
        needles = [json.dumps({"document_id": name}, separators=(",", ":"))[1:-1].encode() for name in self.forgotten]
        return sum(any(needle in blob for blob in blobs) for needle in needles)


def of_other(example: ExampleAccepted, adapter: str) -> ExampleAccepted:
    """Return the example as a document of another adapter, with a name of its own."""
    return example.model_copy(update={"adapter": adapter, "document_id": f"{adapter}/{example.document_id}"})


def table_row(number: int, outcome: Outcome) -> str:
    """Return one row of the table."""
    return (
        f"{number:>3} {outcome.kind:<9}{outcome.examples:>4} examples {outcome.replayed:>4} of {outcome.cuts:>3} updates"
        f"{outcome.forget_s:>8.2f} s {outcome.scratch_s:>8.2f} s {outcome.forget_s / outcome.scratch_s:>7.3f}"
        f"  {'equal' if outcome.is_equal else 'DIFFERENT'}"
    )


def report(outcomes: Sequence[Outcome], learned: Counter[str], readable: int, pass_adapters: Counter[int]) -> None:
    """Print the summary and, as the last line, the JSON."""
    print(f"updates: {dict(learned)}; adapters per pass: {dict(pass_adapters)}; {os.cpu_count()} cores")
    for kind in KINDS:
        ratios = [o.forget_s / o.scratch_s for o in outcomes if o.kind == kind]
        if ratios:
            print(
                f"{kind:<10} median cost {statistics.median(ratios):.3f} of the training compared with, n {len(ratios)}"
            )
    kept = statistics.fmean(o.after_nats / o.before_nats for o in outcomes)
    print(
        json.dumps(
            {
                "requests": len(outcomes),
                "digest_equal": sum(outcome.is_equal for outcome in outcomes),
                "median_cost_ratio": round(statistics.median(o.forget_s / o.scratch_s for o in outcomes), 3),
                "kept_loss_pct": round(100 * kept, 2),
                "readable": readable,
                "pass_adapters": max(pass_adapters),
            }
        )
    )


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    main()
