"""What a job will have left behind when it is through: written before the job changes anything, removed at its end.

One object per adapter and job, `forgotten/<adapter>/<hash of the job id>`. It names blobs by digest and holds no
text, so that whoever finishes the job after a crash knows what to delete, also what a first attempt had made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Annotated

from pydantic import Field

from perennial.storage.errors import ConflictError, NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import AdapterName, Digest
from perennial.storage.registry.records import RegistryRecord, check_adapter, parse_record

MAX_PENDING_DELETES_BYTES = 64 << 20
_ATTEMPTS = 64
_HASH_CHARS = 64


class PendingDeletes(RegistryRecord):
    """Blobs to delete unless something that stands needs them.

    requests: examples found, by retention request. refused: the job never will be done, and what it names is here so
    that a forgetting finds it.
    """

    adapter: AdapterName
    job_id: Annotated[str, Field(min_length=1, max_length=1024)]
    requests: dict[str, int] = Field(default_factory=dict)
    digests: list[Digest] = Field(default_factory=list)
    refused: bool = False


def pending_deletes_key(adapter: str, job_id: str) -> str:
    """Where a job's tombstone lies."""
    return f"forgotten/{check_adapter(adapter)}/{sha256(job_id.encode()).hexdigest()}"


def load_pending_deletes(store: ObjectStore, adapter: str, job_id: str) -> PendingDeletes | None:
    """The job's tombstone, None where there is none."""
    key = pending_deletes_key(adapter, job_id)
    try:
        return parse_record(PendingDeletes, key, store.get(key, MAX_PENDING_DELETES_BYTES).data)
    except NotFoundError:
        return None


def record_pending_deletes(
    store: ObjectStore,
    adapter: str,
    job_id: str,
    digests: Iterable[str],
    requests: Mapping[str, int] | None = None,
    *,
    refused: bool = False,
) -> None:
    """Add to the job's tombstone; once refused it stays so. Raises ConflictError where other writers keep coming first."""
    key, digests = pending_deletes_key(adapter, job_id), set(digests)
    for _ in range(_ATTEMPTS):
        found, etag = PendingDeletes(adapter=adapter, job_id=job_id), None
        try:
            stored = store.get(key, MAX_PENDING_DELETES_BYTES)
            found, etag = parse_record(PendingDeletes, key, stored.data), stored.etag
        except NotFoundError:
            pass
        counts = dict(found.requests)
        for request_id, count in (requests or {}).items():
            counts[request_id] = max(count, counts.get(request_id, 0))
        wanted = found.model_copy(
            update={
                "requests": counts, "digests": sorted({*found.digests, *digests}), "refused": refused or found.refused
            }
        )  # fmt: skip
        if etag is not None and wanted == found:
            return
        try:
            store.compare_and_swap(key, wanted.to_bytes(), etag)
        except ConflictError:
            continue
        return
    raise ConflictError(f"too many writers change {key}", remedy="do it again")


def list_pending_deletes(store: ObjectStore, adapter: str) -> Iterator[PendingDeletes]:
    """All tombstones of the adapter."""
    above = f"forgotten/{check_adapter(adapter)}/"
    for key in store.list(above):
        name = key[len(above) :]
        if len(name) == _HASH_CHARS and "/" not in name:
            try:
                yield parse_record(PendingDeletes, key, store.get(key, MAX_PENDING_DELETES_BYTES).data)
            except NotFoundError:  # its job came to an end meanwhile
                continue


def clear_pending_deletes(store: ObjectStore, adapter: str, job_id: str) -> None:
    """Remove the job's tombstone."""
    store.delete(pending_deletes_key(adapter, job_id))
