"""Read events from topics in a thread: for the demo and the benchmarks, which watch the loop from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from perennial.streams.events import cloudevents as wire
from perennial.streams.events.fields import Event
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.connect import secured
from perennial.streams.settings import Settings

_CONNECT_S = 10.0


class Follower:
    """Reads topics from their beginning, without a consumer group, in a thread of its own until it is closed.

    Args:
        settings: Settings that name the broker.
        topics: Names of topics without the prefix; they must exist.
        on_event: Called from that thread with every event that can be read; other records are left out.
    """

    def __init__(self, settings: Settings, topics: Sequence[str], on_event: Callable[[Event], None]) -> None:
        self._settings = settings
        self._names = {settings.kafka.topic(name): name for name in topics}
        self._on_event = on_event
        self._stop = threading.Event()
        with secured(settings, _CONNECT_S) as options:
            self._consumer: Any = KafkaConsumer(
                bootstrap_servers=settings.kafka.require_bootstrap().split(","),
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                **options,
            )
        partitions = [
            TopicPartition(topic, number)
            for topic in self._names
            for number in self._consumer.partitions_for_topic(topic) or ()
        ]
        self._consumer.assign(partitions)
        self._consumer.seek_to_beginning(*partitions)
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            for records in self._consumer.poll(timeout_ms=100).values():
                for record in records:
                    try:
                        envelope = wire.decode(record.value, record.headers, self._names[record.topic])
                    except WireError:
                        continue
                    self._on_event(envelope.event)
        self._consumer.close()

    def close(self) -> None:
        """Stop reading and wait for the thread."""
        self._stop.set()
        self._thread.join(10)
