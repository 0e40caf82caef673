"""The state of a replica, as its latest record on the compacted topic `adapter-acks` gives it. Pure.

A replica is alive while its lease lasts: for `lease_s` seconds after the broker stored its latest record. It sends that
record again every third of the lease. A replica that closes says so (`replica.left`); one that is killed says nothing,
and its lease ends.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed, ReplicaLeft
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.event_signatures import check_event

Report: TypeAlias = AdapterActivated | AdapterFailed | ReplicaLeft
ReplicaState: TypeAlias = Literal["serving", "failing", "expired", "left"]
REPLICA_STATES: Final[tuple[ReplicaState, ...]] = ("serving", "failing", "expired", "left")

_log = logging.getLogger("perennial.replicas")

_TOPIC: Final = AdapterActivated.topic
_LOG_APPEND_TIME: Final = 1

UNLEASED_S: Final = 24 * 3600
"""How long a record without a lease counts as alive: subscribers of 0.1 send none again, whether they run or not."""
MAX_GRACE_S: Final = 300
"""The longest grace that a lease gets after the reader connected."""
KEPT_S: Final = 24 * 3600
"""How long a record is kept after its lease ended or its replica left. `AckReader.prune` deletes older ones."""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What is known of one replica of an adapter.

    Attributes:
        adapter: The adapter.
        alias: The alias that the replica follows.
        replica: The replica's name.
        generation: The alias's generation that its latest record names: activated, failed, or served when it left.
        version: The version that the record names; None: it left and served none.
        failed: The record is a failure, so nobody knows which version it serves.
        lease_expires_ms: When its lease ends or ended, in milliseconds since 1970; None: it left.
        left: It said that it has stopped.
        stored_ms: When its latest record was stored, in milliseconds since 1970.
        error: Why it failed; empty where it did not.
    """

    adapter: str
    alias: str
    replica: str
    generation: int
    version: str | None
    failed: bool
    lease_expires_ms: int | None
    left: bool
    stored_ms: int
    error: str = ""

    def state(self, now_ms: int) -> ReplicaState:
        """Return the replica's state.

        Args:
            now_ms: The wall clock, in milliseconds since 1970.
        """
        if self.left:
            return "left"
        if self.lease_expires_ms is not None and self.lease_expires_ms <= now_ms:
            return "expired"
        return "failing" if self.failed else "serving"

    def with_grace(self, connected_ms: int) -> ReplicaStatus:
        """Return the status with a lease that does not end before the replica had the time for one more record.

        While the broker is down no replica can renew its lease. After that the leases would seem to have ended, before
        the first heartbeats come.

        Args:
            connected_ms: When the reader connected to the broker, in milliseconds since 1970.
        """
        if self.lease_expires_ms is None:
            return self
        grace_ms = min(self.lease_expires_ms - self.stored_ms, MAX_GRACE_S * 1000)
        return replace(self, lease_expires_ms=max(self.lease_expires_ms, connected_ms + grace_ms))

    def is_outdated(self, now_ms: int) -> bool:
        """Return whether the record may be deleted: KEPT_S have passed since the lease ended or the replica left.

        Args:
            now_ms: The wall clock, in milliseconds since 1970.
        """
        ended_ms = self.stored_ms if self.lease_expires_ms is None else self.lease_expires_ms
        return ended_ms + KEPT_S * 1000 <= now_ms


def replica_status(report: Report, stored_ms: int) -> ReplicaStatus:
    """Return the status that a record gives.

    Args:
        report: The record's event.
        stored_ms: When the broker stored it, in milliseconds since 1970.
    """
    lease_s = 0.0 if isinstance(report, ReplicaLeft) else report.lease_s
    return ReplicaStatus(
        adapter=report.adapter, alias=report.alias, replica=report.replica, generation=report.generation,
        version=report.version, failed=isinstance(report, AdapterFailed), left=isinstance(report, ReplicaLeft),
        lease_expires_ms=(
            None
            if isinstance(report, ReplicaLeft)
            else stored_ms + int(1000 * (UNLEASED_S if lease_s is None else lease_s))
        ),
        stored_ms=stored_ms, error=report.error if isinstance(report, AdapterFailed) else "",
    )  # fmt: skip


class ReplicaTable:
    """The latest status of every replica, by record key and partition. Not thread-safe.

    A record key is in two partitions after partitions were added to the topic; the record that was stored last counts.

    Args:
        trust: The keys of which one must have signed a record. A record that none signed, or that is older than the one
            before it, changes nothing. None: all records count.
    """

    def __init__(self, trust: Trust | None = None) -> None:
        self._trust = trust or Trust()
        self._reported_at: dict[bytes, datetime] = {}
        self._statuses: dict[tuple[bytes, int], ReplicaStatus] = {}

    def apply(self, record: Any, now_ms: int, *, following: bool) -> None:
        """Take one record of `adapter-acks`.

        The lease begins when the broker stored the record. Where the topic keeps the writer's time instead, a record
        that arrives while the topic is followed counts from its arrival, so that the clock of a subscriber that is
        behind ends no lease early. No lease begins in the future.

        Args:
            record: A record of kafka-python's consumer.
            now_ms: The wall clock, in milliseconds since 1970.
            following: The topic was read to its end before this record came.
        """
        location = (record.key or b"", record.partition)
        if record.value is None:  # a tombstone: the replica is no longer of interest
            known = self._statuses.get(location)
            if self._trust.verifies and known is not None and known.state(now_ms) in {"serving", "failing"}:
                _log.warning("a deletion on %s is ignored: the lease of %s holds", _TOPIC, known.replica)
                return  # nobody can sign a tombstone: it ends the wait for no replica that is alive
            self._statuses.pop(location, None)
            return
        try:
            event = decode(record.value, record.headers, _TOPIC).event
        except WireError:  # written by a newer version or by another program: it says nothing about a replica
            return
        if not isinstance(event, AdapterActivated | AdapterFailed | ReplicaLeft):
            return
        if self._trust.verifies and not self._is_trusted(event, record):
            return
        stored_ms = record.timestamp
        if record.timestamp_type != _LOG_APPEND_TIME and following:
            stored_ms = max(stored_ms, now_ms)
        self._statuses[location] = replica_status(event, min(stored_ms, now_ms))

    def _is_trusted(self, event: Report, record: Any) -> bool:
        """Return whether the replica itself sent the record: signed, under its own key, and not an older one again."""
        key = event.key().encode()
        try:
            check_event(event, record.value, self._trust)
        except SignatureError as error:
            _log.warning("a record on %s is ignored: %s", _TOPIC, error)
            return False
        if record.key != key or event.at < self._reported_at.get(key, event.at):
            _log.warning("a record on %s is ignored: %s sent it before its last one", _TOPIC, key.decode())
            return False
        self._reported_at[key] = event.at
        return True

    def clear(self) -> None:
        """Remove all statuses, before the topic is read from its beginning again."""
        self._statuses.clear()
        self._reported_at.clear()

    def of(self, adapter: str | None, alias: str | None) -> list[ReplicaStatus]:
        """Return the statuses of an adapter's replicas, sorted by adapter and name.

        Args:
            adapter: The adapter's name; None: of all adapters.
            alias: The alias that the replicas follow; None: any.
        """
        latest: dict[bytes, ReplicaStatus] = {}
        for (key, _), status in self._statuses.items():
            if key not in latest or latest[key].stored_ms <= status.stored_ms:
                latest[key] = status
        found = [
            status
            for status in latest.values()
            if (adapter is None or status.adapter == adapter) and (alias is None or status.alias == alias)
        ]
        return sorted(found, key=lambda status: (status.adapter, status.replica))

    def outdated(self, now_ms: int) -> list[tuple[bytes, int]]:
        """Return key and partition of every record that may be deleted; see `ReplicaStatus.is_outdated`.

        Args:
            now_ms: The wall clock, in milliseconds since 1970.
        """
        return sorted(location for location, status in self._statuses.items() if status.is_outdated(now_ms))

    def locations(self, adapter: str, replica: str) -> list[tuple[bytes, int]]:
        """Return key and partition of every record of one replica."""
        return sorted(
            location
            for location, status in self._statuses.items()
            if (status.adapter, status.replica) == (adapter, replica)
        )
