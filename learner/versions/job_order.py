"""The order of an adapter's update jobs: which jobs wait in the store, and which must be learned before a given one.

The cuts of an adapter are numbered consecutively, and the newest version says which cut comes next. Kafka delivers the
jobs of an adapter in order as long as its partition stays the same and no record is lost. Where a later cut arrives
first, the jobs in between are taken from the store. Only a job that curate committed is: another one may be of a curate
process that ended before it, and its examples will be cut again under the same number.
"""

from __future__ import annotations

from perennial.learner.versions.job_result import JobError
from perennial.storage.errors import IntegrityError, PerennialError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.waiting_jobs import (
    StoredJob,
    committed_cuts,
    curate_state_key,
    job_key,
    list_jobs,
    load_given_up,
    load_job,
)
from perennial.streams.events.models import UpdateRequested


class MissingCutError(PerennialError):
    """The job of an earlier cut is neither in the store nor settled.

    Args:
        job: the job that cannot be done before it.
        cut: the first missing cut.
        committed: the number of cuts that curate's state counts.
    """

    def __init__(self, job: UpdateRequested, cut: int, committed: int) -> None:
        self.cut = cut
        unpark = f"`perennial adapters unpark {job.adapter}`"
        if cut < committed:
            got = f"no object {job_key(job.adapter, cut)}"
            remedy = (
                f"if `perennial dlq ls --topic adapter-jobs --adapter {job.adapter}` shows the cut's record and it is "
                "genuine, store its value (`perennial dlq show PARTITION:OFFSET --json`, value_b64) as that object; else "
                f"restore the object from a copy; then run {unpark}; if the cut is lost, go on without it: "
                f"`perennial adapters unpark {job.adapter} --without-missing`"
            )
        else:
            got = f"{curate_state_key(job.adapter)} counts {committed} cuts"
            remedy = (
                f"restore the object {curate_state_key(job.adapter)} from a copy that is not older, then run {unpark}"
            )
        super().__init__(
            f"the job of cut {cut} of {job.adapter} is missing, so cut {job.cut} cannot be learned yet",
            got=got, allowed=f"every job from cut {cut} on, in the store or on the topic adapter-jobs", remedy=remedy,
        )  # fmt: skip


def parse_job(adapter: str, stored: StoredJob) -> UpdateRequested:
    """Return a stored job.

    Raises:
        IntegrityError: the object does not hold the adapter's job of this cut.
    """
    try:
        job = UpdateRequested.model_validate_json(stored.data)
        if (job.adapter, job.cut) != (adapter, stored.cut):
            raise ValueError(f"it is the job of {job.adapter} cut {job.cut}")  # noqa: TRY301 - one error for both
    except ValueError as error:
        raise IntegrityError(
            f"{job_key(adapter, stored.cut)} does not hold this cut's job", got=str(error)[:200],
            allowed="an update job of the adapter", remedy="restore the object from a copy",
        ) from error  # fmt: skip
    return job


def stored_job(store: ObjectStore, job: UpdateRequested) -> UpdateRequested | None:
    """Return the job as it waits in the store; None if no job with its id does.

    The stored one counts: a forgetting may have given it another micro-batch after the record was published.

    Raises:
        IntegrityError: the object does not hold a job.
    """
    found = load_job(store, job.adapter, job.cut)
    if found is None:
        return None
    parsed = parse_job(job.adapter, found)
    return parsed if parsed.job_id == job.job_id else None


def waiting_jobs(store: ObjectStore, adapter: str, start: int = 0, end: int | None = None) -> list[UpdateRequested]:
    """Return the jobs that are in the store, by cut, also one that curate has not committed.

    Args:
        store: the store.
        adapter: the adapter.
        start: the first cut.
        end: the cut to stop before; None for no end.

    Raises:
        IntegrityError: an object does not hold a job.
    """
    found: list[UpdateRequested] = []
    for cut in list_jobs(store, adapter):
        if start <= cut and (end is None or cut < end):
            stored = load_job(store, adapter, cut)
            if stored is not None:  # None: it was settled in the meantime
                found.append(parse_job(adapter, stored))
    return found


def committed_jobs(store: ObjectStore, adapter: str, start: int = 0, end: int | None = None) -> list[UpdateRequested]:
    """Return the jobs that wait in the store and that curate committed, by cut; only these may be learned.

    The arguments are those of `waiting_jobs`.

    Raises:
        IntegrityError: a stored job, or curate's state, is not readable.
    """
    committed = committed_cuts(store, adapter)
    return waiting_jobs(store, adapter, start, committed if end is None else min(end, committed))


def jobs_before(store: ObjectStore, job: UpdateRequested, head: Manifest | None) -> list[UpdateRequested]:
    """Return the jobs that must be learned before this one, by cut; none where the jobs arrive in order.

    Args:
        store: the store.
        job: the job that arrived.
        head: the adapter's newest manifest; None where it has no version.

    Raises:
        MissingCutError: one of them is missing.
        JobError: nothing shows that curate ever made this job, and its cut is not the next one.
        IntegrityError: a stored job is not readable.
        ConflictError: another learner settled one of them meanwhile.
    """
    next_cut = head.next_cut if head else None
    if next_cut is not None and job.cut <= next_cut:
        return []
    waiting = committed_jobs(store, job.adapter, next_cut or 0, job.cut)
    if next_cut is None:
        # The adapter has no version, or its newest one is of a release that did not count: every job that is committed and
        # not settled is in the store, unless that release made it.
        return waiting
    if stored_job(store, job) is None:
        raise JobError(
            "unexpected-cut", "nothing in the store shows that curate made this job, and its cut is not the next one",
            got=job.cut, allowed=next_cut,
            remedy=f"if curate made it, store its value (`perennial dlq show PARTITION:OFFSET --json`, value_b64) as "
            f"{job_key(job.adapter, job.cut)} and run `perennial adapters unpark {job.adapter}`",
        )  # fmt: skip
    known = {waits.cut for waits in waiting}
    missing = [cut for cut in range(next_cut, job.cut) if cut not in known]
    if missing:
        given_up = load_given_up(store, job.adapter)
        lost = [cut for cut in missing if cut not in given_up]
        if lost:
            raise MissingCutError(job, lost[0], committed_cuts(store, job.adapter))
    return waiting
