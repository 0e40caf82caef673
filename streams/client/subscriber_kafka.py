"""The subscriber's two ends on Kafka: generations heard on adapter-updates, and acknowledgements sent.

Both come and go with the broker and never raise because of it: a subscriber lives by the object store alone.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from hashlib import sha256
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError
from kafka.partitioner import murmur2

from perennial.streams.events.cloudevents import MAX_INSIDE_VALUE_BYTES, WireError, decode, encode
from perennial.streams.events.models import AdapterActivated, AdapterFailed, AdapterUpdate
from perennial.streams.kafka.connect import close_producer, connect
from perennial.streams.observe.metrics import Metrics

_log = logging.getLogger("perennial.subscriber")

_RECONNECT_S = 5.0
_TIMEOUT_MS = 2_000
_MAX_PENDING = 64


class Updates:
    """Reads the one partition of an alias in adapter-updates from its beginning, without a group."""

    def __init__(self, bootstrap: str, topic: str, key: str, metrics: Metrics) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._key = key.encode()
        self._metrics = metrics
        self._consumer: Any = None
        self._partitions = 0
        self._retry_at_s = 0.0

    def poll(self, wait_s: float, now_s: float, stop: threading.Event) -> int:
        """The highest generation heard within the wait; 0: none. Without a broker it only waits."""
        try:
            if self._consumer is None or now_s >= self._retry_at_s:
                self._connect(now_s)
            if self._consumer is None:
                stop.wait(wait_s)
                return 0
            batches = self._consumer.poll(timeout_ms=int(wait_s * 1000))
        except (KafkaError, OSError, ValueError) as error:
            _log.warning("adapter-updates cannot be read, polling goes on: %s", error)
            self.close()
            stop.wait(wait_s)
            return 0
        return max((self._generation(record) for batch in batches.values() for record in batch), default=0)

    def _connect(self, now_s: float) -> None:
        """Connect, and see whether the topic got more partitions: then the key may have moved."""
        if not self._bootstrap or now_s < self._retry_at_s:
            return
        self._retry_at_s = now_s + _RECONNECT_S
        if self._consumer is None:
            self._consumer = connect(
                KafkaConsumer,
                self._bootstrap,
                _TIMEOUT_MS / 1000,
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                max_partition_fetch_bytes=4 * MAX_INSIDE_VALUE_BYTES,
            )
            self._partitions = 0
        partitions = sorted(self._consumer.partitions_for_topic(self._topic))
        if len(partitions) != self._partitions:
            # Writers are kafka-python and Java clients: both place a key by murmur2.
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
        if isinstance(event, AdapterUpdate) and event.key().encode() == self._key:
            return event.generation
        return 0

    def close(self) -> None:
        """Leave the broker."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with suppress(KafkaError, OSError):
                consumer.close()


class Acks:
    """Sends acknowledgements, keeping the last 64 for a broker that comes back: the topic is compacted anyway."""

    def __init__(self, bootstrap: str, topic: Callable[[str], str], now: Callable[[], datetime]) -> None:
        self._bootstrap = bootstrap
        self._topic = topic(AdapterActivated.topic)
        self._now = now
        self._producer: Any = None
        self._pending: deque[AdapterActivated | AdapterFailed] = deque(maxlen=_MAX_PENDING)
        self._retry_at_s = 0.0

    def send(self, ack: AdapterActivated | AdapterFailed) -> None:
        """Take an acknowledgement; the next tick sends it."""
        if self._bootstrap:
            self._pending.append(ack)

    def tick(self, now_s: float) -> None:
        """Send what waits, in order, and keep what the broker does not take."""
        if not self._pending or now_s < self._retry_at_s:
            return
        try:
            if self._producer is None:
                self._producer = connect(
                    KafkaProducer,
                    self._bootstrap,
                    _TIMEOUT_MS / 1000,
                    acks="all",
                    max_block_ms=_TIMEOUT_MS,
                    request_timeout_ms=_TIMEOUT_MS,
                    delivery_timeout_ms=_TIMEOUT_MS,
                )
            while self._pending:
                ack = self._pending[0]
                value_id = sha256(ack.model_dump_json().encode()).hexdigest()[:32]
                source = f"perennial-subscriber/{ack.replica}"
                record = encode(ack, event_id=value_id, source=source, occurred_at=self._now())
                sent = self._producer.send(self._topic, key=record.key, value=record.value, headers=record.headers)
                sent.get(timeout=_TIMEOUT_MS / 1000)
                self._pending.popleft()
        except (KafkaError, OSError, ValueError) as error:
            _log.warning("acknowledgements wait for the broker: %s", error)
            self._retry_at_s = now_s + _RECONNECT_S
            self._leave(0)  # an idempotent producer that lost a record may never take another

    def _leave(self, timeout_s: float) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            close_producer(producer, timeout_s)

    def close(self) -> None:
        """Send what waits, once, and leave the broker."""
        self.tick(float("inf"))
        self._leave(1)
