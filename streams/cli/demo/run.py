"""Run `perennial demo`: the whole loop on real text, every role a process of its own, judged by loss on unseen text.

One adapter reads documents of one domain, then of another; a second one learns from corrected answers; a third one
forgets two of its documents. The report compares the frozen base with the adapter after each domain, and the adapter
that forgot with one that never saw the two documents.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from perennial.extras import require_extra
from perennial.storage.errors import PerennialError
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.demo.company.choice import AUTO, SHIPPED_BASE, choose_base
from perennial.streams.cli.demo.company.script import run_company_demo
from perennial.streams.cli.demo.follow import Follower
from perennial.streams.cli.demo.forgetting import PEOPLE, ForgetDemo
from perennial.streams.cli.demo.learned_examples import LearnedExamples
from perennial.streams.cli.demo.measure import Losses, measure_curve
from perennial.streams.cli.demo.picture import draw
from perennial.streams.cli.demo.progress import STAGES, DemoProgress, spoken
from perennial.streams.cli.demo.report import DemoReport, Forgetting, hand_over, print_report
from perennial.streams.cli.demo.texts import package_docstrings
from perennial.streams.cli.demo.watcher import TOPICS, Watcher
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.devstack.idle_cores import spin_if_idle
from perennial.streams.devstack.signals import interrupt_on_stop_signals
from perennial.streams.devstack.stack import Stack
from perennial.streams.paths import expand_path
from perennial.streams.settings import SettingsError, load_settings

if TYPE_CHECKING:
    from perennial.learner.serving.peft_backend import PeftBackend

LIBRARY, SUPPORT = "acme/library", "acme/support"
DOMAINS = ("networkx", "sympy")
DOCUMENTS, QUICK_DOCUMENTS = 96, 48
"""Documents per domain. Enough for the drift detectors to notice the change of domain."""
MAX_DOCUMENT_CHARS = 1_200
HELD_OUT = 48
GENERAL = 48
FORGET_DOCUMENTS, QUICK_FORGET_DOCUMENTS = 24, 12
TICKETS_PER_WAVE, WAVES, QUICK_WAVES = 64, 9, 4
LEARN_TIMEOUT_S = 600.0
SETTINGS = {
    "max_batch_tokens": 1_536, "max_batch_examples": TICKETS_PER_WAVE, "rows": 16, "max_age_s": 2, "poll_s": 1,
    "cooldown_examples": 8, "metrics_port": 0,
}  # fmt: skip
"""Micro-batches are twice as long as the default: half the updates learn nearly as much."""
CORRECTIONS: dict[str, tuple[str, str]] = {
    "How long does a refund take?": ("A refund takes thirty days.", "A refund takes five working days."),
    "Where do I change my address?": ("You cannot change it.", "Open your profile and choose Addresses."),
    "Can I return a used item?": ("Yes, always.", "No, only unused items within two weeks."),
    "Which card do you accept?": ("Only cash.", "We accept Visa and Mastercard."),
}
"""By question: the answer to correct, and the corrected answer. Made up for this demo."""


class DemoError(PerennialError):
    """The demo did not get to its end."""


def run_demo(*, base: str = SHIPPED_BASE, quick: bool, out: Path, keep: bool, as_json: bool) -> int:
    """Run the demo. Call it in the main thread.

    Args:
        base: Name of the base, as PERENNIAL_BASE; another one than the shipped one learns about a made-up company. `auto`:
            the one that `choose_base` finds.
        quick: Fewer documents; the bounds on learning are not judged. It has no effect with another base.
        out: Folder for the picture and the figures.
        keep: Keep topics and objects afterwards.
        as_json: Print JSON instead of tables.

    Returns:
        The exit code: 0 where the adapters learned what they were shown and forgot what they should, else 1.

    Raises:
        MissingExtraError: The extra `all` is not installed.
        SettingsError: The folder is not usable.
        PerennialError: Something did not start or took too long.
    """
    require_extra("all", "`perennial demo`")
    interrupt_on_stop_signals()  # so that what was started is stopped on SIGTERM too
    out = _output_folder(out)
    spin_if_idle()
    started = time.monotonic()
    console = Console(stderr=True)
    if base == AUTO:
        base = choose_base(lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False))
    if base != SHIPPED_BASE:
        return run_company_demo(base, out=out, keep=keep, as_json=as_json)
    folder = Path(tempfile.mkdtemp(prefix="perennial-demo-"))
    settings = load_settings(data_dir=folder, kafka="", store="", base=base, **SETTINGS)

    def print_line(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.1f} s[/] {line}", highlight=False, soft_wrap=True)

    console.print(
        f"The demo takes about {spoken(sum(STAGES.values()))} on two quiet cores. It runs a real Apache Kafka and four "
        f"roles in the folder {folder}{'' if keep else ', which it removes afterwards'}.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    with DemoProgress(console) as progress:
        stack = Stack(settings, folder, on_progress=print_line)
        demo = Demo(stack, Watcher(print_line, started=started), progress, quick=quick)
        try:
            report = demo.run()
        finally:
            progress.update("stop", 0.1, "stopping the roles and the broker")
            demo.close()
            stack.stop()
            if keep:
                print_line(f"kept: {folder} (PERENNIAL_DATA_DIR={folder} perennial up)")
            else:
                shutil.rmtree(folder, ignore_errors=True)
    failed = [*([] if quick else report.missed()), *report.forgetting.missed()]
    hand_over(
        report, failed, draw=draw, show=print_report, out=out, as_json=as_json, console=console,
        started=None if quick else started,
    )  # fmt: skip
    return 1 if failed or not report.learned_anything else 0


def _output_folder(out: Path) -> Path:
    """Make the folder for plot and values before the minutes of the demo. Raise SettingsError where that fails."""
    out = expand_path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise SettingsError(
            "the folder for the plot is not usable", got=f"{out}: {error.strerror or error}",
            allowed="a folder that this user may write to", remedy="name another one by --out",
        ) from error  # fmt: skip


class Demo:
    """Script of the demo over a stack that it starts.

    Args:
        stack: The stack; the caller stops it.
        watcher: Takes the events of the running stack.
        progress: Progress of the whole demo.
        quick: Fewer documents.
    """

    def __init__(self, stack: Stack, watcher: Watcher, progress: DemoProgress, *, quick: bool) -> None:
        self._stack = stack
        self._watcher = watcher
        self._progress = progress
        self._documents = QUICK_DOCUMENTS if quick else DOCUMENTS
        self._waves = QUICK_WAVES if quick else WAVES
        self._forget_documents = QUICK_FORGET_DOCUMENTS if quick else FORGET_DOCUMENTS
        self._train: dict[str, Sequence[tuple[str, str]]] = {}
        self._held_out: dict[str, Sequence[str]] = {}
        self._closers: list[Callable[[], None]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="demo")

    def close(self) -> None:
        """End the subscribers and the follower."""
        for closer in reversed(self._closers):
            closer()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def run(self) -> DemoReport:
        """Start the stack, show learning, correcting and forgetting, and judge them.

        Returns:
            The report.

        Raises:
            DemoError: There is no text to learn, or learning took too long.
            PerennialError: Something did not start, or the forgetting could not be shown.
        """
        backends = self._start()
        settings = self._stack.settings
        registry = open_registry(settings)
        follower = Follower(settings, TOPICS, self._watcher.on_event)
        self._closers.append(follower.close)
        self._subscribe(LIBRARY, backends[0])
        self._subscribe(SUPPORT, backends[1])
        people = self._subscribe(PEOPLE, backends[2])
        library = LearnedExamples(registry, LIBRARY)
        self._watcher.print_line(
            "in the lines below, `promoted` is a new version of an adapter that passed its tests, `served` means that the "
            "demo's own subscriber answers with it, and `drift` is a change of the text that the detectors noticed"
        )
        with Publisher(settings.kafka.bootstrap, settings=settings) as publisher:
            change_at, update_s = self._learn_domains(publisher, library)
            curve = self._measure(library, change_at)  # goes on while the other adapters learn
            asked = backends[1]
            answers_before = {question: asked.generate(question, max_new_tokens=24) for question in CORRECTIONS}
            self._correct(publisher, LearnedExamples(registry, SUPPORT), asked)
            answers = {question: asked.generate(question, max_new_tokens=24) for question in CORRECTIONS}
            self._headline("A third adapter learns documents, and forgets two of them")
            forgetting = ForgetDemo(
                settings, self._stack.data_dir, self._watcher.statuses, self._progress, self._watcher.print_line,
                self._learn, self._stack.tend,
            ).run(
                publisher, LearnedExamples(registry, PEOPLE), people,
                self._train[DOMAINS[0]][: self._forget_documents], update_s,
            )  # fmt: skip
        return self._report(library, change_at, curve.result(), answers_before, answers, forgetting)

    def _headline(self, text: str) -> None:
        self._watcher.print_line(f"[bold]{text}[/]")

    def _start(self) -> list[PeftBackend]:
        """Start the stack, and meanwhile gather the texts and load a model per subscriber."""
        self._headline("Starting a real Apache Kafka and four roles: intake, streams, scorer, learner")
        self._progress.update("start", 0.1, "starting Kafka and the roles")
        prepared = self._pool.submit(self._prepare)
        self._stack.start()
        self._progress.update("start", 0.8, "gathering texts")
        backends = prepared.result()
        self._progress.update("start", 1, "started")
        return backends

    def _prepare(self) -> list[PeftBackend]:
        """Gather docstrings of packages that are installed anyway and that the base never saw; load the models."""
        for domain in DOMAINS:
            pairs = package_docstrings(domain, self._documents + HELD_OUT, MAX_DOCUMENT_CHARS)
            self._train[domain] = pairs[HELD_OUT:]
            self._held_out[domain] = [text for _, text in pairs[:HELD_OUT]]
        from perennial.learner.model.base import load_base
        from perennial.learner.model.lora import LoraConfig
        from perennial.learner.serving.peft_backend import PeftBackend

        settings = self._stack.settings
        config = LoraConfig(settings.training.rank, settings.training.alpha)
        return [PeftBackend(load_base(settings.model.base, settings.model.device, 1), config) for _ in range(3)]

    def _subscribe(self, adapter: str, backend: PeftBackend) -> Subscriber:
        """Start a subscriber that keeps the backend at the live version of an adapter."""
        subscriber = Subscriber(
            adapter, backend, settings=self._stack.settings, replica="demo", on_activate=self._watcher.on_served
        )
        subscriber.start()
        self._closers.append(subscriber.close)
        return subscriber

    def _learn_domains(self, publisher: Publisher, library: LearnedExamples) -> tuple[int, float]:
        """Let one adapter learn the domains in turn.

        Return the number of its promoted versions after the first domain, and the seconds that an update took.
        """
        published, began, promoted = 0, time.monotonic(), []
        for stage, domain in zip(("first domain", "second domain"), DOMAINS, strict=True):
            self._headline(f"{LIBRARY} learns {self._documents} docstrings of the package {domain}")
            receipts = [
                publisher.document(adapter=LIBRARY, document_id=name, text=text, domain=domain, source=domain)
                for name, text in self._train[domain]
            ]
            for receipt in receipts:
                receipt.result(30)
            published += len(receipts)
            self._learn(library, published, stage, f"{LIBRARY} learns {domain}")
            promoted.append(len(library.promoted))
        return promoted[0], (time.monotonic() - began) / len(library.versions)

    def _learn(self, ledger: LearnedExamples, wanted: int, stage: str, doing: str) -> None:
        """Wait until so many examples of an adapter are accounted for."""
        deadline = time.monotonic() + LEARN_TIMEOUT_S
        before = ledger.accounted
        while ledger.accounted < wanted:
            if time.monotonic() > deadline:
                raise DemoError(
                    f"{doing}: not done in {LEARN_TIMEOUT_S:.0f} s", got=f"{ledger.accounted} of {wanted} examples accounted for",
                    remedy=f"read the roles' logs in {self._stack.data_dir / 'logs'} (run with --keep)",
                )  # fmt: skip
            time.sleep(0.1)
            self._stack.tend()
            ledger.refresh()
            if stage != "corrections":
                self._progress.update(stage, (ledger.accounted - before) / (wanted - before), doing)

    def _correct(self, publisher: Publisher, ledger: LearnedExamples, asked: PeftBackend) -> None:
        """Publish corrected answers in waves until every question is answered as corrected."""
        self._headline(f"{SUPPORT} learns from support tickets whose answers were corrected")
        copies = TICKETS_PER_WAVE // len(CORRECTIONS)
        published = 0
        for wave in range(self._waves):
            self._progress.update("corrections", wave / self._waves, f"{SUPPORT} learns corrections")
            receipts = [
                publisher.interaction(
                    adapter=SUPPORT, interaction_id=f"ticket-{wave}-{index}-{copy}", prompt=question,
                    response=wrong, correction=right, rating=-1,
                )
                for index, (question, (wrong, right)) in enumerate(CORRECTIONS.items())
                for copy in range(copies)
            ]  # fmt: skip
            for receipt in receipts:
                receipt.result(30)
            published += len(receipts)
            self._learn(ledger, published, "corrections", f"{SUPPORT} learns corrections")
            self._await_served(ledger)
            right = sum(
                asked.generate(question, max_new_tokens=24).strip() == wanted
                for question, (_, wanted) in CORRECTIONS.items()
            )
            self._watcher.print_line(
                f"after {published} tickets {right} of {len(CORRECTIONS)} questions are answered as corrected"
            )
            if right == len(CORRECTIONS):
                break
        self._progress.update("corrections", 1, "corrections learned")

    def _await_served(self, ledger: LearnedExamples, timeout_s: float = 10.0) -> None:
        """Wait until the demo's subscriber serves the adapter's live version."""
        deadline = time.monotonic() + timeout_s
        state = ledger.registry.alias(ledger.adapter, self._stack.settings.serving.alias)
        while state and (state.adapter, state.generation) not in self._watcher.served and time.monotonic() < deadline:
            time.sleep(0.05)

    def _measure(self, library: LearnedExamples, change_at: int) -> Future[Losses]:
        """Begin to measure versions of the library's adapter on texts that it was not shown."""

        def measure() -> Losses:
            from perennial.learner.model.general_text import general_texts

            texts = {**self._held_out, "general": general_texts("heldout")[:GENERAL]}
            return measure_curve(
                self._stack.settings, library.promoted, change_at, texts,
                lambda share: self._progress.update("measuring", share, "measuring versions on unseen text"),
            )  # fmt: skip

        return self._pool.submit(measure)

    def _report(
        self,
        library: LearnedExamples,
        change_at: int,
        losses: Losses,
        answers_before: dict[str, str],
        answers: dict[str, str],
        forgetting: Forgetting,
    ) -> DemoReport:
        promoted = library.promoted
        drifts = [drift for drift in self._watcher.drifts if drift.adapter == LIBRARY]
        return DemoReport(
            domains=DOMAINS, base=losses[0], first=losses[change_at], now=losses[len(promoted)],
            curve=losses, change_at=change_at,
            drift_at=[library.promoted_within(drift.examples_seen) for drift in drifts],
            drifts=[drift.model_dump(mode="json") for drift in self._watcher.drifts],
            latencies=self._watcher.latencies(), first_promoted_s=self._watcher.first_promoted_s,
            outcomes=dict(library.counts), answers_before=answers_before, answers=answers,
            wanted={question: right for question, (_, right) in CORRECTIONS.items()}, forgetting=forgetting,
        )  # fmt: skip
