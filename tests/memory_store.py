"""An object store in memory that counts its calls, for tests of code that makes many of them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256

from perennial.storage.errors import ConflictError, NotFoundError
from perennial.storage.objects.keys import check_key, check_prefix
from perennial.storage.objects.object_store import MAX_OBJECT_BYTES, StoredObject, too_large


class MemoryStore:
    """Objects in a dictionary.

    Attributes:
        uri: Address of the store.
        calls: How often each method was called.
        written: How often each key was written.
    """

    def __init__(self) -> None:
        self.uri = "memory:"
        self.calls: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self._objects: dict[str, bytes] = {}
        self._keys: list[str] = []
        self._unsorted: list[str] = []

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See ObjectStore."""
        self.calls["put_if_absent"] += 1
        check_key(key)
        if key in self._objects:
            return False
        self._put(key, data)
        return True

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        """See ObjectStore."""
        self.calls["compare_and_swap"] += 1
        check_key(key)
        found = self._objects.get(key)
        if (None if found is None else _etag(found)) != expected:
            raise ConflictError(f"object {key} was changed by another writer", remedy="read it again")
        self._put(key, data)
        return _etag(data)

    def get(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> StoredObject:
        """See ObjectStore."""
        self.calls["get"] += 1
        check_key(key)
        if key not in self._objects:
            raise NotFoundError(f"no object {key}")
        data = self._objects[key]
        if len(data) > max_bytes:
            raise too_large(key, len(data), max_bytes)
        return StoredObject(data, _etag(data))

    def exists(self, key: str) -> bool:
        """See ObjectStore."""
        self.calls["exists"] += 1
        check_key(key)
        return key in self._objects

    def delete(self, key: str) -> bool:
        """See ObjectStore."""
        self.calls["delete"] += 1
        check_key(key)
        if key not in self._objects:
            return False
        del self._objects[key]
        return True

    def list(self, prefix: str, start_after: str = "") -> Iterator[str]:
        """See ObjectStore."""
        self.calls["list"] += 1
        check_prefix(prefix)
        if self._unsorted:  # sorted only now, so that a million objects are written in reasonable time
            self._keys = sorted({*self._keys, *self._unsorted} & self._objects.keys())
            self._unsorted = []
        keys = self._keys
        for at in range(bisect_left(keys, max(prefix, start_after)), len(keys)):
            key = keys[at]
            if not key.startswith(prefix):
                return
            if key > start_after and key in self._objects:
                yield key

    def probe(self) -> None:
        """See ObjectStore."""

    def _put(self, key: str, data: bytes) -> None:
        self.written[key] += 1
        if key not in self._objects:
            self._unsorted.append(key)
        self._objects[key] = data


def _etag(data: bytes) -> str:
    return sha256(data).hexdigest()
