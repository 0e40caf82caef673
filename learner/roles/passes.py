"""Run the jobs of the learner: the training thread's side, without Kafka.

Today a pass is one job. To train the jobs of several adapters in one pass, give `PassRunner` a method that takes
several update jobs and returns one `JobResult` each, and let the job loop (`learner.py`) hand it more than one waiting
record; publishing and committing stay per job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.versions.job_result import JobError, JobResult
from perennial.learner.versions.rollback_job import RollbackExecutor
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.learner.versions.version_writer import VersionWriter
from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.fields import Event
from perennial.streams.events.models import ForgetRequested, RollbackRequested, UpdateRequested

_log = logging.getLogger("perennial.learner")


class PassRunner:
    """Runs jobs over the store and the model.

    Args:
        writer: the versions of all adapters.
        alias: the alias that updates and forgettings publish under.
        now: wall clock, for statuses.
        failpoint: called with a name at each step where fault tests may stop the process.
        publish: called with each event that must be published before a forget job ends.
        progress: called after each rebuilt update.
    """

    def __init__(
        self,
        writer: VersionWriter,
        alias: str,
        now: Callable[[], datetime],
        failpoint: Callable[[str], None],
        publish: Callable[[AdapterUpdate], None],
        progress: Callable[[], None],
    ) -> None:
        self._writer = writer
        self._alias = alias
        self._updates = UpdateExecutor(writer)
        self._rollbacks = RollbackExecutor(writer)
        self._forgets = ForgetExecutor(writer, now, failpoint, publish, progress)
        self._reported: set[str] = set()

    def run(self, job: Event) -> JobResult:
        """Run one job.

        Raises:
            JobError: the job can never be done, or is of an unknown type.
            StoreError: the store failed.
            AdapterError: stored weights belong to another base or rank.
        """
        if isinstance(job, UpdateRequested):
            return self._with_event(self._updates.update(job, self._alias), job.adapter, self._alias)
        if isinstance(job, RollbackRequested):
            return self._with_event(self._rollbacks.rollback(job), job.adapter, job.alias)
        if isinstance(job, ForgetRequested):
            return self._forgets.forget(job, self._alias)
        raise JobError("unsupported", f"{job.type} is not supported by this learner", got=job.type)

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
            self._updates.record_refused(job)
        if isinstance(job, ForgetRequested):
            try:
                self._forgets.give_up(job)
            except (IntegrityError, NotFoundError) as error:
                # Its pending deletes stay, so the next forgetting searches them.
                _log.warning("%s left something behind: %s", job.request_id, error)
