"""The learner role: the only consumer of jobs. Takes one at a time, trains it on another thread, publishes, commits.

For each job the version and the alias are in the store first, then the event is published, then the offset is
committed; a job that is interrupted in between is run again. Events of a forget job that cannot wait for its end are
published while it goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Any

from perennial.learner.model.base import Base, load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import AdapterError
from perennial.learner.model.loss import OutOfMemoryError
from perennial.learner.roles.parking import report_parked
from perennial.learner.roles.passes import PassRunner
from perennial.learner.versions.alias_events import alias_event, alias_event_id, status_id
from perennial.learner.versions.job_result import JobError, JobInterruptedError, JobResult
from perennial.learner.versions.version_writer import VersionWriter, make_version_writer
from perennial.storage.errors import IntegrityError, NoSpaceError, NotFoundError, StoreUnavailableError
from perennial.storage.failpoints import failpoint
from perennial.storage.objects.factory import open_store
from perennial.storage.registry.quarantine import RequestOutcome, finish_entry
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.cloudevents import Envelope, decode
from perennial.streams.events.models import ForgetRequested, RetentionProgressed, UpdateRequested
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.group import ConfirmingProducer, ConsumedRecord, GroupConsumer
from perennial.streams.kafka.installation import ROLE_TOPICS, check_installation
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings

_log = logging.getLogger("perennial.learner")

TOPIC = "adapter-jobs"
IDLE_POLL_S = 0.5
TRAINING_POLL_S = 0.02
RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)
"""Waits between tries on a store that does not answer, half a minute in all; then the role ends with an error."""


def run_learner(
    settings: Settings,
    stop: threading.Event,
    metrics: Metrics,
    base: Base | None = None,
    lock: AbstractContextManager[Any] | None = None,
) -> None:
    """Run jobs from the topic `adapter-jobs` until `stop` is set; the job that runs then is finished first.

    Args:
        settings: Kafka, store, model, training and serving.
        stop: ends the role.
        metrics: what the role reports.
        base: the frozen model, if other roles of this process share it.
        lock: held for one training step at a time, if other roles share the base.

    Raises:
        PerennialError: the store or Kafka stay unavailable; nothing of the job that ran was committed.
    """
    store = open_store(settings.store.require_uri(), settings.s3)
    store.probe()
    check_installation(settings, store, ROLE_TOPICS["learner"])
    writer = make_version_writer(
        settings, store, base or load_base(settings.model.base, settings.model.device, settings.model.threads), lock
    )
    with (
        ConfirmingProducer(settings, "learner", metrics, _now) as producer,
        GroupConsumer(settings, TOPIC, "learner", max_records=1) as consumer,
        # A fresh thread has torch's own default number of threads.
        ThreadPoolExecutor(1, "training", initializer=make_deterministic, initargs=(settings.model.threads,)) as pool,
        report_parked(store, metrics),
    ):
        Learner(settings, writer, consumer, producer, metrics, stop).run(pool)


@dataclass(frozen=True)
class _RunningJob:
    """The job that the training thread works on."""

    record: ConsumedRecord
    envelope: Envelope
    result: Future[JobResult]


class Learner:
    """The job loop: one thread polls, publishes and commits, another trains.

    Args:
        settings: settings of the role.
        writer: the versions of all adapters.
        consumer: of the topic `adapter-jobs`.
        producer: of events, statuses and dead letters.
        metrics: what the role reports.
        stop: ends the loop.
    """

    def __init__(
        self,
        settings: Settings,
        writer: VersionWriter,
        consumer: GroupConsumer,
        producer: ConfirmingProducer,
        metrics: Metrics,
        stop: threading.Event,
    ) -> None:
        self._registry = writer.registry
        self._consumer = consumer
        self._producer = producer
        self._metrics = metrics
        self._stop = stop
        self._pending_events: SimpleQueue[AdapterUpdate] = SimpleQueue()
        self._passes = PassRunner(
            writer, settings.serving.alias, _now, failpoint, self._pending_events.put, metrics.progress, stop.is_set
        )
        self._waiting: deque[ConsumedRecord] = deque()
        self._running: _RunningJob | None = None

    def run(self, pool: ThreadPoolExecutor) -> None:
        """Run jobs until `stop` is set and no job is running.

        While a job trains, polling goes on with all partitions paused: the consumer group sees a live member however
        long the training takes, and no second job is fetched.

        Args:
            pool: runs the jobs; one thread.
        """
        while self._running is not None or not self._stop.is_set():
            if self._running is not None:
                wait([self._running.result], timeout=TRAINING_POLL_S)
            self._waiting.extend(self._consumer.poll(TRAINING_POLL_S if self._running else IDLE_POLL_S))
            self._publish_pending()
            if self._running is not None and self._running.result.done():
                self._finish(self._running)
                self._running = None
            while self._running is None and self._waiting and not self._stop.is_set():
                self._start(self._waiting.popleft(), pool)
            if self._running is not None:
                self._consumer.pause()  # also partitions that a rebalance has just assigned
            else:
                self._consumer.resume()
            self._metrics.lag(TOPIC, self._consumer.lag() + len(self._waiting) + (self._running is not None))

    def _start(self, record: ConsumedRecord, pool: ThreadPoolExecutor) -> None:
        if not self._consumer.owns(record):
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
        self._running = _RunningJob(record, envelope, pool.submit(self._run_with_retries, envelope))

    def _run_with_retries(self, envelope: Envelope) -> JobResult:
        """Run the job on the training thread, again and again while the store does not answer.

        A loop of our own instead of a retry library: the wait ends as soon as the role is asked to stop.
        """
        for delay_s in RETRY_S:
            try:
                return self._passes.run(envelope.event)
            except StoreUnavailableError as error:
                self._metrics.store_error("job")
                _log.warning("the store does not answer, trying again in %.1f s: %s", delay_s, error)
                if self._stop.wait(delay_s):
                    raise
        try:
            return self._passes.run(envelope.event)
        except NoSpaceError as error:
            return self._passes.park(envelope.event, error)

    def _finish(self, job: _RunningJob) -> None:
        """Publish what the job sends, then commit. A job that can never be done goes to the dead letters instead."""
        self._metrics.oldest_age_s(0)
        traceparent = job.envelope.traceparent
        self._publish_pending(traceparent)
        try:
            result = job.result.result()
        except JobInterruptedError as error:  # not committed: the next learner goes on from the job's progress
            _log.info("%s", error)
            return
        except JobError as error:
            self._refuse(job.record, error.reason, str(error), job.envelope)
            return
        except (IntegrityError, NotFoundError, AdapterError) as error:
            self._refuse(job.record, "broken-state", str(error), job.envelope)
            return
        except OutOfMemoryError as error:
            self._refuse(job.record, "out-of-memory", str(error), job.envelope)
            return
        if result.event is not None:
            self._publish_latest(result.event, traceparent)
        for status in result.statuses:
            self._producer.send(status, event_id=status_id(status), occurred_at=status.at, traceparent=traceparent)
        self._producer.flush()
        if result.completion is not None:
            result.completion.record(self._registry.store)
        failpoint("learner.event")
        self._consumer.commit([job.record])
        failpoint("learner.commit")
        self._count(job.envelope, result)

    def _publish(self, event: AdapterUpdate, traceparent: str | None) -> None:
        self._producer.send(
            event, event_id=alias_event_id(event), occurred_at=event.published_at, traceparent=traceparent
        )
        self._metrics.generation(event.adapter, event.generation)

    def _publish_latest(self, event: AdapterUpdate, traceparent: str | None) -> None:
        """Publish where the alias points now, so that the topic's last event is the alias's state.

        A process that was suspended until another took over its jobs would otherwise publish an outdated state. So the
        alias is read again before the event is sent, and once more after it, in case the process was suspended in
        between.
        """
        published = 0
        while True:
            state = self._registry.alias(event.adapter, event.alias)
            if state is not None and state.generation > event.generation:
                event = alias_event(self._registry, state)
            if event.generation == published:
                return
            self._publish(event, traceparent)
            self._producer.flush()
            published = event.generation

    def _publish_pending(self, traceparent: str | None = None) -> None:
        """Publish the events that the running job wants published before its end."""
        try:
            while True:
                self._publish(self._pending_events.get_nowait(), traceparent)
        except Empty:
            self._producer.flush()

    def _refuse(self, record: ConsumedRecord, reason: str, detail: str, envelope: Envelope | None = None) -> None:
        """Send a job that can never be done to the dead letters, report a forget job as failed, then commit."""
        _log.warning("job at %s/%d refused: %s: %s", record.partition, record.offset, reason, detail)
        self._producer.send_dead_letter(record, reason, detail)
        if envelope is not None:
            self._passes.give_up(envelope.event)
            if isinstance(envelope.event, ForgetRequested):
                self._report_failed(envelope.event, f"{reason}: {detail}"[:1024])
        self._producer.flush()
        self._consumer.commit([record])
        self._metrics.progress()

    def _report_failed(self, job: ForgetRequested, failure: str) -> None:
        status = RetentionProgressed(
            request_id=job.request_id, adapter=job.adapter, kind=job.kind, state="failed", detail=failure, at=_now()
        )
        self._producer.send(status, event_id=status_id(status), occurred_at=status.at)
        self._producer.flush()
        outcome = RequestOutcome(at_ms=int(status.at.timestamp() * 1000), failure=failure)
        finish_entry(self._registry.store, job.adapter, job.request_id, outcome)

    def _count(self, envelope: Envelope, result: JobResult) -> None:
        adapter = getattr(envelope.event, "adapter", "")
        for stage, seconds in result.stage_s.items():
            self._metrics.stage_s(stage, seconds)
        forgot = isinstance(envelope.event, ForgetRequested)
        if not forgot:
            self._metrics.update(result.outcome, adapter)
        if result.manifest is not None and not forgot:
            self._metrics.trained(result.manifest.tokens, result.stage_s.get("train", 0.0))
            figures = result.manifest.gate
            for which, nats in (
                ("before", figures.loss_before), ("after", figures.loss_after), ("general", figures.anchor_after),
            ):  # fmt: skip
                if nats is not None:
                    self._metrics.loss(adapter, which, nats)
        self._metrics.progress()
        gate = result.manifest.gate.as_dict() if result.manifest else ""
        _log.info("%s %s: %s %s", envelope.type, adapter, result.outcome, gate)


def _now() -> datetime:
    return datetime.now(UTC)
