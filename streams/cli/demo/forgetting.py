"""Forgetting in the demo: one document is erased, one expires, and the adapter is as if it had never seen them.

Both are forgotten as in production: by a request on the topic `retention` and by an expiry time, through retain, the
learner and the subscriber. The result is compared with a model that is trained from scratch without the two documents.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar
from uuid import uuid4

from perennial.storage.errors import PerennialError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import get_blob
from perennial.streams.cli.demo.comparison import train_without
from perennial.streams.cli.demo.learned_examples import LearnedExamples
from perennial.streams.cli.demo.persons import PersonDocument, person_document
from perennial.streams.cli.demo.progress import DemoProgress
from perennial.streams.cli.demo.report import Forgetting
from perennial.streams.cli.demo.watcher import RequestStatuses
from perennial.streams.client.base_publisher import Receipt
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.models import Batch, RetentionProgressed, RetentionRequested, Selector
from perennial.streams.settings import Settings

T = TypeVar("T")

PEOPLE: Final = "acme/people"
MIN_LIFE_S: Final = 10.0
DOCUMENTS_PER_UPDATE: Final = 8
"""About so many of the other documents make an update."""
LIFE_RESERVE: Final = 1.5
"""The expiring document lives so much longer than learning all documents should take."""
EARLY: Final = 4
"""So many of the other documents are published together with the two."""
WAIT_S: Final = 300.0
_NAMES: Final = ("clara", "bruno")
_SHARE_DONE: Final[Mapping[str, float]] = {
    "accepted": 0.1, "quarantined": 0.2, "executed": 0.8, "published": 0.9, "closed": 1.0, "failed": 1.0,
}  # fmt: skip
"""Share of a request to forget that is done, by its state."""


class ForgetDemoError(PerennialError):
    """The forgetting could not be shown."""


@dataclass
class ForgetDemo:
    """Script of the forgetting over a running stack.

    Attributes:
        settings: Settings of the stack.
        folder: Folder for the files of the comparison.
        statuses: States of retention requests, filled while the demo runs.
        progress: Progress of the whole demo.
        print_line: Called with a line of text for the person who watches.
        learn: Waits until an adapter has learned so many examples; called with a ledger, their number, the stage and a
            description.
        tend: Called again and again while waiting, to restart roles that ended.
    """

    settings: Settings
    folder: Path
    statuses: RequestStatuses
    progress: DemoProgress
    print_line: Callable[[str], None]
    learn: Callable[[LearnedExamples, int, str, str], None]
    tend: Callable[[], None]

    def run(
        self,
        publisher: Publisher,
        ledger: LearnedExamples,
        subscriber: Subscriber,
        others: Sequence[tuple[str, str]],
        update_s: float,
    ) -> Forgetting:
        """Learn all documents, erase one, let one expire, and compare.

        Args:
            publisher: Publishes the documents and the request.
            ledger: Ledger of the adapter `PEOPLE`.
            subscriber: Subscriber of that adapter.
            others: Documents that are not forgotten, as (document id, text).
            update_s: Seconds that an update took so far on this machine; decides how long the expiring document lives.

        Returns:
            What was measured.

        Raises:
            ForgetDemoError: a step failed or took too long.
        """
        erased, expiring = (person_document(name) for name in _NAMES)
        secrets, forgotten = (erased.secret, expiring.secret), {erased.document_id, expiring.document_id}
        life_s = MIN_LIFE_S + LIFE_RESERVE * update_s * (3 + len(others) / DOCUMENTS_PER_UPDATE)
        due = datetime.now(UTC) + timedelta(seconds=life_s)
        self.print_line(
            f"publishing {len(others)} documents to {PEOPLE}, and two about persons who do not exist: "
            f"{erased.document_id}, and {expiring.document_id}, which expires in {life_s:.0f} s"
        )
        _publish(publisher, others, erased, expiring, due)
        self.learn(ledger, len(others) + 2, "people", f"{PEOPLE} learns documents that it will forget")
        before = self._served(subscriber, ledger)
        cuts = self._cuts(ledger)
        readable_before = len(self._readable(secrets))
        if datetime.now(UTC) >= due:
            raise ForgetDemoError(
                "this machine is too busy to show the forgetting", got=f"{expiring.document_id} expired before all was learned",
                allowed=f"{life_s:.0f} s for {len(cuts)} updates", remedy="run the demo again while less else runs",
            )  # fmt: skip

        began = time.monotonic()
        request = RetentionRequested(
            request_id=f"forget-{uuid4().hex[:8]}", kind="erase", adapter=PEOPLE, requested_by="demo",
            selector=Selector(document_ids=[erased.document_id]), reason="shown by the demo",
        )  # fmt: skip
        self.print_line(f"asking {PEOPLE} to erase {erased.document_id}, as `perennial forget` does")
        publisher.publish(request).result(30)
        self._wait_closed("erase", f"{PEOPLE} erases {erased.document_id}")
        erase_s = time.monotonic() - began

        with ThreadPoolExecutor(1, thread_name_prefix="comparison") as pool:
            self.print_line("training a second model from scratch without the two documents, for comparison")
            trained = pool.submit(
                train_without, self.settings, self.folder / "comparison", cuts, forgotten,
                lambda share: self.progress.update("comparison", share, "training the comparison"),
            )  # fmt: skip
            left_s = (due - datetime.now(UTC)).total_seconds()
            if left_s > 0:
                self.print_line(f"{expiring.document_id} will expire by itself in {left_s:.0f} s")
            self._wait_closed("expire", f"waiting for {expiring.document_id} to expire and be forgotten")
            expire_s = (datetime.now(UTC) - due).total_seconds()
            after = self._served(subscriber, ledger)
            never, exact = trained.result()
        return Forgetting(
            losses=self._losses(
                {"base": None, "before": before, "after": after, "never": never},
                {"erased": [erased.text], "expired": [expiring.text], "rest": [text for _, text in others]},
            ),
            after_sha256=digest_of(after), never_sha256=digest_of(never), exact=exact,
            readable_before=readable_before, readable=self._readable(secrets), erase_s=erase_s, expire_s=expire_s,
            updates=len(cuts),
        )  # fmt: skip

    def _wait_closed(self, kind: str, doing: str) -> None:
        """Wait until the request of that kind is closed. Raise ForgetDemoError where it failed."""

        def closed() -> RetentionProgressed | None:
            event = self.statuses.last(PEOPLE, kind)
            self.progress.update(kind, _SHARE_DONE.get(event.state, 0.0) if event else 0.0, doing)
            return event if event and event.state in {"closed", "failed"} else None

        event = self._wait_for(closed, f"the request to {kind}")
        if event.state == "failed":
            raise ForgetDemoError(
                f"the request to {kind} failed", got=event.detail, remedy="read the roles' logs (run with --keep)"
            )

    def _served(self, subscriber: Subscriber, ledger: LearnedExamples) -> bytes:
        """Return the weights that the subscriber serves, once it serves the version that the alias names."""

        def weights() -> bytes | None:
            state = ledger.registry.alias(PEOPLE, self.settings.serving.alias)
            current = subscriber.current
            if state is None or current is None or current.generation != state.generation:
                return None
            store = open_store(self.settings.store.require_uri(), self.settings.s3)
            return get_blob(store, current.manifest.weights.digest)

        return self._wait_for(weights, "the subscriber to serve the live version")

    def _wait_for(self, attempt: Callable[[], T | None], what: str) -> T:
        """Call `attempt` until it returns something."""
        deadline = time.monotonic() + WAIT_S
        while (found := attempt()) is None:
            if time.monotonic() > deadline:
                raise ForgetDemoError(
                    f"waited {WAIT_S:.0f} s in vain for {what}", got=[event.state for event in self.statuses.events],
                    remedy="read the roles' logs (run with --keep)",
                )  # fmt: skip
            self.tend()
            time.sleep(0.1)
        return found

    def _cuts(self, ledger: LearnedExamples) -> list[Batch]:
        """Return the micro-batch of each update in order, read while the store still has them."""
        store = open_store(self.settings.store.require_uri(), self.settings.s3)
        return [
            Batch.model_validate_json(get_blob(store, manifest.batch.digest))
            for _, manifest in ledger.versions
            if manifest.kind == "update" and manifest.batch is not None
        ]

    def _losses(
        self, models: Mapping[str, bytes | None], texts: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, float]]:
        """Return the loss in nats per token by model and kind of text."""
        from perennial.learner.serving.evaluate import Evaluator

        evaluator = Evaluator(self.settings, open_store(self.settings.store.require_uri(), self.settings.s3))
        return {
            model: {name: evaluator.loss_of(weights, some) for name, some in texts.items()}
            for model, weights in models.items()
        }

    def _readable(self, secrets: Collection[str]) -> list[str]:
        """Return the files of the store that hold one of the secrets."""
        root = Path(self.settings.store.require_uri())
        found = []
        for path in root.rglob("*"):
            with suppress(FileNotFoundError, IsADirectoryError):  # a role may be replacing the file just now
                data = path.read_bytes()
                if any(secret.encode() in data for secret in secrets):
                    found.append(str(path.relative_to(root)))
        return found


def _publish(
    publisher: Publisher,
    others: Sequence[tuple[str, str]],
    erased: PersonDocument,
    expiring: PersonDocument,
    due: datetime,
) -> None:
    """Publish the two early among the others, so that later updates replay them and forgetting has to undo that too.

    The first documents are confirmed before the others are published: partitions are read in any order.
    """
    persons = (
        publisher.document(adapter=PEOPLE, document_id=erased.document_id, text=erased.text),
        publisher.document(adapter=PEOPLE, document_id=expiring.document_id, text=expiring.text, expires_at=due),
    )
    for first in (*persons, *_publish_others(publisher, others[:EARLY])):
        first.result(30)
    for later in _publish_others(publisher, others[EARLY:]):
        later.result(30)


def _publish_others(publisher: Publisher, others: Sequence[tuple[str, str]]) -> list[Receipt]:
    return [publisher.document(adapter=PEOPLE, document_id=name, text=text) for name, text in others]
