"""Read the latest acknowledgement of every replica from the compacted topic `adapter-acks`, without a consumer group.

The retain agent uses it: it closes a request only when no replica is known to serve a revoked version any more.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, Final

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.connect import connect
from perennial.streams.kafka.topics import KafkaUnavailableError
from perennial.streams.settings import Settings

_TOPIC: Final = AdapterActivated.topic
_TIMEOUT_S: Final = 10.0
_FRESH_S: Final = 1.0


def replicas_behind(
    acks: Mapping[bytes, AdapterActivated | AdapterFailed],
    adapter: str,
    alias: str,
    generation: int,
    revoked: Collection[str],
) -> list[str]:
    """Return the replicas that may still serve a revoked version of the adapter.

    These are the replicas whose latest acknowledgement names a revoked version and an earlier generation. All replicas
    whose latest acknowledgement is a failure count too: nobody knows what such a replica serves, and after a failure
    during a revocation it still holds the previous version.

    Args:
        acks: The latest acknowledgement per record key (`adapter#replica`).
        adapter: The adapter's name.
        alias: The alias that the replicas follow.
        generation: The alias's generation at which the revoked versions went out of service.
        revoked: Ids of the revoked versions. Where it is empty, no replica is behind.

    Returns:
        Names of the replicas, sorted.
    """
    return sorted(
        ack.replica
        for ack in acks.values()
        if (ack.adapter, ack.alias) == (adapter, alias)
        and revoked
        and (isinstance(ack, AdapterFailed) or (ack.generation < generation and ack.version in revoked))
    )


class AckReader:
    """Reads `adapter-acks` on request, at most once a second, and keeps each replica's latest acknowledgement.

    Not thread-safe.

    Args:
        settings: Names the brokers and the topic prefix. The connection is opened at the first read.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer: Any = None
        self._acks: dict[bytes, AdapterActivated | AdapterFailed] = {}
        self._read_s: float | None = None

    def lagging(self, adapter: str, alias: str, generation: int, revoked: Collection[str]) -> list[str]:
        """Return the replicas that may still serve a revoked version, after reading the topic to its end.

        Args:
            adapter: The adapter's name.
            alias: The alias that the replicas follow.
            generation: The alias's generation at which the revoked versions went out of service.
            revoked: Ids of the revoked versions.

        Returns:
            Names of the replicas, sorted; see `replicas_behind`.

        Raises:
            KafkaUnavailableError: The topic cannot be read to its end within 10 seconds.
        """
        if self._read_s is None or time.monotonic() - self._read_s >= _FRESH_S:
            try:
                self._read()
            except (KafkaError, OSError, ValueError) as error:
                self.close()
                raise KafkaUnavailableError(
                    f"{_TOPIC} cannot be read",
                    got=f"{type(error).__name__}: {error}",
                    remedy="check that the broker runs",
                ) from error
            self._read_s = time.monotonic()
        return replicas_behind(self._acks, adapter, alias, generation, revoked)

    def _read(self) -> None:
        topic = self._settings.kafka.topic(_TOPIC)
        if self._consumer is None:
            self._consumer = connect(
                KafkaConsumer, self._settings.kafka.require_bootstrap(), _TIMEOUT_S, group_id=None,
                enable_auto_commit=False, auto_offset_reset="earliest",
            )  # fmt: skip
            self._acks.clear()
            partitions = [TopicPartition(topic, number) for number in self._consumer.partitions_for_topic(topic) or ()]
            self._consumer.assign(partitions)
            if partitions:
                self._consumer.seek_to_beginning(*partitions)
        partitions = list(self._consumer.assignment())
        ends = self._consumer.end_offsets(partitions)
        deadline = time.monotonic() + _TIMEOUT_S
        while any(self._consumer.position(partition) < end for partition, end in ends.items()):
            for batch in self._consumer.poll(timeout_ms=200).values():
                for record in batch:
                    self._apply(record)
            if time.monotonic() > deadline:
                raise KafkaUnavailableError(f"{topic} was not read to its end in {_TIMEOUT_S:g} s")

    def _apply(self, record: Any) -> None:
        if record.value is None:  # a tombstone: the replica was reported to be no longer there
            self._acks.pop(record.key, None)
            return
        try:
            event = decode(record.value, record.headers, _TOPIC).event
        except WireError:  # written by a newer version or by another program: it says nothing about a replica
            return
        if isinstance(event, AdapterActivated | AdapterFailed):
            self._acks[record.key] = event

    def close(self) -> None:
        """Close the connection to the broker; a later read opens a new one."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with suppress(KafkaError, OSError):
                consumer.close()
