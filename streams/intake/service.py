"""The role that faces outside producers: a batch loop on librdkafka around accept.py. Owns offsets and deliveries.

Per batch: consume, decide, produce in order, wait until everything is acknowledged, commit. A write that fails ends
the role with nothing committed; it starts again from the last commit and says the same once more (same origins).
So per origin partition everything below a record is in `examples` before the record is, whatever crashes.

Hazard: a gap would lose events, for downstream drops what is at or below the highest offset it has seen. Hence the
idempotent producer with a gapless guarantee, and no delivery timeout: a message that timed out while those after it
went through would be such a gap.
"""

from __future__ import annotations

import logging
import operator
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from perennial.storage.errors import PerennialError
from perennial.storage.failpoints import failpoint
from perennial.streams.events.cloudevents import MAX_HEADER_BYTES, Headers
from perennial.streams.events.dead_letter import MAX_DEAD_LETTER_BYTES, encode_dead_letter
from perennial.streams.intake.validation import Accepted, Acceptor, OriginPartition, Refused
from perennial.streams.kafka.topics import ClusterIds, KafkaUnavailableError, missing_topics_error, topic_id
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.intake")
_client_log = log.getChild("librdkafka")
_client_log.addFilter(lambda record: "gapless.guarantee is experimental" not in record.getMessage())

SOURCES = ("documents", "interactions")
EXAMPLES = "examples"
DEAD_LETTERS = "dead-letters"

_IDLE_S = 0.25
_GATHER_S = 0.005
_CALL_S = 10.0
_OBSERVE_S = 1.0
_PATIENCE_S = 30.0
_LOST_GROUP = frozenset({
    KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError._ASSIGNMENT_LOST, KafkaError._STATE,  # noqa: SLF001  # librdkafka's own codes have no other name
})  # fmt: skip
_TRANSIENT = frozenset({
    KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT,  # noqa: SLF001
    KafkaError._MAX_POLL_EXCEEDED,  # noqa: SLF001  # the rebalance that follows puts everything right
})  # fmt: skip
_PASSING = frozenset({
    KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.REQUEST_TIMED_OUT,
    KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._WAIT_COORD,  # noqa: SLF001
})  # fmt: skip
Answer = TypeVar("Answer")


class IntakeMetrics(Protocol):
    """What intake tells of itself."""

    def events_in(self, topic: str, n: int) -> None:
        """Records were read and decided."""

    def events_out(self, topic: str, n: int) -> None:
        """Records were written and acknowledged."""

    def refused(self, reason: str, n: int) -> None:
        """Records went to dead-letters."""

    def lag(self, topic: str, events: int) -> None:
        """So many records wait."""

    def oldest_age_s(self, seconds: float) -> None:
        """The oldest record that waits is so old."""

    def waiting(self, waits: bool) -> None:
        """Whether a batch was read and is not committed yet."""

    def progress(self) -> None:
        """A batch was committed."""


class DeliveryError(PerennialError):
    """Kafka did not take a record."""


class ConsumeError(PerennialError):
    """Records cannot be read from Kafka."""


def run_intake(settings: Settings, stop: threading.Event, metrics: IntakeMetrics) -> None:
    """Run until `stop` is set. Raises PerennialError where only a restart (or a person) helps."""
    intake = Intake(settings, metrics)
    try:
        while not stop.is_set():
            intake.step(stop)
    except KafkaException as error:
        raise _unavailable(settings, error) from error
    finally:
        intake.close()


@dataclass(slots=True)
class _Partition:
    """An assigned partition.

    resume_at: offsets below it were handled before and only rebuild the window. end_offset: where the log ended when
    last looked at, beyond transaction markers, which take offsets but are never delivered.
    """

    topic: str
    acceptor: Acceptor
    resume_at: int
    next_offset: int
    end_offset: int = 0
    last_ms: int = 0


class Intake:
    """One member of the intake group. Not thread-safe.

    group: another consumer group than the settings' own. Raises TopicError, KafkaUnavailableError, SettingsError.
    """

    def __init__(self, settings: Settings, metrics: IntakeMetrics, group: str | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._partitions: dict[tuple[str, int], _Partition] = {}
        self._failure: KafkaError | None = None
        self._decided: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._observed_s = 0.0
        self._batch_was_full = False
        self._examples = settings.kafka.topic(EXAMPLES)
        self._dead_letters = settings.kafka.topic(DEAD_LETTERS)
        self._topics = {settings.kafka.topic(name): name for name in SOURCES}
        common = {"bootstrap.servers": settings.kafka.require_bootstrap(), "client.id": settings.kafka.topic("intake")}
        self._admin = AdminClient(common, logger=_client_log)
        try:
            _identify(self._admin, [*self._topics, self._examples, self._dead_letters])
        except KafkaException as error:
            raise _unavailable(settings, error) from error
        self._producer = Producer({**common, **PRODUCER, "on_delivery": self._on_delivery}, logger=_client_log)
        self._consumer = Consumer(
            {**common, **CONSUMER, "group.id": group or settings.kafka.topic("intake")}, logger=_client_log
        )
        self._consumer.subscribe(list(self._topics), on_assign=self._on_assign, on_revoke=self._on_revoke)

    def step(self, stop: threading.Event) -> int:
        """Take one batch through to its commit. Returns the number of records consumed.

        Raises DeliveryError, ConsumeError, OffsetOrderError, KafkaException.
        """
        messages = self._consume()
        if messages:
            failpoint("intake.consume")
            # While the broker takes nothing, nothing is observed either: what is in hand has to be known as waiting.
            self._metrics.waiting(True)
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
        """Leave the group at once; what was not acknowledged is dropped and will be read again."""
        self._producer.purge()
        self._consumer.close()

    def _consume(self) -> list[Message]:
        """One batch. A lone record goes through at once: nothing waits for the batch to fill."""
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
        """Decide about every record and hand what follows from it to the producer, in order."""
        partitions, examples, produce = self._partitions, self._examples, self._producer.produce
        decided: Counter[str] = Counter()
        for message in messages:
            error = message.error()
            if error is not None:
                self._note(error, message)
                continue
            state = partitions.get((message.topic(), message.partition()))
            if state is None:  # of a partition that was revoked since it was fetched
                continue
            offset, timestamp_ms = message.offset(), message.timestamp()[1]
            headers, broken = None, None
            try:
                headers = _call_headers(message)
            except (UnicodeDecodeError, SystemError):
                broken = _BROKEN_HEADERS
            decision = broken or state.acceptor.accept(message.value(), headers, offset, timestamp_ms)
            state.next_offset, state.last_ms = offset + 1, timestamp_ms
            if offset < state.resume_at:
                continue
            decided[state.topic] += 1
            if type(decision) is Accepted:
                try:
                    produce(examples, decision.value, decision.key, headers=decision.headers)
                except (BufferError, KafkaException):
                    self._send(examples, decision.value, decision.key, decision.headers)
                decided[EXAMPLES] += 1
            elif type(decision) is Refused:
                self._send_dead_letter(message, headers, decision)
                self._refused[decision.reason] += 1
        self._decided += decided

    def _note(self, error: KafkaError, message: Message) -> None:
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
            state = self._partitions.get((message.topic(), message.partition()))
            if state is not None:
                state.end_offset = message.offset()
        else:
            _check(error)

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

    def _send(self, topic: str, value: bytes | None, key: bytes | None, headers: Headers) -> None:
        while True:
            try:
                self._producer.produce(topic, value, key, headers=headers)
            except BufferError:
                self._producer.poll(0.1)  # the local queue is full: wait for acknowledgements
                self._raise_failure()
            except KafkaException as error:
                raise _undelivered(error.args[0]) from error
            else:
                return

    def _flush(self, stop: threading.Event) -> bool:
        """Wait until everything is acknowledged, however long the broker is away; False where `stop` came first."""
        try:
            while self._producer.flush(0.5):
                self._raise_failure()
                if stop.is_set():
                    return False
        except KafkaException as error:  # the gapless guarantee ends the producer here
            raise _undelivered(error.args[0]) from error
        self._raise_failure()
        return True

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise _undelivered(self._failure)

    def _commit(self) -> None:
        offsets = [
            TopicPartition(topic, number, state.next_offset)
            for (topic, number), state in self._partitions.items()
            if state.next_offset > state.resume_at
        ]
        if offsets:
            try:
                _patiently(lambda: self._consumer.commit(offsets=offsets, asynchronous=False))
            except KafkaException as error:
                if error.args[0].code() not in _LOST_GROUP:
                    raise
                # Another member has the partitions now, or will: it says the same again, and downstream drops it.
                log.warning("not committed, the group is rebalancing: %s", error)
            for topic_partition in offsets:
                state = self._partitions.get((topic_partition.topic, topic_partition.partition))
                if state is not None:
                    state.resume_at = topic_partition.offset
        for name in SOURCES:
            if self._decided[name]:
                self._metrics.events_in(name, self._decided[name])
        for name, n in ((EXAMPLES, self._decided[EXAMPLES]), (DEAD_LETTERS, self._refused.total())):
            if n:
                self._metrics.events_out(name, n)
        for reason, n in self._refused.items():
            self._metrics.refused(reason, n)
        self._decided.clear()
        self._refused.clear()
        self._metrics.progress()
        self._metrics.waiting(False)

    def _observe(self) -> None:
        """Say how much waits, at most once a second."""
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
        """Start each partition one window before its commit, so that the window is rebuilt from the log."""
        ids = _identify(self._admin, sorted({each.topic for each in assigned})) if assigned else None
        committed = _patiently(lambda: consumer.committed(assigned, timeout=_CALL_S)) if assigned else []
        self._partitions = {}
        for each in committed:
            if each.error is not None:
                raise KafkaException(each.error)
            low, high = _patiently(partial(consumer.get_watermark_offsets, each, timeout=_CALL_S))
            resume_at = each.offset if low <= each.offset <= high else low
            each.offset = max(low, resume_at - self._settings.intake.dedupe_window)
            self._partitions[each.topic, each.partition] = self._partition(each, ids, resume_at)
        consumer.assign(committed)
        self._observed_s = 0.0
        log.info("assigned %d partitions", len(committed))

    def _partition(self, start: TopicPartition, ids: ClusterIds | None, resume_at: int) -> _Partition:
        topic = self._topics[start.topic]
        cluster_id, topic_ids = (ids.cluster_id, ids.topic_ids) if ids else ("", {})
        origin = OriginPartition(cluster_id, start.topic, topic_ids[start.topic], start.partition, topic)
        acceptor = Acceptor(origin, self._settings.intake.dedupe_window, self._settings.curate.learn_turns)
        return _Partition(topic, acceptor, resume_at, start.offset)

    def _on_revoke(self, _: Consumer, __: list[TopicPartition]) -> None:
        """Every batch is finished before the next consume, so nothing is under way here."""
        self._partitions = {}


PRODUCER: Mapping[str, Any] = {
    "enable.idempotence": True,
    "enable.gapless.guarantee": True,
    "message.timeout.ms": 0,
    "acks": "all",
    "partitioner": "murmur2_random",  # where Java's and kafka-python's default partitioners put the same key
    "compression.type": "none",  # kafka-python and aiokafka cannot read lz4 or zstd without further packages
    "linger.ms": 5,
    "message.max.bytes": MAX_DEAD_LETTER_BYTES,
    "queue.buffering.max.kbytes": 131_072,
    "delivery.report.only.error": True,
}
"""How the service writes: acknowledged by all replicas, in order, no gaps."""

CONSUMER: Mapping[str, Any] = {
    "enable.partition.eof": True,
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "earliest",
    "partition.assignment.strategy": "range",
    "session.timeout.ms": 10_000,
    "heartbeat.interval.ms": 2_000,
    "queued.max.messages.kbytes": 65_536,
    "fetch.queue.backoff.ms": 50,
}


_call_headers = operator.methodcaller("headers")
"""A record's headers.

Hazard: where a name is not UTF-8, confluent-kafka 2.12 returns tuples with a null pointer and leaves its exception
pending. CPython's specialised method call does not check for that: `message.headers()` would crash the process, or
raise at some later line. methodcaller goes through the checked call, which raises SystemError at once.
"""
_BROKEN_HEADERS = Refused("bad-header", "a header's name is not UTF-8; the headers were dropped")


def _patiently(call: Callable[[], Answer]) -> Answer:
    """What the call returns, once leaders and coordinators are there. Raises KafkaException after a while."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return call()
        except KafkaException as error:
            if error.args[0].code() not in _PASSING or time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def _check(error: KafkaError) -> None:
    """Let pass what librdkafka mends by itself. Raises ConsumeError, TopicError."""
    if error.code() in _TRANSIENT or error.retriable():
        log.warning("reading: %s", error)
        return
    if error.code() in {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC}:  # noqa: SLF001
        raise missing_topics_error([error.str()])
    raise ConsumeError(
        got=f"{error.name()}: {error.str()}", allowed="records", remedy="see the broker's log; restart intake"
    )


def _identify(admin: AdminClient, names: Sequence[str]) -> ClusterIds:
    """The ids of the cluster and of topics, by full name. Raises TopicError, KafkaException."""
    cluster = admin.describe_cluster(request_timeout=_CALL_S).result()
    found: dict[str, str] = {}
    missing = []
    for name, future in admin.describe_topics(TopicCollection(list(names)), request_timeout=_CALL_S).items():
        try:
            raw = future.result().topic_id
        except KafkaException as error:
            if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise
            missing.append(name)
        else:
            high, low = raw.get_most_significant_bits(), raw.get_least_significant_bits()
            found[name] = topic_id(uuid.UUID(int=((high % 2**64) << 64) | (low % 2**64)))
    if missing:
        raise missing_topics_error(sorted(missing))
    return ClusterIds(str(cluster.cluster_id), found)


def _undelivered(error: KafkaError) -> DeliveryError:
    return DeliveryError(
        got=f"{error.name()}: {error.str()}",
        allowed="an acknowledgement by all replicas",
        remedy="mend the broker or the topic (see `perennial topics create`), then restart intake: nothing is lost",
    )


def _unavailable(settings: Settings, error: KafkaException) -> PerennialError:
    return KafkaUnavailableError(
        got=str(error), allowed=f"a broker at {settings.kafka.bootstrap}", remedy="see that the broker runs"
    )
