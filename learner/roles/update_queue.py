"""Update jobs in the order of their cuts: what must be learned first is taken from the store, what cannot be done waits.

An adapter's jobs wait in `jobs/<adapter>/` from their cut until they are settled. So a job whose adapter is parked can
be committed in Kafka without being run: it stays in the store, in order, until the adapter is unparked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from pydantic import ValidationError

from perennial.learner.roles.parking import park, parking_reason
from perennial.learner.versions.job_order import MissingCutError, committed_jobs, jobs_before, stored_job
from perennial.learner.versions.job_result import JobError, JobInterruptedError, JobResult
from perennial.learner.versions.micro_batches import read_batch
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.learner.versions.version_writer import VersionWriter
from perennial.storage.errors import ConflictError, IntegrityError, NoSpaceError, NotFoundError, PerennialError
from perennial.storage.registry.parked import MISSING_CUT, ParkedAdapter, load_parked, unpark_adapter
from perennial.storage.registry.waiting_jobs import put_job
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.models import UpdateRequested

_log = logging.getLogger("perennial.learner")

PARKED = JobResult("parked", None, None)


class UpdateQueue:
    """Runs update jobs, each after those of the cuts before it.

    Args:
        writer: the versions of all adapters.
        alias: the alias that updates publish under.
        now: wall clock, for parked records.
        publish: called with the event of each update that was taken from the store before the job that arrived.
        should_stop: asked before each update that is taken from the store; True ends the job without a result.
    """

    def __init__(
        self,
        writer: VersionWriter,
        alias: str,
        now: Callable[[], datetime],
        publish: Callable[[AdapterUpdate], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._registry = writer.registry
        self._store = writer.registry.store
        self._alias = alias
        self._now = now
        self._publish = publish
        self._should_stop = should_stop
        self._updates = UpdateExecutor(writer)

    def run(self, job: UpdateRequested) -> JobResult:
        """Learn the job's micro-batch after those of the cuts before it, or leave it in the store.

        Returns:
            The job's own result; its outcome is `parked` where the adapter is parked, or was parked by this call.

        Raises:
            JobError: the job can never be done.
            JobInterruptedError: the process is to stop; the job must not be committed.
            NoSpaceError: the store has no room; `park` parks the adapter.
            StoreError: the store failed.
        """
        parked = load_parked(self._store, job.adapter)
        if parked is None:
            return self._run_in_order(job)
        next_cut = self._next_cut(job.adapter)
        if parked.reason == MISSING_CUT and next_cut is not None and job.cut <= next_cut:
            _log.warning("the missing cut %d of %s has arrived: the adapter is unparked", job.cut, job.adapter)
            try:
                result = self._run_in_order(job, parked)
            except (JobError, ValidationError, ArithmeticError):
                # It goes to the dead letters. That settles its cut, so what waits behind it must not wait for an operator.
                # This runs here and not when the dead letter is sent: the thread that sends it also polls Kafka.
                self.give_up(job)
                self.unpark(parked)
                raise
            if result.outcome != "parked":
                self.unpark(parked)
            return result
        self._keep(job)
        return PARKED

    def unpark(self, parked: ParkedAdapter) -> None:
        """Let an adapter go on: run all its jobs that curate committed and that wait in the store, in order.

        If one cannot be done, the adapter is parked for that reason. The adapter stays parked until the last of them is
        learned: their records are committed, so after a failure in between only the record says that they wait.

        Raises:
            JobInterruptedError: the process is to stop; the adapter stays parked as it was.
            StoreError: the store failed; the adapter stays parked as it was.
        """
        for job in committed_jobs(self._store, parked.adapter):
            if not self._is_next(job, parked) or self._run_waiting(job, parked) is None:
                return
        unpark_adapter(self._store, parked.adapter)

    def park(self, job: UpdateRequested, error: PerennialError, instead_of: ParkedAdapter | None = None) -> JobResult:
        """Park the adapter because of what the job raised; the job waits in the store.

        Args:
            job: the job.
            error: what it raised.
            instead_of: why the adapter was parked until now, if what it waited for has come.

        Raises:
            JobError: the fault is in the job.
            PerennialError: `error` itself, where it is no reason to park an adapter.
        """
        reason = parking_reason(self._store, job, error)
        if reason is None:
            raise error
        self._keep(job)
        park(self._store, job, reason, error, self._now(), instead_of)
        return PARKED

    def give_up(self, job: UpdateRequested) -> None:
        """Settle a job that goes to the dead letters."""
        self._updates.record_refused(job)

    def _run_in_order(self, job: UpdateRequested, parked: ParkedAdapter | None = None) -> JobResult:
        try:
            earlier = self._jobs_before(job)
        except NoSpaceError:
            raise
        except PerennialError as error:
            return self.park(job, error, parked)
        if earlier:
            _log.warning(
                "cut %d of %s arrived before cuts %s: these are taken from the store",
                job.cut, job.adapter, ", ".join(str(waiting.cut) for waiting in earlier[:20]),
            )  # fmt: skip
        for waiting in earlier:
            if self._run_waiting(waiting, parked) is None:
                self._keep(job)
                return PARKED
        try:
            return self._updates.update(job, self._alias)
        except NoSpaceError:
            raise
        except PerennialError as error:
            return self.park(job, error, parked)

    def _is_next(self, job: UpdateRequested, parked: ParkedAdapter) -> bool:
        """Return whether no cut before the job's is missing; park the adapter if one is."""
        try:
            self._jobs_before(job)
        except MissingCutError as error:
            park(self._store, job, MISSING_CUT, error, self._now(), parked)
            return False
        return True

    def _run_waiting(self, job: UpdateRequested, parked: ParkedAdapter | None) -> JobResult | None:
        """Run a job that was taken from the store; return None if its adapter had to be parked."""
        if self._should_stop():
            raise JobInterruptedError(f"{job.adapter} stops before cut {job.cut}; it will go on from there")
        try:
            result = self._update_waiting(job)
        except NoSpaceError:
            raise
        except PerennialError as error:
            reason = parking_reason(self._store, job, error)
            if reason is not None:
                park(self._store, job, reason, error, self._now(), parked)
                return None
            if not isinstance(error, JobError):
                raise
            # Its record in Kafka goes to the dead letters when it arrives.
            _log.warning("cut %d of %s is given up: %s: %s", job.cut, job.adapter, error.reason, error)
            self.give_up(job)
            return PARKED
        if result.event is not None:
            self._publish(result.event)
        return result

    def _update_waiting(self, job: UpdateRequested) -> JobResult:
        """Run a job that was taken from the store; what its fields break must not count for the job that arrived."""
        try:
            return self._updates.update(job, self._alias)
        except (ValidationError, ArithmeticError) as error:
            raise JobError(
                "bad-job", "the job's fields cannot be worked with", got=f"{type(error).__name__}: {error}"[:300]
            ) from error

    def _jobs_before(self, job: UpdateRequested) -> list[UpdateRequested]:
        while True:
            head = self._registry.head(job.adapter)
            try:
                return jobs_before(self._store, job, head.manifest if head else None)
            except MissingCutError:
                again = self._registry.head(job.adapter)
                if (again.version if again else None) == (head.version if head else None):
                    raise
                # Another learner settled the cut between the two reads.

    def _next_cut(self, adapter: str) -> int | None:
        try:
            head = self._registry.head(adapter)
        except (IntegrityError, NotFoundError):  # that may be what the adapter is parked for
            return None
        return head.manifest.next_cut if head else None

    def _keep(self, job: UpdateRequested) -> None:
        """Check that the job waits in the store; store it where a release that did not do that made it.

        Hazard: a forged job must not take the key of a cut that curate has yet to make. So only a job whose micro-batch is
        stored, and names the same adapter and cut, is stored here.

        Raises:
            JobError: the job is not one that curate made.
        """
        try:
            if stored_job(self._store, job) is not None:
                return
        except IntegrityError:  # the object is there and damaged: once it is restored from a copy, it waits
            return
        next_cut = self._next_cut(job.adapter)
        if next_cut is not None and job.cut < next_cut:
            return  # it was settled: otherwise it would still wait
        read_batch(self._store, job)
        try:
            put_job(self._store, job.adapter, job.cut, job.model_dump_json(by_alias=True).encode())
        except ConflictError as error:
            raise JobError(
                "unexpected-cut", "another job has this cut number", got=job.job_id, allowed="the job that curate made"
            ) from error
