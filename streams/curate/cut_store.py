"""Cuts in the store: the job and the body of a micro-batch, and what a process left that did not commit them."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, ValidationError

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.failpoints import failpoint
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore, put_blob
from perennial.storage.registry.pending_deletes import record_pending_deletes
from perennial.storage.registry.waiting_jobs import delete_job, job_key, load_job, put_job
from perennial.streams.events.models import BlobRef, UpdateRequested

MAX_CUTTING_BYTES = 4096


class Cutting(BaseModel):
    """The body that a release before `jobs/<adapter>/` was writing.

    Attributes:
        cut: the number of its cut.
        batch: the body.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    cut: int
    batch: BlobRef


def cutting_key(adapter: str) -> str:
    """Return the object key where earlier releases named an adapter's body while it was being written."""
    return f"state/cutting/{adapter}"


def write_cut(store: ObjectStore, body: bytes, job: UpdateRequested) -> None:
    """Store the job, then the body that it names, so that the body is found after a crash.

    Raises:
        ConflictError: another process stored a job of this cut meanwhile.
    """
    put_job(store, job.adapter, job.cut, job.model_dump_json(by_alias=True).encode())
    failpoint("curate.job")
    put_blob(store, body)


def delete_uncommitted(store: ObjectStore, adapter: str, cuts: int, fence: Callable[[], None]) -> None:
    """Delete the job and the body that an earlier process stored, or was about to store, and did not commit.

    Hazard: that process may still be running. So the state is replaced first: the other process's compare-and-swap then
    fails, and it can never commit a cut with that body.

    Hazard: that process may also still write the body, after it was deleted here. So the body is recorded first as one
    that no version will name: a forgetting then searches it.

    Args:
        store: the store.
        adapter: the adapter.
        cuts: the number of cuts that the adapter's state has committed; also the number of the next one.
        fence: replaces the adapter's state by compare-and-swap; raises ConflictError if the other process was faster.

    Raises:
        ConflictError: raised by `fence`.
        IntegrityError: a stored object is not readable.
    """
    found = load_job(store, adapter, cuts)
    left = None if found is None else _batch_of(adapter, cuts, found.data)
    old = _cutting_of_earlier_release(store, adapter)
    for ref in (left, old.batch if old is not None and old.cut >= cuts else None):
        if ref is not None:
            record_pending_deletes(store, adapter, f"uncommitted {ref.digest}", [ref.digest], refused=True)
            fence()
            store.delete(blob_key(ref.digest))
    if found is not None:
        delete_job(store, adapter, cuts)
    if old is not None:
        store.delete(cutting_key(adapter))


def _batch_of(adapter: str, cut: int, data: bytes) -> BlobRef:
    try:
        return UpdateRequested.model_validate_json(data).batch
    except ValidationError as error:
        raise IntegrityError(
            f"{job_key(adapter, cut)} is not readable", got=data[:100], allowed="an update job",
            remedy="delete the object: its cut was never committed, so nothing is lost",
        ) from error  # fmt: skip


def _cutting_of_earlier_release(store: ObjectStore, adapter: str) -> Cutting | None:
    key = cutting_key(adapter)
    try:
        stored = store.get(key, MAX_CUTTING_BYTES)
    except NotFoundError:
        return None
    try:
        return Cutting.model_validate_json(stored.data)
    except ValidationError as error:
        raise IntegrityError(
            f"{key} is not readable", got=stored.data[:100], allowed="the number of a cut and the digest of its body",
            remedy="delete the blob whose digest the object names, then the object: its cut was never committed",
        ) from error  # fmt: skip
