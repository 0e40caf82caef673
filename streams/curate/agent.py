"""The curate agent: read scored examples, store micro-batches, publish jobs and drift.

The order of the steps of a cut is fixed, so that a crash at any point loses nothing and learns nothing twice:

1. the job, in `jobs/<adapter>/<cut>`; it names the micro-batch's body;
2. the body, as a blob;
3. the adapter's state, in `state/curate/<adapter>`, by compare-and-swap. This commits the cut. A process that lost its
   partitions and did not notice fails here;
4. the job, to the topic adapter-jobs;
5. the acknowledgement of the deliveries that the cut covers.

The learner deletes the stored job when it is settled. Until then it finds the job in the store, also where Kafka lost
the record or delivers a later one first.

A crash between 3 and 4 leaves a job that is stored but possibly not published. The deliveries of its examples were not
acknowledged, so they arrive again. When the first of them arrives, the restored state shows that it is covered, and the
agent publishes the stored job again. A crash between 1 and 3 leaves a job and a body that no cut names. Both are deleted
when the adapter is loaded: the job was never published, and its cut number is still to be given.

This module does not import Faust; it is given the application. streams/faust_app.py describes the hazards of Faust.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from functools import reduce
from typing import Any, Final, Literal, TypeAlias

from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # it ships no types

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError, PerennialError
from perennial.storage.failpoints import failpoint
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.prompts.system_prompts import load_system_prompt
from perennial.storage.registry.quarantine import Quarantine, update_quarantine
from perennial.storage.registry.refused_examples import add_refused_examples
from perennial.storage.registry.registry import Registry
from perennial.storage.registry.waiting_jobs import MAX_CURATE_STATE_BYTES, curate_state_key
from perennial.streams.curate.batcher import Cut, MicroBatcher
from perennial.streams.curate.curate_output import CurateOutput
from perennial.streams.curate.cut_store import delete_uncommitted, write_cut
from perennial.streams.curate.cutting.drift_trust import newest_updates_without_gain
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.curate.offsets import OffsetTracker
from perennial.streams.curate.origin_guard import OriginGuard
from perennial.streams.curate.refusals import UnfilterableError, breaks_a_cut, internal_error, out_of_order_error
from perennial.streams.curate.session import Delivery, LoadedAdapter, Session
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.models import CutReason, ExampleScored
from perennial.streams.events.wire_error import PURE_ERRORS, WireError
from perennial.streams.intake.refused import RefusedExamplesLookup
from perennial.streams.kafka.origin_check import OriginCheck
from perennial.streams.kafka.topic_guard import KeyRouting, TopicGuard
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retention.quarantine_filter import QuarantineFilters
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.curate")

TOPIC: Final = ExampleScored.topic
TICK_S: Final = 0.25

_Rest: TypeAlias = tuple[list[tuple[ExampleScored, Delivery]], list[Delivery]]
"""Deliveries to be offered again, and handles of their redeliveries."""


class CurateAgent:
    """Cut the scored examples of every assigned adapter into micro-batches, for one process.

    `receive` and `tick` must not run at the same time (faust_app.Guard sees to that).

    Args:
        app: the Faust application, of which consumer, producer and `consumer_generation_id` are used.
        settings: topics, bounds of a micro-batch and number of adapters in memory.
        metrics: where the agent counts what it does.
        store: the object store.
        topics: checks that the topics are the recorded ones, before each cut; None: nothing is checked.
        origins: refuses origins that the broker cannot have given; None: none is checked, for tests without a broker.
    """

    def __init__(
        self,
        app: Any,
        settings: Settings,
        metrics: Metrics,
        store: ObjectStore,
        topics: TopicGuard | None = None,
        origins: OriginCheck | None = None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._store = store
        self._registry = Registry(store)  # it is only read
        self._refused_ms = RefusedExamplesLookup(store)
        self._quarantines = QuarantineFilters(store)
        self._guard = OriginGuard(origins, metrics)
        self._output = CurateOutput(app, settings, metrics, topics.routing if topics else KeyRouting({}))
        self._policy = CutPolicy.of(settings)
        self._topics = topics
        self._session = Session()
        self._revoked: int | None = None
        self._ticks = 0
        self._assigned = False

    def assign(self) -> None:
        """Note that partitions were assigned. From now on the lag can be measured."""
        self._assigned = True
        self._metrics.waiting(False)

    def revoke(self) -> None:
        """Note that all partitions were revoked. What is in memory belongs to a generation that has ended."""
        self._assigned = False
        self._revoked = self._app.consumer_generation_id

    def _is_current(self, generation: int | None) -> bool:
        return generation == self._app.consumer_generation_id and generation != self._revoked

    def _drop_ended_session(self) -> None:
        if self._session.generation is not None and not self._is_current(self._session.generation):
            self._session = Session()

    async def receive(self, event: Any) -> None:
        """Process one delivery from scored-examples.

        Raises:
            PerennialError: the store or its content is not usable.
        """
        message = event.message
        self._drop_ended_session()
        if not self._is_current(message.generation_id):
            return  # it will be delivered again to the process that has the partition now
        self._session.generation = message.generation_id
        failpoint("curate.receive")
        tp, offset = message.tp, message.offset
        if not self._session.offsets.setdefault(tp, OffsetTracker()).add(offset, event):
            return
        value, headers = message.value, message.headers
        self._metrics.events_in(TOPIC)
        try:
            scored = self._decoded(message)
            await self._guard.require(scored.example.origin)
        except WireError as error:
            await self._output.refuse(error, value, headers, message)
            self._acknowledge([(tp, offset)])
            return
        finally:
            event.value = message.value = None  # the tracker may hold the event as long as the oldest example waits
        name = scored.example.adapter
        await self._ensure_loaded(name)
        await self._offer(name, [(scored, (tp, offset))])
        self._metrics.progress()

    def _decoded(self, message: Any) -> ExampleScored:
        """Return the event of a delivery; raise WireError for whatever is wrong with it."""
        try:
            self._output.verify(message)
            scored = decode(message.value, message.headers, TOPIC).event
        except PURE_ERRORS as error:
            raise internal_error(error) from error
        if not isinstance(scored, ExampleScored):
            raise WireError("wrong-topic", "type", got=type(scored).__name__, allowed=ExampleScored.type)
        return scored

    async def tick(self) -> None:
        """Cut the adapters whose oldest example has waited long enough. On every fourth call, report lag and age."""
        self._metrics.tick(TOPIC)
        self._drop_ended_session()
        session, now_ms = self._session, _monotonic_ms()
        for name in list(session.waiting):  # longest waiting first
            if name not in session.waiting:
                continue
            batcher = session.adapters[name].batcher
            if not batcher.aged(now_ms):
                break
            due = batcher.due(now_ms)
            if due is not None:
                await self._save_due(name, due)
        self._ticks += 1
        if self._ticks % 4 == 0 and self._assigned:
            with suppress(KafkaError):  # a rebalance may begin meanwhile
                await self._report(_wall_clock_ms())

    # The hot path: offer, cut, store.

    async def _offer(
        self, name: str, deliveries: Iterable[tuple[ExampleScored, Delivery]], redelivered: Iterable[Delivery] = ()
    ) -> None:
        """Offer deliveries to a loaded adapter, and cut whenever its policy asks for it.

        If another process has cut the adapter meanwhile, that process's state is loaded and what is pending is offered
        again. Nothing is missing then: the pending deliveries have no holes, so they contain everything that is above
        the high-water marks of that state.
        """
        queue, repeated = deque(deliveries), list(redelivered)
        while queue:
            adapter = self._session.adapters[name]
            scored, delivery = queue.popleft()
            try:
                if adapter.batcher.is_repeat(scored.example):
                    scored = await asyncio.to_thread(self._marked_if_refused, scored)
                offer = adapter.batcher.offer(scored, delivery, _monotonic_ms())
            except PerennialError:  # of the store
                raise
            except Exception as error:  # noqa: BLE001 - whatever one record breaks must not end the role
                # What the call has changed by then is unknown, so the stored state is loaded again.
                pending, again = await self._reload(adapter)
                queue.extendleft(reversed([each for each in pending if each[1] != delivery]))
                repeated += again
                await self._refuse_example(scored, delivery, internal_error(error))
                continue
            if offer.covered:
                await self._confirm_last_job(adapter)
                self._acknowledge([delivery])
                continue
            if offer.out_of_order is not None:
                await self._refuse_example(scored, delivery, out_of_order_error(scored.example, offer.out_of_order))
                continue
            self._session.waiting.setdefault(name)
            for drift in offer.drifts:
                await self._output.send_drift(drift)
            if offer.reason is None or not await self._may_cut(adapter, offer.reason):
                continue
            rest = await self._cut(adapter, offer.reason)
            if rest is not None:
                queue.extendleft(reversed(rest[0]))
                repeated += rest[1]
        if repeated:
            batcher = self._session.adapters[name].batcher
            if batcher.idle:
                self._acknowledge(repeated)
            else:
                batcher.add_redelivered(repeated)

    async def _may_cut(self, adapter: LoadedAdapter, reason: CutReason) -> bool:
        """Return False for drift of an adapter whose last updates learned nothing, while it has too few examples."""
        if reason != "drift":
            return True
        batcher = adapter.batcher
        without_gain = await asyncio.to_thread(newest_updates_without_gain, self._registry, batcher.adapter)
        return batcher.weigh_drift(without_gain)

    def _marked_if_refused(self, scored: ExampleScored) -> ExampleScored:
        """Mark a repeat of an example that was refused before the repeat was published: it is to be learned.

        Intake does so, too, but its window of duplicates may be shorter than an adapter's recent ids reach.
        """
        example = scored.example
        refused_ms = self._refused_ms(example.adapter, example.example_id, example.origin.timestamp_ms)
        if refused_ms is None or refused_ms > example.origin.timestamp_ms:
            return scored
        return scored.model_copy(update={"example": example.model_copy(update={"returned": True})})

    async def _save_due(self, name: str, due: Literal["age", "flush"] | None) -> None:
        """Cut or flush a loaded adapter now."""
        adapter = self._session.adapters[name]
        rest = await (self._store_cut(adapter, adapter.batcher.flush) if due == "flush" else self._cut(adapter, "age"))
        if rest is not None:
            await self._offer(name, *rest)

    async def _cut(self, adapter: LoadedAdapter, reason: CutReason) -> _Rest | None:
        """Cut what is pending, without what is in quarantine. Return what must be offered again if it was not stored."""
        try:
            blocked = await asyncio.to_thread(self._blocked, adapter.batcher)
            prompt = await asyncio.to_thread(self._system_prompt, adapter.batcher.adapter)
        except UnfilterableError as unfilterable:
            errors = unfilterable.errors
            return await self._without(adapter, lambda scored: errors.get(scored.example.example_id))
        return await self._store_cut(adapter, lambda: adapter.batcher.cut(_now(), reason, blocked, prompt))

    async def _store_cut(self, adapter: LoadedAdapter, build: Callable[[], Cut]) -> _Rest | None:
        """Build and store a cut. Return what must be offered again after a write conflict, or without a culprit."""
        try:
            cut = build()
        except Exception as error:  # noqa: BLE001 - whatever one record breaks must not end the role
            return await self._without_culprits(adapter, error)
        return None if await self._save(adapter, cut) else await self._reload(adapter)

    async def _without_culprits(self, adapter: LoadedAdapter, error: Exception) -> _Rest:
        """Refuse the pending examples that alone make a cut fail; if there is none, the last one. Return the others."""
        name = adapter.batcher.adapter
        return await self._without(
            adapter, lambda scored: error if breaks_a_cut(name, self._policy, scored) else None, error
        )

    async def _without(
        self,
        adapter: LoadedAdapter,
        error_of: Callable[[ExampleScored], Exception | None],
        of_last: Exception | None = None,
    ) -> _Rest:
        """Refuse the pending examples that have an error; if none has, the last one where `of_last` is given."""
        pending, again = await self._reload(adapter)
        culprits = [(*each, error) for each in pending if (error := error_of(each[0])) is not None]
        if not culprits and of_last is not None:
            culprits = [(*each, of_last) for each in pending[-1:]]
        refused = {delivery for _, delivery, _ in culprits}
        for scored, delivery, error in culprits:
            await self._refuse_example(scored, delivery, internal_error(error))
        return [each for each in pending if each[1] not in refused], again

    async def _save(self, adapter: LoadedAdapter, cut: Cut) -> bool:
        """Store a cut, publish its job, acknowledge its deliveries. Return False on a write conflict.

        Hazard: the order body, state, job, acknowledgements must stay (see the module's docstring).
        """
        name = adapter.batcher.adapter
        if self._topics is not None:  # every delivery of the cut was fetched before this check
            await asyncio.to_thread(self._topics.verify)
        try:
            if cut.body is not None and cut.job is not None:
                await asyncio.to_thread(write_cut, self._store, cut.body, cut.job)
                failpoint("curate.blob")
            adapter.state_etag = await asyncio.to_thread(
                self._store.compare_and_swap, curate_state_key(name), cut.state, adapter.state_etag
            )
        except ConflictError:
            self._metrics.store_error("curate.conflict")
            return False
        failpoint("curate.state")
        if cut.job is not None:
            await self._output.send_job(cut.job)
            self._metrics.cut(cut.job.reason, cut.job.examples, cut.job.tokens)
        adapter.unconfirmed = False
        self._session.waiting.pop(name, None)
        self._acknowledge(adapter.batcher.apply(cut))
        self._metrics.progress()
        return True

    def _system_prompt(self, adapter: str) -> str | None:
        try:
            return load_system_prompt(self._store, adapter).text
        except IntegrityError:  # no retry helps, and one adapter's object must not stop the flow of all
            log.exception("the system prompt of %s is unreadable: it is cut without one until it is set again", adapter)
            return None

    def _blocked(self, batcher: MicroBatcher[Delivery]) -> Collection[str]:
        """Return the ids of the pending examples that are in quarantine. Their texts never reach the store.

        An example that is blocked here reaches no version, so the forget job will not find it and cannot suppress its
        text. This method therefore suppresses the text of every blocked example that is to be erased.

        Raises:
            UnfilterableError: the filter fails at examples.
            StoreError: the quarantine cannot be read.
        """
        quarantine_filter = self._quarantines.of(batcher.adapter)
        if quarantine_filter.is_empty:
            return ()
        blocked: set[str] = set()
        suppressions: list[Callable[[Quarantine], Quarantine]] = []
        errors: dict[str, Exception] = {}
        for example in batcher.pending_examples:
            try:
                if quarantine_filter.blocks(example):
                    suppressions.append(quarantine_filter.suppression_of([example]))
                    blocked.add(example.example_id)
            except PURE_ERRORS as error:
                errors[example.example_id] = error
        if errors:
            raise UnfilterableError(errors)
        if blocked:
            update_quarantine(
                self._store, batcher.adapter, lambda found: reduce(lambda q, change: change(q), suppressions, found)
            )
        return blocked

    async def _confirm_last_job(self, adapter: LoadedAdapter) -> None:
        """Publish the last job of a loaded state once more, because it may never have been published."""
        last_job = adapter.batcher.history.last_job
        if adapter.unconfirmed and last_job is not None:
            await self._output.send_job(last_job)
        adapter.unconfirmed = False

    # Adapters in memory: load, reload, evict.

    async def _ensure_loaded(self, name: str) -> None:
        """Load an adapter if it is not in memory, and mark it as the most recently used."""
        adapters = self._session.adapters
        if name not in adapters:
            await self._make_room()
            adapters[name] = await self._load(name)
        adapters.move_to_end(name)

    async def _make_room(self) -> None:
        """Evict the least recently used adapter if memory is full. What is pending there is cut early."""
        adapters = self._session.adapters
        while len(adapters) >= self._settings.curate.max_adapters:
            name = next(iter(adapters))
            batcher = adapters[name].batcher
            if not batcher.idle:
                await self._save_due(name, batcher.due(_monotonic_ms() + self._policy.max_age_ms))
            if adapters[name].batcher.idle:
                del adapters[name]

    async def _load(self, name: str) -> LoadedAdapter:
        while True:
            adapter = await asyncio.to_thread(self._restore, name)
            try:
                await asyncio.to_thread(self._delete_uncommitted_job, adapter)
            except ConflictError:
                continue  # the process that had the adapter before is still writing
            adapter.unconfirmed = adapter.state_etag is not None
            await self._guard.distrust_wrong_marks(adapter.batcher)
            return adapter

    def _restore(self, name: str) -> LoadedAdapter:
        try:
            stored = self._store.get(curate_state_key(name), MAX_CURATE_STATE_BYTES)
        except NotFoundError:
            return LoadedAdapter(MicroBatcher(name, self._policy))
        return LoadedAdapter(MicroBatcher.restore(name, self._policy, stored.data), stored.etag)

    def _delete_uncommitted_job(self, adapter: LoadedAdapter) -> None:
        """Delete the job and the body that an earlier process did not commit, after replacing the state.

        Raises:
            ConflictError: that process was faster and committed.
        """
        batcher = adapter.batcher

        def fence() -> None:
            cut = batcher.fence()
            adapter.state_etag = self._store.compare_and_swap(
                curate_state_key(batcher.adapter), cut.state, adapter.state_etag
            )
            batcher.apply(cut)

        delete_uncommitted(self._store, batcher.adapter, batcher.history.cuts, fence)

    async def _reload(self, adapter: LoadedAdapter) -> _Rest:
        """Replace an adapter by what is stored. Return its pending deliveries, to be offered again, and redeliveries."""
        batcher = adapter.batcher
        self._session.waiting.pop(batcher.adapter, None)
        self._session.adapters[batcher.adapter] = await self._load(batcher.adapter)
        return batcher.pending_deliveries(), batcher.redelivered()

    async def _refuse_example(self, scored: ExampleScored, delivery: Delivery, error: WireError) -> None:
        """Send an example that was decoded to the dead letters, let it be published again, acknowledge it."""
        tp, offset = delivery
        example = scored.example
        await self._output.refuse_example(error, scored, tp.partition, offset)
        await asyncio.to_thread(
            add_refused_examples, self._store, example.adapter, [example.example_id], _wall_clock_ms()
        )
        self._acknowledge([delivery])

    # Kafka: acknowledgements, lag.

    def _acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        if not self._is_current(self._session.generation):
            return
        offsets = self._session.offsets
        touched = []
        for tp, offset in deliveries:
            offsets[tp].complete(offset)
            touched.append(tp)
        for tp in dict.fromkeys(touched):
            for event in offsets[tp].releasable():
                event.ack()
        failpoint("curate.ack")

    async def _report(self, now_ms: int) -> None:
        lag = 0
        topic = self._settings.kafka.topic(TOPIC)
        assigned = [tp for tp in self._app.consumer.assignment() if tp.topic == topic]
        ends = await self._app.consumer.highwaters(*assigned) if assigned else {}
        for tp in assigned:
            tracker = self._session.offsets.get(tp)
            position = tracker.next_offset if tracker is not None else await self._app.consumer.position(tp)
            lag += max(0, (ends.get(tp) or 0) - (position or 0))
        self._metrics.lag(TOPIC, lag)
        longest_waiting = next(iter(self._session.waiting), None)
        oldest_ms = self._session.adapters[longest_waiting].batcher.oldest_origin_ms if longest_waiting else None
        self._metrics.oldest_age_s(max(0.0, (now_ms - oldest_ms) / 1000) if oldest_ms else 0.0)


def _now() -> datetime:
    return datetime.now(UTC)


def _monotonic_ms() -> int:
    """Return the clock that measures how long examples wait, in milliseconds.

    Hazard: by a wall clock that is set back, no adapter would be cut until the clock has caught up.
    """
    return time.monotonic_ns() // 1_000_000


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000
