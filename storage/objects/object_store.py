"""Objects: the store protocol and content-addressed blobs."""

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
    """An object's bytes, and the etag that a compare-and-swap expects.

    digest: of these very bytes, where the store had to compute it anyway; never what a server claims.
    """

    data: bytes
    etag: str
    digest: str | None = None


class ObjectStore(Protocol):
    """Named objects, immutable or atomically replaced; calls may raise StoreError, StoreUnavailableError."""

    uri: str

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create the object: True where this call created it, False where it existed and is untouched.

        After an answer that was lost on the way, False may also mean that this call's own bytes are stored.
        """
        ...

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        """Replace the object of etag `expected` (None: it must not exist); the new etag, or ConflictError.

        Equal bytes have equal etags, so data that may come back to an earlier value needs a nonce in it.
        """
        ...

    def get(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> StoredObject:
        """The object. Raises NotFoundError; StoreError where it has more than `max_bytes`."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        ...

    def delete(self, key: str) -> bool:
        """Remove the object and every stored version of it; False where it was not there."""
        ...

    def list(self, prefix: str, start_after: str = "") -> Iterator[str]:
        """The full keys that begin with `prefix` and sort after `start_after`, sorted."""
        ...

    def probe(self) -> None:
        """Check with real writes that conditions hold; StoreError with a remedy where they do not."""
        ...


def too_large(key: str, size_bytes: int, max_bytes: int) -> StoreError:
    """The error of a `get` whose object is over the bound."""
    return StoreError(
        f"object {key} is larger than its reader accepts",
        got=f"{size_bytes} bytes",
        allowed=f"{max_bytes} bytes",
        remedy="find out who wrote it; nothing of this project writes objects of this size",
    )


def put_blob(store: ObjectStore, data: bytes) -> str:
    """Store bytes under their own digest, which is returned; storing them again changes nothing."""
    digest = digest_of(data)
    store.put_if_absent(blob_key(digest), data)
    return digest


def get_blob(store: ObjectStore, digest: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
    """The bytes of that digest. Raises NotFoundError; IntegrityError where the stored bytes are others."""
    return get_verified(store, blob_key(digest), digest, max_bytes)


def get_verified(store: ObjectStore, key: str, digest: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
    """The object's bytes if they have that digest. Raises NotFoundError, IntegrityError."""
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
    """Write, and try to overwrite, a probe object; StoreError with `remedy` where a condition was ignored."""
    key = f"probe/{secrets.token_hex(16)}"

    def refuse(what: str) -> StoreError:
        return StoreError(f"{store.uri}: {what}", allowed="a store that honours conditional writes", remedy=remedy)

    try:
        if not store.put_if_absent(key, b"1"):
            raise refuse("an object that nobody wrote is said to exist")
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
