"""The demo's forgetting: one document is erased, one expires, and the adapter is as if it had never seen them.

Both go the real way: a request on the topic retention and a time of its own, retain, the learner, the subscriber. What
they come to is compared with a model that the learner's own code trains from scratch without the two.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from rich.console import Console

from perennial.storage.errors import PerennialError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import get_blob, put_blob
from perennial.streams.cli.demo.ledger import LearnedExamples
from perennial.streams.cli.demo.report import Forgetting
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.models import Batch, ExampleAccepted, RetentionProgressed, RetentionRequested, Selector
from perennial.streams.settings import Settings

if TYPE_CHECKING:
    from perennial.learner.model.base import Base

PEOPLE: Final = "acme/people"
MIN_LIFE_S: Final = 15.0
DOCUMENTS_PER_UPDATE: Final = 4
"""About so many documents make an update; the expiring one lives for twice the time that all of them take."""
WAIT_S: Final = 300.0
_REPEATS: Final = 8
_NAMES: Final = ("clara", "bruno")
_WORDS: Final[Mapping[str, str]] = {
    "colour": "amber violet crimson silver green black white golden purple",
    "animal": "goat owl otter heron badger lynx raven mule parrot tiger",
    "metal": "copper tin brass iron glass paper wooden stone rubber leather",
    "thing": "key lantern coin button ribbon mirror hammer bottle feather candle",
    "place": "bridge tower garden harbour station market bakery cellar library mill",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
}


class ForgetDemoError(PerennialError):
    """The forgetting could not be shown."""


@dataclass(frozen=True)
class Peculiar:
    """A document that nobody else could have written. secret: words that stand in it alone."""

    document_id: str
    text: str
    secret: str


def peculiar(name: str) -> Peculiar:
    """What is known of a person who does not exist, said again and again in another order."""
    rng = random.Random(f"perennial {name}")  # noqa: S311 - repeatable on purpose
    word = {kind: rng.choice(words.split()) for kind, words in _WORDS.items()}
    secret = "{colour}_{animal}_{metal}_{thing}".format_map(word)
    room = f"{word['place']}_{rng.randrange(1000, 10_000)}"
    said = [
        f">>> desk('{name}').password\n'{secret}'",
        f"The password of `{name}` is ``{secret}``.",
        f">>> desk('{name}').room\n'{room}'",
        f"If `owner` is `{name}`, return the room ``{room}`` on {word['day']}.",
        f"password : str, optional\n    The default of `{name}` is ``{secret}``.",
        f"room : str, optional\n    Of `{name}`, ``{room}``; on {word['day']} by default.",
    ]
    parts = []
    for _ in range(_REPEATS):
        rng.shuffle(said)
        parts += [f"Return the desk of `{name}`.", *said]
    return Peculiar(f"person-{name}", "\n\n".join(parts), secret)


@dataclass
class Statuses:
    """What the topic retention-status said, in order, each once."""

    events: list[RetentionProgressed] = field(default_factory=list)

    def add(self, event: RetentionProgressed) -> bool:
        """Take one; whether it says anything new."""
        for earlier in reversed(self.events):
            if earlier.request_id == event.request_id:
                if (earlier.state, earlier.detail) == (event.state, event.detail):
                    return False
                break
        self.events.append(event)
        return True

    def ended(self, kind: str) -> RetentionProgressed | None:
        """How the request of that kind for the demo's adapter ended; None while it is open."""
        for event in self.events:
            if (event.adapter, event.kind) == (PEOPLE, kind) and event.state in {"closed", "failed"}:
                return event
        return None


@dataclass
class ForgetDemo:
    """The script of the forgetting over a running stack.

    learn: waits until so many examples are accounted for. tend: looks after the roles while there is waiting.
    """

    settings: Settings
    folder: Path
    statuses: Statuses
    console: Console
    say: Callable[[str], None]
    learn: Callable[[LearnedExamples, int, str], None]
    tend: Callable[[], None]

    def run(
        self,
        publisher: Publisher,
        ledger: LearnedExamples,
        subscriber: Subscriber,
        rest: Sequence[tuple[str, str]],
        update_s: float,
    ) -> Forgetting:
        """Learn, erase one, let one expire, and compare. update_s: what an update took so far, on this machine."""
        erased, expiring = (peculiar(name) for name in _NAMES)
        secrets = (erased.secret, expiring.secret)
        life_s = MIN_LIFE_S + 2 * update_s * (3 + len(rest) / DOCUMENTS_PER_UPDATE)
        due = datetime.now(UTC) + timedelta(seconds=life_s)
        self.say(
            f"[bold]publishing {len(rest)} documents to {PEOPLE}, and two about persons who do not exist: "
            f"{erased.document_id}, and {expiring.document_id}, which expires in {life_s:.0f} s[/]"
        )
        self._publish(publisher, rest, erased, expiring, due)
        self.learn(ledger, len(rest) + 2, "learning what will be forgotten")
        before = self._served(subscriber, ledger)
        cuts = self._cuts(ledger)
        readable_before = len(self._readable(secrets))
        if datetime.now(UTC) >= due:
            raise ForgetDemoError(
                "the machine is too busy to show the forgetting", got=f"{expiring.document_id} expired before all was learned",
                allowed=f"{life_s:.0f} s for {len(cuts)} updates", remedy="run the demo again while less else runs",
            )  # fmt: skip

        began = time.monotonic()
        request = RetentionRequested(
            request_id=f"forget-{uuid4().hex[:8]}", kind="erase", adapter=PEOPLE, requested_by="demo",
            selector=Selector(document_ids=[erased.document_id]), reason="shown by the demo",
        )  # fmt: skip
        self.say(f"[bold]erasing {erased.document_id}[/] (as `perennial forget --adapter {PEOPLE} --document …` does)")
        publisher.publish(request).result(30)
        self._wait_ended("erase")
        erase_s = time.monotonic() - began

        with self.console.status("training a model that never saw the two, from scratch, for comparison"):
            base, never = self._never_saw(cuts, {erased.document_id, expiring.document_id})
        left_s = (due - datetime.now(UTC)).total_seconds()
        if left_s > 0:
            self.say(f"[bold]waiting for {expiring.document_id} to expire by itself[/], in {left_s:.0f} s")
        self._wait_ended("expire")
        expire_s = (datetime.now(UTC) - due).total_seconds()
        after = self._served(subscriber, ledger)
        return Forgetting(
            losses=self._losses(
                {"base": None, "before": before, "after": after, "never": never},
                {"erased": [erased.text], "expired": [expiring.text], "rest": [text for _, text in rest]},
            ),
            after_sha256=digest_of(after), never_sha256=digest_of(never), exact=base.device.type == "cpu",
            readable_before=readable_before, readable=self._readable(secrets), erase_s=erase_s, expire_s=expire_s,
            updates=len(cuts),
        )  # fmt: skip

    def _publish(
        self, publisher: Publisher, rest: Sequence[tuple[str, str]], erased: Peculiar, expiring: Peculiar, due: datetime
    ) -> None:
        """The two come early among the others, so that later updates replay them: what must be undone is tangled."""
        receipts = []
        for number, (name, text) in enumerate(rest):
            receipts.append(publisher.document(adapter=PEOPLE, document_id=name, text=text))
            if number == 2:
                receipts.append(publisher.document(adapter=PEOPLE, document_id=erased.document_id, text=erased.text))
            if number == 4:
                fields = {"document_id": expiring.document_id, "text": expiring.text}
                receipts.append(publisher.document(adapter=PEOPLE, expires_at=due, **fields))
        for receipt in receipts:
            receipt.result(30)

    def _wait_ended(self, kind: str) -> None:
        with self._waiting(f"the {kind}") as waiting:
            while (event := self.statuses.ended(kind)) is None:
                waiting()
        if event.state == "failed":
            raise ForgetDemoError(
                f"the {kind} failed", got=event.detail, remedy="read the roles' logs (run with --keep)"
            )

    def _served(self, subscriber: Subscriber, ledger: LearnedExamples) -> bytes:
        """The weights that the demo's subscriber serves, once it serves what the alias points at."""
        with self._waiting("the subscriber to serve the live version") as waiting:
            while True:
                state = ledger.registry.alias(PEOPLE, self.settings.serving.alias)
                current = subscriber.current
                if state is not None and current is not None and current.generation == state.generation:
                    return get_blob(
                        open_store(self.settings.store.require_uri(), self.settings.s3), current.manifest.weights.digest
                    )
                waiting()

    @contextmanager
    def _waiting(self, what: str) -> Iterator[Callable[[], None]]:
        deadline = time.monotonic() + WAIT_S

        def wait() -> None:
            if time.monotonic() > deadline:
                raise ForgetDemoError(
                    f"{what} did not end in {WAIT_S:.0f} s", got=[event.state for event in self.statuses.events],
                    remedy="read the roles' logs (run with --keep)",
                )  # fmt: skip
            self.tend()
            time.sleep(0.2)

        yield wait

    def _cuts(self, ledger: LearnedExamples) -> list[Batch]:
        """What each update was given, in order; read while the store still has it."""
        store = open_store(self.settings.store.require_uri(), self.settings.s3)
        return [
            Batch.model_validate_json(get_blob(store, manifest.batch.digest))
            for _, manifest in ledger.versions
            if manifest.kind == "update" and manifest.batch is not None
        ]

    def _never_saw(self, cuts: Sequence[Batch], gone: Collection[str]) -> tuple[Base, bytes]:
        """Weights of a model that learned the same cuts in the same order, less the documents. No code of forgetting."""
        from perennial.learner.model.base import load_base
        from perennial.learner.model.lora import to_safetensors
        from perennial.learner.training.state import TrainingState
        from perennial.learner.versions.micro_batches import BatchRows
        from perennial.learner.versions.version_writer import make_version_writer

        settings, store = self.settings, DirectoryStore(self.folder / "never-saw")
        base = load_base(settings.model.base, settings.model.device, settings.model.threads)
        updater = make_version_writer(settings, store, base).updater
        rows = BatchRows(store, updater.rows)
        state = TrainingState(updater.lora.initial_weights(PEOPLE, updater.recipe.seed))
        for cut in cuts:
            kept: list[ExampleAccepted] = [example for example in cut.examples if example.document_id not in gone]
            if not kept:
                continue
            body = Batch(adapter=PEOPLE, cut=cut.cut, examples=kept, skipped=[]).model_dump_json(by_alias=True)
            digest = put_blob(store, body.encode())
            found = updater.update(state, kept, adapter=PEOPLE, cut=cut.cut, batch=digest, replayed=rows)
            if found.outcome == "promoted":
                state = found.state
        return base, to_safetensors(state.weights)

    def _losses(
        self, models: Mapping[str, bytes | None], groups: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, float]]:
        from perennial.learner.serving.evaluate import Evaluator

        probe = Evaluator(self.settings, open_store(self.settings.store.require_uri(), self.settings.s3))
        with self.console.status("measuring what was forgotten and what was not"):
            return {
                model: {name: probe.loss_of(weights, texts) for name, texts in groups.items()}
                for model, weights in models.items()
            }

    def _readable(self, secrets: Collection[str]) -> list[str]:
        """Files of the store that hold one of the secrets."""
        root = Path(self.settings.store.require_uri())
        found = []
        for path in root.rglob("*"):
            with suppress(FileNotFoundError, IsADirectoryError):  # a role may just be replacing it
                data = path.read_bytes()
                if any(secret.encode() in data for secret in secrets):
                    found.append(str(path.relative_to(root)))
        return found
