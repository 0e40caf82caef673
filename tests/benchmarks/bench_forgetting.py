"""Random erasures and expiries while a stream is learned, each compared with training from scratch without them.

`python -m tests.benchmarks.bench_forgetting [--examples 500] [--requests 20]`: docstrings of an installed package are
learned cut by cut with the shipped base, through the learner's own code over a folder and without Kafka. In the second
half of the stream requests come in between. After each one the weights, optimizer and replay index must have the
digests that training from scratch on what is left comes to; its seconds are divided by that training's, timed right
after it. The last line is JSON.
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
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.model.base import load_base
from perennial.learner.model.loss import mean_nats, row_losses
from perennial.learner.model.tokenization import ExampleError, TokenRow
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.learner.versions.version_writer import VersionWriter, make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.object_store import put_blob
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
"""Of each docstring so much is learned, about one row: what is measured is updates, not long documents."""
BORN_MS = 1_700_000_000_000
KINDS = ("document", "subject", "source", "expiry")


@dataclass(frozen=True)
class Outcome:
    """One request. replayed, cuts: updates made anew, and updates that training from scratch makes."""

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
    parser.add_argument("--seed", type=int, default=0, help="of what is asked for")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="perennial-bench-"))
    settings = load_settings(
        steps=2, rows=64, row_tokens=24, anchor_rows=4, replay_share=0.3, general_share=0.1, device="cpu",
        threads=arguments.threads,
    )  # fmt: skip
    try:
        bench = Bench(settings, folder, arguments.examples, arguments.per_cut, arguments.seed)
        outcomes = bench.run(arguments.requests)
        readable = bench.readable()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(outcomes, bench.outcomes, readable)
    if readable or not all(outcome.is_equal for outcome in outcomes):
        sys.exit(1)


class Bench:
    """A stream of documents, what of it is known, and what was forgotten."""

    def __init__(self, settings: Settings, folder: Path, examples: int, per_cut: int, seed: int) -> None:
        self.rng = random.Random(f"forgetting {seed}")
        self.folder = folder
        self.store = DirectoryStore(folder / "store")
        self.line: VersionWriter = make_version_writer(
            settings, self.store, load_base(settings.model.base, "cpu", settings.model.threads)
        )
        self.forgetter = ForgetExecutor(self.line, _now, lambda _: None)
        found = package_docstrings(PACKAGE, examples + HELD_OUT)
        texts = [(name, f"{name}: {text}"[:TEXT_CHARS]) for name, text in found]
        self.documents = [self.document(number, name, text) for number, (name, text) in enumerate(texts[:examples])]
        self.cuts = {
            number // per_cut: self.documents[number : number + per_cut] for number in range(0, examples, per_cut)
        }
        self.probe = [row for _, text in texts[examples:] for row in self.rows(text)]
        self.known: list[ExampleAccepted] = []
        self.gone: set[str] = set()
        self.outcomes: Counter[str] = Counter()

    def document(self, number: int, name: str, text: str) -> ExampleAccepted:
        """A document of one of some persons and sources; every third has a lifetime."""
        return ExampleAccepted(
            adapter=ADAPTER, example_id=hashlib.sha256(name.encode()).hexdigest()[:32], kind="document",
            document_id=name, learn=True, text=text, subjects=[f"person-{self.rng.randrange(150)}"],
            source=f"wiki-{self.rng.randrange(60)}", retention_class="permanent" if number % 3 else "P30D",
            origin=Origin(
                cluster_id="bench", topic="documents", topic_id="bench", partition=0, offset=number,
                timestamp_ms=BORN_MS + 1000 * number,
            ),
        )  # fmt: skip

    def rows(self, text: str) -> list[TokenRow]:
        """Rows of a text that nothing learns."""
        example = self.document(0, "held-out", text)
        try:
            return self.line.updater.rows(example)
        except ExampleError:
            return []

    def run(self, requests: int) -> list[Outcome]:
        """Learn the stream; what came of each request."""
        done: list[Outcome] = []
        first = len(self.cuts) // 2
        for cut, examples in self.cuts.items():
            manifest = UpdateExecutor(self.line).update(self.job(cut, examples), "live").manifest
            self.outcomes[manifest.outcome if manifest else "repeated"] += 1
            self.known += examples
            due = requests * (cut - first + 1) // (len(self.cuts) - first) if cut >= first else 0
            while len(done) < due:
                done.append(self.forget(len(done)))
                print(line_of(len(done), done[-1]), flush=True)
        return done

    def job(self, cut: int, examples: Sequence[ExampleAccepted]) -> UpdateRequested:
        """The update as curate asks for it."""
        batch = Batch(adapter=ADAPTER, cut=cut, examples=list(examples), skipped=[])
        body = batch.model_dump_json(by_alias=True).encode()
        return UpdateRequested(
            job_id=f"cut-{cut}", adapter=ADAPTER, cut=cut, examples=len(examples), skipped=0, tokens=0, reason="size",
            batch=BlobRef(digest=put_blob(self.store, body), size_bytes=len(body)),
            marks={examples[-1].origin.partition_key(): examples[-1].origin.offset},
            oldest_ms=examples[0].origin.timestamp_ms, newest_ms=examples[-1].origin.timestamp_ms, cut_at=_now(),
        )  # fmt: skip

    def ask(self, number: int) -> tuple[str, ForgetRequested, set[str]]:
        """A request for something that is known, and the documents that it means."""
        kind = KINDS[number % len(KINDS)]
        left = [example for example in self.known if example.document_id not in self.gone]
        one = self.rng.choice(left)
        fields: dict[str, Any] = {"kind": "erase"}
        if kind == "document":
            fields["selector"] = Selector(document_ids=[one.document_id])
        elif kind == "subject":
            fields["selector"] = Selector(subjects=one.subjects)
        elif kind == "source":
            fields["selector"] = Selector(sources=[one.source or ""])
        else:
            mortal = [example for example in left if example.retention_class != "permanent"]
            ids = [example.example_id for example in self.rng.sample(mortal, 3)]
            fields = {"kind": "expire", "example_ids": ids, "suppress": False}
        job = ForgetRequested(
            job_id=f"job-{number}", request_id=f"request-{number}", adapter=ADAPTER,
            until_ms=self.known[-1].origin.timestamp_ms, **fields,
        )  # fmt: skip
        return kind, job, {example.document_id for example in left if job.matches(example)}

    def forget(self, number: int) -> Outcome:
        """Have one request carried out as retain and learner do, then train from scratch without it."""
        kind, job, meant = self.ask(number)
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
        self.gone |= meant
        scratch_s, made = self.scratch(number, self.gone)
        head = self.line.registry.head(ADAPTER)
        return Outcome(
            kind, len(meant), self.replayed(), len(made.outcomes), forget_s, scratch_s,
            head is not None and made.equals(head.manifest), before_nats, after_nats,
        )  # fmt: skip

    def scratch(self, number: int, gone: Collection[str]) -> tuple[float, scratch.Scratch]:
        """Seconds of, and what comes of, training on all that is known and not gone, in a store of its own."""
        store = DirectoryStore(self.folder / f"scratch-{number}")
        known = {example.document_id for example in self.known} - set(gone)
        cuts = {cut: [e for e in examples if e.document_id in known] for cut, examples in self.cuts.items()}
        began = time.perf_counter()
        made = scratch.train(self.line.updater, store, ADAPTER, cuts)
        return time.perf_counter() - began, made

    def replayed(self) -> int:
        """How many updates the newest version's forgetting made anew."""
        registry = self.line.registry
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
        """A version and those that its schedule goes back to."""
        found = []
        while version is not None:
            found.append(version)
            version = self.line.registry.manifest(ADAPTER, version).schedule_parent
        return found

    def held_out_nats(self) -> float:
        """Loss per token, under the newest version, on documents that are never learned."""
        head = self.line.registry.head(ADAPTER)
        if head is None:
            raise ValueError("nothing was learned")
        updater = self.line.updater
        state, _ = self.line.state_at(Head(head.seq, head.version, head.manifest), ADAPTER)
        updater.lora.load(state.weights)
        return mean_nats(row_losses(updater.lora, self.probe, pad=updater.codec.pad, adapted=True))

    def readable(self) -> int:
        """How many documents that are gone can still be found in a blob of the store."""
        blobs = [path.read_bytes() for path in (self.folder / "store/blobs").rglob("*") if path.is_file()]
        needles = [json.dumps({"document_id": name}, separators=(",", ":"))[1:-1].encode() for name in self.gone]
        return sum(any(needle in blob for blob in blobs) for needle in needles)


def line_of(number: int, outcome: Outcome) -> str:
    """One row of the table."""
    return (
        f"{number:>3} {outcome.kind:<9}{outcome.examples:>4} examples {outcome.replayed:>4} of {outcome.cuts:>3} updates"
        f"{outcome.forget_s:>8.2f} s {outcome.scratch_s:>8.2f} s {outcome.forget_s / outcome.scratch_s:>7.3f}"
        f"  {'equal' if outcome.is_equal else 'DIFFERENT'}"
    )


def report(outcomes: Sequence[Outcome], learned: Counter[str], readable: int) -> None:
    """Print the summary and, last, the line of JSON."""
    print(f"updates: {dict(learned)}; {os.cpu_count()} cores")
    for kind in KINDS:
        ratios = [o.forget_s / o.scratch_s for o in outcomes if o.kind == kind]
        if ratios:
            print(f"{kind:<10} median cost {statistics.median(ratios):.3f} of training from scratch, n {len(ratios)}")
    kept = statistics.fmean(o.after_nats / o.before_nats for o in outcomes)
    print(
        json.dumps(
            {
                "requests": len(outcomes),
                "digest_equal": sum(outcome.is_equal for outcome in outcomes),
                "median_cost_ratio": round(statistics.median(o.forget_s / o.scratch_s for o in outcomes), 3),
                "kept_loss_pct": round(100 * kept, 2),
                "readable": readable,
            }
        )
    )


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    main()
