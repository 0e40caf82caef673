"""Delete blobs that neither a version nor a waiting job needs any more."""

from __future__ import annotations

from collections.abc import Collection

from perennial.learner.versions.history import load_history
from perennial.learner.versions.job_order import waiting_jobs
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.pending_deletes import load_pending_deletes
from perennial.storage.registry.registry import Registry
from perennial.streams.retention.example_rows import history_index


def delete_unreferenced(
    registry: Registry, adapter: str, job_id: str, *, unpublished: bool = False, keep: Collection[str] = ()
) -> set[str]:
    """Delete the blobs in a job's pending deletes that no version and no other waiting job needs, with all their object versions.

    Nothing that a version still needs is deleted, so this is safe where a job was interrupted. Only this job's pending
    deletes are looked at: another job's may name blobs that it is about to publish. The record itself stays; the job
    clears it when it is through.

    Args:
        registry: the adapter's versions.
        adapter: the job's adapter.
        job_id: the job.
        unpublished: delete only what no version names at all, for a job that goes no further.
        keep: digests of blobs that something else needs, such as the progress of a rebuild.

    Returns:
        The digests that were deleted.
    """
    pending = load_pending_deletes(registry.store, adapter, job_id)
    digests = set(pending.digests).difference(keep) if pending else set()
    if not digests:
        return set()
    history = load_history(registry, adapter)
    if history is not None and unpublished:
        digests -= history.all_blobs()
    elif history is not None:
        digests -= history.reachable_blobs({revocation.version for revocation in registry.revocations(adapter)})
    # The micro-batch of another job that waits belongs to that job alone: no version names it yet.
    digests -= {job.batch.digest for job in waiting_jobs(registry.store, adapter) if job.job_id != job_id}
    for digest in sorted(digests):
        registry.store.delete(blob_key(digest))
    if history is not None and history.index is not None:
        history_index(registry, adapter).erase(history.index, digests)
    return digests
