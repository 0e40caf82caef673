"""The retain agent without Kafka's consumer: keep the ledger in the store and perform the steps of the state machine.

The order of one step: change the quarantines, send the events, save the ledger by compare-and-swap; then the caller
acknowledges the Kafka record. A crash at any point repeats the step, which does no harm: changes of quarantines and of
the ledger are idempotent, and the jobs have the same ids again.
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
from perennial.streams.events.fields import Event
from perennial.streams.events.models import ForgetRequested, RetentionRequested, RollbackRequested
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.acks import AckReader
from perennial.streams.kafka.topics import KafkaUnavailableError
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retain.clock import ClockGuard
from perennial.streams.retain.example_index import ExampleIndex
from perennial.streams.retain.ledger import RequestLedger, StoredExample, calendar, count_states, overdue
from perennial.streams.retain.state_machine import AliasPosition, QuarantineChange, RequestProcessor
from perennial.streams.retention.kinds import KINDS
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.retain")

LEDGER_KEY: Final = "retention/state"
CLOCK_KEY: Final = "retention/clock"
SOURCE: Final = "perennial/retain"
MAX_LEDGER_BYTES: Final = 64 << 20
CALENDAR_LEDGER_BYTES: Final = MAX_LEDGER_BYTES // 2
"""A larger ledger takes no more requests of the calendar; examples that are due wait."""
REQUESTS_LEDGER_BYTES: Final = MAX_LEDGER_BYTES // 8 * 7
"""A larger ledger takes no more requests, except releases. The room up to MAX_LEDGER_BYTES is for the progress of the
requests that are in it."""
ADAPTERS_EVERY_S: Final = 15.0
CLOCK_EVERY_S: Final = 20.0
CALENDAR_BUDGET_S: Final = 1.0
"""About how long one tick may look at adapters for the calendar; the next tick goes on from there."""
_MIN_ADAPTERS_PER_TICK: Final = 16
_ATTEMPTS: Final = 16

Send = Callable[[Event, str], Awaitable[None]]
"""Publish an event under a CloudEvents id and wait for the broker's acknowledgement."""


class _Clock(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    shown_ms: int


class StoreFacts:
    """Answer what steps ask (see `Facts`) from the store and from the topic adapter-acks.

    Args:
        settings: The alias whose replicas count.
        store: The object store.
        acks: A reader of what replicas acknowledged.
    """

    def __init__(self, settings: Settings, store: ObjectStore, acks: AckReader) -> None:
        self.store = store
        self.registry = Registry(store, nonce=lambda: uuid4().hex, now=lambda: datetime.now(UTC))
        self._index = ExampleIndex(self.registry)
        self._acks = acks
        self._alias = settings.serving.alias
        self._adapters: list[str] = []
        self._listed_s: float | None = None

    def adapters(self) -> list[str]:
        """Return every adapter with a version or a cut micro-batch; listed at most every ADAPTERS_EVERY_S seconds."""
        if self._listed_s is None or time.monotonic() - self._listed_s >= ADAPTERS_EVERY_S:
            cut = (key.removeprefix("state/curate/") for key in self.store.list("state/curate/"))
            self._adapters = sorted({*self.registry.adapters(), *cut})
            self._listed_s = time.monotonic()
        return self._adapters

    def examples(self, adapter: str) -> Sequence[StoredExample]:
        """See `Facts`."""
        return self._index.of(adapter)

    def outcome(self, adapter: str, request_id: str) -> RequestOutcome | None:
        """See `Facts`."""
        entry = load_quarantine(self.store, adapter).entry(request_id)
        return entry.done if entry else None

    def live(self, adapter: str) -> AliasPosition:
        """See `Facts`."""
        state = self.registry.alias(adapter, self._alias)
        if state is None:
            return AliasPosition(None, 0)
        return AliasPosition(None if state.kind == "retired" else state.version, state.generation)

    def is_revoked(self, adapter: str, version: str) -> bool:
        """See `Facts`."""
        return self.registry.is_revoked(adapter, self.registry.manifest(adapter, version).seq)

    def lagging(self, adapter: str, generation: int) -> Sequence[str]:
        """See `Facts`."""
        revoked = {revocation.version for revocation in self.registry.revocations(adapter)}
        return self._acks.lagging(adapter, self._alias, generation, revoked)


class RetainService:
    """The ledger, its steps and its clock, in one process.

    Args:
        settings: The settling time of the clock.
        metrics: Where figures go.
        facts: The state of the store and of the replicas.
        send: Publishes an event; see `Send`.
        wall_ms: The wall clock, in milliseconds since 1970.
        monotonic_ms: The monotonic clock, in milliseconds.
    """

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
        """Accept one request and carry it as far as it goes now.

        Args:
            request: The request as it came from the topic.
            received_ms: When the broker took it, in milliseconds since 1970.

        Raises:
            WireError: Another request had the same id, or the ledger is full.
            ConflictError: Other writers kept changing the ledger.
        """
        for _ in range(_ATTEMPTS):
            now_ms = await asyncio.to_thread(self._now_ms)
            ledger, etag = await asyncio.to_thread(self._load)
            self._refuse_if_full(ledger, request)
            step = RequestProcessor(ledger, now_ms, self._at())
            step.receive(request, received_ms)
            await asyncio.to_thread(step.advance, self._facts, {request.request_id})
            try:
                await self._perform(ledger, step, etag)
            except ConflictError:
                self._metrics.store_error("retain.conflict")
                continue
            return
        raise ConflictError(f"too many writers change {LEDGER_KEY}", remedy="restart the role; nothing is lost")

    def _refuse_if_full(self, ledger: RequestLedger, request: RetentionRequested) -> None:
        """Raise WireError if the ledger has no room.

        The refused request becomes a dead letter and can be sent again. A ledger over its limit would be worse: it
        would end the role, and no request could go on.
        """
        if request.request_id in ledger.records or KINDS[request.kind].accepted_when_full:
            return
        size_bytes = len(ledger.to_bytes())
        if size_bytes > REQUESTS_LEDGER_BYTES:
            raise WireError(
                "oversize", "the ledger of retention requests is full", got=f"{size_bytes} bytes",
                allowed=f"{REQUESTS_LEDGER_BYTES} bytes; send the request again once others are closed, or name more "
                "examples in each request",
            )  # fmt: skip

    async def tick(self) -> None:
        """Run the calendar, go on with open requests, and set the metrics."""
        ledger, etag = await asyncio.to_thread(self._load)
        step = RequestProcessor(ledger, await asyncio.to_thread(self._now_ms), self._at())
        if len(ledger.to_bytes()) <= CALENDAR_LEDGER_BYTES:
            await asyncio.to_thread(self._run_calendar, step)
        else:
            self._metrics.store_error("retain.full")
            log.error("the ledger of retention requests is full: no further example expires until requests are closed")
        try:
            await asyncio.to_thread(step.advance, self._facts)
        except KafkaUnavailableError as error:  # the acknowledgements of replicas can wait for the broker
            log.warning("%s", error)
            return
        try:
            await self._perform(ledger, step, etag)
        except ConflictError:  # another process took a request in the meantime: the next tick starts from there
            self._metrics.store_error("retain.conflict")
            return
        await asyncio.to_thread(self._save_clock, step.now_ms)
        self._report(step.ledger, step.now_ms)

    def _run_calendar(self, step: RequestProcessor) -> None:
        """Add what the calendar says of some adapters; the next tick goes on with the adapters after them."""
        names = self._facts.adapters()
        began = time.monotonic()
        start = next((i for i, name in enumerate(names) if name > self._next_adapter), 0)
        for number, adapter in enumerate(names[start:] + names[:start]):
            if number >= _MIN_ADAPTERS_PER_TICK and time.monotonic() - began > CALENDAR_BUDGET_S:
                break
            for record in calendar(step.ledger, adapter, self._facts.examples(adapter), step.now_ms):
                step.add(record)
            self._next_adapter = adapter

    async def _perform(self, before: RequestLedger, step: RequestProcessor, etag: str | None) -> None:
        """Apply the step's changes, send its events, then replace the ledger.

        Raises:
            ConflictError: Another process replaced the ledger first.
            IntegrityError: The ledger would grow over its limit.
        """
        for change in step.changes:
            await asyncio.to_thread(self._apply, change)
        if step.changes:
            failpoint("retain.quarantine")
        for event in step.events:
            await self._send(event, _event_id(event))
        if step.events:
            failpoint("retain.send")
        if step.ledger != before:
            ledger = step.ledger.model_copy(update={"revision": before.revision + 1})
            data = ledger.to_bytes()
            if len(data) > MAX_LEDGER_BYTES:
                raise IntegrityError(
                    "the ledger of retention requests is full", got=f"{len(data)} bytes",
                    allowed=f"{MAX_LEDGER_BYTES} bytes", remedy="let the learner work off the open requests",
                )  # fmt: skip
            await asyncio.to_thread(self._store.compare_and_swap, LEDGER_KEY, data, etag)
            failpoint("retain.state")
            self._count(before, ledger)
            self._metrics.progress()

    def _apply(self, change: QuarantineChange) -> None:
        update_quarantine(self._store, change.adapter, change.apply)

    def _load(self) -> tuple[RequestLedger, str | None]:
        return load_ledger(self._store)

    def _now_ms(self) -> int:
        if self._clock is None:
            last_ms = None
            try:
                stored = self._store.get(CLOCK_KEY, 1024)
                last_ms, self._clock_etag = _Clock.model_validate_json(stored.data).shown_ms, stored.etag
            except NotFoundError:
                pass
            except ValidationError as error:
                raise IntegrityError(
                    f"{CLOCK_KEY} is not readable", got=str(error),
                    remedy="delete the object: the clock is then taken as it is, as at a first start",
                ) from error  # fmt: skip
            self._clock = ClockGuard(self._settle_ms, last_ms, self._wall_ms(), self._monotonic_ms())
        return self._clock.now_ms(self._wall_ms(), self._monotonic_ms())

    def _save_clock(self, now_ms: int) -> None:
        if self._clock_saved_ms is not None and self._monotonic_ms() - self._clock_saved_ms < CLOCK_EVERY_S * 1000:
            return
        data = _Clock(shown_ms=now_ms).model_dump_json().encode()
        try:
            self._clock_etag = self._store.compare_and_swap(CLOCK_KEY, data, self._clock_etag)
        except ConflictError:  # the process that had the calendar before, or has it after this one, wrote it
            try:
                self._clock_etag = self._store.get(CLOCK_KEY, 1024).etag
            except NotFoundError:
                self._clock_etag = None
            return
        self._clock_saved_ms = self._monotonic_ms()

    def _at(self) -> datetime:
        return datetime.fromtimestamp(self._wall_ms() / 1000, UTC)

    def _count(self, before: RequestLedger, ledger: RequestLedger) -> None:
        for request_id, record in ledger.records.items():
            old = before.records.get(request_id)
            if (old is None or old.state != record.state) and record.state in {"closed", "failed"}:
                log.info("%s %s: %s: %s", record.request.kind, request_id, record.state, record.detail)
                if record.state == "closed" and KINDS[record.request.kind].job == "forget":
                    self._metrics.forgot(record.examples, (self._wall_ms() - record.received_ms) / 1000)

    def _report(self, ledger: RequestLedger, now_ms: int) -> None:
        records = list(ledger.records.values())
        for state, count in count_states(records).items():
            self._metrics.forget_requests(state, count)
        self._metrics.forget_overdue(overdue(ledger, now_ms))
        self._metrics.quarantined(sum(r.examples for r in records if r.state in {"held", "quarantined"}))


def load_ledger(store: ObjectStore) -> tuple[RequestLedger, str | None]:
    """Return the ledger of retention requests and its etag; an empty one and None where none was written.

    Raises:
        IntegrityError: The object is not a ledger of this version.
    """
    try:
        stored = store.get(LEDGER_KEY, MAX_LEDGER_BYTES)
    except NotFoundError:
        return RequestLedger(), None
    try:
        return RequestLedger.model_validate_json(stored.data), stored.etag
    except ValidationError as error:
        raise IntegrityError(
            f"{LEDGER_KEY} does not hold a ledger of this version", got=stored.data[:100], allowed="schema_version 1",
            remedy="restore it from a copy, or upgrade to the version that wrote it",
        ) from error  # fmt: skip


def _event_id(event: Any) -> str:
    """Return the id of a job as it is, and for a status a hash of its content."""
    if isinstance(event, ForgetRequested | RollbackRequested):
        return event.job_id
    return sha256(event.model_dump_json().encode()).hexdigest()[:32]
