"""The Faust application: thin agents around the pure parts. The only file that imports faust.

curate: scored examples in; micro-batches to the store, jobs and drift out. Order per cut: the batch's body, the state
object `state/curate/<adapter>` by compare-and-swap (the commit point, which also fences a process that lost its
partitions unawares), the job, then the acknowledgements. On restore the job in the state is sent again as soon as a
delivery that it covers comes back, for only then may it never have been sent.

Hazards of Faust that shape this file, all read in its source:
- an agent that raises acknowledges what it was given, so nothing here raises: a fatal error parks the agent and ends
  the application, and `run_streams` raises it;
- acknowledging out of order commits past what is pending (see OffsetLine);
- every rebalance revokes all partitions and rewinds those it gives back to their committed offset, so all that is in
  memory belongs to one generation of the group and is dropped with it.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import faust
from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # it ships no types

from storage.blobs import ObjectStore, open_store, put_blob
from storage.errors import ConflictError, NotFoundError, PerennialError
from storage.failpoints import failpoint
from streams.events import CutReason, DriftDetected, Event, ExampleScored, UpdateRequested
from streams.metrics import Metrics
from streams.settings import Settings
from streams.trigger import MAX_STATE_BYTES, Curator, Cut, CutPolicy, OffsetLine
from streams.wire import Encoded, WireError, dead_letter, decode, encode

log = logging.getLogger("perennial.curate")

COMMIT_INTERVAL_S: Final = 1.0
TICK_S: Final = 0.25
SESSION_S: Final = 10.0
STOP_S: Final = 5.0
SOURCE: Final = "perennial/curate"
_INPUT: Final = ExampleScored.topic
_UNTIL_STOPPED: Final = 0.05

Delivery: TypeAlias = tuple[Any, int]
"""Input partition (Faust's TP) and offset."""


class StreamsError(PerennialError):
    """The Faust application ended by itself."""


def state_key(adapter: str) -> str:
    """Where curate keeps what it knows of an adapter."""
    return f"state/curate/{adapter}"


class InterruptedStepError(StreamsError):
    """A step was cancelled half-way, so the state in memory may not be what is in the store."""


class Guard:
    """One step at a time on the shared state, and a clear end on what cannot be handled: parked, never raised.

    Hazard: a step that did not come to its end (an error, or a cancellation on stopping) leaves the state in memory
    behind what it may have written; another step on it would count examples twice. So none runs after it.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self._lock = asyncio.Lock()
        self._in_step = False

    async def __call__(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run a step; where it fails, remember why and never return, so that Faust acknowledges nothing."""
        async with self._lock:
            try:
                if self._in_step:
                    raise InterruptedStepError  # noqa: TRY301 - parked below like any other failure
                self._in_step = True
                await step()
                self._in_step = False
                return  # noqa: TRY300 - nothing here may be left undone
            except Exception as error:  # noqa: BLE001 - the agent's boundary: nothing may reach Faust
                self.failure = self.failure or error
        await asyncio.Event().wait()


class Curation:
    """The state of the curate agent in one process: curators, etags and offsets of one group generation."""

    def __init__(self, app: Any, settings: Settings, metrics: Metrics, store: ObjectStore) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._store = store
        self._policy = CutPolicy.of(settings)
        self._generation: int | None = None
        self._revoked: int | None = None
        self._curators: OrderedDict[str, Curator[Delivery]] = OrderedDict()
        self._etags: dict[str, str | None] = {}
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
            for kept in (self._curators, self._etags, self._unconfirmed, self._waiting, self._lines):
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
        self._metrics.events_in(_INPUT)
        try:
            scored = decode(value, headers, _INPUT).event
        except WireError as error:
            await self._refuse(error, value, headers, message)
            self._acknowledge([(tp, offset)])
            return
        if not isinstance(scored, ExampleScored):
            raise StreamsError("an event of another type", got=type(scored).__name__, allowed=ExampleScored.__name__)
        await self._offer(scored, (tp, offset))
        self._metrics.progress()

    async def _offer(self, scored: ExampleScored, delivery: Delivery) -> None:
        adapter = scored.example.adapter
        curator = await self._curator(adapter)
        offer = curator.offer(scored, delivery, _now_ms())
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

    async def _curator(self, adapter: str) -> Curator[Delivery]:
        curator = self._curators.get(adapter)
        if curator is None:
            await self._make_room()
            curator = await self._load(adapter)
            self._curators[adapter] = curator
        self._curators.move_to_end(adapter)
        return curator

    async def _load(self, adapter: str) -> Curator[Delivery]:
        try:
            stored = await asyncio.to_thread(self._store.get, state_key(adapter), MAX_STATE_BYTES)
        except NotFoundError:
            self._etags[adapter] = None
            return Curator(adapter, self._policy)
        self._etags[adapter] = stored.etag
        self._unconfirmed.add(adapter)
        return Curator.restore(adapter, self._policy, stored.data)

    async def _make_room(self) -> None:
        """Let go of the adapter unused for longest; what is pending there is cut before its time."""
        while len(self._curators) >= self._settings.max_adapters:
            adapter, curator = next(iter(self._curators.items()))
            if not curator.idle:
                await self._save_due(curator, curator.due(_now_ms() + self._policy.max_age_ms))
            curator = self._curators[adapter]
            if curator.idle:
                del self._curators[adapter], self._etags[adapter]
                self._unconfirmed.discard(adapter)

    async def _cut(self, curator: Curator[Delivery], reason: CutReason) -> None:
        await self._save(curator, curator.cut(_now(), reason))

    async def _save_due(self, curator: Curator[Delivery], due: Literal["age", "flush"] | None) -> None:
        await self._save(curator, curator.flush() if due == "flush" else curator.cut(_now(), "age"))

    async def _save(self, curator: Curator[Delivery], cut: Cut) -> None:
        """Body, state, job, acknowledgements: in this order a crash at any point loses and doubles nothing."""
        adapter = curator.adapter
        if cut.body is not None:
            await asyncio.to_thread(put_blob, self._store, cut.body)
            failpoint("curate.blob")
        try:
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

    async def _reload(self, curator: Curator[Delivery]) -> None:
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
        now_ms = _now_ms()
        while self._waiting:
            curator = self._curators[next(iter(self._waiting))]
            due = curator.due(now_ms)
            if due is None:
                break
            await self._save_due(curator, due)
        self._ticks += 1
        if self._ticks % 4 == 0 and self._assigned:
            with suppress(KafkaError):  # a rebalance that began meanwhile
                await self._report(now_ms)

    async def _report(self, now_ms: int) -> None:
        lag = 0
        for tp in self._app.consumer.assignment():
            if tp.topic != self._settings.topic(_INPUT):
                continue
            line = self._lines.get(tp)
            at = line.next_offset if line is not None else await self._app.consumer.position(tp)
            lag += max(0, (self._app.consumer.highwater(tp) or 0) - (at or 0))
        self._metrics.lag(_INPUT, lag)
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
        log.warning("refused %s[%d]@%d: %s", _INPUT, message.partition, message.offset, error.reason)
        letter, letter_headers = dead_letter(
            value, headers, reason=error.reason, stage="curate", detail=error.detail, topic=_INPUT,
            partition=message.partition, offset=message.offset, at=_now(),
        )  # fmt: skip
        await self._produce("dead-letters", message.key, letter, letter_headers)
        self._metrics.refused(error.reason)

    async def _send_job(self, job: UpdateRequested) -> None:
        await self._send(job, encode(job, id=job.job_id, source=SOURCE, time=job.cut_at))
        failpoint("curate.produce")

    async def _send_drift(self, drift: DriftDetected) -> None:
        log.info("drift of %s in %s: %.3f to %.3f", drift.signal, drift.adapter, drift.before, drift.after)
        self._metrics.drift(drift.signal, drift.detector)
        event_id = f"{drift.adapter}:{drift.signal}:{drift.examples_seen}"
        await self._send(drift, encode(drift, id=event_id, source=SOURCE, time=_now()))

    async def _send(self, event: Event, encoded: Encoded) -> None:
        await self._produce(event.topic, encoded.key, encoded.value, encoded.headers)

    async def _produce(self, topic: str, key: bytes | None, value: bytes | None, headers: Any) -> None:
        """Publish and wait for the broker's acknowledgement by all in-sync replicas."""
        await self._app.producer.send_and_wait(self._settings.topic(topic), key, value, None, None, headers)
        self._metrics.events_out(topic)


def build_app(settings: Settings, metrics: Metrics, store: ObjectStore, guard: Guard, folder: Path) -> Any:
    """The application with its agents. folder: an empty one, for what Faust insists on writing."""
    app = faust.App(
        settings.topic("curate"),
        broker=[f"kafka://{server.strip()}" for server in settings.require_kafka().split(",")],
        store="memory://",
        datadir=str(folder),
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        processing_guarantee="at_least_once",
        consumer_auto_offset_reset="earliest",
        broker_commit_interval=COMMIT_INTERVAL_S,
        broker_session_timeout=SESSION_S,
        broker_heartbeat_interval=SESSION_S / 4,
        producer_acks=-1,
        producer_max_request_size=8 * 1024 * 1024,
        stream_wait_empty=False,
        stream_buffer_maxsize=1024,
        key_serializer="raw",
        value_serializer="raw",
    )
    _add_curate(app, settings, metrics, store, guard)
    return app


def _add_curate(app: Any, settings: Settings, metrics: Metrics, store: ObjectStore, guard: Guard) -> None:
    curation = Curation(app, settings, metrics, store)
    topic = app.topic(settings.topic(_INPUT), key_type=bytes, value_type=bytes)

    @app.agent(topic, name="curate", concurrency=1)  # type: ignore[untyped-decorator]
    async def curate(stream: Any) -> None:
        async for event in stream.noack().events():
            await guard(partial(curation.receive, event))

    @app.timer(interval=TICK_S)  # type: ignore[untyped-decorator]
    async def tick() -> None:
        await guard(curation.tick)

    async def revoked(*_: Any, **__: Any) -> None:
        curation.revoke()

    async def assigned(*_: Any, **__: Any) -> None:
        curation.assign()

    app.on_partitions_revoked.connect(revoked, weak=False)
    app.on_partitions_assigned.connect(assigned, weak=False)


def run_streams(settings: Settings, stop: threading.Event, metrics: Metrics) -> None:
    """Run the agents until `stop` is set. Raises PerennialError where they cannot go on."""
    for name in ("faust", "mode", "aiokafka"):
        logging.getLogger(name).setLevel(logging.ERROR)
    store = open_store(settings.require_store())
    with tempfile.TemporaryDirectory(prefix="perennial-curate-") as folder:
        asyncio.run(_run(settings, stop, metrics, store, Path(folder)))


async def _run(
    settings: Settings, stop: threading.Event, metrics: Metrics, store: ObjectStore, folder: Path
) -> None:
    guard = Guard()
    app = build_app(settings, metrics, store, guard, folder)
    app.finalize()
    starting = asyncio.ensure_future(app.start())
    try:
        while not stop.is_set() and guard.failure is None and not app.should_stop:
            if starting.done():
                starting.result()
            await asyncio.sleep(_UNTIL_STOPPED)
    finally:
        with suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(app.stop(), STOP_S)
        starting.cancel()
    if guard.failure is not None and not (stop.is_set() and isinstance(guard.failure, InterruptedStepError)):
        if isinstance(guard.failure, PerennialError):
            raise guard.failure
        raise StreamsError(
            f"curate failed: {type(guard.failure).__name__}: {guard.failure}",
            remedy="the traceback says where; a restart loses nothing",
        ) from guard.failure
    if not stop.is_set():
        raise StreamsError(
            "the Faust application ended by itself", got=repr(getattr(app, "_crash_reason", None)),
            remedy="check that the broker is up and that the topics exist; restarting loses nothing",
        )  # fmt: skip


def _now() -> datetime:
    return datetime.now(UTC)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
