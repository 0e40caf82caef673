"""Send dead letters back to the topics that they came from (redrive).

A redrive works in batches: send, wait until every record is acknowledged, then save the progress. After a crash between
the two, the batch is sent again; it goes to the partitions that it came from, where intake's window drops duplicates.

The progress is an object in the store, replaced by compare-and-swap, and not the offsets of a consumer group: Kafka
deletes the offsets of a group that is idle for a week, while dead letters are kept for a month, and two redrives at the
same time must not both send.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Self

from kafka import KafkaProducer, TopicPartition
from kafka.errors import MessageSizeTooLargeError

from perennial.storage.failpoints import failpoint
from perennial.streams.deadletters.model import DeadLetterRecord, Selection
from perennial.streams.deadletters.reader import (
    CONNECT_S,
    MAX_BATCH,
    TOPIC,
    ErasureCheck,
    IdleTimeout,
    ProgressStore,
    at_end,
    decode_records,
    make_consumer,
    partitions_of,
    translated_errors,
)
from perennial.streams.deadletters.redrive_plan import (
    RedrivenRecord,
    RedrivePlan,
    RedriveProgress,
    RedriveReport,
    plan_redrive,
    redriven_record,
)
from perennial.streams.events.dead_letter import MAX_DEAD_LETTER_BYTES
from perennial.streams.kafka.connect import close_producer, connect
from perennial.streams.settings import Settings, SettingsError

_ACK_S = 60.0


class Redriver:
    """Sends dead letters back, and saves which. A context manager.

    Args:
        settings: The installation's settings.
        rate: Dead letters per second, 0 for as many as possible.
        monotonic: Returns the time in seconds by which the rate is measured.

    Raises:
        SettingsError: The rate is out of range, or no brokers or no store are set.
        TopicError: The topic does not exist.
        KafkaUnavailableError: Kafka does not answer.
    """

    def __init__(self, settings: Settings, *, rate: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        if not 0 <= rate <= 1e6:
            raise SettingsError("the rate is not valid", got=rate, allowed="0 to 1000000 dead letters per second")
        self._settings = settings
        self._rate = rate
        self._monotonic = monotonic
        self._topic = settings.kafka.topic(TOPIC)
        self._batch = min(MAX_BATCH, max(1, int(rate))) if rate else MAX_BATCH
        self._saved = ProgressStore(settings)
        self._consumer = make_consumer(settings, self._batch)
        try:
            self._partitions = partitions_of(self._consumer, self._topic)
            self._producer = _make_producer(settings)
        except BaseException:
            self._consumer.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        close_producer(self._producer, 2)
        self._consumer.close()

    def run(
        self, selection: Selection, *, max_redrives: int, limit: int = 0, stop: threading.Event | None = None,
        on_sent: Callable[[int], None] = lambda _n: None,
    ) -> RedriveReport:  # fmt: skip
        """Send back the dead letters that wait now. Those that are refused again meanwhile are left to the next run.

        Args:
            selection: Which dead letters are selected.
            max_redrives: The most times that a record is sent back.
            limit: The most dead letters to send, 0 for all.
            stop: Ends the run after the present batch when set.
            on_sent: Called after every batch with the number of dead letters sent.

        Returns:
            The report.

        Raises:
            DeadLetterError: Another redrive runs, or the progress of earlier ones cannot be read.
            KafkaUnavailableError: Kafka does not answer.
        """
        stop, report = stop or threading.Event(), RedriveReport()
        with translated_errors(self._settings):
            ends, progress = self._begin()
            next_s, idle = self._monotonic(), IdleTimeout()
            while not stop.is_set() and not (limit and report.sent.total() >= limit):
                if at_end(self._consumer, ends):
                    break
                batches = self._consumer.poll(timeout_ms=500, max_records=self._batch)
                idle.check(batches)
                batch = list(decode_records(batches, ends, self._settings))
                plan = plan_redrive(
                    batch, selection, progress, max_redrives=max_redrives,
                    room=limit - report.sent.total() if limit else len(batch), is_erased=ErasureCheck(self._saved.store),
                )  # fmt: skip
                report.left.update(plan.left)
                sent = self._execute(plan, report, progress)
                on_sent(sent)
                if self._rate:
                    next_s = max(next_s, self._monotonic()) + sent / self._rate
                    stop.wait(max(0.0, next_s - self._monotonic()))
        report.stopped = stop.is_set()
        return report

    def _begin(self) -> tuple[dict[TopicPartition, int], dict[int, RedriveProgress]]:
        """Seek to the first dead letter that is not handled. Return the ends of the log and the progress."""
        ends: dict[TopicPartition, int] = self._consumer.end_offsets(self._partitions)
        lows = self._consumer.beginning_offsets(self._partitions)
        saved = self._saved.load()
        progress = {each.partition: saved.get(each.partition) or RedriveProgress() for each in self._partitions}
        self._saved.save(progress)  # a redrive that began earlier cannot save any more, so it ends
        self._consumer.assign(self._partitions)
        for each in self._partitions:
            progress[each.partition].advance(lows[each])
            self._consumer.seek(each, progress[each.partition].first)
        return ends, progress

    def _execute(self, plan: RedrivePlan, report: RedriveReport, progress: dict[int, RedriveProgress]) -> int:
        """Send, wait for every acknowledgement, save the progress. Return how many dead letters were sent."""
        if not plan.send and not plan.unsendable:
            return 0
        futures = [self._send(redriven_record(record)) for record in plan.send]
        sent: list[DeadLetterRecord] = []
        for record, future in zip(plan.send, futures, strict=True):
            try:
                future.get(timeout=_ACK_S)
            except MessageSizeTooLargeError:  # the topic's limit was lowered since
                report.left["too large for its topic"] += 1
            else:
                report.add_sent(record)
                sent.append(record)
        failpoint("dlq.send")
        for record in (*plan.unsendable, *sent):
            progress[record.partition].add(record.offset, record.offset + 1)
        self._saved.save(progress)
        failpoint("dlq.save")
        return len(sent)

    def _send(self, record: RedrivenRecord) -> Any:
        topic = self._settings.kafka.topic(record.topic)
        existing = self._producer.partitions_for(topic)
        # A topic that was deleted and created again may have fewer partitions: the key then decides.
        partition = record.partition if record.partition in existing else None
        headers = [(name, raw or b"") for name, raw in record.headers]  # kafka-python cannot write a null header
        return self._producer.send(topic, key=record.key, value=record.value, headers=headers, partition=partition)


def _make_producer(settings: Settings) -> Any:
    with translated_errors(settings):
        return connect(
            KafkaProducer,
            settings.kafka.require_bootstrap(),
            CONNECT_S,
            security=settings.kafka_security,
            client_id=settings.kafka.topic("dlq"),
            acks="all",
            # An idempotent producer cannot go on after one record that is too large for its topic. Without idempotence
            # the producer's own retries may send a record twice, as a crash may; intake's window drops the duplicate.
            enable_idempotence=False,
            max_in_flight_requests_per_connection=1,
            max_request_size=2 * MAX_DEAD_LETTER_BYTES,
        )
