"""Find the replicas whose last record names a revoked version, and count replicas by state for the metrics."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, Final

from perennial.storage.errors import StoreError
from perennial.storage.registry.registry import Registry
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.observe.metrics import Metrics
from perennial.streams.replicas.replica_status import REPLICA_STATES, ReplicaStatus

_log = logging.getLogger("perennial.replicas")

EVERY_S: Final = 60.0


class ReplicaWatch:
    """Looks at all replicas once a minute. Not thread-safe.

    Args:
        acks: An `AckReader` of its own.
        registry: The registry.
        metrics: Where the counts go.
        clock: Monotonic clock in seconds.
        wall_ms: The wall clock, in milliseconds since 1970.
    """

    def __init__(
        self,
        acks: Any,
        registry: Registry,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._acks = acks
        self._registry = registry
        self._metrics = metrics
        self._clock = clock
        self._wall_ms = wall_ms
        self._due_s = 0.0

    def tick(self) -> None:
        """Count the replicas, at most once in EVERY_S seconds."""
        if self._clock() < self._due_s:
            return
        self._due_s = self._clock() + EVERY_S
        try:
            statuses = self._acks.replicas(None, None)
            now_ms = self._wall_ms()
            states = Counter(status.state(now_ms) for status in statuses)
            revoked = Counter[str](status.state(now_ms) for status in serving_revoked(self._registry, statuses))
            self._metrics.replicas({state: states[state] for state in REPLICA_STATES}, revoked)
        except KafkaUnavailableError as error:
            _log.warning("%s", error)
        except StoreError as error:
            self._metrics.store_error("revocations")
            _log.warning("the replicas cannot be compared with the revocations: %s", error)


def serving_revoked(registry: Registry, statuses: Iterable[ReplicaStatus]) -> list[ReplicaStatus]:
    """Return the replicas whose last record names a revoked version.

    Args:
        registry: The registry.
        statuses: Replicas, sorted by adapter.

    Raises:
        StoreError: The store does not answer.
    """
    found: list[ReplicaStatus] = []
    for adapter, group in groupby(statuses, key=lambda status: status.adapter):
        replicas = list(group)
        live = {alias.alias: alias.version for alias in registry.aliases(adapter)}
        others = [status for status in replicas if status.version and live.get(status.alias) != status.version]
        if others:
            revoked = {revocation.version for revocation in registry.revocations(adapter)}
            found += [status for status in others if status.version in revoked]
    return found
