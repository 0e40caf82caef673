"""Training states in memory, shared by the lanes of a learner."""

from __future__ import annotations

import threading
from collections.abc import Collection

from cachetools import LRUCache

from perennial.learner.training.state import StateRefs, TrainingState

CACHED_STATES = 16


class StateCache:
    """The states used last, by their blobs. Thread-safe.

    Args:
        size: how many states are kept.
    """

    def __init__(self, size: int = CACHED_STATES) -> None:
        self._states: LRUCache[StateRefs, TrainingState] = LRUCache(size)
        self._lock = threading.Lock()  # cachetools is not thread-safe

    def get(self, refs: StateRefs) -> TrainingState | None:
        """Return a state; None if it is not in memory."""
        with self._lock:
            return self._states.get(refs)

    def put(self, refs: StateRefs, state: TrainingState) -> None:
        """Keep a state; the least recently used one makes room."""
        with self._lock:
            self._states[refs] = state

    def drop(self, digests: Collection[str]) -> None:
        """Remove every state that was read from one of these blobs."""
        deleted = set(digests)
        with self._lock:
            for refs in [refs for refs in self._states if not deleted.isdisjoint(refs.digests())]:
                del self._states[refs]
