"""Remove requests that ended long ago, and their quarantine entries, in slices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Final

from perennial.streams.retain.request_cache import RequestCache
from perennial.streams.retain.request_store import RequestStore, indexes_of
from perennial.streams.retain.rules.jobs import QuarantineChange
from perennial.streams.retain.work_slice import SLICE_ADAPTERS, Slice
from perennial.streams.retention.kinds import KINDS

PRUNE_EVERY_S: Final = 60.0
PRUNE_AT_ONCE: Final = 500
"""Ended requests that one tick removes at most."""


class EndedRequests:
    """Removes requests that ended long ago. Not thread-safe.

    Args:
        store: Where the requests are stored.
        cache: The requests that something can still change.
    """

    def __init__(self, store: RequestStore, cache: RequestCache) -> None:
        self._store = store
        self._cache = cache
        self._pruned_s = float("-inf")

    def prune(self, now_ms: int) -> Iterator[Slice]:
        """Remove requests whose time has come, at most once a minute; a forgetting that failed stays for a person to see to.

        Args:
            now_ms: The guarded time, in milliseconds since 1970.
        """
        if time.monotonic() - self._pruned_s < PRUNE_EVERY_S:
            return
        self._pruned_s = time.monotonic()
        for entry in list(islice(self._store.to_remove(now_ms), PRUNE_AT_ONCE)):
            index, _, name = entry.rpartition("/")
            found = self._cache.load(name)
            if found is None or index not in indexes_of(found.record):
                self._store.delete_entry(entry)
                continue
            record = found.record
            if KINDS[record.request.kind].job == "forget":
                adapters = [*record.adapters, *(a for page in self._store.pages(name) for a in page)]
                drop = (record.request.request_id,)
                for start in range(0, len(adapters), SLICE_ADAPTERS):
                    yield Slice([QuarantineChange(a, drop=drop) for a in adapters[start : start + SLICE_ADAPTERS]])
            yield Slice(saves=[partial(self._cache.remove, record)])
