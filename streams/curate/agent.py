"""The curate agent's hold on Faust: scored examples in; micro-batches to the store, jobs and drift out.

Order per cut: the name of the batch's body in `state/cutting/<adapter>`, the body, the state object
`state/curate/<adapter>` by compare-and-swap (the commit point, which also fences a process that lost its partitions
unawares), the job, then the acknowledgements. On restore the job in the state is sent again as soon as a delivery that
it covers comes back, for only then may it never have been sent; and a body that was named but never committed is
deleted, for its text would be where no forgetting looks.
Needs faust only as an argument; its hazards are told in streams/agents.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeAlias

from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # it ships no types
from pydantic import BaseModel, ConfigDict, ValidationError

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError, PerennialError
from perennial.storage.failpoints import failpoint
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore, put_blob
from perennial.storage.registry.quarantine import load_quarantine, update_quarantine
from perennial.streams.curate.batcher import MAX_STATE_BYTES, Cut, CutPolicy, MicroBatcher, OffsetLine
from perennial.streams.events.cloudevents import Encoded, WireError, decode, encode
from perennial.streams.events.dead_letter import encode_dead_letter
from perennial.streams.events.models import BlobRef, CutReason, DriftDetected, Event, ExampleScored, UpdateRequested
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retention.quarantine_filter import QuarantineFilter, text_hash
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.curate")

SOURCE: Final = "perennial/curate"
TOPIC: Final = ExampleScored.topic
TICK_S: Final = 0.25
MAX_CUTTING_BYTES: Final = 4096

Delivery: TypeAlias = tuple[Any, int]
"""Input partition (Faust's TP) and offset."""


class CurateError(PerennialError):
    """The curate agent got what it cannot handle."""


class _Cutting(BaseModel):
    """The body that is being written, and of which cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    cut: int
    batch: BlobRef


def state_key(adapter: str) -> str:
    """Where curate keeps what it knows of an adapter."""
    return f"state/curate/{adapter}"


def cutting_key(adapter: str) -> str:
    """Where curate names a body before it writes it."""
    return f"state/cutting/{adapter}"


class CurateAgent:
    """The state of the curate agent in one process: curators, etags and offsets of one group generation."""

    def __init__(self, app: Any, settings: Settings, metrics: Metrics, store: ObjectStore) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._store = store
        self._policy = CutPolicy.of(settings)
        self._generation: int | None = None
        self._revoked: int | None = None
        self._curators: OrderedDict[str, MicroBatcher[Delivery]] = OrderedDict()
        self._etags: dict[str, str | None] = {}
        self._cutting: dict[str, str | None] = {}  # etags of what is under cutting_key
        self._unconfirmed: set[str] = set()  # restored: whether the last job went out is not known
        self._waiting: dict[str, None] = {}  # adapters with something pending, oldest first
        self._lines: dict[Any, OffsetLine[Any]] = {}
        self._ticks = 0
        self._assigned = False

    def assign(self) -> None:
        """Partitions were given: from now on it can be told how many events wait."""
        self._assigned = True
        self._metrics.waiting(False)

    def revoke(self) -> None:
        """All partitions were taken: what is in memory belongs to a generation that is over."""
        self._assigned = False
        self._revoked = self._app.consumer_generation_id

    def _is_current(self, generation: int | None) -> bool:
        return generation == self._app.consumer_generation_id and generation != self._revoked

    def _drop_stale(self) -> None:
        """Drop what an ended generation left."""
        if self._generation is not None and not self._is_current(self._generation):
            self._generation = None
            for kept in (self._curators, self._etags, self._cutting, self._unconfirmed, self._waiting, self._lines):
                kept.clear()

    async def receive(self, event: Any) -> None:
        """Take one delivery."""
        message = event.message
        self._drop_stale()
        if not self._is_current(message.generation_id):
            return  # it will be delivered again to whoever has the partition now
        self._generation = message.generation_id
        failpoint("curate.receive")
        tp, offset = message.tp, message.offset
        if not self._lines.setdefault(tp, OffsetLine()).add(offset, event):
            return
        value, headers = message.value, message.headers
        event.value = message.value = None  # the line may hold the event for as long as the oldest example waits
        self._metrics.events_in(TOPIC)
        try:
            scored = decode(value, headers, TOPIC).event
        except WireError as error:
            await self._refuse(error, value, headers, message)
            self._acknowledge([(tp, offset)])
            return
        if not isinstance(scored, ExampleScored):
            raise CurateError("an event of another type", got=type(scored).__name__, allowed=ExampleScored.__name__)
        await self._offer(scored, (tp, offset))
        self._metrics.progress()

    async def _offer(self, scored: ExampleScored, delivery: Delivery) -> None:
        adapter = scored.example.adapter
        curator = await self._curator(adapter)
        offer = curator.offer(scored, delivery, _steady_ms())
        if offer.covered:
            if adapter in self._unconfirmed and curator.last_job is not None:
                await self._send_job(curator.last_job)
            self._unconfirmed.discard(adapter)
            self._acknowledge([delivery])
            return
        self._waiting.setdefault(adapter)
        for drift in offer.drifts:
            await self._send_drift(drift)
        if offer.reason is not None:
            await self._cut(curator, offer.reason)

    async def _curator(self, adapter: str) -> MicroBatcher[Delivery]:
        curator = self._curators.get(adapter)
        if curator is None:
            await self._make_room()
            curator = await self._load(adapter)
            self._curators[adapter] = curator
        self._curators.move_to_end(adapter)
        return curator

    async def _load(self, adapter: str) -> MicroBatcher[Delivery]:
        while True:
            curator = await asyncio.to_thread(self._restore, adapter)
            try:
                await asyncio.to_thread(self._clear, curator)
            except ConflictError:
                continue  # whoever was here before goes on still
            if self._etags[adapter] is not None:
                self._unconfirmed.add(adapter)
            return curator

    def _restore(self, adapter: str) -> MicroBatcher[Delivery]:
        try:
            stored = self._store.get(state_key(adapter), MAX_STATE_BYTES)
        except NotFoundError:
            self._etags[adapter] = None
            return MicroBatcher(adapter, self._policy)
        self._etags[adapter] = stored.etag
        return MicroBatcher.restore(adapter, self._policy, stored.data)

    def _clear(self, curator: MicroBatcher[Delivery]) -> None:
        """Delete the body that a process before this one wrote, or was about to write, and did not commit.

        Hazard: that process may go on. So the state is replaced first: it can then never commit a cut with that body.
        """
        adapter = curator.adapter
        key = cutting_key(adapter)
        try:
            stored = self._store.get(key, MAX_CUTTING_BYTES)
        except NotFoundError:
            self._cutting[adapter] = None
            return
        self._cutting[adapter] = stored.etag
        try:
            left = _Cutting.model_validate_json(stored.data)
        except ValidationError as error:
            raise IntegrityError(
                f"{key} is not readable", got=stored.data[:100], allowed="a cut and its body",
                remedy="delete the object once the blob that it names is deleted",
            ) from error  # fmt: skip
        if left.cut < curator.cuts:
            return
        self._etags[adapter] = self._store.compare_and_swap(state_key(adapter), curator.fence(), self._etags[adapter])
        self._store.delete(blob_key(left.batch.digest))

    def _write_body(self, body: bytes, job: UpdateRequested) -> None:
        """The body, once its name is known to whoever comes after a crash. Raises ConflictError."""
        name = _Cutting(cut=job.cut, batch=job.batch).model_dump_json().encode()
        held = self._cutting[job.adapter]
        self._cutting[job.adapter] = self._store.compare_and_swap(cutting_key(job.adapter), name, held)
        put_blob(self._store, body)

    async def _make_room(self) -> None:
        """Let go of the adapter unused for longest; what is pending there is cut before its time."""
        while len(self._curators) >= self._settings.curate.max_adapters:
            adapter, curator = next(iter(self._curators.items()))
            if not curator.idle:
                await self._save_due(curator, curator.due(_steady_ms() + self._policy.max_age_ms))
            curator = self._curators[adapter]
            if curator.idle:
                del self._curators[adapter], self._etags[adapter], self._cutting[adapter]
                self._unconfirmed.discard(adapter)

    async def _cut(self, curator: MicroBatcher[Delivery], reason: CutReason) -> None:
        blocked = await asyncio.to_thread(self._blocked, curator)
        await self._save(curator, curator.cut(_now(), reason, blocked))

    async def _save_due(self, curator: MicroBatcher[Delivery], due: Literal["age", "flush"] | None) -> None:
        if due == "flush":
            await self._save(curator, curator.flush())
        else:
            await self._cut(curator, "age")

    def _blocked(self, curator: MicroBatcher[Delivery]) -> Collection[str]:
        """Ids of the pending examples that must not be learned. Their texts never reach the store.

        What is to be forgotten for good is gone before any version could know it, so here its text is suppressed.
        """
        quarantine = load_quarantine(self._store, curator.adapter)
        if not (quarantine.entries or quarantine.suppressed):
            return ()
        screen = QuarantineFilter(quarantine)
        blocked = {example.example_id: example for example in curator.pending if screen.blocks(example)}
        erased = [text for example in blocked.values() if screen.erases(example) and (text := text_hash(example))]
        if erased:
            update_quarantine(self._store, curator.adapter, lambda found: found.suppressing(erased))
        return blocked.keys()

    async def _save(self, curator: MicroBatcher[Delivery], cut: Cut) -> None:
        """Body, state, job, acknowledgements: in this order a crash at any point loses and doubles nothing."""
        adapter = curator.adapter
        try:
            if cut.body is not None and cut.job is not None:
                await asyncio.to_thread(self._write_body, cut.body, cut.job)
                failpoint("curate.blob")
            self._etags[adapter] = await asyncio.to_thread(
                self._store.compare_and_swap, state_key(adapter), cut.state, self._etags[adapter]
            )
        except ConflictError:
            self._metrics.store_error("curate.conflict")
            await self._reload(curator)
            return
        failpoint("curate.state")
        if cut.job is not None:
            await self._send_job(cut.job)
            self._metrics.cut(cut.job.reason, cut.job.examples, cut.job.tokens)
        self._unconfirmed.discard(adapter)
        self._waiting.pop(adapter, None)
        self._acknowledge(curator.saved())
        self._metrics.progress()

    async def _reload(self, curator: MicroBatcher[Delivery]) -> None:
        """Another process cut this adapter meanwhile: take its state over, and what is pending beyond it.

        What is pending is a part of the log without holes, so what lies beyond the new marks is all there.
        """
        adapter = curator.adapter
        self._waiting.pop(adapter, None)
        self._curators[adapter] = await self._load(adapter)
        for scored, delivery in curator.tail():
            await self._offer(scored, delivery)
        again = curator.redelivered()
        if self._curators[adapter].idle:
            self._acknowledge(again)
        else:
            self._curators[adapter].adopt(again)

    async def tick(self) -> None:
        """Cut what has waited long enough; every fourth time, report."""
        self._drop_stale()
        now_ms = _steady_ms()
        while self._waiting:
            curator = self._curators[next(iter(self._waiting))]
            due = curator.due(now_ms)
            if due is None:
                break
            await self._save_due(curator, due)
        self._ticks += 1
        if self._ticks % 4 == 0 and self._assigned:
            with suppress(KafkaError):  # a rebalance that began meanwhile
                await self._report(_now_ms())

    async def _report(self, now_ms: int) -> None:
        lag = 0
        for tp in self._app.consumer.assignment():
            if tp.topic != self._settings.kafka.topic(TOPIC):
                continue
            line = self._lines.get(tp)
            at = line.next_offset if line is not None else await self._app.consumer.position(tp)
            lag += max(0, (self._app.consumer.highwater(tp) or 0) - (at or 0))
        self._metrics.lag(TOPIC, lag)
        oldest = [c.oldest_origin_ms for c in map(self._curators.__getitem__, list(self._waiting)[:1])]
        self._metrics.oldest_age_s(max(0.0, (now_ms - oldest[0]) / 1000) if oldest and oldest[0] else 0.0)

    def _acknowledge(self, deliveries: list[Delivery]) -> None:
        if not self._is_current(self._generation):
            return
        touched = []
        for tp, offset in deliveries:
            self._lines[tp].done(offset)
            touched.append(tp)
        for tp in dict.fromkeys(touched):
            for event in self._lines[tp].ready():
                event.ack()
        failpoint("curate.ack")

    async def _refuse(self, error: WireError, value: bytes | None, headers: Any, message: Any) -> None:
        log.warning("refused %s[%d]@%d: %s", TOPIC, message.partition, message.offset, error.reason)
        letter, letter_headers = encode_dead_letter(
            value, headers, reason=error.reason, stage="curate", detail=error.detail, topic=TOPIC,
            partition=message.partition, offset=message.offset, at=_now(),
        )  # fmt: skip
        await self._produce("dead-letters", message.key, letter, letter_headers)
        self._metrics.refused(error.reason)

    async def _send_job(self, job: UpdateRequested) -> None:
        await self._send(job, encode(job, event_id=job.job_id, source=SOURCE, occurred_at=job.cut_at))
        failpoint("curate.produce")

    async def _send_drift(self, drift: DriftDetected) -> None:
        log.info("drift of %s in %s: %.3f to %.3f", drift.signal, drift.adapter, drift.before, drift.after)
        self._metrics.drift(drift.signal, drift.detector, drift.adapter)
        event_id = f"{drift.adapter}:{drift.signal}:{drift.examples_seen}"
        await self._send(drift, encode(drift, event_id=event_id, source=SOURCE, occurred_at=_now()))

    async def _send(self, event: Event, encoded: Encoded) -> None:
        await self._produce(event.topic, encoded.key, encoded.value, encoded.headers)

    async def _produce(self, topic: str, key: bytes | None, value: bytes | None, headers: Any) -> None:
        """Publish and wait for the broker's acknowledgement by all in-sync replicas."""
        await self._app.producer.send_and_wait(self._settings.kafka.topic(topic), key, value, None, None, headers)
        self._metrics.events_out(topic)


def _now() -> datetime:
    return datetime.now(UTC)


def _steady_ms() -> int:
    """For how long an example waits: a wall clock that is set back would keep every adapter's from being cut."""
    return time.monotonic_ns() // 1_000_000


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
