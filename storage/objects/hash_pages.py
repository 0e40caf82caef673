"""Pages: immutable objects that each hold a set of hashes, so that a long set is never read or written as a whole.

A page's key ends with a part of its digest, so equal sets have equal keys, and a page that is read is verified. Pages
never change; a process keeps the pages that it read last in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from cachetools import LRUCache

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.keys import digest_of, hex_of
from perennial.storage.objects.object_store import ObjectStore

MAX_PAGE_HASHES = 4096
"""Most hashes of one page; a page of 64-digit hashes then takes about 270 kB."""
_MAX_PAGE_BYTES = 1 << 20
_NAME_CHARS = 32
_CACHED_PAGES = 64
_pages: LRUCache[tuple[str, str], frozenset[str]] = LRUCache(_CACHED_PAGES)
_pages_lock = threading.Lock()


def write_page(store: ObjectStore, prefix: str, hashes: Iterable[str]) -> str:
    """Store a page and return its key.

    Args:
        store: The store.
        prefix: What the key begins with.
        hashes: The page's hashes: lower-case hex digits, at most `MAX_PAGE_HASHES`.
    """
    found = frozenset(hashes)
    body = "\n".join(sorted(found)).encode()
    key = prefix + hex_of(digest_of(body))[:_NAME_CHARS]
    store.put_if_absent(key, body)
    with _pages_lock:
        _pages[store.uri, key] = found
    return key


def load_page(store: ObjectStore, key: str) -> frozenset[str]:
    """Return a page's hashes.

    Raises:
        NotFoundError: There is no such page.
        IntegrityError: The object is not the page that it is named after.
    """
    with _pages_lock:
        cached = _pages.get((store.uri, key))
    if cached is not None:
        return cached
    data = store.get(key, _MAX_PAGE_BYTES).data
    if not key.endswith(hex_of(digest_of(data))[:_NAME_CHARS]):
        raise IntegrityError(
            f"page {key} does not hold the bytes that it is named after", got=f"{len(data)} bytes",
            remedy="restore the object from a copy: without it, forgotten texts could be learned again",
        )  # fmt: skip
    found = frozenset(data.decode().split("\n")) if data else frozenset()
    with _pages_lock:
        _pages[store.uri, key] = found
    return found
