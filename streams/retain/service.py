"""The retain role without Kafka's consumer: keeps the book in the store, performs turns, tells the time.

Per turn: quarantines, then events, then the book by compare-and-swap, then the caller acknowledges. A crash after
any step repeats the turn: quarantines and the book are idempotent, jobs carry the same names again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError
from perennial.storage.failpoints import failpoint
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.quarantine import RequestOutcome, load_quarantine, update_quarantine
from perennial.storage.registry.registry import Registry
from perennial.streams.events.cloudevents import WireError
from perennial.streams.events.models import Event, ForgetRequested, RetentionRequested, RollbackRequested
from perennial.streams.kafka.acks import AckReader
from perennial.streams.kafka.topics import KafkaUnavailableError
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retain.clock import ClockGuard
from perennial.streams.retain.example_index import ExampleIndex
from perennial.streams.retain.ledger import RequestLedger, StoredExample, calendar, count_states, overdue
from perennial.streams.retain.state_machine import AliasPosition, Change, RequestProcessor
from perennial.streams.retention.kinds import KINDS
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.retain")

BOOK_KEY: Final = "retention/state"
CLOCK_KEY: Final = "retention/clock"
SOURCE: Final = "perennial/retain"
MAX_BOOK_BYTES: Final = 64 << 20
CALENDAR_BOOK_BYTES: Final = MAX_BOOK_BYTES // 2
"""A book larger than that takes no more requests of the calendar's own; what is due waits."""
REQUESTS_BOOK_BYTES: Final = MAX_BOOK_BYTES // 8 * 7
"""A book larger than that takes no more requests of others, but releases; the rest is for the progress of those in it."""
ADAPTERS_EVERY_S: Final = 15.0
CLOCK_EVERY_S: Final = 20.0
LOOK_S: Final = 1.0
_MIN_LOOKS: Final = 16
_ATTEMPTS: Final = 16

Send = Callable[[Event, str], Awaitable[None]]
"""Publishes an event under an id and waits for the broker's acknowledgement."""


class _Clock(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    shown_ms: int


class StoreFacts:
    """What turns ask, answered from the store and from adapter-acks."""

    def __init__(self, settings: Settings, store: ObjectStore, acks: AckReader) -> None:
        self.store = store
        self.registry = Registry(store, nonce=lambda: uuid4().hex, now=lambda: datetime.now(UTC))
        self._index = ExampleIndex(self.registry)
        self._acks = acks
        self._alias = settings.serving.alias
        self._adapters: list[str] = []
        self._listed_s: float | None = None

    def adapters(self) -> list[str]:
        """Every adapter with a version or with a cut micro-batch; listed anew every so often."""
        if self._listed_s is None or time.monotonic() - self._listed_s >= ADAPTERS_EVERY_S:
            cut = (key.removeprefix("state/curate/") for key in self.store.list("state/curate/"))
            self._adapters = sorted({*self.registry.adapters(), *cut})
            self._listed_s = time.monotonic()
        return self._adapters

    def known(self, adapter: str) -> Sequence[StoredExample]:
        """See Facts."""
        return self._index.of(adapter)

    def done(self, adapter: str, request_id: str) -> RequestOutcome | None:
        """See Facts."""
        entry = load_quarantine(self.store, adapter).entry(request_id)
        return entry.done if entry else None

    def live(self, adapter: str) -> AliasPosition:
        """See Facts."""
        state = self.registry.alias(adapter, self._alias)
        if state is None:
            return AliasPosition(None, 0)
        return AliasPosition(None if state.kind == "retired" else state.version, state.generation)

    def is_revoked(self, adapter: str, version: str) -> bool:
        """See Facts."""
        return self.registry.is_revoked(adapter, self.registry.manifest(adapter, version).seq)

    def lagging(self, adapter: str, generation: int) -> Sequence[str]:
        """See Facts."""
        revoked = {revocation.version for revocation in self.registry.revocations(adapter)}
        return self._acks.lagging(adapter, self._alias, generation, revoked)


class RetainService:
    """The book, its turns and its clock, in one process. send: see Send. wall_ms, monotonic_ms: the clocks."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        facts: StoreFacts,
        send: Send,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    ) -> None:
        self._metrics = metrics
        self._facts = facts
        self._store = facts.store
        self._send = send
        self._settle_ms = int(settings.retain.clock_settle_s * 1000)
        self._wall_ms = wall_ms
        self._monotonic_ms = monotonic_ms
        self._clock: ClockGuard | None = None
        self._clock_etag: str | None = None
        self._clock_saved_ms: int | None = None
        self._next_adapter = ""

    async def receive(self, request: RetentionRequested, received_ms: int) -> None:
        """Take one request and carry it as far as it goes now.

        Raises WireError where its id is another's, and where the book is full.
        """
        for _ in range(_ATTEMPTS):
            now_ms = await asyncio.to_thread(self._now_ms)
            book, etag = await asyncio.to_thread(self._load)
            self._refuse_if_full(book, request)
            turn = RequestProcessor(book, now_ms, self._at())
            turn.receive(request, received_ms)
            await asyncio.to_thread(turn.advance, self._facts, {request.request_id})
            try:
                await self._perform(book, turn, etag)
            except ConflictError:
                self._metrics.store_error("retain.conflict")
                continue
            return
        raise ConflictError(f"too many writers change {BOOK_KEY}", remedy="restarting loses nothing")

    def _refuse_if_full(self, book: RequestLedger, request: RetentionRequested) -> None:
        """Raises WireError: a request in the dead letters can be sent again, one that ends the role takes all with it."""
        if request.request_id in book.records or KINDS[request.kind].accepted_when_full:
            return
        size_bytes = len(book.to_bytes())
        if size_bytes > REQUESTS_BOOK_BYTES:
            raise WireError(
                "oversize", "the book of retention requests is full", got=f"{size_bytes} bytes",
                allowed=f"{REQUESTS_BOOK_BYTES} bytes; send it again once others are done, or name more in each request",
            )  # fmt: skip

    async def tick(self) -> None:
        """See what fell due, go on with what is open, tell the figures."""
        book, etag = await asyncio.to_thread(self._load)
        turn = RequestProcessor(book, await asyncio.to_thread(self._now_ms), self._at())
        if len(book.to_bytes()) <= CALENDAR_BOOK_BYTES:
            await asyncio.to_thread(self._look, turn)
        else:
            self._metrics.store_error("retain.full")
            log.error("the book of retention requests is full: nothing new expires until some are done")
        try:
            await asyncio.to_thread(turn.advance, self._facts)
        except KafkaUnavailableError as error:  # acknowledgements can wait for the broker
            log.warning("%s", error)
            return
        try:
            await self._perform(book, turn, etag)
        except ConflictError:  # another process took a request meanwhile: the next tick starts from there
            self._metrics.store_error("retain.conflict")
            return
        await asyncio.to_thread(self._save_clock, turn.now_ms)
        self._report(turn.book, turn.now_ms)

    def _look(self, turn: RequestProcessor) -> None:
        """Put what the calendar says of some adapters into the turn, going on at the next tick where time ran out."""
        names = self._facts.adapters()
        began = time.monotonic()
        start = next((i for i, name in enumerate(names) if name > self._next_adapter), 0)
        for number, adapter in enumerate(names[start:] + names[:start]):
            if number >= _MIN_LOOKS and time.monotonic() - began > LOOK_S:
                break
            for record in calendar(turn.book, adapter, self._facts.known(adapter), turn.now_ms):
                turn.add(record)
            self._next_adapter = adapter

    async def _perform(self, before: RequestLedger, turn: RequestProcessor, etag: str | None) -> None:
        for change in turn.changes:
            await asyncio.to_thread(self._apply, change)
        if turn.changes:
            failpoint("retain.quarantine")
        for event in turn.events:
            await self._send(event, _event_id(event))
        if turn.events:
            failpoint("retain.send")
        if turn.book != before:
            book = turn.book.model_copy(update={"revision": before.revision + 1})
            data = book.to_bytes()
            if len(data) > MAX_BOOK_BYTES:
                raise IntegrityError(
                    "the book of retention requests is full", got=f"{len(data)} bytes",
                    allowed=f"{MAX_BOOK_BYTES} bytes", remedy="let the learner work off what is open",
                )  # fmt: skip
            await asyncio.to_thread(self._store.compare_and_swap, BOOK_KEY, data, etag)
            failpoint("retain.state")
            self._count(before, book)
            self._metrics.progress()

    def _apply(self, change: Change) -> None:
        update_quarantine(self._store, change.adapter, change.apply)

    def _load(self) -> tuple[RequestLedger, str | None]:
        return load_ledger(self._store)

    def _now_ms(self) -> int:
        if self._clock is None:
            shown_ms = None
            try:
                stored = self._store.get(CLOCK_KEY, 1024)
                shown_ms, self._clock_etag = _Clock.model_validate_json(stored.data).shown_ms, stored.etag
            except NotFoundError:
                pass
            except ValidationError as error:
                raise IntegrityError(
                    f"{CLOCK_KEY} is not readable", got=str(error),
                    remedy="delete the object: expiry then waits for nothing but the clock",
                ) from error  # fmt: skip
            self._clock = ClockGuard(self._settle_ms, shown_ms, self._wall_ms(), self._monotonic_ms())
        return self._clock.now_ms(self._wall_ms(), self._monotonic_ms())

    def _save_clock(self, now_ms: int) -> None:
        if self._clock_saved_ms is not None and self._monotonic_ms() - self._clock_saved_ms < CLOCK_EVERY_S * 1000:
            return
        data = _Clock(shown_ms=now_ms).model_dump_json().encode()
        try:
            self._clock_etag = self._store.compare_and_swap(CLOCK_KEY, data, self._clock_etag)
        except ConflictError:  # whoever had the calendar before, or has it after this process
            try:
                self._clock_etag = self._store.get(CLOCK_KEY, 1024).etag
            except NotFoundError:
                self._clock_etag = None
            return
        self._clock_saved_ms = self._monotonic_ms()

    def _at(self) -> datetime:
        return datetime.fromtimestamp(self._wall_ms() / 1000, UTC)

    def _count(self, before: RequestLedger, book: RequestLedger) -> None:
        for name, record in book.records.items():
            old = before.records.get(name)
            if (old is None or old.state != record.state) and record.state in {"closed", "failed"}:
                log.info("%s %s: %s: %s", record.request.kind, name, record.state, record.detail)
                if record.state == "closed" and KINDS[record.request.kind].job == "forget":
                    self._metrics.forgot(record.examples, (self._wall_ms() - record.received_ms) / 1000)

    def _report(self, book: RequestLedger, now_ms: int) -> None:
        records = list(book.records.values())
        for state, count in count_states(records).items():
            self._metrics.forget_requests(state, count)
        self._metrics.forget_overdue(overdue(book, now_ms))
        self._metrics.quarantined(sum(r.examples for r in records if r.state in {"held", "quarantined"}))


def load_ledger(store: ObjectStore) -> tuple[RequestLedger, str | None]:
    """The book of retention requests and its etag; an empty one where none was written. Raises IntegrityError."""
    try:
        stored = store.get(BOOK_KEY, MAX_BOOK_BYTES)
    except NotFoundError:
        return RequestLedger(), None
    try:
        return RequestLedger.model_validate_json(stored.data), stored.etag
    except ValidationError as error:
        raise IntegrityError(
            f"{BOOK_KEY} does not hold a book of this version", got=stored.data[:100], allowed="schema_version 1",
            remedy="restore it from a copy, or upgrade to the version that wrote it",
        ) from error  # fmt: skip


def _event_id(event: Any) -> str:
    """Jobs are told apart by their names; what is said of a request, by what is said."""
    if isinstance(event, ForgetRequested | RollbackRequested):
        return event.job_id
    return sha256(event.model_dump_json().encode()).hexdigest()[:32]
