"""The soak's load: documents, corrections, texts that come back, duplicates, junk and requests to forget.

Writes a log of everything that the broker acknowledged.
"""

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
from perennial.streams.events.fields import Event
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.events.models import RetentionRequested, Selector
from perennial.streams.settings import Settings
from tests.integration.test_exactly_once import WORDS
from tests.oracle import Position

ADAPTERS = ("acme/a", "acme/b", "other")
RATE_PER_S = 4.0
_KINDS = {
    "document": 54, "plain": 6, "revision": 5, "return": 3, "correction": 10, "rating": 3, "repeat": 8, "junk": 5,
    "short-lived": 5, "supersession": 2, "erase-document": 2, "erase-subject": 1, "hold": 1,
}  # fmt: skip
"""Kinds of records and requests, with their relative frequencies."""
_JUNK = (b"\xff\xfe", b"{", b"[]", b"null", b'{"adapter":"acme/a"}', b'{"adapter":"A B","document_id":"1","text":"t"}')
_RECENT = 60
"""Most requests name one of the newest so many events: rebuilding a long history for each would take all the time."""


class Load(threading.Thread):
    """A thread that publishes until `stop` is set, then releases most of its holds and waits for acknowledgements.

    Args:
        settings: Names the broker.
        seed: Determines what is published.
        folder: Where the log of acknowledgements is written.

    Attributes:
        acked: The kind of every acknowledged record, by its position.
        unknown: How many records were sent and never acknowledged; each may be in its topic or not.
        requests: Requests by id, acknowledged or not.
        acked_requests: The ids of the acknowledged requests.
        failure: The error that ended the thread early, None if there is none.
        stop: Set it to end the load.
    """

    def __init__(self, settings: Settings, seed: int, folder: Path) -> None:
        super().__init__(name="load", daemon=True)
        self.acked: dict[Position, str] = {}
        self.unknown = 0
        self.requests: dict[str, RetentionRequested] = {}
        self.acked_requests: set[str] = set()
        self.failure: Exception | None = None
        self.stop = threading.Event()
        self._settings = settings
        self._rng = random.Random(f"load {seed}")
        self._log = (folder / "acknowledged.jsonl").open("w")
        self._number = 0
        self._sent: list[Event] = []
        self._holds: list[tuple[int, RetentionRequested]] = []
        self._in_flight: list[tuple[str, Any]] = []
        self._publisher: Any = None

    def run(self) -> None:
        try:
            while not self.stop.wait(self._rng.uniform(0.5, 1.5) / RATE_PER_S):
                self._once()
                self._collect_answers(block_s=0)
            self._release_holds()
            self._collect_answers(block_s=30)
            self._close()
            self._collect_answers(block_s=0)
        except Exception as error:  # noqa: BLE001 - the main thread raises it; it would wait for ever
            self.failure = error
        finally:
            self._log.close()

    def expected_open(self) -> int:
        """Return how many acknowledged records are to be learned, judged by their kind; for the progress display."""
        return sum(kind not in {"junk", "repeat"} for kind in list(self.acked.values()))

    # ---- what is sent

    def _once(self) -> None:
        kind = self._rng.choices(list(_KINDS), list(_KINDS.values()))[0]
        recent = self._sent[-_RECENT:] if self._rng.random() < 0.9 else self._sent
        if not recent and kind not in {"document", "junk"}:
            kind = "document"
        self._number += 1
        match kind:
            case "junk":
                raw = self._rng.choice(_JUNK) if self._rng.random() < 0.8 else self._plain_json(self._expired())
                self._send(kind, raw)
            case "plain":
                self._send(kind, self._remember(self._document()))
            case "repeat":
                self._send(kind, self._rng.choice(recent))
            case "revision" | "return":
                documents = [event for event in recent if isinstance(event, DocumentObserved)]
                old = self._rng.choice(documents) if documents else self._document()
                self._send(kind, self._remember(old.model_copy(update={"text": self._text(), "supersedes": []})))
                if kind == "return":  # A, B, A: the last text counts, so it is no duplicate of the first
                    self._send(kind, self._remember(old.model_copy(update={"supersedes": []})))
            case "correction" | "rating":
                self._send(kind, self._remember(self._interaction(kind)))
            case "erase-document" | "erase-subject" | "hold":
                self._request(kind, self._rng.choice(recent))
            case _:
                self._send(kind, self._remember(self._document(kind, recent)))

    def _text(self) -> str:
        return f"mark-{self._number:07d}-kram " + " ".join(self._rng.choices(WORDS, k=12))

    def _remember(self, event: Event) -> Event:
        self._sent.append(event)
        return event

    def _common(self) -> dict[str, Any]:
        adapter = self._rng.choice(ADAPTERS)
        return {"adapter": adapter, "subjects": [f"person-{self._number // 10}"] if self._rng.random() < 0.3 else []}

    def _document(self, kind: str = "document", recent: list[Event] | None = None) -> DocumentObserved:
        fields: dict[str, Any] = {**self._common(), "document_id": f"doc-{self._number}", "text": self._text()}
        life_s = self._rng.randint(10, 30)
        if kind == "short-lived" and self._rng.random() < 0.5:
            fields["expires_at"] = datetime.now(UTC) + timedelta(seconds=life_s)
        elif kind == "short-lived":
            fields["retention_class"] = f"PT{life_s}S"
        elif kind == "supersession" and recent:
            old = self._rng.choice(recent)
            fields |= {"adapter": old.adapter, "supersedes": [_id_of(old)]}  # type: ignore[attr-defined]
        return DocumentObserved(**fields)

    def _interaction(self, kind: str) -> InteractionObserved:
        feedback = (
            {"correction": self._text()} if kind == "correction" else {"rating": self._rng.choice([-1.0, 0.5, 1.0])}
        )
        return InteractionObserved(
            **self._common(), interaction_id=f"turn-{self._number}", prompt=f"what is {self._number}?",
            response="I do not know.", **feedback,
        )  # fmt: skip

    def _expired(self) -> DocumentObserved:
        return self._document().model_copy(update={"expires_at": datetime(2020, 1, 1, tzinfo=UTC)})

    @staticmethod
    def _plain_json(event: Event) -> bytes:
        return event.model_dump_json(by_alias=True, exclude_none=True).encode()

    # ---- requests

    def _request(self, kind: str, about: Event) -> None:
        subjects = getattr(about, "subjects", [])
        selector = Selector(document_ids=[_id_of(about)])
        if kind == "erase-subject" and subjects:
            selector = Selector(subjects=subjects)
        request = RetentionRequested(
            request_id=f"{kind}-{self._number}", kind="hold" if kind == "hold" else "erase",
            adapter=about.adapter, selector=selector, requested_by="soak",  # type: ignore[attr-defined]
        )  # fmt: skip
        if kind == "hold":
            self._holds.append((self._number + self._rng.randint(20, 80), request))
            if self._rng.random() < 0.5:  # an erasure that waits for the release
                self._send_request(request)
                request = request.model_copy(update={"request_id": f"held-erase-{self._number}", "kind": "erase"})
        self._send_request(request)
        ended = [hold for until, hold in self._holds if until <= self._number]
        self._holds = [(until, hold) for until, hold in self._holds if until > self._number]
        for hold in ended:
            self._release(hold)

    def _release(self, hold: RetentionRequested) -> None:
        if hold.request_id in self.acked_requests:  # the release of a hold that may not have arrived would rightly fail
            self._send_request(hold.model_copy(update={"request_id": f"release-{hold.request_id}", "kind": "release"}))

    def _send_request(self, request: RetentionRequested) -> None:
        self.requests[request.request_id] = request
        self._send(f"request {request.request_id}", request)

    def _release_holds(self) -> None:
        """Release all holds but one, whose erasures stay held."""
        for _, hold in self._holds[1:]:
            self._release(hold)

    # ---- sending

    def _connect(self) -> bool:
        """Return whether there is a publisher; make a new one if the last was closed."""
        try:
            if self._publisher is None:
                self._publisher = Publisher(settings=self._settings, source="soak", timeout_s=10)
        except (PublishError, KafkaError, ValueError):
            self._close()
            return False
        return True

    def _send(self, kind: str, event: Event | bytes) -> None:
        """Publish an event, or send bytes that are no event past the publisher. Waits while no broker answers."""
        while not self._connect():
            if self.stop.wait(0.5):
                return
        try:
            if isinstance(event, bytes) or kind == "plain":
                raw = event if isinstance(event, bytes) else self._plain_json(event)
                producer = self._publisher._producer
                if producer is None:  # closed because it lost an event; the next publish would make another
                    self._close()
                    return
                self._in_flight.append((kind, producer.send(self._settings.kafka.topic("documents"), raw, key=b"junk")))
            else:
                self._in_flight.append((kind, self._publisher.publish(event)._future))
        except (PublishError, KafkaError, ValueError):  # it may not have been sent at all
            self.unknown += 1
            self._close()

    def _collect_answers(self, block_s: float) -> None:
        """Record which sends were acknowledged and which failed.

        Args:
            block_s: Seconds to wait for answers; 0 looks only at those that have arrived.
        """
        waiting = []
        failed = False
        deadline = time.monotonic() + block_s
        for kind, future in self._in_flight:
            if not future.is_done and not block_s:
                waiting.append((kind, future))
                continue
            try:
                record = future.get(timeout=max(0.01, deadline - time.monotonic()))
            except KafkaError:
                self.unknown += 1
                failed = True
                continue
            position = f"{record.topic}/{record.partition}", record.offset
            prefix, _, request_id = kind.partition(" ")
            if prefix == "request":
                self.acked_requests.add(request_id)
            else:
                self.acked[position] = kind
            self._log.write(json.dumps([*position, kind]) + "\n")
        self._in_flight = waiting
        self._log.flush()
        if failed and self._publisher is not None:  # after a gap an idempotent producer may accept nothing more
            self._close()

    def _close(self) -> None:
        with suppress(PublishError, KafkaError):
            if self._publisher is not None:
                self._publisher.close()
        self._publisher = None
        # A closed producer never answers for records that it had not sent.
        answered = [(kind, future) for kind, future in self._in_flight if future.is_done]
        self.unknown += len(self._in_flight) - len(answered)
        self._in_flight = answered


def _id_of(event: Event) -> str:
    return event.document_id if isinstance(event, DocumentObserved) else event.interaction_id  # type: ignore[attr-defined,no-any-return]
