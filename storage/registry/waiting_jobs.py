"""The jobs of an adapter in the store: which update jobs wait, which cuts were given up, which versions jobs made.

- `jobs/<adapter>/<cut>` holds an update job from its cut until it is settled: learned, refused by the gate, or given up.
  curate writes it before the micro-batch's body, the learner deletes it. So the objects under `jobs/<adapter>/` name
  exactly the micro-batches that no version names yet, also where Kafka lost or reordered the record of the job.
- `given-up/<adapter>` lists the cuts whose job went to the dead letters: no version will ever name them, and the cuts
  after them do not wait for them.
- `state/curate/<adapter>` is curate's own; its count of cuts says which jobs curate committed. A job whose cut number is
  not below that count may be what a curate process left that ended before it committed the cut. Nobody may learn or
  publish it: curate deletes it, and gives its cut number to other examples.
- `job-versions/<adapter>/<hash of the job id>` lists the versions that a rollback or a forgetting was about to publish,
  so that a redelivered job is recognised however many versions were made since.

A job is opaque bytes here: the JSON of the event `update.requested`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from perennial.storage.errors import NotFoundError, StoreError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.compare_and_swap import update_object
from perennial.storage.registry.manifest import AdapterName, Digest
from perennial.storage.registry.records import RegistryRecord, check_adapter, parse_record

CUT_DIGITS = 12
MAX_CUT = 10**CUT_DIGITS - 1
MAX_JOB_BYTES = 4 << 20
MAX_GIVEN_UP = 10_000
_MAX_GIVEN_UP_BYTES = 16 << 20
_MAX_JOB_VERSIONS_BYTES = 1 << 20
MAX_CURATE_STATE_BYTES = 8 << 20
_PREFIX = "jobs/"


@dataclass(frozen=True)
class StoredJob:
    """An update job that waits in the store.

    Attributes:
        cut: the job's cut number.
        data: the job as JSON.
        etag: what a compare-and-swap expects.
    """

    cut: int
    data: bytes
    etag: str


def job_key(adapter: str, cut: int) -> str:
    """Return the key of the update job with that cut number; padded, so that lists sort.

    Raises:
        StoreError: the cut number has too many digits, or the name is not an adapter's.
    """
    if not 0 <= cut <= MAX_CUT:
        raise StoreError("not a usable cut number", got=cut, allowed=f"0 to {MAX_CUT}")
    return f"{_PREFIX}{check_adapter(adapter)}/{cut:0{CUT_DIGITS}d}"


def put_job(store: ObjectStore, adapter: str, cut: int, data: bytes) -> str:
    """Store the job of a cut and return its etag.

    Raises:
        ConflictError: another process stored a job with this cut number first.
    """
    return store.compare_and_swap(job_key(adapter, cut), data, None)


def load_job(store: ObjectStore, adapter: str, cut: int) -> StoredJob | None:
    """Return the job of a cut; None where none waits."""
    if not 0 <= cut <= MAX_CUT:
        return None
    try:
        stored = store.get(job_key(adapter, cut), MAX_JOB_BYTES)
    except NotFoundError:
        return None
    return StoredJob(cut, stored.data, stored.etag)


def delete_job(store: ObjectStore, adapter: str, cut: int) -> None:
    """Remove the job of a cut that is settled."""
    store.delete(job_key(adapter, cut))


def list_jobs(store: ObjectStore, adapter: str) -> Iterator[int]:
    """Yield the cut numbers of the adapter's waiting jobs in ascending order."""
    prefix = f"{_PREFIX}{check_adapter(adapter)}/"
    for key in store.list(prefix):
        cut = _cut_of(key[len(prefix) :])
        if cut is not None:  # else it is of an adapter below this one
            yield cut


def count_jobs(store: ObjectStore) -> dict[str, int]:
    """Return how many jobs wait, by adapter; adapters without waiting jobs are left out."""
    counts: dict[str, int] = {}
    for key in store.list(_PREFIX):
        adapter, _, name = key[len(_PREFIX) :].rpartition("/")
        if adapter and _cut_of(name) is not None:
            counts[adapter] = counts.get(adapter, 0) + 1
    return counts


def curate_state_key(adapter: str) -> str:
    """Return the key of an adapter's curate state."""
    return f"state/curate/{check_adapter(adapter)}"


def committed_cuts(store: ObjectStore, adapter: str) -> int:
    """Return how many cuts curate committed: those with a lower number. 0 where curate has no state of the adapter.

    The number only grows. So a stored job whose cut number is below it is committed, however old the answer is.

    Raises:
        IntegrityError: the state is not readable.
    """
    key = curate_state_key(adapter)
    try:
        stored = store.get(key, MAX_CURATE_STATE_BYTES)
    except NotFoundError:
        return 0
    return cuts_of_state(key, stored.data)


def cuts_of_state(key: str, data: bytes) -> int:
    """Return how many cuts a stored state of curate counts.

    Args:
        key: the state's key, for the error.
        data: the state.

    Raises:
        IntegrityError: the state is not readable.
    """
    return parse_record(_CurateState, key, data).cuts


class _CurateState(BaseModel):
    """The part of curate's state that others read; `streams/curate/batcher.py` writes it."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    cuts: Annotated[int, Field(ge=0)]


def _cut_of(name: str) -> int | None:
    return int(name) if len(name) == CUT_DIGITS and name.isdecimal() else None


# ---- cuts that were given up


class GivenUpCuts(RegistryRecord):
    """The cuts of an adapter whose job went to the dead letters.

    Attributes:
        adapter: the adapter.
        job_ids: the id of the job, by cut number.
    """

    adapter: AdapterName
    job_ids: dict[Annotated[int, Field(ge=0)], str] = Field(default_factory=dict)


def given_up_key(adapter: str) -> str:
    """Return the key of the cuts that were given up."""
    return f"given-up/{check_adapter(adapter)}"


def load_given_up(store: ObjectStore, adapter: str) -> dict[int, str]:
    """Return the ids of the jobs that were given up, by cut number.

    Raises:
        IntegrityError: the object is not readable.
    """
    return dict(_load_given_up(store, adapter)[0].job_ids)


def give_up_cut(store: ObjectStore, adapter: str, cut: int, job_id: str) -> None:
    """Record that the job of a cut will never be done; the newest `MAX_GIVEN_UP` cuts are kept.

    Raises:
        ConflictError: other writers were first at every attempt.
        IntegrityError: the object is not readable.
    """

    def added(found: GivenUpCuts) -> GivenUpCuts:
        job_ids = dict(sorted({**found.job_ids, cut: job_id}.items())[-MAX_GIVEN_UP:])
        return found.model_copy(update={"job_ids": job_ids})

    update_object(
        store, given_up_key(adapter), lambda: _load_given_up(store, adapter), added, lambda wanted: wanted.to_bytes()
    )


def _load_given_up(store: ObjectStore, adapter: str) -> tuple[GivenUpCuts, str | None]:
    key = given_up_key(adapter)
    try:
        stored = store.get(key, _MAX_GIVEN_UP_BYTES)
    except NotFoundError:
        return GivenUpCuts(adapter=adapter), None
    return parse_record(GivenUpCuts, key, stored.data), stored.etag


# ---- versions that jobs made


class JobVersions(RegistryRecord):
    """The versions that a job was about to publish; at most one per kind of version was published.

    Attributes:
        adapter: the adapter.
        job_id: the job.
        versions: the versions, in the order of the attempts.
    """

    adapter: AdapterName
    job_id: Annotated[str, Field(min_length=1, max_length=1024)]
    versions: list[Digest] = Field(default_factory=list)


def job_versions_key(adapter: str, job_id: str) -> str:
    """Return the key of the versions of a job."""
    return f"job-versions/{check_adapter(adapter)}/{sha256(job_id.encode()).hexdigest()}"


def record_job_version(store: ObjectStore, adapter: str, job_id: str, version: str) -> None:
    """Record, before a version is published, which job makes it.

    Raises:
        ConflictError: other writers were first at every attempt.
        IntegrityError: the object is not readable.
    """

    def added(found: JobVersions) -> JobVersions:
        if version in found.versions:
            return found
        return found.model_copy(update={"versions": [*found.versions, version]})

    update_object(
        store, job_versions_key(adapter, job_id), lambda: _load_job_versions(store, adapter, job_id), added,
        lambda wanted: wanted.to_bytes(),
    )  # fmt: skip


def load_job_versions(store: ObjectStore, adapter: str, job_id: str) -> list[str]:
    """Return the versions that a job was about to publish, in the order of the attempts.

    Raises:
        IntegrityError: the object is not readable.
    """
    return list(_load_job_versions(store, adapter, job_id)[0].versions)


def _load_job_versions(store: ObjectStore, adapter: str, job_id: str) -> tuple[JobVersions, str | None]:
    key = job_versions_key(adapter, job_id)
    try:
        stored = store.get(key, _MAX_JOB_VERSIONS_BYTES)
    except NotFoundError:
        return JobVersions(adapter=adapter, job_id=job_id), None
    return parse_record(JobVersions, key, stored.data), stored.etag
