"""Run one job of the learner from its beginning to its end: the side of a lane's thread, without Kafka.

Updates of other lanes may train in the same passes (see `together.gathered_passes`): nothing here notices it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from pydantic import ValidationError

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.forgetting.rebase_executor import RebaseExecutor
from perennial.learner.roles.parking import ends_with_rebase, park, parking_reason
from perennial.learner.roles.update_queue import UpdateQueue
from perennial.learner.versions.job_result import JobError, JobResult
from perennial.learner.versions.rollback_job import RollbackExecutor
from perennial.learner.versions.version_writer import VersionWriter
from perennial.storage.errors import IntegrityError, NoSpaceError, NotFoundError, PerennialError
from perennial.storage.registry.parked import load_parked
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.fields import Event
from perennial.streams.events.models import (
    ForgetRequested,
    RebaseRequested,
    RetentionProgressed,
    RollbackRequested,
    UpdateRequested,
)
from perennial.streams.retention.kinds import DEPENDANT_PREFIX

_log = logging.getLogger("perennial.learner")


class JobRunner:
    """Runs jobs over the store and the model.

    Args:
        writer: the versions of all adapters.
        alias: the alias that updates and forgettings publish under.
        now: wall clock, for statuses.
        failpoint: called with a name at each step where fault tests may stop the process.
        publish: called with each event that must be published before a job ends.
        progress: called after each rebuilt update and each step of its training.
        should_stop: asked between two updates of a rebuild, or of an adapter that catches up; True ends the job without a
            result.
    """

    def __init__(
        self,
        writer: VersionWriter,
        alias: str,
        now: Callable[[], datetime],
        failpoint: Callable[[str], None],
        publish: Callable[[AdapterUpdate], None],
        progress: Callable[[], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._writer = writer
        self._alias = alias
        self._now = now
        self._publish = publish
        self._updates = UpdateQueue(writer, alias, now, publish, should_stop)
        self._rollbacks = RollbackExecutor(writer)
        self._forgets = ForgetExecutor(writer, now, failpoint, publish, progress, should_stop)
        self._rebases = RebaseExecutor(writer, now, failpoint, progress, should_stop)
        self._reported: set[str] = set()

    def run(self, job: Event) -> JobResult:
        """Run one job.

        Returns:
            The job's result; its outcome is `parked` where the fault is neither the job's nor the role's: the adapter
            waits for an operator, and the job must be committed.

        Raises:
            JobError: the job can never be done, or is of an unknown type.
            NoSpaceError: the store has no room; hand it to `park` if trying again does not help.
            StoreError: the store failed.
            JobInterruptedError: the process is to stop; the job must not be committed.
            AdapterError: stored weights belong to another base or rank.
        """
        try:
            return self._run(job)
        except (ValidationError, ArithmeticError) as error:
            raise JobError(
                "bad-job", "the job's fields cannot be worked with", got=f"{type(error).__name__}: {error}"[:300]
            ) from error

    def _run(self, job: Event) -> JobResult:
        if isinstance(job, UpdateRequested):
            result = self._updates.run(job)
            return result if result.outcome == "parked" else self._with_event(result, job.adapter, self._alias)
        if isinstance(job, RollbackRequested):
            return self._with_event(self._rollbacks.rollback(job), job.adapter, job.alias)
        if isinstance(job, ForgetRequested):
            return self._forget(job)
        if isinstance(job, RebaseRequested):
            return self._rebase(job)
        raise JobError("unsupported", f"{job.type} is not supported by this learner", got=job.type)

    def _forget(self, job: ForgetRequested) -> JobResult:
        """Run a forget job, also while its adapter is parked; if the job parked it, its end unparks it."""
        try:
            result = self._forgets.forget(job, self._alias)
        except NoSpaceError:
            raise
        except PerennialError as error:
            return self.park(job, error)
        parked = load_parked(self._writer.registry.store, job.adapter)
        if parked is not None and parked.job_id == job.job_id and not job.prepare:
            self._updates.unpark(parked)
        return result

    def _rebase(self, job: RebaseRequested) -> JobResult:
        """Run a rebase job, also while its adapter is parked; let the updates that wait for this base go on after it."""
        try:
            result = self._rebases.rebase(job, self._alias)
        except NoSpaceError:
            raise
        except PerennialError as error:
            return self.park(job, error)
        parked = load_parked(self._writer.registry.store, job.adapter)
        rebased = result.manifest is not None or result.outcome == "repeated"
        if parked is not None and rebased and ends_with_rebase(parked):
            if result.event is not None:  # before those of the updates that waited
                self._publish(result.event)
            self._updates.unpark(parked)
        return self._with_event(result, job.adapter, self._alias)

    def park(self, job: Event, error: PerennialError) -> JobResult:
        """Park the job's adapter because of what the job raised.

        An update waits in the store. A forget job is not reported as failed: retain sends it again, and so does
        `perennial adapters unpark`. A rebase that failed takes the place of what a rebase would mend; an adapter that is parked for
        another reason, such as by an operator, stays parked for that one.

        Raises:
            JobError: the fault is in the job.
            PerennialError: `error` itself, where it is no reason to park an adapter.
        """
        if isinstance(job, UpdateRequested):
            return self._updates.park(job, error)
        store = self._writer.registry.store
        if not isinstance(job, ForgetRequested | RebaseRequested):
            raise error
        reason = parking_reason(store, job, error)
        if reason is None:
            raise error
        if isinstance(job, RebaseRequested):
            before = load_parked(store, job.adapter)
            mended = before is not None and ends_with_rebase(before)
            park(store, job, reason, error, self._now(), before if mended else None)
            return JobResult("parked", None, None)
        park(store, job, reason, error, self._now())
        status = RetentionProgressed(
            request_id=job.request_id, adapter=job.adapter, kind=job.kind, state="quarantined",
            detail=f"waits, the adapter is parked: {reason}: {error}"[:1024], at=self._now(),
        )  # fmt: skip
        told = () if job.request_id.startswith(DEPENDANT_PREFIX) else (status,)
        return JobResult("parked", None, None, statuses=told)

    def _with_event(self, result: JobResult, adapter: str, alias: str) -> JobResult:
        """Add the alias's event to an adapter's first result: an earlier process may have died before it could send it."""
        if result.event is None and adapter not in self._reported:
            result = replace(result, event=self._writer.current_alias_event(adapter, alias))
        self._reported.add(adapter)
        return result

    def give_up(self, job: Event) -> None:
        """Clean up after a job that will never be done.

        Raises:
            StoreError: the store failed.
        """
        if isinstance(job, UpdateRequested):
            self._updates.give_up(job)
        if isinstance(job, RebaseRequested):
            self._rebases.give_up(job)
        if isinstance(job, ForgetRequested):
            try:
                self._forgets.give_up(job)
            except (IntegrityError, NotFoundError) as error:
                # Its pending deletes stay, so the next forgetting searches them.
                _log.warning(
                    "what %s had stored is not deleted, the next forgetting searches it: %s", job.request_id, error
                )
