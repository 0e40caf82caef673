"""The blobs that a job will delete: written before the job changes anything, removed when the job is complete.

One object per adapter and job, `forgotten/<adapter>/<hash of the job id>`. It names blobs by digest and holds no text.
Once it names `MAX_PAGE_HASHES` blobs, they move to an immutable page (see `hash_pages`), whose key is that of the
object, `=` and the page's name; so each write stays small however many blobs a job deletes. A process that finishes the
job after a crash reads here what to delete, including blobs of an earlier attempt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Annotated

from pydantic import Field

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.hash_pages import MAX_PAGE_HASHES, load_page, write_page
from perennial.storage.objects.keys import hex_of
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.compare_and_swap import update_object
from perennial.storage.registry.manifest import AdapterName, Digest
from perennial.storage.registry.records import RegistryRecord, check_adapter, parse_record

MAX_PENDING_DELETES_BYTES = 64 << 20
_HASH_CHARS = 64
_PAGE = "="


class PendingDeletes(RegistryRecord):
    """Blobs of one job to delete, unless a manifest that stays needs them.

    Attributes:
        adapter: The adapter.
        job_id: The job.
        requests: The number of examples found, by retention request.
        digests: The blobs; in the stored object those that are in no page yet.
        refused: The job will never be carried out. Its blobs stay until a forgetting finds texts in them to delete.
        pages: What the keys of the pages have after that of the object.
    """

    adapter: AdapterName
    job_id: Annotated[str, Field(min_length=1, max_length=1024)]
    requests: dict[str, int] = Field(default_factory=dict)
    digests: list[Digest] = Field(default_factory=list)
    refused: bool = False
    pages: list[str] = Field(default_factory=list)


def pending_deletes_key(adapter: str, job_id: str) -> str:
    """Return the key of a job's pending deletes."""
    return f"forgotten/{check_adapter(adapter)}/{sha256(job_id.encode()).hexdigest()}"


def load_pending_deletes(store: ObjectStore, adapter: str, job_id: str) -> PendingDeletes | None:
    """Return the job's pending deletes with the blobs of all pages; None where there are none.

    Raises:
        IntegrityError: The object or a page is not readable.
    """
    key = pending_deletes_key(adapter, job_id)
    found, _ = _load(store, key)
    return None if found is None else _with_pages(store, key, found)


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
        digests = sorted({*found.digests, *(added - _paged(store, key, found))})
        pages = list(found.pages)
        while len(digests) >= MAX_PAGE_HASHES:
            page, digests = digests[:MAX_PAGE_HASHES], digests[MAX_PAGE_HASHES:]
            pages.append(write_page(store, key + _PAGE, map(hex_of, page))[len(key) :])
        return found.model_copy(
            update={
                "requests": counts,
                "digests": digests,
                "refused": refused or found.refused,
                "pages": pages,
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
                try:
                    yield _with_pages(store, key, found)
                except NotFoundError:
                    if store.exists(key):
                        raise


def clear_pending_deletes(store: ObjectStore, adapter: str, job_id: str) -> None:
    """Remove the job's pending deletes, pages that an interrupted writer left included."""
    key = pending_deletes_key(adapter, job_id)
    store.delete(key)
    for page in list(store.list(key + _PAGE)):
        store.delete(page)


def _with_pages(store: ObjectStore, key: str, found: PendingDeletes) -> PendingDeletes:
    if not found.pages:
        return found
    return found.model_copy(update={"digests": sorted({*found.digests, *_paged(store, key, found)}), "pages": []})


def _paged(store: ObjectStore, key: str, found: PendingDeletes) -> set[str]:
    """Return the digests that are in pages."""
    return {f"sha256:{name}" for page in found.pages for name in load_page(store, key + page)}


def _load(store: ObjectStore, key: str) -> tuple[PendingDeletes | None, str | None]:
    try:
        stored = store.get(key, MAX_PENDING_DELETES_BYTES)
    except NotFoundError:
        return None, None
    return parse_record(PendingDeletes, key, stored.data), stored.etag
