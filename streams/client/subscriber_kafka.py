"""Read the generations that events on `adapter-updates` announce, for a subscriber.

Nothing here raises an error because of the broker: a subscriber works with the object store alone.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from kafka.partitioner import murmur2

from perennial.storage.signing.key_files import KeyFileError
from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.cloudevents import MAX_INSIDE_VALUE_BYTES, decode
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.connect import connect
from perennial.streams.kafka.event_signatures import check_event
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings.kafka_security_group import KafkaSecuritySettings

_log = logging.getLogger("perennial.subscriber")

RECONNECT_S = 5.0
TIMEOUT_MS = 2_000


class Updates:
    """Reads the generations of one alias from `adapter-updates`: one partition, from its beginning, without a group.

    Args:
        bootstrap: Bootstrap servers; empty: there is no broker.
        security: TLS and SASL.
        topic: Full name of the topic.
        key: Record key of the alias, `<adapter>#<alias>`.
        metrics: Where to count.
        trust: The keys of which one must have signed an event; an event that none signed says nothing.
    """

    def __init__(
        self, bootstrap: str, security: KafkaSecuritySettings, topic: str, key: str, metrics: Metrics, trust: Trust
    ) -> None:
        self._trust = trust
        self._bootstrap = bootstrap
        self._security = security
        self._topic = topic
        self._key = key.encode()
        self._metrics = metrics
        self._consumer: Any = None
        self._partitions = 0
        self._retry_at_s = 0.0

    def poll(self, wait_s: float, now_s: float, stop: threading.Event) -> int:
        """Return the highest generation that arrives within a time, or 0. Without a broker, only wait.

        Args:
            wait_s: How long to wait, in seconds.
            now_s: Clock time, in seconds, for the pause between attempts to connect.
            stop: Ends a wait without a broker.
        """
        try:
            if self._consumer is None or now_s >= self._retry_at_s:
                self._connect(now_s)
            if self._consumer is None:
                stop.wait(wait_s)
                return 0
            batches = self._consumer.poll(timeout_ms=int(wait_s * 1000))
        except Exception as error:  # noqa: BLE001 - no error of a Kafka client may end a subscriber
            _log.warning("adapter-updates cannot be read, polling goes on: %s", error)
            self.close()
            stop.wait(wait_s)
            return 0
        return max((self._generation(record) for batch in batches.values() for record in batch), default=0)

    def _connect(self, now_s: float) -> None:
        """Connect, and check whether the topic got more partitions, because then the key may be in another one."""
        if not self._bootstrap or now_s < self._retry_at_s:
            return
        self._retry_at_s = now_s + RECONNECT_S
        if self._consumer is None:
            self._consumer = connect(
                KafkaConsumer,
                self._bootstrap,
                TIMEOUT_MS / 1000,
                security=self._security,
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                max_partition_fetch_bytes=4 * MAX_INSIDE_VALUE_BYTES,
            )
            self._partitions = 0
        partitions = sorted(self._consumer.partitions_for_topic(self._topic))
        if len(partitions) != self._partitions:
            # Learners write with kafka-python, which chooses a key's partition by murmur2 as Java clients do.
            index = (murmur2(self._key) & 0x7FFFFFFF) % len(partitions)
            partition = TopicPartition(self._topic, partitions[index])
            self._consumer.assign([partition])
            self._consumer.seek_to_beginning(partition)
            self._partitions = len(partitions)

    def _generation(self, record: Any) -> int:
        if record.key != self._key or record.value is None:
            return 0
        try:
            event = decode(record.value, record.headers, "adapter-updates").event
        except WireError as error:
            self._metrics.refused(error.reason)
            return 0
        self._metrics.events_in("adapter-updates")
        if not isinstance(event, AdapterUpdate) or event.key().encode() != self._key:
            return 0
        try:
            check_event(event, record.value, self._trust)
        except SignatureError as error:
            self._metrics.refused("bad-signature")
            _log.warning("an event on adapter-updates is ignored: %s", error)
            return 0
        except KeyFileError as error:
            _log.warning("events on adapter-updates are ignored: %s", error)
            return 0
        return event.generation

    def close(self) -> None:
        """Close the connection to the broker."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with suppress(KafkaError, OSError):
                consumer.close()
