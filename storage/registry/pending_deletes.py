"""The blobs that a job will delete: written before the job changes anything, removed when the job is complete.

One object per adapter and job, `forgotten/<adapter>/<hash of the job id>`. It names blobs by digest and holds no text.
A process that finishes the job after a crash reads here what to delete, including blobs of an earlier attempt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Annotated

from pydantic import Field

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.compare_and_swap import update_object
from perennial.storage.registry.manifest import AdapterName, Digest
from perennial.storage.registry.records import RegistryRecord, check_adapter, parse_record

MAX_PENDING_DELETES_BYTES = 64 << 20
_HASH_CHARS = 64


class PendingDeletes(RegistryRecord):
    """Blobs of one job to delete, unless a manifest that stays needs them.

    Attributes:
        adapter: The adapter.
        job_id: The job.
        requests: The number of examples found, by retention request.
        digests: The blobs.
        refused: The job will never be carried out. Its blobs stay until a forgetting finds texts in them to delete.
    """

    adapter: AdapterName
    job_id: Annotated[str, Field(min_length=1, max_length=1024)]
    requests: dict[str, int] = Field(default_factory=dict)
    digests: list[Digest] = Field(default_factory=list)
    refused: bool = False


def pending_deletes_key(adapter: str, job_id: str) -> str:
    """Return the key of a job's pending deletes."""
    return f"forgotten/{check_adapter(adapter)}/{sha256(job_id.encode()).hexdigest()}"


def load_pending_deletes(store: ObjectStore, adapter: str, job_id: str) -> PendingDeletes | None:
    """Return the job's pending deletes; None where there are none.

    Raises:
        IntegrityError: The object is not readable.
    """
    return _load(store, pending_deletes_key(adapter, job_id))[0]


def record_pending_deletes(
    store: ObjectStore,
    adapter: str,
    job_id: str,
    digests: Iterable[str],
    requests: Mapping[str, int] | None = None,
    *,
    refused: bool = False,
) -> None:
    """Add blobs to the job's pending deletes; what is recorded already stays.

    Args:
        store: The store.
        adapter: The adapter.
        job_id: The job.
        digests: Blobs to add.
        requests: The number of examples found, by retention request; the larger number stays.
        refused: The job will never be carried out; once set this stays.

    Raises:
        ConflictError: Other writers were first at every attempt.
        IntegrityError: The object is not readable.
    """
    key, added = pending_deletes_key(adapter, job_id), set(digests)

    def load() -> tuple[PendingDeletes, str | None]:
        found, etag = _load(store, key)
        return found or PendingDeletes(adapter=adapter, job_id=job_id), etag

    def extended(found: PendingDeletes) -> PendingDeletes:
        counts = dict(found.requests)
        for request_id, count in (requests or {}).items():
            counts[request_id] = max(count, counts.get(request_id, 0))
        return found.model_copy(
            update={
                "requests": counts,
                "digests": sorted({*found.digests, *added}),
                "refused": refused or found.refused,
            }
        )

    update_object(store, key, load, extended, PendingDeletes.to_bytes, always_create=True)


def list_pending_deletes(store: ObjectStore, adapter: str) -> Iterator[PendingDeletes]:
    """Yield the pending deletes of all jobs of the adapter.

    Raises:
        IntegrityError: An object is not readable.
    """
    prefix = f"forgotten/{check_adapter(adapter)}/"
    for key in store.list(prefix):
        name = key[len(prefix) :]
        if len(name) == _HASH_CHARS and "/" not in name:  # else it is of an adapter below this one
            found, _ = _load(store, key)
            if found is not None:  # None: the job was completed in the meantime
                yield found


def clear_pending_deletes(store: ObjectStore, adapter: str, job_id: str) -> None:
    """Remove the job's pending deletes."""
    store.delete(pending_deletes_key(adapter, job_id))


def _load(store: ObjectStore, key: str) -> tuple[PendingDeletes | None, str | None]:
    try:
        stored = store.get(key, MAX_PENDING_DELETES_BYTES)
    except NotFoundError:
        return None, None
    return parse_record(PendingDeletes, key, stored.data), stored.etag
