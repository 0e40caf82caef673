"""Look up which examples were refused after intake had accepted them, so that they can be published again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from cachetools import TTLCache

from perennial.storage.errors import IntegrityError, StoreError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.refused_examples import load_refused_examples

log = logging.getLogger("perennial.intake")

CACHED_S = 10.0
"""How long a list is used at most. For a record that is younger than the list, it is read again at once."""
_AHEAD_MS = 250
"""Age in ms that a list may have for a record whose time is not reached yet, by this machine's clock."""
_MAX_ADAPTERS = 1_000
_RETRY_FOR_S = 20.0
_RETRY_WAIT_S = 1.0


class _List(NamedTuple):
    read_ms: int
    refused_ms: dict[str, int]


class RefusedExamplesLookup:
    """Return when an example was refused last. The lists are read from the store, one adapter at a time, and cached.

    An example may be published again at the moment its forgetting ends. So a list counts only for records that were
    published before it was read. Of records that are read together, at most the first one of an adapter costs a read.

    Thread-safe: curate asks from several threads.

    Args:
        store: The object store.
        clock: A monotonic clock in seconds.
        sleep: Waits a number of seconds.
        now_s: The wall clock, in seconds since the epoch.
    """

    def __init__(
        self,
        store: ObjectStore,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sleep = sleep
        self._now_s = now_s
        self._lists: TTLCache[str, _List] = TTLCache(_MAX_ADAPTERS, CACHED_S, timer=clock)
        self._lock = threading.Lock()  # cachetools is not thread-safe

    def __call__(self, adapter: str, example_id: str, at_ms: int) -> int | None:
        """Return when the example was refused last, in ms since the epoch; None if it was not.

        Args:
            adapter: The adapter.
            example_id: The example.
            at_ms: When its record was published, in ms since the epoch: a list that was read before is read again.

        Raises:
            StoreError: The store does not answer within 20 s. Without it, a duplicate cannot be told from an
                example that must be learned after all.
        """
        now_ms = int(self._now_s() * 1000)
        with self._lock:
            found = self._lists.get(adapter)
        if found is None or found.read_ms <= (at_ms if at_ms <= now_ms else now_ms - _AHEAD_MS):
            found = _List(now_ms, self._load(adapter))
            with self._lock:
                self._lists[adapter] = found
        return found.refused_ms.get(example_id)

    def _load(self, adapter: str) -> dict[str, int]:
        deadline_s = self._clock() + _RETRY_FOR_S
        while True:
            try:
                return load_refused_examples(self._store, adapter)
            except IntegrityError:  # no retry helps; a duplicate must not stop the flow of all adapters
                log.exception(
                    "refused/%s is unreadable: refused examples count as duplicates until it is restored", adapter
                )
                return {}
            except StoreError as error:
                if self._clock() > deadline_s:
                    raise
                log.warning("the refused examples of %s cannot be read, trying again: %s", adapter, error)
                self._sleep(_RETRY_WAIT_S)
