"""`perennial demo`: the whole loop on real text, every role a process of its own, judged by held-out loss.

One adapter reads documents of one domain, then of another; a second one learns from corrected answers; a third one
forgets two of its documents again. At the end: what the frozen base, the adapter after the first domain and the adapter
now lose on documents that none was shown, and what forgetting came to.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perennial.extras import require_extra
from perennial.storage.errors import PerennialError
from perennial.storage.objects.factory import open_store
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.registry import AliasState
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.demo.follow import Follower
from perennial.streams.cli.demo.forgetting import PEOPLE, ForgetDemo, Statuses
from perennial.streams.cli.demo.latency import stage_seconds
from perennial.streams.cli.demo.ledger import LearnedExamples
from perennial.streams.cli.demo.report import DemoReport, Forgetting, draw, print_report
from perennial.streams.cli.demo.texts import package_docstrings
from perennial.streams.cli.tables import short_version
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.devstack.stack import Stack
from perennial.streams.events.models import (
    AdapterPromoted,
    AdapterRevoked,
    AdapterUpdate,
    DriftDetected,
    Event,
    RetentionProgressed,
    UpdateRequested,
)
from perennial.streams.settings import load_settings

if TYPE_CHECKING:
    from perennial.learner.serving.peft_backend import PeftBackend

LIBRARY, SUPPORT = "acme/library", "acme/support"
DOMAINS = ("networkx", "sympy")
HELD_OUT = 48
GENERAL = 64
CURVE_POINTS = 10
CORRECTIONS: dict[str, tuple[str, str]] = {
    "How long does a refund take?": ("A refund takes thirty days.", "A refund takes five working days."),
    "Where do I change my address?": ("You cannot change it.", "Open your profile and choose Addresses."),
    "Can I return a used item?": ("Yes, always.", "No, only unused items within two weeks."),
    "Which card do you accept?": ("Only cash.", "We accept Visa and Mastercard."),
}
"""Question: what the model is said to have answered, and what it should have said. Made up for this demo."""


class DemoError(PerennialError):
    """The demo did not get to its end."""


@dataclass
class Watcher:
    """Collects what the loop says while it runs, and tells it in a line each."""

    say: Callable[[str], None]
    drifts: list[DriftDetected] = field(default_factory=list)
    cuts: list[UpdateRequested] = field(default_factory=list)
    updates: list[AdapterUpdate] = field(default_factory=list)
    served: dict[tuple[str, int], datetime] = field(default_factory=dict)
    statuses: Statuses = field(default_factory=Statuses)
    first_promoted_s: float | None = None
    started: float = field(default_factory=time.monotonic)

    def on_event(self, event: Event) -> None:
        """An event of the topics that the demo follows."""
        if isinstance(event, DriftDetected):
            self.drifts.append(event)
            self.say(
                f"[magenta]drift[/]     {event.adapter}: {event.signal} by {event.detector}, "
                f"{event.before:.3f} → {event.after:.3f} after {event.examples_seen} examples"
            )
        elif isinstance(event, UpdateRequested):
            self.cuts.append(event)
        elif isinstance(event, AdapterPromoted):
            if self.first_promoted_s is None:
                self.first_promoted_s = time.monotonic() - self.started
            self.updates.append(event)
            gate = GateFigures.model_validate(event.gate)
            before, after = gate.held_out_before, gate.held_out_after
            loss = f"held-out {before:.3f} → {after:.3f}" if before is not None and after is not None else ""
            self.say(
                f"[green]promoted[/]  {event.adapter} generation {event.generation} {short_version(event.version)}: "
                f"{event.learned.examples} examples, {event.learned.tokens} tokens {loss}"
            )

        elif isinstance(event, AdapterRevoked):
            self.say(
                f"[red]revoked[/]   {event.adapter} generation {event.generation} {short_version(event.version)} "
                "takes the place of versions that must not be served any more"
            )
        elif isinstance(event, RetentionProgressed) and self.statuses.add(event):
            detail = f": {event.detail}" if event.detail else ""
            self.say(
                f"[yellow]{event.state:<11}[/] {event.kind} {event.request_id[:15]}, {event.examples} examples{detail}"
            )

    def on_served(self, state: AliasState, stage_s: Mapping[str, float]) -> None:
        """A subscriber serves a version."""
        self.served[state.adapter, state.generation] = datetime.now(UTC)
        self.say(
            f"[cyan]served[/]    {state.adapter} generation {state.generation}, "
            f"swapped in {1000 * stage_s.get('activate', 0):.1f} ms, "
            f"{stage_s.get('publish_to_served', 0):.2f} s after it was published"
        )

    def latencies(self) -> list[dict[str, float]]:
        """Seconds per stage of each update that was served before the next one came."""
        return [
            stage_seconds({**update.stage_at, "served": self.served[update.adapter, update.generation]})
            for update in self.updates
            if (update.adapter, update.generation) in self.served
        ]


def run_demo(*, quick: bool, out: Path, keep: bool, as_json: bool) -> int:
    """Run the demo; exit code 0 where the adapters learned what they were shown, 1 where not."""
    require_extra("all", "`perennial demo`")
    started = time.monotonic()
    console = Console(stderr=True)
    folder = Path(tempfile.mkdtemp(prefix="perennial-demo-"))
    settings = load_settings(
        data_dir=folder, kafka="", store="", max_age_s=3, poll_s=1, cooldown_examples=8, metrics_port=0
    )

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.1f} s[/] {line}", highlight=False, soft_wrap=True)

    stack = Stack(settings, folder, say=say)
    demo = Demo(stack, Watcher(say, started=started), console, quick=quick)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is stopped on SIGTERM too
    try:
        with console.status("starting a real Apache Kafka and four roles, each a process of its own"):
            texts = threading.Thread(target=demo.collect, name="texts")
            texts.start()
            stack.start()
            texts.join()
        report = demo.run()
    finally:
        demo.close()
        with console.status("stopping the roles and the broker"):
            stack.stop()
        if keep:
            say(f"kept: {folder} (PERENNIAL_DATA_DIR={folder} perennial up)")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    picture, figures = out / "demo.png", out / "demo.json"
    draw(report, picture)
    figures.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        print_report(report, Console())
        console.print(f"picture: {picture}   figures: {figures}", highlight=False)
    failed = [*([] if quick else report.missed()), *report.forgetting.missed()]
    for line in failed:
        console.print(f"[bold red]missed:[/] {line}", highlight=False)
    return 1 if failed or not report.learned_anything else 0


class Demo:
    """The script of the demo over a running stack."""

    def __init__(self, stack: Stack, watcher: Watcher, console: Console, *, quick: bool) -> None:
        self.stack = stack
        self.watcher = watcher
        self.console = console
        self.documents = 60 if quick else 160
        self.waves = 3 if quick else 8
        self.kept = 12 if quick else 24
        self.train: dict[str, Sequence[tuple[str, str]]] = {}
        self.held_out: dict[str, list[str]] = {}
        self._closers: list[Callable[[], None]] = []

    def collect(self) -> None:
        """Gather the documents: docstrings of packages that are installed anyway, and that the base never saw."""
        for domain in DOMAINS:
            pairs = package_docstrings(domain, self.documents + HELD_OUT)
            self.train[domain] = pairs[HELD_OUT:]
            self.held_out[domain] = [text for _, text in pairs[:HELD_OUT]]

    def close(self) -> None:
        """End the subscribers and the follower."""
        for closer in reversed(self._closers):
            closer()

    def run(self) -> DemoReport:
        """The two domains one after the other, the corrections, and the judgement."""
        say, settings = self.watcher.say, self.stack.settings
        missing = [domain for domain in DOMAINS if domain not in self.train]
        if missing:
            raise DemoError(
                "there is no text to learn",
                got=f"no docstrings of {', '.join(missing)}",
                remedy="run `make setup` again",
            )
        registry = open_registry(settings)
        self._closers.append(
            Follower(
                settings, ("drift", "adapter-jobs", "adapter-updates", "retention-status"), self.watcher.on_event
            ).close
        )
        self._subscribe(LIBRARY)
        answering, _ = self._subscribe(SUPPORT)
        library = LearnedExamples(registry, LIBRARY)
        ends: list[int] = []
        with Publisher(settings.kafka.bootstrap, settings=settings) as publisher:
            published, began = 0, time.monotonic()
            for domain in DOMAINS:
                say(f"[bold]publishing {self.documents} documents of {domain} to {LIBRARY}[/]")
                receipts = [
                    publisher.document(adapter=LIBRARY, document_id=name, text=text, domain=domain, source=domain)
                    for name, text in self.train[domain]
                ]
                for receipt in receipts:
                    receipt.result(30)
                published += len(receipts)
                self._learn(library, published, f"learning {domain}")
                ends.append(len(library.versions))
            update_s = (time.monotonic() - began) / len(library.versions)
            answers_before = {question: answering.generate(question, max_new_tokens=24) for question in CORRECTIONS}
            self._correct(publisher, LearnedExamples(registry, SUPPORT), answering)
            answers = {question: answering.generate(question, max_new_tokens=24) for question in CORRECTIONS}
            _, people = self._subscribe(PEOPLE)
            forgetting = ForgetDemo(
                settings, self.stack.data_dir, self.watcher.statuses, self.console, say, self._learn, self.stack.tend
            ).run(publisher, LearnedExamples(registry, PEOPLE), people, self.train[DOMAINS[0]][: self.kept], update_s)
        return self._judge(library, ends, answers_before, answers, forgetting)

    def _subscribe(self, adapter: str) -> tuple[PeftBackend, Subscriber]:
        from perennial.learner.model.base import load_base
        from perennial.learner.model.lora import LoraConfig
        from perennial.learner.serving.peft_backend import PeftBackend

        settings = self.stack.settings
        base = load_base(settings.model.base, settings.model.device, 1)
        backend = PeftBackend(base, LoraConfig(settings.training.rank, settings.training.alpha))
        subscriber = Subscriber(adapter, backend, settings=settings, replica="demo", on_activate=self.watcher.on_served)
        subscriber.start()
        self._closers.append(subscriber.close)
        return backend, subscriber

    def _learn(self, ledger: LearnedExamples, wanted: int, title: str, timeout_s: float = 600) -> None:
        deadline = time.monotonic() + timeout_s
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("examples"), TimeElapsedColumn(),
            console=self.console, transient=True,
        ) as progress:  # fmt: skip
            task = progress.add_task(title, total=wanted, completed=ledger.accounted)
            while ledger.accounted < wanted:
                if time.monotonic() > deadline:
                    raise DemoError(
                        f"{title} did not end in {timeout_s:.0f} s", got=f"{ledger.accounted} of {wanted} examples accounted for",
                        remedy=f"read the roles' logs in {self.stack.data_dir / 'logs'} (run with --keep)",
                    )  # fmt: skip
                time.sleep(0.2)
                self.stack.tend()
                ledger.refresh()
                progress.update(task, completed=ledger.accounted)

    def _correct(self, publisher: Publisher, ledger: LearnedExamples, answering: PeftBackend) -> None:
        say = self.watcher.say
        published = 0
        for wave in range(self.waves):
            receipts = [
                publisher.interaction(
                    adapter=SUPPORT, interaction_id=f"ticket-{wave}-{index}-{copy}", prompt=question,
                    response=wrong, correction=right, rating=-1,
                )
                for index, (question, (wrong, right)) in enumerate(CORRECTIONS.items())
                for copy in range(24)
            ]  # fmt: skip
            for receipt in receipts:
                receipt.result(30)
            published += len(receipts)
            self._learn(ledger, published, f"learning corrections, wave {wave + 1}")
            time.sleep(1.5)  # the subscriber swaps meanwhile
            right = sum(
                answering.generate(question, max_new_tokens=24).strip() == wanted
                for question, (_, wanted) in CORRECTIONS.items()
            )
            say(
                f"corrections: after {published} tickets {right} of {len(CORRECTIONS)} questions are answered as corrected"
            )
            if right == len(CORRECTIONS):
                return

    def _judge(
        self,
        ledger: LearnedExamples,
        ends: Sequence[int],
        before: dict[str, str],
        answers: dict[str, str],
        forgetting: Forgetting,
    ) -> DemoReport:
        from perennial.learner.model.general_text import general_texts
        from perennial.learner.serving.evaluate import Evaluator

        settings = self.stack.settings
        probe = Evaluator(settings, open_store(settings.store.uri, settings.s3))
        groups = {**self.held_out, "general": general_texts("heldout")[:GENERAL]}
        promoted = [manifest for _, manifest in ledger.versions if manifest.outcome == "promoted"]
        change_at = sum(manifest.outcome == "promoted" for _, manifest in ledger.versions[: ends[0]])
        points = measured_points(len(promoted), change_at)
        losses: dict[int, dict[str, float]] = {}
        with Progress(console=self.console, transient=True) as progress:
            for index in progress.track(points, description="measuring versions on documents that none was shown"):
                manifest = promoted[index - 1] if index else None
                losses[index] = {name: probe.loss(manifest, texts) for name, texts in groups.items()}
        return DemoReport(
            domains=DOMAINS, base=losses[0], first=losses[change_at], now=losses[len(promoted)],
            curve=losses, change_at=change_at,
            drift_at=[sum(m.published_to_ms is not None and m.published_to_ms <= d.origin.timestamp_ms for m in promoted)
                      for d in self.watcher.drifts if d.adapter == LIBRARY],
            drifts=[d.model_dump(mode="json") for d in self.watcher.drifts],
            latencies=self.watcher.latencies(), first_promoted_s=self.watcher.first_promoted_s,
            outcomes=dict(ledger.counts), answers_before=before, answers=answers,
            wanted={question: right for question, (_, right) in CORRECTIONS.items()}, forgetting=forgetting,
        )  # fmt: skip


def measured_points(versions: int, change_at: int) -> list[int]:
    """Which promoted versions are measured (0: the frozen base): evenly spread, with the change of domain and the last."""
    step = max(1, versions // CURVE_POINTS)
    return sorted({0, change_at, versions, *range(0, versions, step)})
