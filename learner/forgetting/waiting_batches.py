"""The micro-batches of update jobs that wait in the store, and their form without forgotten examples.

No version names such a micro-batch: its job is queued, its adapter is parked, or Kafka lost or reordered the job's
record. An erasure must find its text nevertheless, and the job must still be learned later, with the rest of it.
"""

from __future__ import annotations

from perennial.learner.forgetting.rebuild_plan import RemovedOffsets
from perennial.learner.versions.job_order import waiting_jobs
from perennial.learner.versions.micro_batches import batch_to_bytes, load_batch, origin_offset, without_examples
from perennial.storage.errors import ConflictError
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import ObjectStore, put_blob
from perennial.storage.registry.pending_deletes import clear_pending_deletes, record_pending_deletes
from perennial.storage.registry.waiting_jobs import job_key, load_job
from perennial.streams.events.models import MAX_REMOVED, BatchSkip, BlobRef, UpdateRequested


def waiting_digests(store: ObjectStore, adapter: str) -> set[str]:
    """Return the digests of the micro-batches of the adapter's waiting jobs.

    Raises:
        IntegrityError: a stored job is not readable.
    """
    return {job.batch.digest for job in waiting_jobs(store, adapter)}


def leave_out_of_waiting(store: ObjectStore, adapter: str, removed_offsets: RemovedOffsets) -> None:
    """Give each waiting job that has examples to remove a micro-batch without them; the old one is not deleted here.

    The job's high-water marks stay, so the removed examples are taken for done and not learned again. The micro-batch
    is as if they had never been published; the job lists them, for the version's list of skipped examples.

    Args:
        store: the store.
        adapter: the adapter.
        removed_offsets: the examples to remove.

    Raises:
        ConflictError: another learner settled or changed a job meanwhile.
        IntegrityError: a stored job or a micro-batch is not readable.
    """
    for job in waiting_jobs(store, adapter):
        offsets = removed_offsets.get(job.batch.digest)
        batch = load_batch(store, job.batch.digest) if offsets else None
        if not offsets or batch is None:
            continue
        removed = [
            BatchSkip(example_id=example.example_id, origin=example.origin, reason="quarantined")
            for example in batch.examples
            if origin_offset(example) in offsets
        ]
        kept = without_examples(batch, offsets)
        changed = job.model_copy(
            update={
                "examples": len(kept.examples),
                "skipped": len(kept.skipped),
                "removed": [*job.removed, *removed][:MAX_REMOVED],
            }
        )
        _replace_batch(store, job, changed, batch_to_bytes(kept))


def _replace_batch(store: ObjectStore, job: UpdateRequested, changed: UpdateRequested, body: bytes) -> None:
    ref = BlobRef(digest=digest_of(body), size_bytes=len(body))
    changed = changed.model_copy(update={"batch": ref})
    # Until the job names the new body, it is recorded as a refused job's, so that every forgetting finds its text.
    record = f"waiting {ref.digest}"
    record_pending_deletes(store, job.adapter, record, [ref.digest], refused=True)
    put_blob(store, body)
    stored = load_job(store, job.adapter, job.cut)
    if stored is None or UpdateRequested.model_validate_json(stored.data) != job:
        raise ConflictError(f"cut {job.cut} of {job.adapter} was settled or changed by another learner")
    store.compare_and_swap(
        job_key(job.adapter, job.cut), changed.model_dump_json(by_alias=True).encode(), stored.etag
    )  # fmt: skip
    clear_pending_deletes(store, job.adapter, record)
