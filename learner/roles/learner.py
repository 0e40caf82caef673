"""The learner role: the only consumer of jobs. Reads them, trains them in lanes, publishes, commits.

For each job the version and the alias are in the store first, then the event is published, then the offset is
committed; a job that is interrupted in between is run again. Events of a forget job that cannot wait for its end are
published while it goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import Empty, SimpleQueue

from perennial.learner.model.base import Base, load_base
from perennial.learner.model.lora import AdapterError
from perennial.learner.model.loss import OutOfMemoryError
from perennial.learner.model.turns import FairLock
from perennial.learner.roles.fair_queue import FairQueue
from perennial.learner.roles.job_figures import figures_of
from perennial.learner.roles.job_runner import JobRunner
from perennial.learner.roles.lanes import CommitOrder, Lane, RunningState, WaitingJob, open_places
from perennial.learner.roles.parking import report_parked
from perennial.learner.roles.tenant_report import TenantReport
from perennial.learner.versions.alias_events import alias_event, alias_event_id, status_id
from perennial.learner.versions.job_result import JobError, JobInterruptedError, JobResult
from perennial.learner.versions.version_writer import VersionWriter, make_version_writer
from perennial.storage.errors import IntegrityError, NoSpaceError, NotFoundError, StoreUnavailableError
from perennial.storage.failpoints import failpoint
from perennial.storage.objects.factory import open_store
from perennial.storage.registry.quarantine import RequestOutcome, finish_entry
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.cloudevents import Envelope, decode
from perennial.streams.events.fields import Event
from perennial.streams.events.high_water_marks import HighWaterMarks
from perennial.streams.events.models import ForgetRequested, RebaseRequested, RetentionProgressed, UpdateRequested
from perennial.streams.events.wire_error import PURE_ERRORS, WireError
from perennial.streams.kafka.group import ConfirmingProducer, ConsumedRecord, GroupConsumer
from perennial.streams.kafka.installation import ROLE_TOPICS, check_installation
from perennial.streams.kafka.origin_check import OriginCheck
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retention.kinds import DEPENDANT_PREFIX
from perennial.streams.settings import Settings

_log = logging.getLogger("perennial.learner")

TOPIC = "adapter-jobs"
IDLE_POLL_S = 0.5
TRAINING_POLL_S = 0.02
MAX_WAITING = 32_768
"""Jobs that may wait in the process, about 5 KB each. The order is fair among these; what is in the log behind them waits
for as long as they do."""
POLL_RECORDS = 256
RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)
"""Waits between tries on a store that does not answer, half a minute in all; then the role ends with an error."""


def run_learner(
    settings: Settings,
    stop: threading.Event,
    metrics: Metrics,
    base: Base | None = None,
    lock: FairLock | None = None,
) -> None:
    """Run jobs from the topic `adapter-jobs` until `stop` is set.

    Jobs that run then are finished first, or interrupted where they take too long; see `lanes`.

    Args:
        settings: Kafka, store, model, training and serving.
        stop: ends the role.
        metrics: what the role reports.
        base: the frozen model, if other roles of this process share it.
        lock: held for one training step at a time, if other roles share the base; None makes one for the lanes.

    Raises:
        PerennialError: the store or Kafka stay unavailable; nothing of the job that ran was committed.
    """
    store = open_store(settings.store.require_uri(), settings.s3)
    store.probe()
    check_installation(settings, store, ROLE_TOPICS["learner"])
    base = base or load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
    writer = make_version_writer(settings, store, base, lock or FairLock(), metrics.training_pass)
    with (
        ConfirmingProducer(settings, "learner", metrics, _now) as producer,
        GroupConsumer(settings, TOPIC, "learner", max_records=POLL_RECORDS, metrics=metrics) as consumer,
        report_parked(store, metrics),
        OriginCheck.of(settings, store) as origins,
        closing(Learner(settings, writer, consumer, producer, metrics, stop, origins)) as learner,
    ):
        learner.run()


@dataclass(frozen=True)
class _RunningJob:
    """A job, the lane that it runs in, and when it began, by the monotonic clock in seconds."""

    job: WaitingJob
    lane: Lane
    result: Future[JobResult]
    began_s: float


class Learner:
    """The job loop: one thread polls, publishes and commits, the lanes train.

    Args:
        settings: settings of the role.
        writer: the versions of all adapters.
        consumer: of the topic `adapter-jobs`.
        producer: of events, statuses and dead letters.
        metrics: what the role reports.
        stop: ends the loop.
        origins: refuses high-water marks beyond the end of their log.
    """

    def __init__(
        self,
        settings: Settings,
        writer: VersionWriter,
        consumer: GroupConsumer,
        producer: ConfirmingProducer,
        metrics: Metrics,
        stop: threading.Event,
        origins: OriginCheck,
    ) -> None:
        self._settings = settings
        self._pass_adapters = settings.model.pass_adapters if settings.training.shared_passes else 1
        self._origins = origins
        self._writer = writer
        self._registry = writer.registry
        self._consumer = consumer
        self._producer = producer
        self._metrics = metrics
        self._stop = stop
        self._signer = RecordSigner(settings)
        self._pending_events: SimpleQueue[tuple[AdapterUpdate, str | None]] = SimpleQueue()
        self._lanes: list[Lane] = []
        self._waiting: FairQueue[WaitingJob] = FairQueue(
            settings.tenants.weight, settings.tenants.tokens_per_hour, self._pass_adapters
        )
        self._tenants = TenantReport(self._waiting, metrics)
        self._running: list[_RunningJob] = []
        self._order = CommitOrder()

    def run(self) -> None:
        """Run jobs until `stop` is set and no job is running.

        While jobs train, polling goes on: the consumer group sees a live member however long the training takes. The
        partitions are paused once `MAX_WAITING` jobs wait here or are not committed.
        """
        while self._running or not self._stop.is_set():
            if self._running:
                wait([job.result for job in self._running], TRAINING_POLL_S, FIRST_COMPLETED)
            for record in self._consumer.poll(TRAINING_POLL_S if self._running else IDLE_POLL_S):
                self._take(record)
            if self._order.drop_lost(self._consumer.owns):
                self._drop_lost()
            self._publish_pending()
            for job in [job for job in self._running if job.result.done()]:
                self._running.remove(job)
                self._finish(job)
            while not self._stop.is_set() and self._start_next():
                pass
            # Behind a job that waits or takes long, records stay in memory until it is committed.
            if max(len(self._waiting), len(self._order)) >= MAX_WAITING or self._stop.is_set():
                self._consumer.pause()  # also partitions that a rebalance has just assigned
            else:
                self._consumer.resume()
            self._report()

    def close(self) -> None:
        """End the lanes."""
        for lane in self._lanes:
            lane.close()

    def _report(self) -> None:
        self._metrics.lag(TOPIC, self._consumer.lag() + len(self._waiting) + len(self._running))
        self._tenants.update(time.monotonic())
        jobs = (job.job.envelope.event for job in self._running)
        published_s = [job.oldest_ms / 1000 for job in jobs if isinstance(job, UpdateRequested)]
        if self._tenants.oldest_s is not None:
            published_s.append(self._tenants.oldest_s)
        self._metrics.oldest_age_s(max(0.0, time.time() - min(published_s)) if published_s else 0)

    def _take(self, record: ConsumedRecord) -> None:
        """Decode a record that was read, and let its job wait for a lane."""
        if not self._consumer.owns(record):
            return
        self._metrics.events_in(TOPIC)
        self._order.add(record)
        try:
            self._signer.verify(TOPIC, record.key, record.value, record.headers)
            envelope = decode(record.value, record.headers, TOPIC)
            self._require_plausible(envelope.event)
        except WireError as error:
            self._refuse(record, error.reason, error.detail)
            return
        except PURE_ERRORS as error:  # one record must not end the role
            self._refuse(record, "internal-error", f"{type(error).__name__}: {error}"[:1024])
            return
        failpoint("learner.receive")
        self._waiting.add(WaitingJob(record, envelope), figures_of(envelope.event))

    def _drop_lost(self) -> None:
        """Drop jobs of a partition that was taken away: another member reads them, from its last commit on."""
        self._waiting.keep(lambda job: self._consumer.owns(job.record))

    def _require_plausible(self, job: Event) -> None:
        """Raise WireError for an update with a high-water mark beyond the end of its log; wait while Kafka is away."""
        if not isinstance(job, UpdateRequested):
            return
        for partition, position in HighWaterMarks(job.marks, job.epochs):
            problem = None
            while not self._stop.is_set():
                try:
                    problem = self._origins.mark_problem(partition, position)
                    break
                except (KafkaUnavailableError, StoreUnavailableError) as error:
                    _log.warning("the marks of a job cannot be checked yet: %s", error)
                    self._stop.wait(IDLE_POLL_S)
            if problem is not None:
                raise WireError("implausible-origin", f"high-water mark of {partition[:200]}", got=problem)

    def _start_next(self) -> bool:
        """Start the next job if one may start now; return False if none may."""
        now_s = time.monotonic()
        running = [RunningState(job.job.adapter, job.job.is_update, now_s - job.began_s) for job in self._running]
        places = open_places(running, self._settings.model.lanes, self._pass_adapters)
        busy = {job.adapter for job in running}
        while (entry := self._waiting.next(busy, now_s, **places._asdict())) is not None:
            if self._consumer.owns(entry.job.record):
                break
            self._drop_lost()
        else:
            return False
        self._waiting.start(entry, now_s)
        job, lane = entry.job, self._free_lane()
        self._running.append(_RunningJob(job, lane, lane.start(job.envelope, self._run_with_retries), now_s))
        return True

    def _free_lane(self) -> Lane:
        """Return a lane that runs no job; make one where all do."""
        used = [running.lane for running in self._running]
        free = next((lane for lane in self._lanes if lane not in used), None)
        if free is None:
            number = len(self._lanes)
            writer = self._writer.sibling(f"learner{number}") if number else self._writer

            def runner_of(publish: Callable[[AdapterUpdate], None], progress: Callable[[], None]) -> JobRunner:
                return JobRunner(
                    writer, self._settings.serving.alias, _now, failpoint, publish, progress, self._stop.is_set
                )

            free = Lane(
                number, writer, runner_of, lambda event, traceparent: self._pending_events.put((event, traceparent)),
                self._metrics.progress, self._stop, time.monotonic,
            )  # fmt: skip
            self._lanes.append(free)
        return free

    def _run_with_retries(self, runner: JobRunner, envelope: Envelope) -> JobResult:
        """Run the job in a lane's thread, again and again while the store does not answer.

        A loop of our own instead of a retry library: the wait ends as soon as the role is asked to stop.
        """
        for delay_s in RETRY_S:
            try:
                return runner.run(envelope.event)
            except StoreUnavailableError as error:
                self._metrics.store_error("job")
                _log.warning("the store does not answer, trying again in %.1f s: %s", delay_s, error)
                if self._stop.wait(delay_s):
                    raise
        try:
            return runner.run(envelope.event)
        except NoSpaceError as error:
            return runner.park(envelope.event, error)

    def _finish(self, running: _RunningJob) -> None:
        """Publish what the job sends, then commit. A job that can never be done goes to the dead letters instead."""
        job = running.job
        traceparent = job.envelope.traceparent
        self._publish_pending()
        try:
            result = running.result.result()
        except JobInterruptedError as error:  # not committed: the next learner goes on from the job's progress
            _log.info("%s", error)
            return
        except JobError as error:
            self._refuse(job.record, error.reason, str(error), job.envelope, running.lane.runner)
            return
        except (IntegrityError, NotFoundError, AdapterError) as error:
            self._refuse(job.record, "broken-state", str(error), job.envelope, running.lane.runner)
            return
        except OutOfMemoryError as error:
            self._refuse(job.record, "out-of-memory", str(error), job.envelope, running.lane.runner)
            return
        if result.event is not None:
            self._publish_latest(result.event, traceparent)
        for status in result.statuses:
            self._producer.send(status, event_id=status_id(status), occurred_at=status.at, traceparent=traceparent)
        self._producer.flush()
        if result.completion is not None:
            result.completion.record(self._registry.store)
        failpoint("learner.event")
        self._commit(job.record)
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

    def _publish_pending(self) -> None:
        """Publish the events that running jobs want published before their end."""
        try:
            while True:
                self._publish(*self._pending_events.get_nowait())
        except Empty:
            self._producer.flush()

    def _commit(self, record: ConsumedRecord) -> None:
        """Commit a handled record once every record before it in its partition is handled too."""
        last = self._order.complete(record)
        if last is not None:
            self._consumer.commit([last])

    def _refuse(
        self, record: ConsumedRecord, reason: str, detail: str, envelope: Envelope | None = None,
        runner: JobRunner | None = None,
    ) -> None:  # fmt: skip
        """Send a job that can never be done to the dead letters, report a forget job as failed, then commit."""
        _log.warning("job at %s/%d refused: %s: %s", record.partition, record.offset, reason, detail)
        self._producer.send_dead_letter(record, reason, detail)
        if envelope is not None and runner is not None:
            runner.give_up(envelope.event)
            if isinstance(envelope.event, ForgetRequested):
                self._report_failed(envelope.event, f"{reason}: {detail}"[:1024])
        self._producer.flush()
        self._commit(record)
        self._metrics.progress()

    def _report_failed(self, job: ForgetRequested, failure: str) -> None:
        status = RetentionProgressed(
            request_id=job.request_id, adapter=job.adapter, kind=job.kind, state="failed", detail=failure, at=_now()
        )
        if not job.request_id.startswith(DEPENDANT_PREFIX):
            self._producer.send(status, event_id=status_id(status), occurred_at=status.at)
            self._producer.flush()
        outcome = RequestOutcome(at_ms=int(status.at.timestamp() * 1000), failure=failure)
        finish_entry(self._registry.store, job.adapter, job.request_id, outcome)

    def _count(self, envelope: Envelope, result: JobResult) -> None:
        adapter = getattr(envelope.event, "adapter", "")
        for stage, seconds in result.stage_s.items():
            self._metrics.stage_s(stage, seconds)
        rebuilt = isinstance(envelope.event, ForgetRequested | RebaseRequested)
        if not rebuilt:
            self._metrics.update(result.outcome, adapter)
        if result.cost is not None:
            cost = result.cost
            self._metrics.update_cost(
                cost.training_flops + cost.measuring_flops, cost.seconds, cost.joules, cost.energy_source
            )
        if result.manifest is not None and not rebuilt:
            self._metrics.trained(result.manifest.tokens)
            if not self._settings.training.shared_passes:
                self._metrics.training_pass(1, result.stage_s.get("train", 0.0))
            figures = result.manifest.gate
            if figures.loss_before is not None and figures.loss_after is not None:
                fall_nats = figures.loss_before - figures.loss_after
                self._waiting.learned(adapter, fall_nats if result.outcome == "promoted" else 0.0)
            for which, nats in (
                ("before", figures.loss_before), ("after", figures.loss_after), ("general", figures.anchor_after),
                ("answer_rise", figures.answer_rise),
            ):  # fmt: skip
                if nats is not None:
                    self._metrics.loss(adapter, which, nats)
        self._metrics.progress()
        gate = result.manifest.gate.as_dict() if result.manifest else ""
        _log.info("%s %s: %s %s", envelope.type, adapter, result.outcome, gate)


def _now() -> datetime:
    return datetime.now(UTC)
