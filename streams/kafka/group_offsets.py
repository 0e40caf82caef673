"""Ask the broker how far a consumer group has committed, and compare it with the logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kafka import TopicPartition
from kafka.errors import GroupIdNotFoundError


@dataclass(frozen=True)
class ReaderPosition:
    """The position of a consumer group in one partition.

    Attributes:
        partition: The partition; its topic with the prefix.
        begin: The first offset of the log.
        end: The offset behind the log's last record.
        committed: The committed offset; -1 where none was committed.
    """

    partition: TopicPartition
    begin: int
    end: int
    committed: int

    @property
    def waiting(self) -> int:
        """The number of records that the group has not committed."""
        return max(0, self.end - max(self.committed, self.begin))


def group_offsets(admin: Any, group: str) -> dict[TopicPartition, int]:
    """Return the committed offsets of a consumer group; empty where no such group exists.

    Args:
        admin: A KafkaAdminClient.
        group: The group's name with the prefix.

    Raises:
        KafkaError: Kafka does not answer.
    """
    try:
        found: dict[TopicPartition, Any] = admin.list_group_offsets(group).get(group, {})
    except GroupIdNotFoundError:
        return {}
    return {partition: committed.offset for partition, committed in found.items() if committed.offset >= 0}


def reader_positions(admin: Any, group: str, topic: str, partitions: int) -> list[ReaderPosition]:
    """Return the positions of a consumer group in all partitions of a topic.

    Args:
        admin: A KafkaAdminClient.
        group: The group's name with the prefix.
        topic: The topic's name with the prefix.
        partitions: The topic's partition count.

    Raises:
        KafkaError: Kafka does not answer.
    """
    from kafka.admin import OffsetSpec

    each = [TopicPartition(topic, number) for number in range(partitions)]
    ends = admin.list_partition_offsets(dict.fromkeys(each, OffsetSpec.LATEST))
    begins = admin.list_partition_offsets(dict.fromkeys(each, OffsetSpec.EARLIEST))
    committed = group_offsets(admin, group)
    return [
        ReaderPosition(partition, begins[partition].offset, ends[partition].offset, committed.get(partition, -1))
        for partition in each
    ]
