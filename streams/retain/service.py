"""The retain agent without Kafka's consumer: perform the slices of the request worker, and keep the guarded clock.

The order within a slice: change the quarantines, send the events, store the requests by compare-and-swap; after the
last slice of a delivery the caller acknowledges the Kafka record. A crash at any point repeats the slice, which does no
harm: changes of quarantines are idempotent, and the jobs have the same ids again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError, StoreError
from perennial.storage.failpoints import failpoint
from perennial.storage.recovery.rollback import revoke
from perennial.streams.events.fields import Event
from perennial.streams.events.models import ForgetRequested, RetentionRequested, RollbackRequested
from perennial.streams.events.tenants import request_in_tenant, tenant_topic
from perennial.streams.kafka.event_signatures import ReceivedRequest
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retain.clock import ClockGuard
from perennial.streams.retain.ledger import STATES, RequestRecord, epoch_ms
from perennial.streams.retain.ledger_migration import migrate_ledger
from perennial.streams.retain.request_store import RequestStore
from perennial.streams.retain.request_worker import RequestWorker
from perennial.streams.retain.rules.approvals import ApprovalRules
from perennial.streams.retain.rules.jobs import QuarantineChange
from perennial.streams.retain.store_facts import StoreFacts
from perennial.streams.retain.work_slice import Slice
from perennial.streams.retention.kinds import KINDS
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.retain")

CLOCK_KEY: Final = "retention/clock"
SOURCE: Final = "perennial/retain"
CLOCK_EVERY_S: Final = 20.0
PRUNE_REPLICAS_EVERY_S: Final = 3600.0
_ATTEMPTS: Final = 16

Send = Callable[[Event, str], Awaitable[None]]
"""Publish an event under a CloudEvents id and wait for the broker's acknowledgement."""


class _Clock(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    shown_ms: int


class RetainService:
    """Retention requests and the clock, in one process.

    Args:
        settings: The settling time of the clock, the time to gather requests and to rebuild ahead.
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
        self._registry = facts.signing_registry
        self._send = send
        self._tenants = settings.tenants.names
        self._full_name = settings.kafka.topic
        self._settle_ms = int(settings.retain.clock_settle_s * 1000)
        self._wall_ms = wall_ms
        self._monotonic_ms = monotonic_ms
        self._clock: ClockGuard | None = None
        self._clock_etag: str | None = None
        self._clock_saved_ms: int | None = None
        self._lock: asyncio.Lock | None = None
        self._migrated = False
        self._pruned_ms = monotonic_ms()
        self._ended: Counter[str] = Counter()
        self._worker = RequestWorker(
            RequestStore(facts.store), facts, self._at, self._count,
            gather_ms=int(settings.retain.forget_window_s * 1000), lead_ms=int(settings.retain.expiry_lead_s * 1000),
            approvals=_approval_rules(settings), tenants=self._tenants,
        )  # fmt: skip

    async def receive(
        self, request: RetentionRequested, received_ms: int, tenant: str | None = None, *, is_read_again: bool = False
    ) -> None:
        """Accept one request and take its first step.

        Args:
            request: The request as it came from the topic.
            received_ms: When the broker took it, in milliseconds since 1970.
            tenant: The tenant whose topic it came from; None: it came from `retention`.
            is_read_again: Whether a restore reads it again. It may be older than the topics of a tenant with whose name
                its id begins, so such an id is accepted.

        Raises:
            WireError: Another request had the same id, the id is reserved, a record approves nothing, or it addresses an
                adapter of another tenant.
            ConflictError: Other writers kept changing the request.
        """
        named = request_in_tenant(request, tenant, () if is_read_again else self._tenants)
        topic = request.topic if tenant is None else tenant_topic(request.topic, tenant)
        signed = ReceivedRequest.of(request, self._full_name(topic))
        await self._migrate()
        for _ in range(_ATTEMPTS):
            now_ms = await asyncio.to_thread(self._now_ms)
            slices = self._worker.receive(named, received_ms, now_ms, signed)
            if await self._drive(slices, stop_at_conflict=True):
                return
        raise ConflictError(
            f"too many writers change request {request.request_id}", remedy="restart the role; nothing is lost"
        )

    async def tick(self) -> None:
        """Run the calendar, go on with open requests, and set the metrics."""
        await self._migrate()
        now_ms = await asyncio.to_thread(self._now_ms)
        try:
            await self._drive(self._worker.tick(now_ms), stop_at_conflict=False)
            if self._monotonic_ms() - self._pruned_ms >= PRUNE_REPLICAS_EVERY_S * 1000:
                self._pruned_ms = self._monotonic_ms()
                async with self._turns():
                    await asyncio.to_thread(self._facts.prune_replicas)
        except KafkaUnavailableError as error:  # the acknowledgements of replicas can wait for the broker
            log.warning("%s", error)
            return
        await asyncio.to_thread(self._save_clock, now_ms)
        async with self._turns():
            self._report(now_ms)

    async def _migrate(self) -> None:
        if not self._migrated:
            await asyncio.to_thread(migrate_ledger, RequestStore(self._store))
            self._migrated = True

    async def _drive(self, slices: Iterator[Slice], *, stop_at_conflict: bool) -> bool:
        """Perform slices, one at a time and none while another delivery or tick performs one.

        Returns:
            False where another process changed a request first and the caller wants to begin anew.
        """
        while True:
            async with self._turns():
                piece = await asyncio.to_thread(next, slices, None)
                if piece is None:
                    return True
                try:
                    await self._perform(piece)
                except ConflictError:  # another process stored it first: go on from what is stored now
                    self._metrics.store_error("retain.conflict")
                    self._worker.drop_begun()
                    if stop_at_conflict:
                        return False

    def _turns(self) -> asyncio.Lock:
        """Return the lock that whoever uses the worker holds; made at its first use, in the running event loop."""
        if self._lock is None:
            self._lock = asyncio.Lock()
        return self._lock

    async def _perform(self, piece: Slice) -> None:
        """Apply the changes of a slice, send its events, store its requests, then apply its removals.

        Raises:
            ConflictError: Another process stored a request first.
        """
        if piece.changes:
            await asyncio.to_thread(self._apply, piece.changes)
            failpoint("retain.quarantine")
        for event in piece.events:
            await self._send(event, _event_id(event))
        if piece.events:
            failpoint("retain.send")
        if piece.saves:
            await asyncio.to_thread(_save, piece)
            failpoint("retain.state")
        if piece.removals:
            await asyncio.to_thread(self._apply, piece.removals)
        if piece.changes or piece.events or piece.saves:
            self._metrics.progress()
        # Only now: the store says which version the request is about, so a step that is taken again takes out no other.
        for event in piece.events:
            if isinstance(event, RollbackRequested):
                await asyncio.to_thread(self._revoke_now, event)

    def _revoke_now(self, job: RollbackRequested) -> None:
        """Take the version out of service without waiting for a learner.

        The learner finds the job done when its turn comes, and publishes the event. A process that ends before this
        leaves it to the learner.
        """
        if job.version is None:
            return
        try:
            revoke(self._registry, job.adapter, job.alias, job.version, job.job_id, job.reason)
        except StoreError as error:
            log.warning("job %s could not be carried out here and is left to a learner: %s", job.job_id, error)

    def _apply(self, changes: list[QuarantineChange]) -> None:
        for change in changes:
            self._worker.apply(change)

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

    def _count(self, before: RequestRecord | None, record: RequestRecord) -> None:
        """Log and count a request that ended."""
        if record.open or (before is not None and not before.open):
            return
        request = record.request
        log.info("%s %s: %s: %s", request.kind, request.request_id, record.state, record.detail)
        self._ended[record.state] += 1
        if record.exceptions:
            self._metrics.forget_exceptions()
        if record.state == "closed" and KINDS[request.kind].job == "forget":
            self._metrics.forgot(record.examples, (self._wall_ms() - record.received_ms) / 1000)

    def _report(self, now_ms: int) -> None:
        cache = self._worker.cache
        requests = [found.record for found in cache.open.values()]
        in_force = [record for record in cache.in_force.everything() if record.state == "executed"]
        states = Counter(record.state for record in (*requests, *in_force)) + self._ended
        for state in STATES:
            self._metrics.forget_requests(state, states[state])
        due = [epoch_ms(record.request.due_at) for record in requests if not KINDS[record.request.kind].stays_in_force]
        self._metrics.forget_overdue(sum(due_ms is not None and due_ms <= now_ms for due_ms in due))
        self._metrics.quarantined(sum(r.examples for r in requests if r.state in {"held", "quarantined"}))


def _approval_rules(settings: Settings) -> ApprovalRules:
    """Return which requests need a second approver.

    Raises:
        KeyFileError: The file of the trusted keys cannot be used.
    """
    if settings.retain.second_approver == "off":
        return ApprovalRules()
    return ApprovalRules(int(settings.retain.approval_wait_s * 1000), settings.signing.request_readers_trust())


def _save(piece: Slice) -> None:
    for save in piece.saves:
        save()


def _event_id(event: Any) -> str:
    """Return the id of a job as it is, and for a status a hash of its content."""
    if isinstance(event, ForgetRequested | RollbackRequested):
        return event.job_id
    return sha256(event.model_dump_json().encode()).hexdigest()[:32]
