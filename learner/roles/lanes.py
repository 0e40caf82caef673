"""Lanes: several jobs at once over one base, so that a long job does not keep the others waiting.

Each lane trains in a thread and a LoRA slot of its own. The base is shared: a lane holds the lock for one optimizer
step at a time. Jobs of one adapter never run in two lanes at once, and they start in their order.

Updates of several adapters start together, and train in passes that they share (see `together.gathered_passes`). A job
of another kind starts only when every running job is long, and so does an update beside such a job. Short jobs thus do
not slow each other down, and a rebuild or an oversized document shares the machine.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from perennial.learner.model.determinism import make_deterministic
from perennial.learner.roles.job_runner import JobRunner
from perennial.learner.versions.job_result import JobInterruptedError, JobResult
from perennial.learner.versions.version_writer import VersionWriter
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.cloudevents import Envelope
from perennial.streams.events.models import UpdateRequested
from perennial.streams.kafka.group import ConsumedRecord

LONG_JOB_S = 2.0
"""A job that runs for this long shares the base with the jobs of other adapters."""
STOP_GRACE_S = 15.0
"""How long a job may go on after the role was asked to stop; compose kills the process after 30 seconds."""


@dataclass(frozen=True)
class WaitingJob:
    """A job that was read from Kafka and has not started.

    Attributes:
        record: the Kafka record.
        envelope: the decoded job.
    """

    record: ConsumedRecord
    envelope: Envelope

    @property
    def adapter(self) -> str:
        """The adapter that the job changes."""
        return str(getattr(self.envelope.event, "adapter", ""))

    @property
    def is_update(self) -> bool:
        """True if the job trains in passes that other updates share."""
        return isinstance(self.envelope.event, UpdateRequested)


@dataclass(frozen=True)
class RunningState:
    """What decides whether another job may start beside a running one.

    Attributes:
        adapter: the adapter that the job changes.
        is_update: True if it trains in passes that other updates share.
        running_s: for how many seconds it has run.
    """

    adapter: str
    is_update: bool
    running_s: float


class OpenPlaces(NamedTuple):
    """Which kinds of jobs may start beside the running ones.

    Attributes:
        updates: True if an update of an adapter that does not run may start.
        others: True if a job of another kind may.
        hold: True if such a job may as soon as the short jobs that run have ended.
    """

    updates: bool
    others: bool
    hold: bool


def open_places(running: Sequence[RunningState], lanes: int, pass_adapters: int) -> OpenPlaces:
    """Return which jobs may start now. Pure.

    Args:
        running: the running jobs.
        lanes: the most jobs that may run at once beside updates.
        pass_adapters: the most updates that may run at once.
    """
    updates = sum(job.is_update for job in running)
    beside_long = all(job.running_s >= LONG_JOB_S for job in running)
    beside_updates = all(job.is_update or job.running_s >= LONG_JOB_S for job in running)
    free_lane = len(running) - updates < lanes
    return OpenPlaces(
        updates=(beside_long and len(running) < lanes) or (updates < pass_adapters and beside_updates),
        others=beside_long and free_lane,
        hold=not beside_long and free_lane,
    )


class CommitOrder:
    """Say how far each partition may be committed when jobs end in another order than they were read.

    Example:
        >>> from perennial.streams.kafka.group import ConsumedRecord
        >>> first, second = (ConsumedRecord("adapter-jobs", 0, n, None, b"", [], epoch=0) for n in (7, 8))
        >>> order = CommitOrder()
        >>> order.add(first)
        >>> order.add(second)
        >>> order.complete(second) is None  # offset 7 is not done yet
        True
        >>> order.complete(first).offset
        8
    """

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], deque[ConsumedRecord]] = {}
        self._completed: set[tuple[int, int, int]] = set()

    def add(self, record: ConsumedRecord) -> None:
        """Register a record that was read."""
        self._open.setdefault((record.partition, record.epoch), deque()).append(record)

    def complete(self, record: ConsumedRecord) -> ConsumedRecord | None:
        """Note that a record is handled; return the last record before which everything is, None if that is no news."""
        partition = (record.partition, record.epoch)
        read = self._open.get(partition)
        if read is None:  # the partition was taken away
            return None
        self._completed.add((*partition, record.offset))
        last = None
        while read and (*partition, read[0].offset) in self._completed:
            last = read.popleft()
            self._completed.discard((*partition, last.offset))
        if not read:
            del self._open[partition]
        return last

    def drop_lost(self, owns: Callable[[ConsumedRecord], bool]) -> bool:
        """Drop what was read of partitions that were taken away: it is never committed here.

        Args:
            owns: returns whether the partition is this member's, and was when the record was read.

        Returns:
            True if there was any.
        """
        lost = {partition for partition, read in self._open.items() if not owns(read[0])}
        if lost:
            self._open = {partition: read for partition, read in self._open.items() if partition not in lost}
            self._completed = {done for done in self._completed if done[:2] not in lost}
        return bool(lost)

    def __len__(self) -> int:
        """Return how many records were read and are not committed yet."""
        return sum(len(read) for read in self._open.values())


class Lane:
    """A thread that runs one job at a time.

    Args:
        number: from 0; lane 0 trains in the writer's own slot.
        writer: the versions of all adapters, with a slot that no other lane uses.
        runner_of: makes the runner of the lane's jobs from what it calls: with an event that must be published before
            its job ends, and after each step. See `JobRunner`.
        publish: called with such an event and the trace context of its job.
        progress: called after each step.
        stop: set when the role must end.
        clock: monotonic clock, in seconds.
    """

    def __init__(
        self,
        number: int,
        writer: VersionWriter,
        runner_of: Callable[[Callable[[AdapterUpdate], None], Callable[[], None]], JobRunner],
        publish: Callable[[AdapterUpdate, str | None], None],
        progress: Callable[[], None],
        stop: threading.Event,
        clock: Callable[[], float],
    ) -> None:
        self._traceparent: str | None = None
        self._progress = progress
        self._stop = stop
        self._clock = clock
        self._stopping_since_s: float | None = None
        self._closing = False
        writer.on_step = self._tick
        self.runner = runner_of(lambda event: publish(event, self._traceparent), self._tick)
        # A fresh thread has torch's own default number of threads.
        self._pool = ThreadPoolExecutor(
            1, f"training-{number}", initializer=make_deterministic, initargs=(writer.threads,)
        )

    def start(self, envelope: Envelope, run: Callable[[JobRunner, Envelope], JobResult]) -> Future[JobResult]:
        """Run a job in the lane's thread."""
        self._traceparent = envelope.traceparent
        return self._pool.submit(run, self.runner, envelope)

    def _tick(self) -> None:
        """Report a step; end a job that would keep a stopping role for too long.

        Raises:
            JobInterruptedError: the role was asked to stop `STOP_GRACE_S` ago, or the lane is closed.
        """
        self._progress()
        if self._closing:
            raise JobInterruptedError("the role ends before the job is done", remedy="nothing is lost: it runs again")
        if not self._stop.is_set():
            return
        if self._stopping_since_s is None:
            self._stopping_since_s = self._clock()
        if self._clock() - self._stopping_since_s > STOP_GRACE_S:
            raise JobInterruptedError("the role stops before the job is done", remedy="nothing is lost: it runs again")

    def close(self) -> None:
        """End the thread and the job that it runs, if any: the role has failed then, and nobody polls meanwhile."""
        self._closing = True
        self._pool.shutdown()
