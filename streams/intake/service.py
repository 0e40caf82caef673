"""The intake role: read what outside producers publish, validate it, and write examples and dead letters.

The role is a batch loop on librdkafka around `validation.Acceptor`. Per batch it consumes, decides about every record,
produces the results in order, waits until all of them are acknowledged, and commits. A write that fails ends the role
with nothing committed; after a restart it begins at the last commit and writes the same results again, with the same
origins. So whatever crashes, a record of an origin partition is in `examples` only after all accepted records before
it.

Hazard: a gap would lose events, because downstream roles drop records at or below the highest offset that they have
seen. Hence the idempotent producer with librdkafka's gapless guarantee, and no delivery timeout: a record that timed
out while later ones were delivered would leave such a gap.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from perennial.storage.failpoints import failpoint
from perennial.streams.events.cloudevents import MAX_HEADER_BYTES, Headers
from perennial.streams.events.dead_letter import encode_dead_letter
from perennial.streams.intake.intake_metrics import IntakeMetrics
from perennial.streams.intake.librdkafka import (
    CONSUMER_CONFIG,
    LOST_GROUP,
    PRODUCER_CONFIG,
    client_log,
    cluster_ids,
    commit_offsets,
    committed_offsets,
    delivery_error,
    log,
    log_bounds,
    message_headers,
    raise_unless_recovering,
    unavailable_error,
)
from perennial.streams.intake.refused import RefusedExamplesLookup
from perennial.streams.intake.validation import Accepted, Acceptor, OriginPartition, Refused
from perennial.streams.kafka.installation import ROLE_TOPICS, check_installation, open_store_of
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.kafka.topic_guard import TopicGuard
from perennial.streams.kafka.topics import ClusterIds
from perennial.streams.settings import Settings

SOURCES = ("documents", "interactions")
EXAMPLES = "examples"
DEAD_LETTERS = "dead-letters"
CHOSEN_BY_KEY = -1
"""The partition argument that makes librdkafka choose the partition."""

_IDLE_S = 0.25
_GATHER_S = 0.005
_OBSERVE_S = 1.0
_VERIFY_S = 1.0
_BROKEN_HEADERS = Refused("bad-header", "a header's name is not UTF-8; the headers were dropped")


def run_intake(settings: Settings, stop: threading.Event, metrics: IntakeMetrics) -> None:
    """Run the intake role until it is told to stop.

    Args:
        settings: The installation's settings.
        stop: Ends the role when set, even while the broker is away.
        metrics: Where the role reports what it does.

    Raises:
        PerennialError: The role cannot go on: Kafka does not answer, a topic is missing, or a record cannot be read or
            delivered.
    """
    intake = Intake(settings, metrics)
    try:
        while not stop.is_set():
            intake.step(stop)
    except KafkaException as error:
        raise unavailable_error(settings, error) from error
    finally:
        intake.close()


@dataclass(slots=True)
class _Partition:
    """The state of an assigned partition.

    Attributes:
        topic: The topic's name without the prefix.
        acceptor: Decides about the partition's records.
        resume_at: The committed offset. Records below it were handled before; they are read again only to rebuild the
            window of duplicates.
        next_offset: The offset behind the last record that was read.
        end_offset: The end of the log when the consumer last reached it. It counts transaction markers too, which have
            offsets but are never delivered, so that they do not count as lag.
        last_ms: The time of the last record that was read, in ms since the epoch.
    """

    topic: str
    acceptor: Acceptor
    resume_at: int
    next_offset: int
    end_offset: int = 0
    last_ms: int = 0


class Intake:
    """One member of the intake group. Not thread-safe.

    Args:
        settings: The installation's settings.
        metrics: Where the role reports what it does.
        group: The consumer group, with the prefix; by default the settings' own.

    Raises:
        TopicError: A topic does not exist.
        InstallationError: A topic is not the one that the installation recorded.
        KafkaUnavailableError: Kafka does not answer.
        SettingsError: No brokers are set.
    """

    def __init__(self, settings: Settings, metrics: IntakeMetrics, group: str | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._partitions: dict[tuple[str, int], _Partition] = {}
        self._failure: KafkaError | None = None
        self._handled: Counter[str] = Counter()  # since the last commit: records read per source, examples written
        self._refused: Counter[str] = Counter()  # since the last commit: dead letters written, by reason
        self._observed_s = 0.0
        self._batch_was_full = False
        self._examples = settings.kafka.topic(EXAMPLES)
        self._dead_letters = settings.kafka.topic(DEAD_LETTERS)
        self._signer = RecordSigner(settings)
        self._topics = {settings.kafka.topic(name): name for name in SOURCES}
        common = {"bootstrap.servers": settings.kafka.require_bootstrap(), "client.id": settings.kafka.topic("intake")}
        self._admin = AdminClient(common, logger=client_log)
        store = open_store_of(settings)
        self._refused_at = None if store is None else RefusedExamplesLookup(store)
        if store is not None:
            check_installation(settings, store, ROLE_TOPICS["intake"])
        self._topic_guard = TopicGuard(settings, [EXAMPLES], store, writes=[EXAMPLES])
        # By the recorded count, whatever count librdkafka knows by now.
        self._partition_of = self._topic_guard.routing.partitions(EXAMPLES)
        try:
            cluster_ids(self._admin, [*self._topics, self._examples, self._dead_letters])
        except KafkaException as error:
            raise unavailable_error(settings, error) from error
        self._producer = Producer({**common, **PRODUCER_CONFIG, "on_delivery": self._on_delivery}, logger=client_log)
        self._consumer = Consumer(
            {**common, **CONSUMER_CONFIG, "group.id": group or settings.kafka.topic("intake")}, logger=client_log
        )
        self._consumer.subscribe(list(self._topics), on_assign=self._on_assign, on_revoke=self._on_revoke)

    def step(self, stop: threading.Event) -> int:
        """Read one batch, write its results and commit it.

        Args:
            stop: Ends the wait for acknowledgements; the batch is then not committed.

        Returns:
            The number of records read; 0 where none arrived within a quarter of a second.

        Raises:
            DeliveryError: A record was not accepted by Kafka.
            ConsumeError: Records cannot be read.
            OffsetOrderError: Offsets of a partition did not increase.
            TopicError: A topic was deleted.
            InstallationError: The topic `examples` is not the one that the installation recorded.
            KafkaException: The offsets cannot be committed.
        """
        messages = self._consume()
        if messages:
            failpoint("intake.consume")
            # While the broker accepts nothing, `_observe` does not run: report here that this batch waits.
            self._metrics.waiting(True)
            self._topic_guard.verify(_VERIFY_S)
            self._produce(messages)
            failpoint("intake.produce")
            if not self._flush(stop):
                return len(messages)
            failpoint("intake.flush")
            self._commit()
            failpoint("intake.commit")
        self._observe()
        return len(messages)

    def close(self) -> None:
        """Leave the group at once. Records that were not acknowledged are dropped; their sources are read again."""
        self._topic_guard.close()
        self._producer.purge()
        self._consumer.close()

    def _consume(self) -> list[Message]:
        """Read one batch. A single record is returned at once: a batch does not wait until it is full."""
        size = self._settings.intake.intake_batch
        if self._batch_was_full:
            messages = self._consumer.consume(size, _GATHER_S)
        else:
            messages = self._consumer.consume(1, _IDLE_S)
            if messages and size > 1:
                messages += self._consumer.consume(size - 1, _GATHER_S)
        self._batch_was_full = len(messages) == size
        return list(messages)

    def _produce(self, messages: Sequence[Message]) -> None:
        """Decide about every record and queue the results, in order."""
        partitions, examples, produce = self._partitions, self._examples, self._producer.produce
        partition_of = self._partition_of
        sign = self._signer.sign if self._signer.enabled else None
        handled: Counter[str] = Counter()
        for message in messages:
            error = message.error()
            if error is not None:
                self._handle_error(error, message)
                continue
            state = partitions.get((message.topic(), message.partition()))
            if state is None:  # the partition was revoked after this record was fetched
                continue
            offset, timestamp_ms = message.offset(), message.timestamp()[1]
            headers, broken = None, None
            try:
                headers = message_headers(message)
            except (UnicodeDecodeError, SystemError):
                broken = _BROKEN_HEADERS
            decision = broken or state.acceptor.accept(
                message.value(), headers, offset, timestamp_ms, message.leader_epoch() or 0
            )
            state.next_offset, state.last_ms = offset + 1, timestamp_ms
            if offset < state.resume_at:
                continue
            handled[state.topic] += 1
            if type(decision) is Accepted:
                signed = sign(EXAMPLES, decision.key, decision.value, decision.headers) if sign else decision.headers
                try:
                    produce(examples, decision.value, decision.key, partition_of[decision.key], headers=signed)
                except (BufferError, KafkaException):
                    self._send(examples, decision.value, decision.key, signed, partition_of[decision.key])
                handled[EXAMPLES] += 1
            elif type(decision) is Refused:
                self._send_dead_letter(message, headers, decision)
                self._refused[decision.reason] += 1
        self._handled += handled

    def _handle_error(self, error: KafkaError, message: Message) -> None:
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
            state = self._partitions.get((message.topic(), message.partition()))
            if state is not None:
                state.end_offset = message.offset()
        else:
            raise_unless_recovering(error)

    def _send_dead_letter(self, message: Message, headers: Headers | None, refused: Refused) -> None:
        value, all_headers = encode_dead_letter(
            message.value(),
            headers,
            reason=refused.reason,
            stage="intake",
            detail=refused.detail,
            topic=message.topic(),
            partition=message.partition(),
            offset=message.offset(),
            at=datetime.now(UTC),
        )
        key = message.key()
        self._send(self._dead_letters, value, key if key and len(key) <= MAX_HEADER_BYTES else None, all_headers)

    def _send(
        self, topic: str, value: bytes | None, key: bytes | None, headers: Headers, partition: int = CHOSEN_BY_KEY
    ) -> None:
        while True:  # not a retry of something that failed: it waits for room in the producer's queue
            try:
                self._producer.produce(topic, value, key, partition, headers=headers)
            except BufferError:
                self._producer.poll(0.1)  # handles acknowledgements, which make room
                self._raise_failure()
            except KafkaException as error:
                raise delivery_error(error.args[0]) from error
            else:
                return

    def _flush(self, stop: threading.Event) -> bool:
        """Wait until every queued record is acknowledged, however long it takes; return False where `stop` is set."""
        try:
            while self._producer.flush(0.5):
                self._raise_failure()
                if stop.is_set():
                    return False
        except KafkaException as error:  # raised where the gapless guarantee is broken: the producer has ended
            raise delivery_error(error.args[0]) from error
        self._raise_failure()
        return True

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise delivery_error(self._failure)

    def _commit(self) -> None:
        offsets = [
            TopicPartition(topic, number, state.next_offset)
            for (topic, number), state in self._partitions.items()
            if state.next_offset > state.resume_at
        ]
        if offsets:
            try:
                commit_offsets(self._consumer, offsets)
            except KafkaException as error:
                if error.args[0].code() not in LOST_GROUP:
                    raise
                # The member that gets the partitions writes the same results again; downstream roles drop them.
                log.warning("offsets are not committed, the group is rebalancing: %s", error)
            for topic_partition in offsets:
                state = self._partitions.get((topic_partition.topic, topic_partition.partition))
                if state is not None:
                    state.resume_at = topic_partition.offset
        for name in SOURCES:
            if self._handled[name]:
                self._metrics.events_in(name, self._handled[name])
        for name, n in ((EXAMPLES, self._handled[EXAMPLES]), (DEAD_LETTERS, self._refused.total())):
            if n:
                self._metrics.events_out(name, n)
        for reason, n in self._refused.items():
            self._metrics.refused(reason, n)
        self._handled.clear()
        self._refused.clear()
        self._metrics.progress()
        self._metrics.waiting(False)

    def _observe(self) -> None:
        """Report how many records wait, at most once a second."""
        now_s = time.time()
        if now_s - self._observed_s < _OBSERVE_S:
            return
        self._observed_s = now_s
        waiting = dict.fromkeys(self._topics.values(), 0)
        oldest_ms = now_s * 1000
        for (topic, number), state in self._partitions.items():
            _, high = self._consumer.get_watermark_offsets(TopicPartition(topic, number), cached=True)
            lag = max(0, high - max(state.next_offset, state.end_offset))  # high is negative until the first fetch
            waiting[state.topic] += lag
            if lag and state.last_ms > 0:
                oldest_ms = min(oldest_ms, state.last_ms)
        for name, lag in waiting.items():
            self._metrics.lag(name, lag)
        self._metrics.oldest_age_s(max(0.0, now_s - oldest_ms / 1000) if any(waiting.values()) else 0.0)

    def _on_delivery(self, error: KafkaError | None, _: Message) -> None:
        if error is not None and self._failure is None:
            self._failure = error

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        """Start each partition one window before its committed offset, so that the window is rebuilt from the log."""
        self._partitions = {}
        if assigned:
            ids = cluster_ids(self._admin, sorted({each.topic for each in assigned}))
            assigned = committed_offsets(consumer, assigned)
            for each in assigned:
                low, high = log_bounds(consumer, each)
                resume_at = each.offset if low <= each.offset <= high else low
                each.offset = max(low, resume_at - self._settings.intake.dedupe_window)
                self._partitions[each.topic, each.partition] = self._partition(each, ids, resume_at)
        consumer.assign(assigned)
        self._observed_s = 0.0
        log.info("assigned %d partitions", len(assigned))

    def _partition(self, start: TopicPartition, ids: ClusterIds, resume_at: int) -> _Partition:
        topic = self._topics[start.topic]
        origin = OriginPartition(ids.cluster_id, start.topic, ids.topic_ids[start.topic], start.partition, topic)
        settings = self._settings
        acceptor = Acceptor(origin, settings.intake.dedupe_window, settings.curate.learn_turns, self._refused_at)
        return _Partition(topic, acceptor, resume_at, start.offset)

    def _on_revoke(self, _: Consumer, __: list[TopicPartition]) -> None:
        """Forget the partitions. This runs inside `consume`, when the batch before is finished."""
        self._partitions = {}
