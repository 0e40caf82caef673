"""The two ends on Kafka that scorer and learner share: records in, with what is still ours to commit; events out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.coordinator.assignors.range import RangePartitionAssignor
from kafka.errors import CommitFailedError, KafkaError, RebalanceInProgressError
from kafka.structs import OffsetAndMetadata

from perennial.storage.errors import PerennialError
from perennial.streams.events.cloudevents import MAX_DEAD_LETTER_BYTES, dead_letter, encode
from perennial.streams.events.models import Event
from perennial.streams.kafka.connect import close_producer, connect
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings

_log = logging.getLogger("perennial.learner")

CONNECT_S = 15.0
DELIVERY_TIMEOUT_MS = 30_000
METADATA_AGE_MS = 30_000
MAX_FETCH_BYTES = 8 * 1024**2
SESSION_TIMEOUT_MS = 10_000
MAX_POLL_INTERVAL_MS = 300_000
REBALANCE_POLL_S = 1.0


class KafkaLinkError(PerennialError):
    """Kafka did not take or give what it had to."""


@dataclass(frozen=True)
class ConsumedRecord:
    """One Kafka record. epoch: how often its partition had left this member when it was read."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    epoch: int


class GroupConsumer(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """A group member on one topic. Nothing is committed but by `commit`, and only where the partition is still ours."""

    def __init__(self, settings: Settings, topic: str, group: str, max_records: int) -> None:
        self._topic = topic
        self._name = settings.kafka.topic(topic)
        self._epochs: Counter[TopicPartition] = Counter()
        self._held: set[TopicPartition] = set()
        self._rebalancing = False
        self._owed: dict[TopicPartition, tuple[int, int]] = {}  # offset to commit, epoch of the record before it
        try:
            self._consumer: Any = connect(
                KafkaConsumer,
                settings.kafka.require_bootstrap(),
                CONNECT_S,
                client_id=settings.kafka.topic(group),
                group_id=settings.kafka.topic(group),
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                # Eager: on_partitions_assigned then names all that is held, by which what left is told.
                partition_assignment_strategy=[RangePartitionAssignor],
                max_poll_records=max_records,
                session_timeout_ms=SESSION_TIMEOUT_MS,
                max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
                max_partition_fetch_bytes=MAX_FETCH_BYTES,
                metadata_max_age_ms=METADATA_AGE_MS,
            )
            # Without the topic's metadata the first assignment would be empty until the next refresh.
            self._consumer.partitions_for_topic(self._name)
        except (KafkaError, ValueError, OSError) as error:
            raise _unreachable(settings, error) from error
        self._consumer.subscribe([self._name], listener=self)

    # kafka-python calls these on its own thread: they only count.

    def on_partitions_revoked(self, _revoked: Iterable[TopicPartition]) -> None:
        """Nothing goes yet: a partition that comes back in the same rebalance keeps its position here, unlike in Java.

        Were its records dropped now, nobody would read them again.
        """
        self._rebalancing = True

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Records of partitions that did not come back are no longer ours: another member begins at the last commit."""
        now_held = set(assigned)
        self._epochs.update(self._held - now_held)
        self._held = now_held
        self._rebalancing = False

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        """The group went on without this member; what it had read is another's now."""
        self._epochs.update(lost)
        self._held -= set(lost)

    def poll(self, timeout_s: float) -> list[ConsumedRecord]:
        """What came within the time, in the order of its partition; also keeps the group membership.

        It may take a second longer while the group rebalances.
        """
        if self._rebalancing:
            # kafka-python 3.0.12 drops a join that ends between two polls. Unless it is asked to join again it may
            # take itself for a member with its heartbeat off: it would be put out of the group and never know.
            self._consumer._coordinator.request_rejoin()  # noqa: SLF001 - there is no public way
            timeout_s = max(timeout_s, REBALANCE_POLL_S)
        try:
            batches = self._consumer.poll(timeout_ms=max(1, int(timeout_s * 1000)))
        except KafkaError as error:
            raise KafkaLinkError(
                f"{self._name} cannot be read", got=str(error), remedy="see that the broker runs"
            ) from error
        if self._owed and not self._rebalancing:
            self._settle()
        return [
            ConsumedRecord(
                self._topic, record.partition, record.offset, record.key, record.value,
                list(record.headers or ()), self._epochs[partition],
            )
            for partition, batch in batches.items()
            for record in batch
        ]  # fmt: skip

    def owns(self, record: ConsumedRecord) -> bool:
        """Whether the record's partition has stayed with this member since the record was read."""
        return self._epochs[TopicPartition(self._name, record.partition)] == record.epoch

    def commit(self, records: Iterable[ConsumedRecord]) -> None:
        """Commit past these records, except on partitions that were taken away meanwhile.

        While the group rebalances nothing can be committed: it is done in a later poll then, if the partition stays.
        """
        for record in records:
            if self.owns(record):
                self._owed[TopicPartition(self._name, record.partition)] = (record.offset + 1, record.epoch)
        self._settle()

    def _settle(self) -> None:
        self._owed = {at: owed for at, owed in self._owed.items() if self._epochs[at] == owed[1]}
        if not self._owed:
            return
        try:
            self._consumer.commit({at: OffsetAndMetadata(offset, "", -1) for at, (offset, _) in self._owed.items()})
        except (CommitFailedError, RebalanceInProgressError) as error:
            # Should the partitions go, the records come again at the next owner and are recognised by their marks.
            _log.debug("offsets wait, the group is rebalancing: %s", error)
        except KafkaError as error:
            raise KafkaLinkError(
                "offsets cannot be committed", got=str(error), remedy="see that the broker runs; nothing is lost"
            ) from error
        else:
            self._owed = {}

    def pause(self) -> None:
        """Fetch nothing from any partition held now; polling then only keeps the membership."""
        self._consumer.pause(*self._consumer.assignment())

    def resume(self) -> None:
        """Fetch again."""
        self._consumer.resume(*self._consumer.paused())

    def lag(self) -> int:
        """How many records of the partitions held are published and not read, as far as the last fetch told."""
        total = 0
        for partition in self._consumer.assignment():
            end = self._consumer.highwater(partition)
            if end is not None:
                total += max(0, end - (self._consumer.position(partition) or 0))
        return total

    def close(self) -> None:
        """Leave the group."""
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ConfirmingProducer:
    """An idempotent producer that counts a record as sent only when every replica in sync has it."""

    def __init__(self, settings: Settings, role: str, metrics: Metrics, now: Callable[[], datetime]) -> None:
        self._settings = settings
        self._role = role
        self._metrics = metrics
        self._now = now
        self._pending: list[tuple[str, Any]] = []
        try:
            self._producer: Any = connect(
                KafkaProducer,
                settings.kafka.require_bootstrap(),
                CONNECT_S,
                client_id=settings.kafka.topic(role),
                acks="all",
                enable_idempotence=True,
                delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
                request_timeout_ms=DELIVERY_TIMEOUT_MS // 2,
                max_request_size=2 * MAX_DEAD_LETTER_BYTES,
            )
        except (KafkaError, ValueError, OSError) as error:
            raise _unreachable(settings, error) from error

    def send(self, event: Event, *, id: str, time: datetime, traceparent: str | None = None) -> None:  # noqa: A002
        """Hand an event to the producer; `flush` tells whether it arrived."""
        record = encode(event, id=id, source=f"perennial/{self._role}", time=time, traceparent=traceparent)
        self._send(event.topic, record.key, record.value, record.headers)

    def refuse(self, record: ConsumedRecord, reason: str, detail: str) -> None:
        """Put a record that cannot be handled into the dead letters."""
        value, headers = dead_letter(
            record.value,
            record.headers,
            reason=reason,
            stage=self._role,
            detail=detail,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            at=self._now(),
        )
        self._metrics.refused(reason)
        # kafka-python cannot write a header without a value; a record must not stop the flow by having one.
        self._send("dead-letters", record.key, value, [(name, raw or b"") for name, raw in headers])

    def _send(self, topic: str, key: bytes | None, value: bytes | None, headers: list[Any]) -> None:
        try:
            future = self._producer.send(self._settings.kafka.topic(topic), key=key, value=value, headers=headers)
        except KafkaError as error:
            raise _undelivered(topic, error) from error
        self._pending.append((topic, future))

    def flush(self) -> None:
        """Wait until all that was handed over is acknowledged. Raises KafkaLinkError where one record was not."""
        pending, self._pending = self._pending, []
        sent: Counter[str] = Counter()
        for topic, future in pending:
            try:
                future.get(timeout=2 * DELIVERY_TIMEOUT_MS / 1000)
            except KafkaError as error:
                raise _undelivered(topic, error) from error
            sent[topic] += 1
        for topic, count in sent.items():
            self._metrics.events_out(topic, count)

    def close(self) -> None:
        """Drop the connection; what was not flushed may be lost and is sent again after a restart."""
        close_producer(self._producer, 2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unreachable(settings: Settings, error: Exception) -> KafkaLinkError:
    return KafkaLinkError(
        "Kafka does not answer",
        got=f"{type(error).__name__}: {error}",
        allowed=f"a broker at {settings.kafka.bootstrap}",
        remedy="see that the broker runs",
    )


def _undelivered(topic: str, error: Exception) -> KafkaLinkError:
    return KafkaLinkError(
        f"an event for {topic} was not delivered",
        got=f"{type(error).__name__}: {error}",
        remedy="see that the broker runs and the topic exists; nothing was committed, nothing is lost",
    )
