"""Follows topics from a moment on and hands on what it reads: how the demo and the benchmarks look at the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from perennial.streams.events import cloudevents as wire
from perennial.streams.events.models import Event
from perennial.streams.settings import Settings


class Follower:
    """Reads topics without a group, in a thread of its own, until it is closed. on_event is called from that thread."""

    def __init__(self, settings: Settings, topics: Sequence[str], on_event: Callable[[Event], None]) -> None:
        self._settings = settings
        self._names = {settings.kafka.topic(name): name for name in topics}
        self._on_event = on_event
        self._stop = threading.Event()
        self._consumer: Any = KafkaConsumer(
            bootstrap_servers=settings.kafka.require_bootstrap().split(","),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
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
                    except wire.WireError:
                        continue
                    self._on_event(envelope.event)
        self._consumer.close()

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join(10)
