"""Parking: which errors park an adapter, what is recorded of it, and the metrics of parked adapters."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from perennial.learner.model.lora import AdapterError
from perennial.learner.model.loss import OutOfMemoryError
from perennial.learner.versions.job_order import MissingCutError, stored_job
from perennial.learner.versions.job_result import JobError
from perennial.storage.errors import IntegrityError, NoSpaceError, NotFoundError, PerennialError, StoreError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.history.rebuilt_steps import REBASE_JOB_PREFIX
from perennial.storage.registry.parked import (
    MAX_DETAIL_CHARS,
    MISSING_CUT,
    ParkedAdapter,
    list_parked,
    park_adapter,
    unpark_adapter,
)
from perennial.storage.registry.waiting_jobs import list_jobs
from perennial.streams.events.models import ForgetRequested, RebaseRequested, UpdateRequested
from perennial.streams.observe.metrics import Metrics

_log = logging.getLogger("perennial.learner")

ParkingJob = UpdateRequested | ForgetRequested | RebaseRequested
"""Jobs that may park their adapter."""
REPORT_EVERY_S = 15.0
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (MissingCutError, MISSING_CUT),
    (NotFoundError, "missing-object"),
    (IntegrityError, "unreadable-object"),
    (AdapterError, "broken-state"),
    (OutOfMemoryError, "out-of-memory"),
    (NoSpaceError, "no-space"),
)
MENDED_BY_REBASE = frozenset({"base-mismatch", "rank-mismatch", "alpha-mismatch", "recipe-mismatch", "rebase-refused"})
"""Reasons for which an adapter waits and that are gone once it was learned anew on this learner's base."""
_JOB_ERRORS = MENDED_BY_REBASE
_REMEDIES = {
    "base-mismatch": "start this learner with the adapter's base (PERENNIAL_BASE), or learn the adapter anew on this "
    "learner's base with `perennial adapters rebase ADAPTER`",
    "rank-mismatch": "start this learner with the adapter's rank (PERENNIAL_RANK), or learn the adapter anew with this "
    "learner's rank by `perennial adapters rebase ADAPTER`",
    "alpha-mismatch": "start this learner with the adapter's alpha (PERENNIAL_ALPHA), or learn the adapter anew with this "
    "learner's alpha by `perennial adapters rebase ADAPTER`",
    "recipe-mismatch": "start a learner with the rank and alpha of that update (PERENNIAL_RANK, PERENNIAL_ALPHA), of "
    "the release that made it or a later one",
    "broken-state": "start this learner with the adapter's base and rank, or restore the version's weights from a copy",
    "missing-object": "restore the object from a copy",
    "out-of-memory": "lower PERENNIAL_ROW_TOKENS, or give the learner more memory",
}
"""The remedies that replace what the error says, because it may not know that the adapter is parked."""


def parking_reason(store: ObjectStore, job: ParkingJob, error: Exception) -> str | None:
    """Return why a job that failed parks its adapter; None where the fault is in the job, or the role must end.

    Args:
        store: the store.
        job: the job.
        error: what the job raised.
    """
    if isinstance(error, JobError):
        if error.reason == "missing-batch":
            # Where curate stored the job, its micro-batch was stored, too, and was lost since. Otherwise the record names
            # a micro-batch that never existed.
            genuine = not isinstance(job, UpdateRequested) or stored_job(store, job) is not None
            return "missing-object" if genuine else None
        return error.reason if error.reason in _JOB_ERRORS else None
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), None)


def ends_with_rebase(parked: ParkedAdapter) -> bool:
    """Return whether an adapter goes on once a rebase has succeeded: it waits for a base, or for a rebase that failed."""
    return parked.reason in MENDED_BY_REBASE or (parked.job_id or "").startswith(REBASE_JOB_PREFIX)


def park(
    store: ObjectStore, job: ParkingJob, reason: str, error: Exception, at: datetime,
    instead_of: ParkedAdapter | None = None,
) -> ParkedAdapter:  # fmt: skip
    """Park the adapter of a job that failed, and return the record that is stored.

    Args:
        store: the store.
        job: the job.
        reason: what `parking_reason` returned.
        error: what the job raised.
        at: the time now.
        instead_of: why the adapter was parked until now, if what it waited for has come; any other record stays.
    """
    detail = _detail(job, reason, error)
    record = ParkedAdapter(
        adapter=job.adapter, reason=reason, detail=detail[:MAX_DETAIL_CHARS], job_id=job.job_id,
        cut=job.cut if isinstance(job, UpdateRequested) else None, since=at,
        worker=f"{socket.gethostname()}:{os.getpid()}",
    )  # fmt: skip
    _log.error("%s is parked (%s), its jobs wait in the store: %s", job.adapter, reason, detail)
    if instead_of is not None:
        unpark_adapter(store, job.adapter)
    return park_adapter(store, record)


def _detail(job: ParkingJob, reason: str, error: Exception) -> str:
    """Return what was found, what is allowed and what to do, then how the adapter goes on."""
    if isinstance(job, RebaseRequested):
        go_on = f"`perennial adapters rebase {job.adapter}`"
    else:
        go_on = f"`perennial adapters unpark {job.adapter}`"
    remedy = _REMEDIES.get(reason) or (error.remedy if isinstance(error, PerennialError) else "")
    if reason != MISSING_CUT:  # whose remedy says it already
        remedy = f"{remedy or 'mend the cause'}; then {go_on}"
    if not isinstance(error, PerennialError):
        return f"{error}; remedy: {remedy}"
    return str(PerennialError(error.message, got=error.got, allowed=error.allowed, remedy=remedy))


@contextmanager
def report_parked(store: ObjectStore, metrics: Metrics) -> Iterator[None]:
    """Set the metrics of parked adapters every `REPORT_EVERY_S` seconds, on a thread of its own, until the block ends.

    A store that does not answer must not keep the job loop from polling Kafka.
    """
    ended = threading.Event()

    def report() -> None:
        while True:
            try:
                parked = list(list_parked(store))
                metrics.parked({record.adapter: record.reason for record in parked})
                for record in parked:
                    metrics.jobs_waiting(record.adapter, sum(1 for _ in list_jobs(store, record.adapter)))
            except StoreError as error:
                metrics.store_error("parked")
                _log.warning("parked adapters cannot be listed: %s", error)
            if ended.wait(REPORT_EVERY_S):
                return

    thread = threading.Thread(target=report, name="parked", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(1)
