"""The Kafka input and output of scorer and learner: a group member that reads one topic, and a confirming producer."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.coordinator.assignors.range import RangePartitionAssignor
from kafka.errors import CommitFailedError, KafkaError, RebalanceInProgressError
from kafka.structs import OffsetAndMetadata

from perennial.storage.errors import PerennialError
from perennial.streams.events.cloudevents import encode
from perennial.streams.events.dead_letter import MAX_DEAD_LETTER_BYTES, encode_dead_letter
from perennial.streams.events.fields import Event
from perennial.streams.kafka.connect import close_producer, connect
from perennial.streams.kafka.installation import open_store_of
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.kafka.stall_watch import StallWatch
from perennial.streams.kafka.topic_guard import KeyRouting, TopicGuard
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
WATCH_S = 5.0
"""Seconds between two comparisons of the positions with the broker's ends."""
STALL_S = 20.0
"""Seconds for which a partition that has records may yield none, while it is not paused."""
END_OFFSETS_MS = 3_000
POSITION_MS = 500


class KafkaLinkError(PerennialError):
    """Records cannot be read, committed or delivered."""


@dataclass(frozen=True)
class ConsumedRecord:
    """One Kafka record, as a group member read it.

    Attributes:
        topic: The topic's name without the prefix.
        partition: The partition's number.
        offset: The record's offset.
        key: The record's key.
        value: The record's value; None is a tombstone.
        headers: The record's headers in their order.
        epoch: How many times the partition had been taken from this member before the record was read.
    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    epoch: int


class GroupConsumer(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """A member of a consumer group that reads one topic.

    Offsets are committed by `commit` only, and only for partitions that have stayed with this member since the record
    was read. The on_partitions methods are called by kafka-python on its own thread, so they only keep count.

    Args:
        settings: Names the brokers and the topic prefix.
        topic: The topic's name without the prefix.
        group: The consumer group's name without the prefix.
        max_records: The most records that one poll returns.
        writes: Topics without the prefix that the records are turned into. They are checked with the topic.
        metrics: Counts partitions that had to be read anew; its health sees whether `poll` is called.

    Raises:
        KafkaLinkError: No broker answers.
        InstallationError: A topic is not the one that the installation recorded.
    """

    def __init__(
        self,
        settings: Settings,
        topic: str,
        group: str,
        max_records: int,
        writes: Sequence[str] = (),
        metrics: Metrics | None = None,
    ) -> None:
        self._settings = settings
        self._group = settings.kafka.topic(group)
        self._max_records = max_records
        self._metrics = metrics
        self._topic = topic
        self._guard = TopicGuard(settings, [topic, *writes], open_store_of(settings), writes=writes)
        self._name = settings.kafka.topic(topic)
        self._epochs: Counter[TopicPartition] = Counter()
        self._assigned: set[TopicPartition] = set()
        self._rebalancing = False
        self._uncommitted: dict[TopicPartition, tuple[int, int]] = {}  # offset to commit, epoch of the last record
        self._ends: dict[TopicPartition, int] = {}
        self._watched_s = time.monotonic()
        self._stalls = StallWatch()
        self._consumer: Any = self._connect()

    def _connect(self) -> Any:
        """Return a new client that has subscribed to the topic."""
        try:
            consumer = connect(
                KafkaConsumer,
                self._settings.kafka.require_bootstrap(),
                CONNECT_S,
                security=self._settings.kafka_security,
                client_id=self._group,
                group_id=self._group,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                # With the range assignor every rebalance is eager: on_partitions_assigned names all partitions that
                # this member now has, so those that it does not name were taken away.
                partition_assignment_strategy=[RangePartitionAssignor],
                max_poll_records=self._max_records,
                session_timeout_ms=SESSION_TIMEOUT_MS,
                max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
                max_partition_fetch_bytes=MAX_FETCH_BYTES,
                metadata_max_age_ms=METADATA_AGE_MS,
            )
            # Load the topic's metadata now: without it the first assignment is empty until the next refresh.
            consumer.partitions_for_topic(self._name)
        except (KafkaError, ValueError, OSError) as error:
            raise _unreachable(self._settings, error) from error
        consumer.subscribe([self._name], listener=self)
        return consumer

    def on_partitions_revoked(self, _revoked: Iterable[TopicPartition]) -> None:
        """Note that a rebalance has begun; give up no partition yet.

        Hazard: unlike in Java, a partition that returns to this member in the same rebalance keeps its position. If its
        records were dropped here, no member would read them again.
        """
        self._rebalancing = True

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Raise the epoch of partitions that were taken away: another member reads them from the last commit on."""
        now_assigned = set(assigned)
        self._epochs.update(self._assigned - now_assigned)
        self._assigned = now_assigned
        self._rebalancing = False

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        """Raise the epoch of partitions that the group gave to others after it had expelled this member."""
        self._epochs.update(lost)
        self._assigned -= set(lost)

    def poll(self, timeout_s: float) -> list[ConsumedRecord]:
        """Return the records that arrive within the time, and keep the membership in the group.

        Args:
            timeout_s: Seconds to wait for records; at least one second while the group rebalances.

        Returns:
            Records in the order of their offsets within each partition.

        Raises:
            KafkaLinkError: The topic cannot be read.
            InstallationError: A topic is not the one that the installation recorded. Nothing of what was fetched is
                returned.
            TopicError: A topic was deleted.
            KafkaUnavailableError: The broker does not say within half a minute whether the topics are the same.
        """
        if self._metrics is not None:
            self._metrics.tick(self._topic)
        if self._rebalancing:
            # kafka-python 3.0.12 discards the answer to a join request that arrives between two polls. It may then
            # believe that it is a member while its heartbeat is off, be expelled and never notice. Ask to join again.
            self._consumer._coordinator.request_rejoin()  # noqa: SLF001 - there is no public way
            timeout_s = max(timeout_s, REBALANCE_POLL_S)
        self._free_slot()
        try:
            batches = self._consumer.poll(timeout_ms=max(1, int(timeout_s * 1000)))
        except KafkaError as error:
            raise KafkaLinkError(
                f"{self._name} cannot be read", got=str(error), remedy="check that the broker runs"
            ) from error
        if self._uncommitted and not self._rebalancing:
            self._commit_pending()
        if batches:
            self._guard.verify()
        self._watch()
        return [
            ConsumedRecord(
                self._topic, record.partition, record.offset, record.key, record.value,
                list(record.headers or ()), self._epochs[partition],
            )
            for partition, batch in batches.items()
            for record in batch
        ]  # fmt: skip

    def _free_slot(self) -> None:
        """Let kafka-python take up batches of partitions that were paused.

        Hazard: kafka-python 3.0.12 (since dpkp/kafka-python#2981) sets the unread rest of a paused partition's batch
        aside, fetches no more of the partition, and takes the rest up again only while `_next_partition_records` is
        None. A batch of another partition that was read to its end stays there. Partitions that a rebalance assigns are
        not paused, so one of them could keep another from being read for ever; where the other one was taken away and
        came back in between, even its lag would be unknown.
        """
        fetcher = self._consumer._fetcher  # noqa: SLF001 - there is no public way
        in_hand = fetcher._next_partition_records  # noqa: SLF001
        if in_hand is not None and not in_hand:
            fetcher._next_partition_records = None  # noqa: SLF001

    def _watch(self) -> None:
        """Compare the positions with the broker's ends now and then, and read on where a partition stands still."""
        now_s = time.monotonic()
        if self._rebalancing or now_s - self._watched_s < WATCH_S:
            return
        self._watched_s = now_s
        try:
            assigned = list(self._consumer.assignment())
            self._ends = self._consumer.end_offsets(assigned, timeout_ms=END_OFFSETS_MS) if assigned else {}
            paused = self._consumer.paused()
            positions = {
                partition: self._consumer.position(partition, timeout_ms=POSITION_MS)
                for partition in assigned
                if partition not in paused
            }
        except KafkaError as error:  # a rebalance has begun, or a leader is being elected
            _log.debug("the ends of %s are not known now: %s", self._name, error)
            return
        stalled = self._stalls.look(now_s, STALL_S, positions, self._ends)
        for partition, reports in stalled.items():
            by_seek = reports == 1 and positions[partition] is not None
            _log.warning(
                "%s: nothing was read from partition %d, though its records %s to %d wait: %s", self._name,
                partition.partition, positions[partition], self._ends[partition] - 1,
                "seeking to the first of them" if by_seek else "joining the group again",
            )  # fmt: skip
            if self._metrics is not None:
                self._metrics.stalled_partition(self._topic, "seek" if by_seek else "rejoin")
            if not by_seek:
                self._join_again()
                return
            self._consumer.seek(partition, positions[partition])

    def _join_again(self) -> None:
        """Leave the group and join it with a new client, which reads on from the committed offsets."""
        self._epochs.update(self._assigned)  # what was read and not committed is read again
        self._assigned = set()
        with suppress(KafkaError, OSError):
            self._consumer.close()
        self._rebalancing = False
        self._ends = {}
        self._stalls = StallWatch()
        self._consumer = self._connect()

    def owns(self, record: ConsumedRecord) -> bool:
        """Return whether the record's partition has stayed with this member since the record was read."""
        return self._epochs[TopicPartition(self._name, record.partition)] == record.epoch

    def commit(self, records: Iterable[ConsumedRecord]) -> None:
        """Commit the offsets behind these records, except in partitions that were taken away meanwhile.

        During a rebalance nothing can be committed. A later poll then commits, for partitions that stay.

        Args:
            records: Records that are fully handled, in the order of their offsets within each partition.

        Raises:
            KafkaLinkError: The offsets cannot be committed.
        """
        for record in records:
            if self.owns(record):
                partition = TopicPartition(self._name, record.partition)
                self._uncommitted[partition] = (record.offset + 1, record.epoch)
        self._commit_pending()

    def _commit_pending(self) -> None:
        self._uncommitted = {
            partition: (offset, epoch)
            for partition, (offset, epoch) in self._uncommitted.items()
            if self._epochs[partition] == epoch
        }
        if not self._uncommitted:
            return
        offsets = {partition: OffsetAndMetadata(offset, "", -1) for partition, (offset, _) in self._uncommitted.items()}
        try:
            self._consumer.commit(offsets)
        except (CommitFailedError, RebalanceInProgressError) as error:
            # If the partitions move to another member, it reads the records again and recognises them as handled by
            # the high-water marks.
            _log.debug("offsets are committed later, the group is rebalancing: %s", error)
        except KafkaError as error:
            raise KafkaLinkError(
                "offsets cannot be committed", got=str(error), remedy="check that the broker runs; nothing is lost"
            ) from error
        else:
            self._uncommitted = {}

    def pause(self) -> None:
        """Stop fetching from the partitions of this member; `poll` then only keeps the membership."""
        self._consumer.pause(*self._consumer.assignment())

    def resume(self) -> None:
        """Fetch again from all paused partitions."""
        self._consumer.resume(*self._consumer.paused())

    def lag(self) -> int:
        """Return how many records of this member's partitions are not read yet.

        The ends are the broker's own of a few seconds ago: a partition that is not being fetched must show too.
        """
        total = 0
        for partition in self._consumer.assignment():
            end = max(self._ends.get(partition, 0), self._consumer.highwater(partition) or 0)
            if end:
                total += max(0, end - (self._consumer.position(partition, timeout_ms=POSITION_MS) or 0))
        return total

    def close(self) -> None:
        """Leave the group."""
        self._guard.close()
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ConfirmingProducer:
    """An idempotent producer that counts a record as sent only when every in-sync replica has it.

    Records of internal topics go to the partition of their key by the recorded partition count (topic_guard.py).

    Args:
        settings: Names the brokers and the topic prefix.
        role: The role's name: part of the events' source, and the stage of its dead letters.
        metrics: Counts the events sent and the records refused.
        now: Returns the time, with its zone, that is written into dead letters.

    Raises:
        KafkaLinkError: No broker answers.
    """

    def __init__(self, settings: Settings, role: str, metrics: Metrics, now: Callable[[], datetime]) -> None:
        self._settings = settings
        self._role = role
        self._metrics = metrics
        self._now = now
        self._signer = RecordSigner(settings)
        self._pending: list[tuple[str, Any]] = []
        self._routing = KeyRouting.of(settings)
        try:
            self._producer: Any = connect(
                KafkaProducer,
                settings.kafka.require_bootstrap(),
                CONNECT_S,
                security=settings.kafka_security,
                client_id=settings.kafka.topic(role),
                acks="all",
                enable_idempotence=True,
                delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
                request_timeout_ms=DELIVERY_TIMEOUT_MS // 2,
                max_request_size=2 * MAX_DEAD_LETTER_BYTES,
            )
        except (KafkaError, ValueError, OSError) as error:
            raise _unreachable(settings, error) from error

    def send(self, event: Event, *, event_id: str, occurred_at: datetime, traceparent: str | None = None) -> None:
        """Queue an event for sending; `flush` waits for its acknowledgement.

        Args:
            event: The event.
            event_id: The CloudEvents id.
            occurred_at: The CloudEvents time, with its zone.
            traceparent: The W3C trace context, left out where it is None.

        Raises:
            KafkaLinkError: The producer does not take the record.
            WireError: The event cannot be encoded.
        """
        record = encode(
            event, event_id=event_id, source=f"perennial/{self._role}", occurred_at=occurred_at, traceparent=traceparent
        )
        headers = self._signer.sign(event.topic, record.key, record.value, record.headers)
        self._send(event.topic, record.key, record.value, headers)

    def send_dead_letter(self, record: ConsumedRecord, reason: str, detail: str) -> None:
        """Queue a record that cannot be handled for the topic `dead-letters`.

        Args:
            record: The record, as it was read.
            reason: A short identifier of the reason, such as `bad-field`.
            detail: What was found and what is allowed.

        Raises:
            KafkaLinkError: The producer does not take the record.
        """
        value, headers = encode_dead_letter(
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
        # kafka-python cannot write a header without a value, which other clients can: write an empty one instead.
        self._send("dead-letters", record.key, value, [(name, raw or b"") for name, raw in headers])

    def _send(self, topic: str, key: bytes | None, value: bytes | None, headers: list[Any]) -> None:
        try:
            future = self._producer.send(
                self._settings.kafka.topic(topic), key=key, value=value, headers=headers,
                partition=self._routing.partition(topic, key),
            )  # fmt: skip
        except KafkaError as error:
            raise _undelivered(topic, error) from error
        self._pending.append((topic, future))

    def flush(self) -> None:
        """Wait until every queued record is acknowledged.

        Raises:
            KafkaLinkError: A record was not delivered.
        """
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
        """Close the connection. Records that were not flushed may be lost; a restarted role sends them again."""
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
        remedy="check that the broker runs",
    )


def _undelivered(topic: str, error: Exception) -> KafkaLinkError:
    return KafkaLinkError(
        f"an event for {topic} was not delivered",
        got=f"{type(error).__name__}: {error}",
        remedy="check that the broker runs and that the topic exists; nothing was committed, nothing is lost",
    )
