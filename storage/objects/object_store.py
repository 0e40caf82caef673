"""The protocol of object stores, and content-addressed blobs.

>>> import tempfile
>>> from pathlib import Path
>>> from perennial.storage.objects.directory_store import DirectoryStore
>>> folder = tempfile.TemporaryDirectory()
>>> store = DirectoryStore(Path(folder.name))

Creating an object succeeds once, whoever is first:

>>> store.put_if_absent("aliases/acme/support/live", b"version 1")
True
>>> store.put_if_absent("aliases/acme/support/live", b"version 2")
False

Replacing one needs the etag of the bytes that are replaced:

>>> read = store.get("aliases/acme/support/live")
>>> etag = store.compare_and_swap("aliases/acme/support/live", b"version 2", read.etag)
>>> store.compare_and_swap("aliases/acme/support/live", b"version 3", read.etag)
Traceback (most recent call last):
    ...
perennial.storage.errors.ConflictError: object aliases/acme/support/live was changed by another writer; got: ...

A blob is named by its digest, which is checked when it is read:

>>> digest = put_blob(store, b"weights")
>>> get_blob(store, digest)
b'weights'
>>> list(store.list("aliases/"))
['aliases/acme/support/live']
>>> folder.cleanup()
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from perennial.storage.errors import ConflictError, IntegrityError, StoreError, StoreUnavailableError
from perennial.storage.objects.keys import blob_key, digest_of

MAX_OBJECT_BYTES = 1 << 30


@dataclass(frozen=True)
class StoredObject:
    """An object as it was read.

    Attributes:
        data: its bytes.
        etag: what a compare-and-swap expects.
        digest: digest of `data`, computed here; None if the store had no need to compute it. Never a server's claim.
    """

    data: bytes
    etag: str
    digest: str | None = None


class ObjectStore(Protocol):
    """Named objects that are created once or replaced atomically.

    Every call raises StoreError where the store refuses, and StoreUnavailableError where it does not answer and the
    same call may succeed later. Stores are safe to share among threads, processes and machines.

    Attributes:
        uri: address of the store.
    """

    uri: str

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create an object.

        Args:
            key: the object's key.
            data: its bytes.

        Returns:
            True if this call created the object; False if it existed, and then it is unchanged. A store may send a
            request again when its answer is lost; then False may mean that the first try stored these bytes.
        """
        ...

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        """Replace an object if nobody changed it since it was read.

        Equal bytes have equal etags, so data that may return to an earlier value must contain a nonce.

        Args:
            key: the object's key.
            data: the new bytes.
            expected: etag of the object to replace; None if it must not exist.

        Returns:
            The new etag.

        Raises:
            ConflictError: the object has another etag.
        """
        ...

    def get(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> StoredObject:
        """Return an object.

        Args:
            key: the object's key.
            max_bytes: the most bytes that are accepted.

        Raises:
            NotFoundError: there is no such object.
            StoreError: it is larger than `max_bytes`.
        """
        ...

    def exists(self, key: str) -> bool:
        """Return whether the object exists."""
        ...

    def delete(self, key: str) -> bool:
        """Remove an object and every stored version of it; return False if it did not exist."""
        ...

    def list(self, prefix: str, start_after: str = "") -> Iterator[str]:
        """Yield the full keys that begin with `prefix` and sort after `start_after`, sorted."""
        ...

    def probe(self) -> None:
        """Check with real writes that the store honours conditions.

        Raises:
            StoreError: it does not.
        """
        ...


def too_large(key: str, size_bytes: int, max_bytes: int) -> StoreError:
    """Return the error of a `get` whose object is larger than its bound."""
    return StoreError(
        f"object {key} is larger than its reader accepts",
        got=f"{size_bytes} bytes",
        allowed=f"{max_bytes} bytes",
        remedy="find out who wrote it; nothing of this project writes objects of this size",
    )


def put_blob(store: ObjectStore, data: bytes) -> str:
    """Store bytes under their digest and return it; storing the same bytes again changes nothing."""
    digest = digest_of(data)
    store.put_if_absent(blob_key(digest), data)
    return digest


def get_blob(store: ObjectStore, digest: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
    """Return the blob with that digest.

    Raises:
        NotFoundError: there is no such blob.
        IntegrityError: the stored bytes have another digest.
    """
    return get_verified(store, blob_key(digest), digest, max_bytes)


def get_verified(store: ObjectStore, key: str, digest: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
    """Return an object's bytes, digest verified.

    Args:
        store: the store.
        key: the object's key.
        digest: the digest that the bytes must have.
        max_bytes: the most bytes that are accepted.

    Raises:
        NotFoundError: there is no such object.
        IntegrityError: its bytes have another digest.
    """
    stored = store.get(key, max_bytes)
    data, found = stored.data, stored.digest or digest_of(stored.data)
    if found != digest:
        raise IntegrityError(
            f"object {key} does not hold the bytes that it is named after",
            got=f"{found} ({len(data)} bytes)",
            allowed=digest,
            remedy="restore the object from a copy, or delete it and publish again",
        )
    return data


def probe_conditional_writes(store: ObjectStore, remedy: str) -> None:
    """Write a probe object, then try to overwrite it under conditions that do not hold; `ObjectStore.probe` calls this.

    Args:
        store: the store to check.
        remedy: what the operator should do if the store ignores a condition.

    Raises:
        StoreError: the store ignored a condition.
    """
    key = f"probe/{secrets.token_hex(16)}"

    def refuse(what: str) -> StoreError:
        return StoreError(f"{store.uri}: {what}", allowed="a store that honours conditional writes", remedy=remedy)

    try:
        if not store.put_if_absent(key, b"1"):
            raise refuse("the store reports an object that nobody wrote")
        if store.put_if_absent(key, b"2") or store.get(key).data != b"1":
            raise refuse("create-if-absent overwrote an object")
        first = store.get(key).etag
        second = store.compare_and_swap(key, b"3", first)
        for stale in (first, None):
            try:
                store.compare_and_swap(key, b"4", stale)
            except ConflictError:
                continue
            raise refuse("compare-and-swap replaced an object that had changed")
        found = store.get(key)
        if (found.data, found.etag) != (b"3", second):
            raise refuse("compare-and-swap lost what it wrote")
    finally:
        with contextlib.suppress(StoreUnavailableError):
            store.delete(key)
    if store.exists(key):
        raise refuse("a deleted object is still there")
