"""Change topics under running roles."""

from __future__ import annotations

import time
from collections.abc import Mapping

from kafka.admin import KafkaAdminClient

from perennial.streams.settings import Settings

WAIT_S = 180


def create_again(
    settings: Settings, topic: str, partitions: int, configs: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """Delete a topic and create it again.

    Hazard: the controller lets a topic be created again before the broker has applied the deletion. Until then the broker
    acknowledges records into the old log and deletes them with it. So the topic is created after the broker's own list
    has lost it.

    Args:
        settings: Where Kafka is, and the prefix of topics.
        topic: The topic's name without the prefix.
        partitions: The partitions of the topic that is created.
        configs: The settings of the topic that is created.
    """
    name = settings.kafka.topic(topic)
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap, request_timeout_ms=WAIT_S * 1000)
    try:
        admin.delete_topics([name])
        deadline_s = time.monotonic() + WAIT_S
        while name in admin.list_topics():
            assert time.monotonic() < deadline_s, f"{name} was not deleted within {WAIT_S} s"
            time.sleep(0.02)
        wanted = {"num_partitions": partitions, "replication_factor": 1, "configs": dict(configs or {})}
        admin.create_topics({name: wanted})
        admin.wait_for_topics([name], timeout_ms=WAIT_S * 1000)
    finally:
        admin.close()
