"""Parts for the learner's and scorer's tests on a real broker: a small base on disk, producers, readers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from transformers.utils.logging import disable_progress_bar

from perennial.streams.events.cloudevents import Envelope, decode, encode
from perennial.streams.events.fields import Event
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.kafka.connect import connect
from perennial.streams.settings import Settings
from tests import origins, tiny


def base_folder(root: Path) -> Path:
    """The tiny base as a folder that any process can load."""
    made = tiny.base()
    disable_progress_bar()
    made.model.save_pretrained(root / "base")
    made.tokenizer.save_pretrained(root / "base")
    return root / "base"


def settings(bootstrap: str, prefix: str, root: Path, **more: Any) -> Settings:
    return Settings.of(
        kafka=bootstrap, topic_prefix=prefix, store=str(root / "store"), base=str(base_folder(root)), threads=1,
        device="cpu", partitions=1, rank=4, alpha=8, steps=1, rows=4, row_tokens=32, max_tokens=32, anchor_rows=1,
        learning_rate=5e-3, max_general_rise_nats=50, min_gain_nats=-50, poll_s=0.2,
        **more,
    )  # fmt: skip


def send(given: Settings, *events: Event | tuple[str, bytes], traceparent: str | None = None) -> None:
    """Publish events; (topic, bytes) is sent as it is."""
    from datetime import UTC, datetime

    producer = connect(KafkaProducer, given.kafka.bootstrap, 10, security=given.kafka_security, acks="all")
    try:
        for event in events:
            if isinstance(event, tuple):
                producer.send(given.kafka.topic(event[0]), value=event[1], key=b"k").get(120)
                continue
            if isinstance(event, ExampleAccepted):
                event = origins.adopt(given, event)  # noqa: PLW2901 - what is sent
            record = encode(
                event, event_id="test", source="test", occurred_at=datetime.now(UTC), traceparent=traceparent
            )
            producer.send(
                given.kafka.topic(event.topic), key=record.key, value=record.value, headers=record.headers
            ).get(120)
    finally:
        producer.close()


def read(given: Settings, topic: str, count: int, timeout_s: float = 180) -> list[Any]:
    """The first records of a one-partition topic; fewer where the time runs out."""
    consumer = connect(
        KafkaConsumer, given.kafka.bootstrap, 10, security=given.kafka_security, group_id=None, enable_auto_commit=False
    )
    records: list[Any] = []
    try:
        partition = TopicPartition(given.kafka.topic(topic), 0)
        consumer.assign([partition])
        consumer.seek_to_beginning(partition)
        deadline = time.monotonic() + timeout_s
        while len(records) < count and time.monotonic() < deadline:
            for batch in consumer.poll(timeout_ms=200).values():
                records += batch
    finally:
        consumer.close()
    return records


def envelopes(given: Settings, topic: str, count: int, timeout_s: float = 180) -> list[Envelope]:
    return [decode(record.value, record.headers, topic) for record in read(given, topic, count, timeout_s)]


def dead_letters(given: Settings, count: int) -> list[tuple[str, bytes | None]]:
    """(reason, original value) of dead letters."""
    return [
        (dict(record.headers)["perennial-reason"].decode(), record.value)
        for record in read(given, "dead-letters", count)
    ]


def committed(given: Settings, topic: str, group: str) -> int:
    consumer = connect(
        KafkaConsumer,
        given.kafka.bootstrap,
        10,
        security=given.kafka_security,
        group_id=given.kafka.topic(group),
        enable_auto_commit=False,
    )
    try:
        return consumer.committed(TopicPartition(given.kafka.topic(topic), 0)) or 0
    finally:
        consumer.close()


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


@contextmanager
def running(body: Callable[[threading.Event], None]) -> Iterator[threading.Event]:
    """A role in a thread of this process; what it raises is raised at the end."""
    stop, raised = threading.Event(), []

    def guarded() -> None:
        try:
            body(stop)
        except Exception as error:  # noqa: BLE001 - handed to the test below
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(120)
    if raised:
        raise raised[0]
    assert not thread.is_alive()
