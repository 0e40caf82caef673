"""Where the consumer groups stood when a backup was made; the backup keeps it as JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kafka import TopicPartition
from kafka.errors import CoordinatorNotAvailableError
from pydantic import BaseModel, ConfigDict

from perennial.streams.events.tenants import base_topic
from perennial.streams.kafka.group_offsets import ReaderPosition, group_offsets, reader_positions
from perennial.streams.kafka.repartition import READERS, group_members
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.kafka.topics import admin_client, identify, topic_names
from perennial.streams.settings import Settings

GROUPS: Final = ("intake", "scorer", "curate", "learner")
"""The consumer groups of the roles, without the prefix."""
COORDINATOR_S: Final = 60.0
LOOK_S: Final = 0.5


class KafkaPositions(BaseModel):
    """Positions and ids of a Kafka cluster at one moment.

    Attributes:
        schema_version: Version of this format.
        cluster_id: The cluster.
        topic_ids: Topic ids by name without the prefix.
        offsets: What the group that reads a topic had committed, by topic without the prefix and partition. A partition
            of which nothing was committed has the first offset of its log.
        generations: The highest generation that was announced, by `adapter#alias`.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    cluster_id: str
    topic_ids: dict[str, str]
    offsets: dict[str, dict[int, int]]
    generations: dict[str, int] = {}

    def recorded(self, topic: str, topic_id: str | None, cluster_id: str) -> Mapping[int, int]:
        """Return the committed offsets in a topic; none where it is another topic by now, or in another cluster."""
        same = self.cluster_id == cluster_id and self.topic_ids.get(topic) == topic_id
        return self.offsets.get(topic, {}) if same else {}


def members_of(settings: Settings, group: str) -> int:
    """Return how many processes are members of a consumer group.

    A cluster on which no group was ever used first makes the topic of its groups, which takes seconds.

    Args:
        settings: Name the brokers and the topic prefix.
        group: The group without the prefix.

    Raises:
        KafkaUnavailableError: Kafka does not answer.
    """
    deadline_s = time.monotonic() + COORDINATOR_S
    while True:
        try:
            with admin_client(settings) as admin:
                return group_members(admin, settings.kafka.topic(group))
        except KafkaUnavailableError as error:
            if not isinstance(error.__cause__, CoordinatorNotAvailableError) or time.monotonic() > deadline_s:
                raise
        time.sleep(LOOK_S)


def used_topics(settings: Settings, positions: object) -> set[str]:
    """Return the topics, without the prefix, of which a role has read something; also those that the settings do not name.

    Args:
        settings: Name the brokers and the topic prefix.
        positions: The positions in a backup; None: there are none.

    Raises:
        KafkaUnavailableError: Kafka does not answer.
    """
    prefix = settings.kafka.topic_prefix
    with admin_client(settings) as admin:
        read = [partition.topic for group in GROUPS for partition in group_offsets(admin, settings.kafka.topic(group))]
    in_backup = () if positions is None else KafkaPositions.model_validate(positions).offsets
    return {*in_backup, *(topic.removeprefix(prefix) for topic in read if topic.startswith(prefix))}


def read_logs(settings: Settings, admin: Any, counts: Mapping[str, int]) -> dict[str, list[ReaderPosition]]:
    """Return the position of its reader in every partition of every topic that a role reads.

    Args:
        settings: Name the topic prefix.
        admin: A KafkaAdminClient.
        counts: Partition counts by topic with the prefix.
    """
    found = {}
    for topic in topic_names(settings, READERS):
        group = READERS[base_topic(topic)]
        full = settings.kafka.topic(topic)
        found[topic] = reader_positions(admin, settings.kafka.topic(group), full, counts.get(full, 0))
    return found


def read_positions(settings: Settings, generations: Mapping[str, int]) -> KafkaPositions:
    """Return where the consumer groups stand now.

    Read it before the store is copied: what is committed by then is in the store.

    Args:
        settings: Name the brokers and the topic prefix.
        generations: The highest generation that was announced, by `adapter#alias`.

    Raises:
        KafkaUnavailableError: Kafka does not answer.
    """
    ids = identify(settings)
    for group in GROUPS:
        members_of(settings, group)
    with admin_client(settings) as admin:
        logs = read_logs(settings, admin, ids.partitions)
    return KafkaPositions(
        cluster_id=ids.cluster_id,
        topic_ids={topic: ids.topic_ids[settings.kafka.topic(topic)] for topic in logs if logs[topic]},
        offsets={
            topic: {each.partition.partition: max(each.committed, each.begin) for each in positions}
            for topic, positions in logs.items()
        },
        generations=dict(generations),
    )


def offsets_at(admin: Any, readers: Sequence[ReaderPosition], at_ms: int) -> dict[int, int]:
    """Return the first offset at or after a time, by partition; the log's end where there is none.

    Args:
        admin: A KafkaAdminClient.
        readers: The positions of the topic's reader.
        at_ms: The time, in milliseconds since 1970.
    """
    found = admin.list_partition_offsets(dict.fromkeys((each.partition for each in readers), max(0, at_ms)))
    offsets = {each.partition.partition: found[each.partition].offset for each in readers}
    return {
        each.partition.partition: each.end if (at := offsets[each.partition.partition]) < 0 else at for each in readers
    }


def partition_of(settings: Settings, topic: str, number: int) -> TopicPartition:
    """Return a partition of a topic that is named without the prefix."""
    return TopicPartition(settings.kafka.topic(topic), number)
