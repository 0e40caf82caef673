"""The learner: takes jobs one at a time, trains beside the poll loop, announces, then commits. The only job consumer.

Per job: version and alias in the store, then the event, then the offset; each may be cut off and done again.
What a forgetting has to say before it is through is sent while it goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.model.base import Base, load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.general_text import GeneralText, general_texts
from perennial.learner.model.lora import AdapterError, Lora, LoraConfig
from perennial.learner.model.loss import OutOfMemoryError
from perennial.learner.model.tokenization import ExampleTokenizer
from perennial.learner.training.update import Recipe, Updater
from perennial.learner.versions.alias_events import alias_event, alias_event_id, status_id
from perennial.learner.versions.micro_batches import JobError
from perennial.learner.versions.update_job import JobResult, VersionWriter
from perennial.storage.errors import IntegrityError, NotFoundError, StoreUnavailableError
from perennial.storage.failpoints import failpoint
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.quarantine import RequestOutcome as Mark
from perennial.storage.registry.quarantine import finish_entry
from perennial.storage.registry.registry import Registry
from perennial.streams.events.cloudevents import Envelope, WireError, decode
from perennial.streams.events.models import (
    AdapterUpdate,
    ForgetRequested,
    RetentionProgressed,
    RollbackRequested,
    UpdateRequested,
)
from perennial.streams.kafka.group import ConfirmingProducer, ConsumedRecord, GroupConsumer
from perennial.streams.kafka.topics import identify
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings

_log = logging.getLogger("perennial.learner")

TOPIC = "adapter-jobs"
IDLE_POLL_S = 0.5
TRAINING_POLL_S = 0.02
RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)
"""Waits between tries on a store that does not answer, half a minute in all; then the role ends and health is red."""


def run_learner(
    settings: Settings,
    stop: threading.Event,
    metrics: Metrics,
    base: Base | None = None,
    lock: AbstractContextManager[Any] | None = None,
) -> None:
    """Learn what the topic adapter-jobs asks for, until stop is set; the job in hand is brought to its end.

    base, lock: shared with other roles of this process; the lock is held for one training step at a time.
    Raises PerennialError where the store or Kafka stay away; then nothing of the job in hand was committed.
    """
    identify(settings, [TOPIC, "adapter-updates", "retention-status", "dead-letters"])
    store = open_store(settings.store.require_uri(), settings.s3)
    store.probe()
    lineage = make_lineage(
        settings, store, base or load_base(settings.model.base, settings.model.device, settings.model.threads), lock
    )
    with (
        ConfirmingProducer(settings, "learner", metrics, _now) as outbox,
        GroupConsumer(settings, TOPIC, "learner", max_records=1) as inbox,
        # A fresh thread has torch's own idea of how many threads to use.
        ThreadPoolExecutor(1, "training", initializer=make_deterministic, initargs=(settings.model.threads,)) as pool,
    ):
        Learner(settings, lineage, inbox, outbox, metrics, stop).run(pool)


def make_lineage(
    settings: Settings, store: ObjectStore, base: Base, lock: AbstractContextManager[Any] | None = None
) -> VersionWriter:
    """Put the learner's parts together over a store and a base."""
    make_deterministic(settings.model.threads)
    registry = Registry(store, nonce=lambda: uuid4().hex, now=_now, failpoint=failpoint)
    codec = ExampleTokenizer(base.tokenizer)
    general = GeneralText(general_texts("train"), general_texts("anchor"), codec, settings.training.row_tokens)
    with lock or nullcontext():  # another role may be putting its own slot into the shared base
        lora = Lora(base, LoraConfig(settings.training.rank, settings.training.alpha))
    updater = Updater(lora, codec, general, Recipe.of(settings), lock)
    return VersionWriter(registry, updater, base, threads=settings.model.threads, now=_now, failpoint=failpoint)


class Learner:
    """The job loop: one thread polls, announces and commits, another trains."""

    def __init__(
        self,
        settings: Settings,
        lineage: VersionWriter,
        inbox: GroupConsumer,
        outbox: ConfirmingProducer,
        metrics: Metrics,
        stop: threading.Event,
    ) -> None:
        self._settings = settings
        self._lineage = lineage
        self._inbox = inbox
        self._outbox = outbox
        self._metrics = metrics
        self._stop = stop
        self._told: SimpleQueue[AdapterUpdate] = SimpleQueue()
        self._forgetter = ForgetExecutor(lineage, _now, failpoint, self._told.put, metrics.progress)
        self._seen: set[str] = set()
        self._waiting: deque[ConsumedRecord] = deque()
        self._job: tuple[ConsumedRecord, Envelope, Future[JobResult]] | None = None

    def run(self, pool: ThreadPoolExecutor) -> None:
        """Handle jobs until stop is set and none is in hand.

        While one trains, polling goes on with all partitions paused: the group sees a live member however long
        the training takes, and no second job is fetched.
        """
        while self._job is not None or not self._stop.is_set():
            if self._job is not None:
                wait([self._job[2]], timeout=TRAINING_POLL_S)
            self._waiting.extend(self._inbox.poll(TRAINING_POLL_S if self._job else IDLE_POLL_S))
            self._pass_on()
            if self._job is not None and self._job[2].done():
                self._finish(*self._job)
                self._job = None
            while self._job is None and self._waiting and not self._stop.is_set():
                self._take(self._waiting.popleft(), pool)
            if self._job is not None:
                self._inbox.pause()  # also what a rebalance has just brought
            else:
                self._inbox.resume()
            self._metrics.lag(TOPIC, self._inbox.lag() + len(self._waiting) + (self._job is not None))

    def _take(self, record: ConsumedRecord, pool: ThreadPoolExecutor) -> None:
        if not self._inbox.owns(record):
            return
        self._metrics.events_in(TOPIC)
        try:
            envelope = decode(record.value, record.headers, TOPIC)
        except WireError as error:
            self._refuse(record, error.reason, error.detail)
            return
        failpoint("learner.receive")
        if isinstance(envelope.event, UpdateRequested):
            self._metrics.oldest_age_s(max(0.0, time.time() - envelope.event.oldest_ms / 1000))
        self._job = record, envelope, pool.submit(self._do, envelope)

    def _do(self, envelope: Envelope) -> JobResult:
        """On the training thread: the job, tried again while the store does not answer."""
        for delay_s in RETRY_S:
            try:
                return self._job_of(envelope)
            except StoreUnavailableError as error:
                self._metrics.store_error("job")
                _log.warning("the store does not answer, trying again in %.1f s: %s", delay_s, error)
                if self._stop.wait(delay_s):
                    raise
        return self._job_of(envelope)

    def _job_of(self, envelope: Envelope) -> JobResult:
        job = envelope.event
        if isinstance(job, UpdateRequested):
            return self._first_sight(
                self._lineage.update(job, self._settings.serving.alias), job.adapter, self._settings.serving.alias
            )
        if isinstance(job, RollbackRequested):
            return self._first_sight(self._lineage.rollback(job), job.adapter, job.alias)
        if isinstance(job, ForgetRequested):
            return self._forgetter.forget(job, self._settings.serving.alias)
        raise JobError("unsupported", f"{envelope.type} is not supported by this learner", got=envelope.type)

    def _first_sight(self, done: JobResult, adapter: str, alias: str) -> JobResult:
        """Say once per process where an alias stands: whoever was here before may have died before it could."""
        if done.event is None and adapter not in self._seen:
            done = JobResult(done.outcome, done.manifest, self._lineage.standing(adapter, alias), done.stage_s)
        self._seen.add(adapter)
        return done

    def _finish(self, record: ConsumedRecord, envelope: Envelope, job: Future[JobResult]) -> None:
        """Announce, then commit. A job that can never be done goes to the dead letters, and the next one is taken."""
        self._metrics.oldest_age_s(0)
        self._pass_on(envelope.traceparent)
        try:
            done = job.result()
        except JobError as error:
            self._refuse(record, error.reason, str(error), envelope)
            return
        except (IntegrityError, NotFoundError, AdapterError) as error:
            self._refuse(record, "broken-state", str(error), envelope)
            return
        except OutOfMemoryError as error:
            self._refuse(record, "out-of-memory", str(error), envelope)
            return
        if done.event is not None:
            self._announce_latest(done.event, envelope.traceparent)
        for status in done.statuses:
            self._outbox.send(
                status, event_id=status_id(status), occurred_at=status.at, traceparent=envelope.traceparent
            )
        self._outbox.flush()
        if done.close is not None:
            done.close()
        failpoint("learner.event")
        self._inbox.commit([record])
        failpoint("learner.commit")
        self._count(envelope, done)

    def _announce(self, event: AdapterUpdate, traceparent: str | None) -> None:
        self._outbox.send(
            event, event_id=alias_event_id(event), occurred_at=event.published_at, traceparent=traceparent
        )
        self._metrics.generation(event.adapter, event.generation)

    def _announce_latest(self, event: AdapterUpdate, traceparent: str | None) -> None:
        """Say where the alias stands now, so that the last word on the topic is the alias's.

        A process that was stopped for so long that another has its jobs would else publish what is no longer true:
        the alias is read again before the event is sent, and after that, for it may have been stopped in between.
        """
        told = 0
        while True:
            state = self._lineage.registry.alias(event.adapter, event.alias)
            if state is not None and state.generation > event.generation:
                event = alias_event(self._lineage.registry, state)
            if event.generation == told:
                return
            self._announce(event, traceparent)
            self._outbox.flush()
            told = event.generation

    def _pass_on(self, traceparent: str | None = None) -> None:
        """Send what the job in hand has to say before it is through."""
        try:
            while True:
                self._announce(self._told.get_nowait(), traceparent)
        except Empty:
            self._outbox.flush()

    def _refuse(self, record: ConsumedRecord, reason: str, detail: str, envelope: Envelope | None = None) -> None:
        _log.warning("job at %s/%d refused: %s: %s", record.partition, record.offset, reason, detail)
        self._outbox.send_dead_letter(record, reason, detail)
        job = envelope.event if envelope else None
        if isinstance(job, UpdateRequested):
            self._lineage.refused(job)
        if isinstance(job, ForgetRequested):
            self._give_up(job)
            said = f"{reason}: {detail}"[:1024]
            status = RetentionProgressed(
                request_id=job.request_id, adapter=job.adapter, kind=job.kind, state="failed", detail=said, at=_now()
            )
            self._outbox.send(status, event_id=status_id(status), occurred_at=status.at)
            self._outbox.flush()
            mark = Mark(at_ms=int(status.at.timestamp() * 1000), failure=said)
            finish_entry(self._lineage.registry.store, job.adapter, job.request_id, mark)
        self._outbox.flush()
        self._inbox.commit([record])
        self._metrics.progress()

    def _give_up(self, job: ForgetRequested) -> None:
        try:
            self._forgetter.give_up(job)
        except (IntegrityError, NotFoundError) as error:  # its tombstone stays: the next forgetting looks into it
            _log.warning("%s left something behind: %s", job.request_id, error)

    def _count(self, envelope: Envelope, done: JobResult) -> None:
        adapter = getattr(envelope.event, "adapter", "")
        for stage, seconds in done.stage_s.items():
            self._metrics.stage_s(stage, seconds)
        forgot = isinstance(envelope.event, ForgetRequested)
        if not forgot:
            self._metrics.update(done.outcome, adapter)
        if done.manifest is not None and not forgot:
            self._metrics.trained(done.manifest.tokens, done.stage_s.get("train", 0.0))
            figures = done.manifest.gate
            for which, nats in (
                ("before", figures.loss_before), ("after", figures.loss_after), ("general", figures.anchor_after),
            ):  # fmt: skip
                if nats is not None:
                    self._metrics.loss(adapter, which, nats)
        self._metrics.progress()
        _log.info(
            "%s %s: %s %s", envelope.type, adapter, done.outcome, done.manifest.gate.as_dict() if done.manifest else ""
        )


def _now() -> datetime:
    return datetime.now(UTC)
