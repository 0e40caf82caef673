"""Look up which examples were refused after intake had accepted them, so that they can be published again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cachetools import TTLCache

from perennial.storage.errors import IntegrityError, StoreError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.refused_examples import load_refused_examples

log = logging.getLogger("perennial.intake")

CACHED_S = 10.0
"""How long a list is used; far below validation.REFUSED_BEFORE_MS, so that a late list changes no decision."""
_MAX_ADAPTERS = 1_000
_RETRY_FOR_S = 20.0
_RETRY_WAIT_S = 1.0


class RefusedExamplesLookup:
    """Return when an example was refused last. The lists are read from the store, one adapter at a time, and cached.

    Thread-safe: curate asks from several threads.

    Args:
        store: The object store.
        clock: A monotonic clock in seconds.
        sleep: Waits a number of seconds.
    """

    def __init__(
        self,
        store: ObjectStore,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sleep = sleep
        self._lists: TTLCache[str, dict[str, int]] = TTLCache(_MAX_ADAPTERS, CACHED_S, timer=clock)
        self._lock = threading.Lock()  # cachetools is not thread-safe

    def __call__(self, adapter: str, example_id: str) -> int | None:
        """Return when the example was refused last, in ms since the epoch; None if it was not.

        Raises:
            StoreError: The store does not answer within 20 s. Without it, a duplicate cannot be told from an
                example that must be learned after all.
        """
        with self._lock:
            found = self._lists.get(adapter)
        if found is None:
            found = self._load(adapter)
            with self._lock:
                self._lists[adapter] = found
        return found.get(example_id)

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
