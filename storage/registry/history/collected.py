"""The versions whose weights were deleted to save space, and the versions that a rollback is about to take over.

The manifests of collected versions stay, and so do their sequence numbers. Nothing may start from their state: no
rollback and no rebuild.

A rollback takes over an old version's blobs while a collection may delete them. So the rollback pins the version, then
looks whether it is collected; the collection marks the versions, then looks which are pinned. Whichever comes second
sees what the other wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from hashlib import sha256

from pydantic import Field

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.compare_and_swap import update_object
from perennial.storage.registry.manifest import AdapterName, Digest
from perennial.storage.registry.records import MAX_RECORD_BYTES, RegistryRecord, check_adapter, parse_record

_MAX_BYTES = 256 << 20


class CollectedVersions(RegistryRecord):
    """The collected versions of an adapter.

    Attributes:
        adapter: the adapter.
        revision: grows with every change.
        versions: versions whose blobs are deleted.
        deleting: versions whose blobs are being deleted; a collection that was interrupted goes on with them.
    """

    adapter: AdapterName
    revision: int = 0
    versions: list[Digest] = Field(default_factory=list)
    deleting: list[Digest] = Field(default_factory=list)

    @property
    def all(self) -> frozenset[str]:
        """Every version that nothing may start from."""
        return frozenset(self.versions).union(self.deleting)


class Pin(RegistryRecord):
    """A version that a rollback is about to take over.

    Attributes:
        adapter: the adapter.
        version: the version.
    """

    adapter: AdapterName
    version: Digest


def load_collected(store: ObjectStore, adapter: str) -> CollectedVersions:
    """Return the adapter's collected versions; none where nothing was ever collected.

    Raises:
        IntegrityError: the object is not readable.
    """
    return _load(store, adapter)[0]


def mark_collected(store: ObjectStore, adapter: str, versions: Collection[str]) -> CollectedVersions:
    """Record that nothing may start from these versions, before their blobs are deleted.

    Raises:
        ConflictError: other writers were first at every attempt.
    """

    def marked(found: CollectedVersions) -> CollectedVersions:
        new = set(versions) - found.all
        return _changed(found, found.versions, sorted({*found.deleting, *new})) if new else found

    return _update(store, adapter, marked)


def settle_collected(
    store: ObjectStore, adapter: str, deleted: Collection[str], unmarked: Collection[str]
) -> CollectedVersions:
    """Record which marked versions have no blobs any more, and which keep theirs after all.

    Args:
        store: the store.
        adapter: the adapter.
        deleted: versions whose blobs are deleted.
        unmarked: versions that turned out to be needed.

    Raises:
        ConflictError: other writers were first at every attempt.
    """

    def settled(found: CollectedVersions) -> CollectedVersions:
        deleting = [v for v in found.deleting if v not in deleted and v not in unmarked]
        versions = sorted({*found.versions, *(v for v in found.deleting if v in deleted and v not in unmarked)})
        return found if deleting == found.deleting else _changed(found, versions, deleting)

    return _update(store, adapter, settled)


@contextmanager
def pinned(store: ObjectStore, adapter: str, version: str, job_id: str) -> Iterator[bool]:
    """Keep a version's blobs while a rollback takes them over.

    Args:
        store: the store.
        adapter: the adapter.
        version: the version.
        job_id: the rollback; run again after a crash it takes its pin away.

    Yields:
        Whether the version has its blobs; if not, it must not be taken over.
    """
    key = f"{_pins(adapter)}{sha256(f'{job_id} {version}'.encode()).hexdigest()}"
    store.put_if_absent(key, Pin(adapter=adapter, version=version).to_bytes())
    try:
        yield version not in load_collected(store, adapter).all
    finally:
        store.delete(key)


def load_pins(store: ObjectStore, adapter: str) -> set[str]:
    """Return the versions that rollbacks are about to take over."""
    folder, found = _pins(adapter), set()
    for key in list(store.list(folder)):
        if "/" not in key[len(folder) :]:  # else it is of an adapter below this one
            try:
                found.add(parse_record(Pin, key, store.get(key, MAX_RECORD_BYTES).data).version)
            except NotFoundError:  # the rollback ended
                continue
    return found


def _pins(adapter: str) -> str:
    return f"pins/{check_adapter(adapter)}/"


def _key(adapter: str) -> str:
    return f"collected/{check_adapter(adapter)}"


def _changed(found: CollectedVersions, versions: list[str], deleting: list[str]) -> CollectedVersions:
    return found.model_copy(update={"revision": found.revision + 1, "versions": versions, "deleting": deleting})


def _update(
    store: ObjectStore, adapter: str, change: Callable[[CollectedVersions], CollectedVersions]
) -> CollectedVersions:
    return update_object(store, _key(adapter), lambda: _load(store, adapter), change, CollectedVersions.to_bytes)


def _load(store: ObjectStore, adapter: str) -> tuple[CollectedVersions, str | None]:
    key = _key(adapter)
    try:
        stored = store.get(key, _MAX_BYTES)
    except NotFoundError:
        return CollectedVersions(adapter=adapter), None
    return parse_record(CollectedVersions, key, stored.data), stored.etag
