"""Delete orphans: blobs that processes left when they crashed, and that nothing refers to.

Stores disagree about the age of an object. So a first run records which blobs nothing refers to, and a later run deletes
those of them that still nothing refers to. The time between the two must be longer than any job that may refer to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated

from pydantic import AwareDatetime, Field

from perennial.learner.forgetting.collect_versions import referenced_blobs
from perennial.storage.errors import NotFoundError
from perennial.storage.objects.keys import hex_of
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.records import RegistryRecord, parse_record
from perennial.storage.registry.registry import Registry

MAX_ORPHANS = 100_000
"""The most blobs that one run writes down; the next run goes on."""
_KEY = "orphans"
_MAX_BYTES = 64 << 20
_BLOBS = "blobs/sha256/"
_ADAPTERS_IN = ("adapters/", "jobs/", "forgotten/", "rebuilds/", "state/curate/")


class Orphans(RegistryRecord):
    """Blobs that nothing named when they were last looked for.

    Attributes:
        seen: when each was first seen so, by the hex digits of its digest.
    """

    seen: dict[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], AwareDatetime] = Field(default_factory=dict)


@dataclass(frozen=True)
class OrphanReport:
    """The outcome of a look for orphans.

    Attributes:
        blobs: blobs in the store.
        waiting: blobs that nothing names, but not for long enough.
        deleted: blobs that were deleted, or would be.
    """

    blobs: int
    waiting: int
    deleted: int


def collect_orphans(registry: Registry, now: datetime, min_age: timedelta, *, dry_run: bool = False) -> OrphanReport:
    """Delete the blobs that nothing has named for the least age; write down the others that nothing names.

    Args:
        registry: all adapters' versions.
        now: the time.
        min_age: how long nothing must have named a blob.
        dry_run: only report; nothing is written down either.

    Raises:
        StoreError: the store failed, or an object is not readable: nothing was deleted then, because it may name blobs.
        ConflictError: another process looks for orphans at the same time.
    """
    store = registry.store
    orphans, etag = _load(store)
    stored = {key[len(_BLOBS) :] for key in store.list(_BLOBS)}  # before what names them
    unnamed = stored - _named(registry)
    due = sorted(name for name in unnamed if name in orphans.seen and now - orphans.seen[name] >= min_age)
    if not dry_run:
        # The newest names again: a job that was sent again after a crash may have named one of them.
        if due:
            due = sorted(set(due) - _named(registry))
        for name in due:
            store.delete(_BLOBS + name)
        left = sorted(unnamed.difference(due), key=lambda name: (name not in orphans.seen, name))[:MAX_ORPHANS]
        record = Orphans(seen={name: orphans.seen.get(name, now) for name in left})
        if record != orphans:
            store.compare_and_swap(_KEY, record.to_bytes(), etag)
    return OrphanReport(len(stored), len(unnamed) - len(due), len(due))


def _named(registry: Registry) -> set[str]:
    return {hex_of(digest) for adapter in _adapters(registry.store) for digest in referenced_blobs(registry, adapter)}


def _adapters(store: ObjectStore) -> Iterable[str]:
    """Return every adapter that anything in the store belongs to; their names end where a key's last segment begins."""
    found: set[str] = set()
    for folder in _ADAPTERS_IN:
        for key in store.list(folder):
            name = key[len(folder) :]
            found.add(name if folder in {"adapters/", "state/curate/"} else name.rpartition("/")[0])
    return sorted(found)


def _load(store: ObjectStore) -> tuple[Orphans, str | None]:
    try:
        stored = store.get(_KEY, _MAX_BYTES)
    except NotFoundError:
        return Orphans(), None
    return parse_record(Orphans, _KEY, stored.data), stored.etag
