"""The intake role: read what outside producers publish, validate it, and write examples and dead letters.

The role is a batch loop on librdkafka around `validation.Acceptor`. Per batch it consumes, asks Kafka whether the topics
are still the same, decides about every record, produces the results in order, waits until all of them are acknowledged,
and commits; while more records wait, the broker stores the commit during the next batch. A write that fails ends the
role without a commit of its batch; after a restart it begins at the last commit and writes the same results again, with
the same origins. So whatever crashes, a record of an origin partition is in `examples` only after all accepted records
before it.

Hazard: a gap would lose events, because downstream roles drop records at or below the highest offset that they have
seen. Hence the idempotent producer with librdkafka's gapless guarantee, and no delivery timeout: a record that timed
out while later ones were delivered would leave such a gap.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from perennial.storage.failpoints import failpoint
from perennial.streams.events.cloudevents import MAX_HEADER_BYTES, Headers
from perennial.streams.events.dead_letter import encode_dead_letter
from perennial.streams.intake.input_consumer import InputConsumer
from perennial.streams.intake.intake_metrics import IntakeMetrics
from perennial.streams.intake.librdkafka import (
    PRODUCER_CONFIG,
    RefusalWatch,
    client_log,
    cluster_ids,
    delivery_error,
    make_admin,
    message_headers,
    raise_if_refused,
    unavailable_error,
)
from perennial.streams.intake.validation import Accepted, Refused
from perennial.streams.kafka.installation import check_installation, load_installation, open_store_of, role_topics
from perennial.streams.kafka.security.options import librdkafka_options, with_password
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.kafka.topic_guard import TopicGuard
from perennial.streams.kafka.topics import topic_names
from perennial.streams.settings import Settings

SOURCES = ("documents", "interactions")
EXAMPLES = "examples"
DEAD_LETTERS = "dead-letters"
CHOSEN_BY_KEY = -1
"""The partition argument that makes librdkafka choose the partition."""

_VERIFY_S = 1.0
_FLUSH_POLL_S = 0.001
_FLUSH_POLL_MAX_S = 0.5
_GC_THRESHOLD = 50_000
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


def spare_garbage_collector() -> None:
    """Exempt what the start made from garbage collection, which takes a tenth of the time of the batch loop.

    The loop itself makes no reference cycles, but each batch holds thousands of records at once: by the default threshold
    of 700 objects, they are searched for cycles many times per batch.

    Only for a process that runs nothing else: it holds for all that the process has made so far.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)


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
        KafkaSecurityError: The broker refuses the settings of TLS and SASL.
        SettingsError: No brokers are set, or a file of TLS or SASL cannot be used.
    """

    def __init__(self, settings: Settings, metrics: IntakeMetrics, group: str | None = None) -> None:
        settings = self._settings = with_password(settings)
        self._metrics = metrics
        self._failure: KafkaError | None = None
        self._refusals = RefusalWatch(settings)
        self._handled: Counter[str] = Counter()  # since the last commit: records read per source, examples written
        self._refused: Counter[str] = Counter()  # since the last commit: dead letters written, by reason
        self._examples = settings.kafka.topic(EXAMPLES)
        self._dead_letters = settings.kafka.topic(DEAD_LETTERS)
        self._signer = RecordSigner(settings)
        self._sources = topic_names(settings, SOURCES)
        topics = {settings.kafka.topic(name): name for name in self._sources}
        common = {
            "bootstrap.servers": settings.kafka.require_bootstrap(),
            "client.id": settings.kafka.topic("intake"),
            **librdkafka_options(settings.kafka_security),
        }
        raise_if_refused(settings)  # the constructors below would only say after a timeout that nobody answers
        store = open_store_of(settings)
        before = None
        if store is not None:
            before = load_installation(store)
            check_installation(settings, store, role_topics(settings, "intake"))
        self._topic_guard = TopicGuard(settings, [EXAMPLES], store, writes=[EXAMPLES])
        # By the recorded count, whatever count librdkafka knows by now.
        self._partition_of = self._topic_guard.routing.partitions(EXAMPLES)
        try:
            admin = make_admin(common)
            known = dict(cluster_ids(admin, [*topics, self._examples, self._dead_letters]).topic_ids)
        except KafkaException as error:
            raise unavailable_error(settings, error) from error
        for topic, name in topics.items():
            # Of a topic that was created again while no intake ran, the id that was known before.
            if before is not None and name in before.topics and known[topic] not in before.known_topic_ids(name):
                known[topic] = before.topics[name].topic_id
        callbacks = {"on_delivery": self._on_delivery, "error_cb": self._refusals.suspects}
        self._producer = Producer({**common, **PRODUCER_CONFIG, **callbacks}, logger=client_log)
        group = group or settings.kafka.topic("intake")
        self._input = InputConsumer(settings, metrics, topics, known, store, common, group, self._refusals)

    def step(self, stop: threading.Event) -> int:
        """Read one batch, write its results and commit it. After a full batch the commit is only begun.

        Args:
            stop: Ends the wait for acknowledgements; the batch is then not committed.

        Returns:
            The number of records read; 0 where none arrived within a quarter of a second.

        Raises:
            DeliveryError: A record was not accepted by Kafka.
            ConsumeError: Records cannot be read.
            OffsetOrderError: Offsets of a partition did not increase.
            TopicError: A topic was deleted and not created again within ten seconds.
            InstallationError: The topic `examples` is not the one that the installation recorded.
            KafkaException: The offsets cannot be committed.
            KafkaSecurityError: The broker refuses TLS or SASL as set, after a change of either side.
        """
        self._metrics.tick("intake")
        messages = self._input.consume()
        if messages:
            failpoint("intake.consume")
            # While the broker accepts nothing, `_observe` does not run: report here that this batch waits.
            self._metrics.waiting(True)
            self._topic_guard.verify(_VERIFY_S)
            if not self._input.check_topics(stop):
                return len(messages)
            if self._input.reposition is None:
                self._produce(messages)
            failpoint("intake.produce")
            if not self._flush(stop):
                return len(messages)
            failpoint("intake.flush")
            self._input.commit()
            self._report_batch()
            failpoint("intake.commit")
            if self._input.reposition is not None:
                self._input.start_again()
        self._input.observe()
        self._producer.poll(0)  # an idle producer, too, must renew its token and report what the broker refuses
        self._raise_failure()
        return len(messages)

    def close(self) -> None:
        """Leave the group at once. Records that were not acknowledged are dropped; their sources are read again."""
        self._topic_guard.close()
        self._producer.purge()
        self._input.close()

    def _produce(self, messages: Sequence[Message]) -> None:
        """Decide about every record and queue the results, in order."""
        # Decisions are not kept until all are made: thousands of live tuples cost half as much again in time.
        partitions, examples, produce = self._input.partitions, self._examples, self._producer.produce
        partition_of, sign = self._partition_of, self._signer.sign if self._signer.enabled else None
        handled: Counter[str] = Counter()
        for message in messages:
            error = message.error()
            if error is not None:
                self._input.handle_error(error, message)
                continue
            state = partitions.get((message.topic(), message.partition()))
            if state is None:  # the partition was revoked after this record was fetched
                continue
            offset, timestamp_ms, epoch = message.offset(), message.timestamp()[1], message.leader_epoch() or 0
            headers, broken = None, None
            try:
                headers = message_headers(message)
            except (UnicodeDecodeError, SystemError):
                broken = _BROKEN_HEADERS
            decision = broken or state.acceptor.accept(message.value(), headers, offset, timestamp_ms, epoch)
            state.next_offset, state.last_epoch, state.last_ms = offset + 1, epoch, timestamp_ms
            if offset < state.resume_at and self._input.was_handled(state, message, epoch):
                continue
            handled[state.topic] += 1
            if type(decision) is Accepted:
                _, key, value, written = decision
                signed = sign(EXAMPLES, key, value, written) if sign else written
                try:
                    produce(examples, value, key, partition_of[key], headers=signed)
                except (BufferError, KafkaException):
                    self._send(examples, value, key, signed, partition_of[key])
                handled[EXAMPLES] += 1
            elif type(decision) is Refused:
                self._send_dead_letter(message, headers, decision)
                self._refused[decision.reason] += 1
        self._handled += handled

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
        # Only errors are reported, so no report ends librdkafka's wait: `flush` looks every 10 ms whether records are
        # left, and at the end of its time. Many short waits end soon after the last acknowledgement.
        wait_s = _FLUSH_POLL_S
        try:
            while self._producer.flush(wait_s):
                self._raise_failure()
                if stop.is_set():
                    return False
                wait_s = min(1.1 * wait_s, _FLUSH_POLL_MAX_S)
        except KafkaException as error:  # raised where the gapless guarantee is broken: the producer has ended
            raise delivery_error(error.args[0]) from error
        self._raise_failure()
        return True

    def _raise_failure(self) -> None:
        self._refusals.raise_if_refused()
        if self._failure is not None:
            raise delivery_error(self._failure)

    def _report_batch(self) -> None:
        """Report what was written."""
        for name in self._sources:
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

    def _on_delivery(self, error: KafkaError | None, _: Message) -> None:
        if error is not None and self._failure is None:
            self._failure = error
