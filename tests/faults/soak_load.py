"""The soak's load: documents, corrections, repeats, junk and requests to forget, at a steady rate, with a log of acknowledgements."""

from __future__ import annotations

import json
import random
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from kafka.errors import KafkaError

from perennial.streams.client.base_publisher import PublishError
from perennial.streams.client.publisher import Publisher
from perennial.streams.events.models import DocumentObserved, Event, InteractionObserved, RetentionRequested, Selector
from perennial.streams.settings import Settings
from tests.integration.test_exactly_once import WORDS
from tests.oracle import Place

ADAPTERS = ("acme/a", "acme/b", "other")
RATE_PER_S = 4.0
_KINDS = {
    "document": 58, "plain": 6, "revision": 5, "correction": 10, "rating": 3, "repeat": 8, "junk": 5, "short-lived": 3,
    "supersession": 1, "erase-document": 2, "erase-subject": 1, "hold": 1,
}  # fmt: skip
"""What is sent, with its weight."""
_JUNK = (b"\xff\xfe", b"{", b"[]", b"null", b'{"adapter":"acme/a"}', b'{"adapter":"A B","document_id":"1","text":"t"}')
_RECENT = 60
"""Requests mostly name what is as recent as this: replaying all of a long line for each would be all that is done."""


class Load(threading.Thread):
    """Publishes until stop is set; then releases most of its holds, and waits for what is under way.

    acked: what was sent, by where the broker says it lies. unknown: how many were sent and never acknowledged: they
    may be in the topics or not. asked: requests by id, acknowledged or not. heard: the ids of those acknowledged.
    """

    def __init__(self, settings: Settings, seed: int, folder: Path) -> None:
        super().__init__(name="load", daemon=True)
        self.acked: dict[Place, str] = {}
        self.unknown = 0
        self.asked: dict[str, RetentionRequested] = {}
        self.heard: set[str] = set()
        self.failure: Exception | None = None
        self.stop = threading.Event()
        self._settings = settings
        self._rng = random.Random(f"load {seed}")
        self._log = (folder / "acknowledged.jsonl").open("w")
        self._number = 0
        self._sent: list[Event] = []
        self._holds: list[tuple[int, RetentionRequested]] = []
        self._under_way: list[tuple[str, Any]] = []
        self._publisher: Any = None

    def run(self) -> None:
        try:
            while not self.stop.wait(self._rng.uniform(0.5, 1.5) / RATE_PER_S):
                self._once()
                self._reap(block_s=0)
            self._end_holds()
            self._reap(block_s=30)
            self._close()
            self._reap(block_s=0)
        except Exception as error:  # noqa: BLE001 - told by the main thread, which would wait for ever
            self.failure = error
        finally:
            self._log.close()

    def expected_open(self) -> int:
        """How many acknowledged records are to be learned, as far as their kind says: for the line of progress."""
        return sum(what not in {"junk", "repeat"} for what in list(self.acked.values()))

    # ---- what is sent

    def _once(self) -> None:
        what = self._rng.choices(list(_KINDS), list(_KINDS.values()))[0]
        recent = self._sent[-_RECENT:] if self._rng.random() < 0.9 else self._sent
        if not recent and what not in {"document", "junk"}:
            what = "document"
        self._number += 1
        match what:
            case "junk":
                raw = self._rng.choice(_JUNK) if self._rng.random() < 0.8 else self._plain_json(self._expired())
                self._send(what, raw)
            case "plain":
                self._send(what, self._remembered(self._document()))
            case "repeat":
                self._send(what, self._rng.choice(recent))
            case "revision":
                documents = [event for event in recent if isinstance(event, DocumentObserved)]
                old = self._rng.choice(documents) if documents else self._document()
                self._send(what, self._remembered(old.model_copy(update={"text": self._text(), "supersedes": []})))
            case "correction" | "rating":
                self._send(what, self._remembered(self._interaction(what)))
            case "erase-document" | "erase-subject" | "hold":
                self._request(what, self._rng.choice(recent))
            case _:
                self._send(what, self._remembered(self._document(what, recent)))

    def _text(self) -> str:
        return f"mark-{self._number:07d}-kram " + " ".join(self._rng.choices(WORDS, k=12))

    def _remembered(self, event: Event) -> Event:
        self._sent.append(event)
        return event

    def _common(self) -> dict[str, Any]:
        adapter = self._rng.choice(ADAPTERS)
        return {"adapter": adapter, "subjects": [f"person-{self._number // 10}"] if self._rng.random() < 0.3 else []}

    def _document(self, what: str = "document", recent: list[Event] | None = None) -> DocumentObserved:
        fields: dict[str, Any] = {**self._common(), "document_id": f"doc-{self._number}", "text": self._text()}
        life_s = self._rng.randint(10, 30)
        if what == "short-lived" and self._rng.random() < 0.5:
            fields["expires_at"] = datetime.now(UTC) + timedelta(seconds=life_s)
        elif what == "short-lived":
            fields["retention_class"] = f"PT{life_s}S"
        elif what == "supersession" and recent:
            old = self._rng.choice(recent)
            fields |= {"adapter": old.adapter, "supersedes": [_id_of(old)]}  # type: ignore[attr-defined]
        return DocumentObserved(**fields)

    def _interaction(self, what: str) -> InteractionObserved:
        said = {"correction": self._text()} if what == "correction" else {"rating": self._rng.choice([-1.0, 0.5, 1.0])}
        return InteractionObserved(
            **self._common(), interaction_id=f"turn-{self._number}", prompt=f"what of {self._number}?",
            response="I do not know.", **said,
        )  # fmt: skip

    def _expired(self) -> DocumentObserved:
        return self._document().model_copy(update={"expires_at": datetime(2020, 1, 1, tzinfo=UTC)})

    @staticmethod
    def _plain_json(event: Event) -> bytes:
        return event.model_dump_json(by_alias=True, exclude_none=True).encode()

    # ---- requests

    def _request(self, what: str, about: Event) -> None:
        subjects = getattr(about, "subjects", [])
        selector = Selector(document_ids=[_id_of(about)])
        if what == "erase-subject" and subjects:
            selector = Selector(subjects=subjects)
        request = RetentionRequested(
            request_id=f"{what}-{self._number}", kind="hold" if what == "hold" else "erase",
            adapter=about.adapter, selector=selector, requested_by="soak",  # type: ignore[attr-defined]
        )  # fmt: skip
        if what == "hold":
            self._holds.append((self._number + self._rng.randint(20, 80), request))
            if self._rng.random() < 0.5:  # an erasure that has to wait for the release
                self._ask(request)
                request = request.model_copy(update={"request_id": f"held-erase-{self._number}", "kind": "erase"})
        self._ask(request)
        over = [hold for until, hold in self._holds if until <= self._number]
        self._holds = [(until, hold) for until, hold in self._holds if until > self._number]
        for hold in over:
            self._release(hold)

    def _release(self, hold: RetentionRequested) -> None:
        if hold.request_id in self.heard:  # a release of what perhaps never came would rightly fail
            self._ask(hold.model_copy(update={"request_id": f"release-{hold.request_id}", "kind": "release"}))

    def _ask(self, request: RetentionRequested) -> None:
        self.asked[request.request_id] = request
        self._send(f"request {request.request_id}", request)

    def _end_holds(self) -> None:
        """All but one: its erasures stay held."""
        for _, hold in self._holds[1:]:
            self._release(hold)

    # ---- the way to the broker

    def _connect(self) -> bool:
        """Whether there is a publisher, made anew where it was closed."""
        try:
            if self._publisher is None:
                self._publisher = Publisher(settings=self._settings, source="soak", timeout_s=10)
        except (PublishError, KafkaError, ValueError):
            self._close()
            return False
        return True

    def _send(self, what: str, event: Event | bytes) -> None:
        """Hand it to the publisher, or past it what is no event, waiting for a broker where none answers."""
        while not self._connect():
            if self.stop.wait(0.5):
                return
        try:
            if isinstance(event, bytes) or what == "plain":
                raw = event if isinstance(event, bytes) else self._plain_json(event)
                producer = self._publisher._producer
                if producer is None:  # retired, for it lost an event; the next publish would make another
                    self._close()
                    return
                self._under_way.append((what, producer.send(self._settings.kafka.topic("documents"), raw, key=b"junk")))
            else:
                self._under_way.append((what, self._publisher.publish(event)._future))
        except (PublishError, KafkaError, ValueError):  # perhaps never sent at all
            self.unknown += 1
            self._close()

    def _reap(self, block_s: float) -> None:
        """Take note of what was acknowledged and of what failed."""
        still = []
        failed = False
        deadline = time.monotonic() + block_s
        for what, future in self._under_way:
            if not future.is_done and not block_s:
                still.append((what, future))
                continue
            try:
                record = future.get(timeout=max(0.01, deadline - time.monotonic()))
            except KafkaError:
                self.unknown += 1
                failed = True
                continue
            place = f"{record.topic}/{record.partition}", record.offset
            kind, _, request_id = what.partition(" ")
            if kind == "request":
                self.heard.add(request_id)
            else:
                self.acked[place] = what
            self._log.write(json.dumps([*place, what]) + "\n")
        self._under_way = still
        self._log.flush()
        if failed and self._publisher is not None:  # after a gap an idempotent producer may take nothing more
            self._close()

    def _close(self) -> None:
        with suppress(PublishError, KafkaError):
            if self._publisher is not None:
                self._publisher.close()
        self._publisher = None
        # A producer that is closed leaves what it had not sent without an answer for ever.
        answered = [(what, future) for what, future in self._under_way if future.is_done]
        self.unknown += len(self._under_way) - len(answered)
        self._under_way = answered


def _id_of(event: Event) -> str:
    return event.document_id if isinstance(event, DocumentObserved) else event.interaction_id  # type: ignore[attr-defined,no-any-return]
