"""Read the latest record of every replica from the compacted topic `adapter-acks`, without a consumer group.

The retain agent uses it: it closes a request when no replica with a lease is known to serve a revoked version any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError

from perennial.streams.events.adapter_events import AdapterActivated
from perennial.streams.kafka.connect import close_producer, connect
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.replicas.replica_status import ReplicaStatus, ReplicaTable
from perennial.streams.settings import Settings

_log = logging.getLogger("perennial.replicas")

_TOPIC: Final = AdapterActivated.topic
_TIMEOUT_S: Final = 10.0
_FRESH_S: Final = 1.0


class AckReader:
    """Reads `adapter-acks` on request, at most once a second, and keeps each replica's latest status.

    Not thread-safe.

    Args:
        settings: Names the brokers and the topic prefix. The connection is opened at the first read.
        wall_ms: The wall clock, in milliseconds since 1970.
        grace: After each connection to the broker, give every lease the time for one more heartbeat; for a reader that
            decides whether to wait for a replica. See `ReplicaStatus.with_grace`.
    """

    def __init__(
        self,
        settings: Settings,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        *,
        grace: bool = False,
    ) -> None:
        self._grace = grace
        self._connected_ms = 0
        self._settings = settings
        self._wall_ms = wall_ms
        self._consumer: Any = None
        self._table = ReplicaTable(settings.signing.replica_readers_trust())
        self._following = False
        self._count = 0
        self._read_s: float | None = None

    def replicas(self, adapter: str | None, alias: str | None = "live") -> list[ReplicaStatus]:
        """Return the latest status of every replica, after reading the topic to its end.

        Args:
            adapter: The adapter's name; None: of all adapters.
            alias: The alias that the replicas follow; None: any.

        Returns:
            The statuses, with those of ended leases and of replicas that left, sorted by adapter and name.

        Raises:
            KafkaUnavailableError: The topic cannot be read to its end within 10 seconds.
        """
        if self._read_s is None or time.monotonic() - self._read_s >= _FRESH_S:
            try:
                self._read()
            except (KafkaError, OSError, ValueError) as error:
                self.close()
                raise _unavailable("read", error) from error
            except KafkaUnavailableError:
                self.close()
                raise
            self._read_s = time.monotonic()
        found = self._table.of(adapter, alias)
        return [status.with_grace(self._connected_ms) for status in found] if self._grace else found

    def prune(self) -> int:
        """Delete the records of replicas whose lease ended, or that left, more than KEPT_S ago.

        So the topic holds the records of living replicas and of those of the last day, however often they restart. A
        replica that comes back is in the topic again with its next record, at the latest after a third of its lease.

        Returns:
            The number of records deleted.

        Raises:
            KafkaUnavailableError: The topic cannot be read or written.
        """
        self.replicas(None, None)
        outdated = self._table.outdated(self._wall_ms())
        self._delete(outdated)
        return len(outdated)

    def remove(self, adapter: str, replica: str) -> int:
        """Delete the records of one replica.

        Args:
            adapter: The adapter's name.
            replica: The replica's name.

        Returns:
            The number of records deleted; more than one where partitions were added to the topic.

        Raises:
            KafkaUnavailableError: The topic cannot be read or written.
        """
        self.replicas(None, None)
        found = self._table.locations(adapter, replica)
        self._delete(found)
        return len(found)

    def _delete(self, locations: Sequence[tuple[bytes, int]]) -> None:
        """Write a tombstone into the partition of each record."""
        if not locations:
            return
        producer: Any = None
        try:
            producer = connect(
                KafkaProducer, self._settings.kafka.require_bootstrap(), _TIMEOUT_S,
                security=self._settings.kafka_security, acks="all",
                delivery_timeout_ms=int(_TIMEOUT_S * 1000), request_timeout_ms=int(_TIMEOUT_S * 1000),
            )  # fmt: skip
            topic = self._settings.kafka.topic(_TOPIC)
            sent = [(key, producer.send(topic, key=key, value=None, partition=number)) for key, number in locations]
            for key, future in sent:
                future.get(timeout=_TIMEOUT_S)
                _log.info("deleted the record of replica %s", key.decode(errors="replace"))
        except (KafkaError, OSError, ValueError) as error:
            raise _unavailable("written", error) from error
        finally:
            if producer is not None:
                close_producer(producer, 1)

    def _read(self) -> None:
        topic = self._settings.kafka.topic(_TOPIC)
        if self._consumer is None:
            self._consumer = connect(
                KafkaConsumer, self._settings.kafka.require_bootstrap(), _TIMEOUT_S,
                security=self._settings.kafka_security, group_id=None,
                enable_auto_commit=False, auto_offset_reset="earliest",
            )  # fmt: skip
            self._count = 0
            self._connected_ms = self._wall_ms()
        numbers = sorted(self._consumer.partitions_for_topic(topic) or ())
        if len(numbers) != self._count:  # the first read, or partitions were added: a key may be in another one now
            self._table.clear()
            self._following = False
            partitions = [TopicPartition(topic, number) for number in numbers]
            self._consumer.assign(partitions)
            self._consumer.seek_to_beginning(*partitions)
            self._count = len(numbers)
        partitions = list(self._consumer.assignment())
        ends = self._consumer.end_offsets(partitions)
        deadline = time.monotonic() + _TIMEOUT_S
        while any(self._consumer.position(partition) < end for partition, end in ends.items()):
            for batch in self._consumer.poll(timeout_ms=200).values():
                for record in batch:
                    self._table.apply(record, self._wall_ms(), following=self._following)
            if time.monotonic() > deadline:
                raise KafkaUnavailableError(f"{topic} was not read to its end in {_TIMEOUT_S:g} s")
        self._following = True

    def close(self) -> None:
        """Close the connection to the broker; a later read opens a new one."""
        consumer, self._consumer = self._consumer, None
        self._read_s = None
        if consumer is not None:
            with suppress(KafkaError, OSError):
                consumer.close()


def _unavailable(done: str, error: Exception) -> KafkaUnavailableError:
    return KafkaUnavailableError(
        f"{_TOPIC} cannot be {done}", got=f"{type(error).__name__}: {error}", remedy="check that the broker runs"
    )
