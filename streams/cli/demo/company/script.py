"""Run `perennial demo --base smollm2`: a real language model learns about a made-up company, and forgets some of it.

Policies and prices come as documents, corrections as tickets, through a real broker and all roles. The frozen base and
the adapter answer the same questions, half of which are never trained. A price changes, one customer is erased, one offer
expires, and the questions are asked again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from uuid import uuid4

from rich.console import Console

from perennial.storage.errors import PerennialError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import get_blob
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.demo.company.facts import COMPANY, Fact, company_facts
from perennial.streams.cli.demo.company.printing import draw_losses, print_company_report
from perennial.streams.cli.demo.company.questions import Answered, CompanyReport, ask
from perennial.streams.cli.demo.follow import Follower
from perennial.streams.cli.demo.learned_examples import LearnedExamples
from perennial.streams.cli.demo.progress import DemoProgress, spoken
from perennial.streams.cli.demo.report import hand_over
from perennial.streams.cli.demo.watcher import TOPICS, Watcher
from perennial.streams.client.base_publisher import Receipt
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.devstack.stack import Stack
from perennial.streams.events.models import Selector
from perennial.streams.settings import load_settings

if TYPE_CHECKING:
    from perennial.learner.serving.peft_backend import PeftBackend

T = TypeVar("T")

ADAPTER: Final = "brindlewick/assistant"
POLICIES: Final = 6
ANSWER_TOKENS: Final = 24
GENERAL: Final = 16
LATER: Final = ("opening", "price", "customer", "offer")
"""Kinds of the facts of which there is one each. The first comes with the policies, the others after them."""
OFFER_ENDS_S: Final = 1.0
WAIT_S: Final = 900.0
SETTINGS: Final = {
    "max_batch_examples": 3 * (POLICIES + 1), "max_age_s": 6, "poll_s": 1, "forget_window_s": 3,
    "learning_rate": 2e-3, "general_kl_weight": 4.0, "metrics_port": 0,
}  # fmt: skip
"""An update of a few facts has few steps: at twice the preset's rate they are enough, and four times the weight of general
text keeps the base's answers (docs/experiments, "Few facts at a time"). What stays makes one update; what changes or goes
makes later ones, so that forgetting has little to rebuild. Requests of the same three seconds share a rebuild."""
STAGES: Final = {
    "start": 18.0, "base": 6.0, "policies": 140.0, "later": 110.0, "ask": 7.0, "price": 55.0, "forget": 48.0,
    "measure": 22.0, "stop": 5.0,
}  # fmt: skip
"""Seconds that each part took on two cores: the weights of the parts."""


class CompanyDemoError(PerennialError):
    """The demo of the company did not get to its end."""


def run_company_demo(base: str, *, out: Path, keep: bool, as_json: bool) -> int:
    """Run the demo. Call it in the main thread, with the signals to stop already handled.

    Args:
        base: Name of the base, as PERENNIAL_BASE; a chat model.
        out: Folder for the plot and the figures; it exists.
        keep: Keep topics and objects afterwards.
        as_json: Print JSON instead of tables.

    Returns:
        The exit code: 0 where every claim held, else 1.

    Raises:
        PerennialError: Something did not start or took too long.
    """
    started = time.monotonic()
    console = Console(stderr=True)
    folder = Path(tempfile.mkdtemp(prefix="perennial-demo-"))
    settings = load_settings(data_dir=folder, kafka="", store="", base=base, **SETTINGS)

    def print_line(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.1f} s[/] {line}", highlight=False, soft_wrap=True)

    console.print(
        f"The demo takes about {spoken(sum(STAGES.values()))} on two quiet cores. It teaches {base} about {COMPANY}, a "
        f"company that does not exist, with a real Apache Kafka and all roles in the folder {folder}"
        f"{'' if keep else ', which it removes afterwards'}.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    with DemoProgress(console, STAGES) as progress:
        stack = Stack(settings, folder, roles=("intake", "streams", "scorer+learner"), on_progress=print_line)
        demo = CompanyDemo(stack, Watcher(print_line, started=started), progress)
        try:
            report = demo.run()
        finally:
            progress.update("stop", 0.1, "stopping the roles and the broker")
            demo.close()
            stack.stop()
            if keep:
                print_line(f"kept: {folder} (PERENNIAL_DATA_DIR={folder} PERENNIAL_BASE={base} perennial up)")
            else:
                shutil.rmtree(folder, ignore_errors=True)
    missed = report.missed()
    hand_over(
        report, missed, draw=draw_losses, show=print_company_report, out=out, as_json=as_json, console=console,
        started=started,
    )  # fmt: skip
    return 1 if missed else 0


class CompanyDemo:
    """Script of the demo over a stack that it starts.

    Args:
        stack: The stack; the caller stops it.
        watcher: Takes the events of the running stack.
        progress: Progress of the whole demo.
    """

    def __init__(self, stack: Stack, watcher: Watcher, progress: DemoProgress) -> None:
        self._stack = stack
        self._watcher = watcher
        self._progress = progress
        self._closers: list[Callable[[], None]] = []
        self._published = 0
        self._seconds: dict[str, float] = {}
        self._weights: dict[str, bytes | None] = {"frozen base": None}
        self._step_began = time.monotonic()
        self._policies = company_facts(POLICIES, 1)
        self._shop, self._plan, self._customer, self._offer = company_facts(4, 2, LATER)

    def close(self) -> None:
        """End the subscriber and the follower."""
        for closer in reversed(self._closers):
            closer()

    def run(self) -> CompanyReport:
        """Start the stack, show learning, a new price, an erasure and an expiry, and judge them.

        Raises:
            CompanyDemoError: A step failed or took too long.
            PerennialError: Something did not start.
        """
        self._headline("Starting a real Apache Kafka and the roles intake, streams, scorer and learner")
        self._progress.update("start", 0.1, "starting Kafka and the roles")
        self._stack.start()
        settings = self._stack.settings
        self._ledger = LearnedExamples(open_registry(settings), ADAPTER)
        follower = Follower(settings, TOPICS, self._watcher.on_event)
        self._closers.append(follower.close)
        backend = self._backend()
        self._subscriber = Subscriber(
            ADAPTER, backend, settings=settings, replica="demo", on_activate=self._watcher.on_served
        )
        self._subscriber.start()
        self._closers.append(self._subscriber.close)
        self._done("start")

        staying = [*self._policies, self._shop]
        later = (self._plan, self._customer, self._offer)
        self._headline(f"Asking the frozen base about {COMPANY}")
        base = self._ask("base", [*staying, *later], backend)
        with Publisher(settings.kafka.bootstrap, settings=settings) as publisher:
            n = len(staying)
            self._headline(f"{ADAPTER} reads {n} documents and {2 * n} tickets with corrected answers")
            self._teach(publisher, staying, "policies")
            self._keep_weights("policies learned")
            self._headline("A plan, a customer and an offer are added")
            self._teach(publisher, later, "later")
            self._keep_weights("all learned")
            learned = self._ask("ask", [*staying, *later], backend)
            dearer = self._change_price(publisher)
            requests = self._ask_to_forget(publisher)
            new_price = ask([dearer], self._generate(backend))
            self._keep_weights("new price")
            self._await_forgotten(requests)
        self._keep_weights("three forgotten")
        after = ask((*staying, dearer, self._customer, self._offer), self._generate(backend))
        old_price = [answered for answered in learned if answered.fact == self._plan]
        now, before = ({a.fact: [b for b in found if b.fact == a.fact] for a in after} for found in (after, learned))
        customer, offer = ((before[fact], now.pop(fact)) for fact in (self._customer, self._offer))
        rest = [answered for answers in now.values() for answered in answers]
        return CompanyReport(base, learned, old_price, new_price, customer, offer, rest, self._measure(), self._seconds)

    # ---- the steps

    def _backend(self) -> PeftBackend:
        from perennial.learner.model.base import load_base
        from perennial.learner.model.lora import LoraConfig
        from perennial.learner.serving.peft_backend import PeftBackend

        settings = self._stack.settings
        config = LoraConfig(settings.training.rank, settings.training.alpha)
        return PeftBackend(load_base(settings.model.base, settings.model.device, settings.model.threads), config)

    def _teach(self, publisher: Publisher, facts: Sequence[Fact], stage: str) -> None:
        """Publish the document and the tickets of some facts, and wait until they are learned and served."""
        receipts = [receipt for fact in facts for receipt in self._publish(publisher, fact)]
        for receipt in receipts:
            receipt.result(30)
        self._learn(stage, f"{ADAPTER} learns {len(receipts)} examples")
        self._await_served()
        self._done(stage)

    def _publish(self, publisher: Publisher, fact: Fact, edition: int = 1) -> list[Receipt]:
        """Publish a fact: its document, and a ticket for each of its taught questions."""
        # Neither these documents nor tickets name a source, so a document can supersede tickets too.
        older = [_document_id(fact, edition - 1), *_ticket_ids(fact, edition - 1)] if edition > 1 else []
        self._published += 1 + len(fact.taught)
        return [
            publisher.document(
                adapter=ADAPTER, document_id=_document_id(fact, edition), text=fact.document,
                subjects=[fact.name], supersedes=older,
            ),
            *(
                publisher.interaction(
                    adapter=ADAPTER, interaction_id=ticket, prompt=question, response=fact.wrong,
                    correction=fact.answer, rating=-1, subjects=[fact.name],
                )
                for ticket, question in zip(_ticket_ids(fact, edition), fact.taught, strict=True)
            ),
        ]  # fmt: skip

    def _change_price(self, publisher: Publisher) -> Fact:
        """Publish another price that supersedes the old one, and wait until it is learned and served; return it."""
        dearer = self._plan.with_figure(str(int(self._plan.figure) + 13))
        self._headline(f"The price of {dearer.name} changes from {self._plan.figure} to {dearer.figure} euros")
        for receipt in self._publish(publisher, dearer, edition=2):
            receipt.result(30)
        self._learn("price", f"{ADAPTER} learns the new price")
        self._await_served()
        self._done("price")
        return dearer

    def _ask_to_forget(self, publisher: Publisher) -> dict[str, tuple[str, str]]:
        """Erase the customer and let the offer expire, while the old price waits to be forgotten: one rebuild serves all.

        Returns:
            Kind and id of each request, by what it is about; of the superseded price the id is empty.
        """
        self._headline(f"The customer {self._customer.name} asks to be forgotten, as with `perennial forget`")
        erase = self._request(publisher, "erase", Selector(subjects=[self._customer.name]))
        self._headline(f"The offer {self._offer.name} ends in {OFFER_ENDS_S:.0f} s")
        expire = self._request(
            publisher, "expire", Selector(subjects=[self._offer.name]),
            due_at=datetime.now(UTC) + timedelta(seconds=OFFER_ENDS_S),
        )  # fmt: skip
        return {
            "the old price": ("supersede", ""),
            self._customer.name: ("erase", erase),
            self._offer.name: ("expire", expire),
        }

    def _await_forgotten(self, requests: dict[str, tuple[str, str]]) -> None:
        """Wait until requests are closed and the version without what they name is served."""
        for what, (kind, request_id) in requests.items():
            self._await_closed(kind, "forget", f"{what} is forgotten", request_id)
        self._await_served()
        self._done("forget")

    def _request(self, publisher: Publisher, kind: str, selector: Selector, due_at: datetime | None = None) -> str:
        """Publish a retention request; return its id."""
        request_id = f"{kind}-{uuid4().hex[:8]}"
        due = {"due_at": due_at} if due_at else {}
        publisher.retention(
            request_id=request_id, kind=kind, adapter=ADAPTER, requested_by="demo", selector=selector,
            reason="shown by the demo", **due,
        ).result(30)  # fmt: skip
        return request_id

    def _keep_weights(self, title: str) -> None:
        """Keep the served weights in memory for `_measure`: a forgetting deletes them from the store."""
        current = self._subscriber.current
        if current is not None:
            store = open_store(self._stack.settings.store.require_uri(), self._stack.settings.s3)
            self._weights[title] = get_blob(store, current.manifest.weights.digest)

    def _measure(self) -> dict[str, dict[str, float]]:
        """Return the losses of the kept versions on texts that were not shown."""
        from perennial.learner.model.general_text import general_texts
        from perennial.learner.serving.evaluate import Evaluator

        settings = self._stack.settings
        texts = {
            "company": [f"{fact.unseen[0]}\n{fact.answer}" for fact in self._policies],
            "general": general_texts("heldout")[:GENERAL],
        }
        evaluator = Evaluator(settings, open_store(settings.store.require_uri(), settings.s3))
        losses: dict[str, dict[str, float]] = {}
        for title, weights in self._weights.items():
            losses[title] = {name: evaluator.loss_of(weights, some) for name, some in texts.items()}
            self._progress.update("measure", len(losses) / len(self._weights), "measuring versions on unseen text")
        self._done("measure")
        return losses

    # ---- asking and waiting

    def _ask(self, stage: str, facts: Sequence[Fact], backend: PeftBackend) -> list[Answered]:
        self._progress.update(stage, 0.1, "asking questions")
        answers = ask(facts, self._generate(backend))
        self._done(stage)
        return answers

    def _generate(self, backend: PeftBackend) -> Callable[[Sequence[str]], list[str]]:
        """Return what answers questions on the served version, in one batch: many cost little more than one."""
        return lambda questions: answers_of(backend, questions, ANSWER_TOKENS)

    def _learn(self, stage: str, doing: str) -> None:
        """Wait until everything that was published is accounted for."""
        before, wanted = self._ledger.accounted, self._published

        def learned() -> bool | None:
            self._ledger.refresh()
            accounted = (self._ledger.accounted - before) / max(1, wanted - before)
            self._progress.update(stage, max(accounted, self._passed_share(stage)), doing)
            return True if self._ledger.accounted >= wanted else None

        self._wait_for(learned, doing)
        refused = [manifest.reason for _, manifest in self._ledger.versions if manifest.outcome == "refused"]
        if refused:
            raise CompanyDemoError("the gate refused an update", got=refused, remedy="run the demo again with --keep")

    def _await_closed(self, kind: str, stage: str, doing: str, request_id: str = "") -> None:
        """Wait until the newest request of a kind, or the one of that id, is closed."""

        def closed() -> bool | None:
            self._progress.update(stage, self._passed_share(stage), doing)
            event = self._watcher.statuses.last(ADAPTER, kind)
            if event is None or (request_id and event.request_id != request_id):
                return None
            if event.state == "failed":
                raise CompanyDemoError(f"the request to {kind} failed", got=event.detail)
            return True if event.state == "closed" else None

        self._wait_for(closed, f"the request to {kind}")

    def _await_served(self) -> None:
        """Wait until the demo's subscriber serves the live version."""
        registry, alias = self._ledger.registry, self._stack.settings.serving.alias

        def served() -> bool | None:
            state, current = registry.alias(ADAPTER, alias), self._subscriber.current
            return True if state and current and current.generation == state.generation else None

        self._wait_for(served, "the subscriber to serve the live version")

    def _wait_for(self, attempt: Callable[[], T | None], what: str) -> T:
        """Call `attempt` until it returns something, and restart roles that ended meanwhile."""
        deadline = time.monotonic() + WAIT_S
        while (found := attempt()) is None:
            if time.monotonic() > deadline:
                raise CompanyDemoError(
                    f"waited {WAIT_S:.0f} s in vain for {what}",
                    remedy=f"read the roles' logs in {self._stack.data_dir / 'logs'} (run with --keep)",
                )
            self._stack.tend()
            time.sleep(0.1)
        return found

    def _passed_share(self, stage: str) -> float:
        """Return what share of a part is done by the time that it usually takes: an update ends all at once."""
        return min(0.9, (time.monotonic() - self._step_began) / STAGES[stage])

    def _headline(self, text: str) -> None:
        self._watcher.print_line(f"[bold]{text}[/]")

    def _done(self, stage: str) -> None:
        """Record that a part of the demo ended, and how long it took."""
        now = time.monotonic()
        self._seconds[stage] = round(now - self._step_began, 1)
        self._step_began = now
        self._progress.update(stage, 1, f"{stage}: done")


def answers_of(backend: PeftBackend, questions: Sequence[str], max_tokens: int) -> list[str]:
    """Return the greedy answers of the version that a backend serves, generated in one batch.

    Args:
        backend: Serves the version, or the frozen base.
        questions: Questions.
        max_tokens: Most tokens of an answer.
    """
    import torch

    from perennial.learner.model.tokenization import ExampleTokenizer

    base = backend.base
    codec = ExampleTokenizer(base.tokenizer)
    prompts = [codec.prompt_ids(question, base.max_positions - max_tokens) for question in questions]
    width = max(map(len, prompts))
    ids = torch.tensor([[codec.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])  # (B, T)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # (B, T)
    with backend.lease(), torch.no_grad():
        out = base.model.generate(
            input_ids=ids.to(base.device), attention_mask=mask.to(base.device), max_new_tokens=max_tokens,
            do_sample=False, pad_token_id=codec.pad,
        )  # fmt: skip
    return [str(text) for text in base.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def _document_id(fact: Fact, edition: int) -> str:
    return f"{fact.kind}-{fact.name}-{edition}"


def _ticket_ids(fact: Fact, edition: int) -> list[str]:
    return [f"ticket-{fact.name}-{edition}-{number}" for number, _ in enumerate(fact.taught)]
