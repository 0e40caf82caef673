"""Read a range of a partition without a consumer group."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from typing import Any, Final

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from perennial.streams.kafka.connect import connect
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.settings import Settings

_CONNECT_S: Final = 10.0
_STALL_S: Final = 60.0
_POLL_MS: Final = 500


def read_range(settings: Settings, partition: TopicPartition, start: int, end: int) -> Iterator[Any]:
    """Yield the records of a partition from one offset to another, in order; memory holds one fetch.

    Args:
        settings: Name the brokers.
        partition: The partition; its topic with the prefix.
        start: The first offset.
        end: The offset to stop before.

    Raises:
        KafkaUnavailableError: Kafka does not answer, or sends nothing for a minute.
    """
    if start >= end:
        return
    try:
        consumer = connect(
            KafkaConsumer, settings.kafka.require_bootstrap(), _CONNECT_S, security=settings.kafka_security,
            group_id=None, enable_auto_commit=False, auto_offset_reset="earliest",
        )  # fmt: skip
        try:
            consumer.assign([partition])
            consumer.seek(partition, start)
            moved_s = time.monotonic()
            # The position, not the records' offsets: compaction leaves holes.
            while (position := consumer.position(partition)) < end:
                for record in consumer.poll(timeout_ms=_POLL_MS).get(partition, ()):
                    if record.offset < end:
                        yield record
                if consumer.position(partition) > position:
                    moved_s = time.monotonic()
                elif time.monotonic() - moved_s > _STALL_S:
                    raise KafkaUnavailableError(
                        f"{partition.topic}[{partition.partition}] yields nothing", got=f"position {position}",
                        allowed=f"records up to offset {end}", remedy="check that the broker runs",
                    )  # fmt: skip
        finally:
            consumer.close()
    except (KafkaError, OSError, ValueError) as error:
        raise KafkaUnavailableError(
            got=f"{type(error).__name__}: {error}", allowed=f"a broker at {settings.kafka.bootstrap}",
            remedy="check that the broker runs",
        ) from error  # fmt: skip


def merge_by_time(ranges: list[Iterator[Any]]) -> Iterator[Any]:
    """Yield the records of several partitions in the order of their timestamps."""
    return heapq.merge(*ranges, key=lambda record: (record.timestamp, record.partition, record.offset))
