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
from perennial.storage.registry.records import Record, check_adapter, parse

MAX_TOMBSTONE_BYTES = 64 << 20
_ATTEMPTS = 64
_HASH_CHARS = 64


class Tombstone(Record):
    """Blobs to delete unless something that stands needs them.

    requests: examples found, by retention request. refused: the job never will be done, and what it names is here so
    that a forgetting finds it.
    """

    adapter: AdapterName
    job_id: Annotated[str, Field(min_length=1, max_length=1024)]
    requests: dict[str, int] = Field(default_factory=dict)
    digests: list[Digest] = Field(default_factory=list)
    refused: bool = False


def tombstone_key(adapter: str, job_id: str) -> str:
    """Where a job's tombstone lies."""
    return f"forgotten/{check_adapter(adapter)}/{sha256(job_id.encode()).hexdigest()}"


def load_tombstone(store: ObjectStore, adapter: str, job_id: str) -> Tombstone | None:
    """The job's tombstone, None where there is none."""
    key = tombstone_key(adapter, job_id)
    try:
        return parse(Tombstone, key, store.get(key, MAX_TOMBSTONE_BYTES).data)
    except NotFoundError:
        return None


def extend_tombstone(
    store: ObjectStore,
    adapter: str,
    job_id: str,
    digests: Iterable[str],
    requests: Mapping[str, int] | None = None,
    *,
    refused: bool = False,
) -> None:
    """Add to the job's tombstone; once refused it stays so. Raises ConflictError where other writers keep coming first."""
    key, digests = tombstone_key(adapter, job_id), set(digests)
    for _ in range(_ATTEMPTS):
        found, etag = Tombstone(adapter=adapter, job_id=job_id), None
        try:
            stored = store.get(key, MAX_TOMBSTONE_BYTES)
            found, etag = parse(Tombstone, key, stored.data), stored.etag
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


def tombstones(store: ObjectStore, adapter: str) -> Iterator[Tombstone]:
    """All tombstones of the adapter."""
    above = f"forgotten/{check_adapter(adapter)}/"
    for key in store.list(above):
        name = key[len(above) :]
        if len(name) == _HASH_CHARS and "/" not in name:
            try:
                yield parse(Tombstone, key, store.get(key, MAX_TOMBSTONE_BYTES).data)
            except NotFoundError:  # its job came to an end meanwhile
                continue


def lift_tombstone(store: ObjectStore, adapter: str, job_id: str) -> None:
    """Remove the job's tombstone."""
    store.delete(tombstone_key(adapter, job_id))
