"""Dead letters on Kafka: read without a trace, or replayed.

Per batch: send, wait until everything is acknowledged, then save the progress. What a crash between the two sends
twice lands on the partition that it came from, where intake's window drops the repeat. The progress is in the object
store, replaced by compare-and-swap: Kafka forgets the offsets of a group that is away for a week, letters live for a
month, and two replays at once must not both send.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Self

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError

from perennial.storage.errors import ConflictError, NotFoundError, StoreError
from perennial.storage.failpoints import failpoint
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.quarantine import load_quarantine
from perennial.storage.registry.records import check_adapter
from perennial.streams.deadletters.model import (
    STATE_PREFIX,
    DeadLetterError,
    DeadLetterRecord,
    RedriveProgress,
    RedriveReport,
    Resend,
    Selection,
    decide,
    dump_progress,
    example_of,
    load_progress,
    read_dead_letter,
    resend,
)
from perennial.streams.events.dead_letter import MAX_DEAD_LETTER_BYTES
from perennial.streams.kafka.connect import close_producer, connect
from perennial.streams.kafka.topics import KafkaUnavailableError, identify, missing_topics_error
from perennial.streams.retention.quarantine_filter import QuarantineFilter
from perennial.streams.settings import Settings, SettingsError

TOPIC = "dead-letters"

_CONNECT_S = 10.0
_ACK_S = 60.0
_SILENT_S = 60.0
_MAX_FETCH_BYTES = 2 * MAX_DEAD_LETTER_BYTES
_MAX_BATCH = 100
_MAX_SCREENS = 1000


class _Erasures:
    """Whether what letters hold was to be forgotten since, by the quarantines when first asked: a new one for each batch."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._screens: dict[str, QuarantineFilter] = {}

    def __call__(self, letter: DeadLetterRecord) -> bool:
        example = example_of(letter)
        if example.adapter not in self._screens:
            try:
                name = check_adapter(example.adapter)
            except StoreError:  # no adapter can have that name: intake will refuse it again
                return False
            if len(self._screens) >= _MAX_SCREENS:
                self._screens.clear()
            self._screens[name] = QuarantineFilter(load_quarantine(self._store, name))
        return self._screens[example.adapter].blocks(example)


class _Saved:
    """The progress in the store."""

    def __init__(self, settings: Settings) -> None:
        topic = settings.kafka.topic(TOPIC)
        self.store = open_store(settings.store.require_uri(), settings.s3)
        self._key = f"{STATE_PREFIX}{topic}"
        self._topic_id = identify(settings, [TOPIC]).topic_ids[topic]
        self._etag: str | None = None

    def load(self) -> dict[int, RedriveProgress]:
        """How far replays came, by partition."""
        try:
            stored = self.store.get(self._key)
        except NotFoundError:
            self._etag = None
            return {}
        self._etag = stored.etag
        return load_progress(stored.data, self._topic_id)

    def save(self, progress: Mapping[int, RedriveProgress]) -> None:
        """Replace what was loaded. Raises DeadLetterError where another replay did so meanwhile."""
        data = dump_progress(self._topic_id, progress)
        try:
            self._etag = self.store.compare_and_swap(self._key, data, self._etag)
        except ConflictError as error:
            raise DeadLetterError(
                "another replay runs", got="progress that another one saved", allowed="one replay at a time",
                remedy="wait until it ends, then run this again",
            ) from error  # fmt: skip


class DeadLetters:
    """Reads the topic and changes nothing. Memory: one fetch."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = settings.kafka.topic(TOPIC)
        self._saved = _Saved(settings)
        self._consumer = _consumer(settings, _MAX_BATCH)
        self._partitions = _partitions(self._consumer, self._topic)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def progress(self) -> dict[int, RedriveProgress]:
        """How far replays came, by partition."""
        return self._saved.load()

    def erasures(self) -> Callable[[DeadLetterRecord], bool]:
        """Whether what a letter holds was to be forgotten since it was refused."""
        return _Erasures(self._saved.store)

    def scan(self, since: datetime | None = None) -> Iterator[DeadLetterRecord]:
        """The letters that are there now, oldest first within a partition."""
        with _kafka(self._settings):
            ends = self._consumer.end_offsets(self._partitions)
            starts = self._consumer.beginning_offsets(self._partitions)
            if since is not None:  # a record is stamped after the time in its header; librdkafka cuts to milliseconds
                moment = max(0, int(since.timestamp() * 1000) - 1000)
                found = self._consumer.offsets_for_times(dict.fromkeys(self._partitions, moment))
                starts = {each: found[each].offset if found.get(each) else ends[each] for each in self._partitions}
            self._consumer.assign(self._partitions)
            for each, offset in starts.items():
                self._consumer.seek(each, offset)
        silence = _Silence()
        while True:
            with _kafka(self._settings):
                if all(self._consumer.position(each) >= ends[each] for each in self._partitions):
                    return
                batches = self._consumer.poll(timeout_ms=500)
                silence.check(batches)
            for each, records in batches.items():
                yield from (_letter(record, self._settings) for record in records if record.offset < ends[each])

    def letter(self, partition: int, offset: int) -> DeadLetterRecord:
        """One letter. Raises NotFoundError."""
        place = TopicPartition(self._topic, partition)
        if place in self._partitions:
            with _kafka(self._settings):
                low = self._consumer.beginning_offsets([place])[place]
                end = self._consumer.end_offsets([place])[place]
                if low <= offset < end:
                    self._consumer.assign([place])
                    self._consumer.seek(place, offset)
                    silence = _Silence()
                    while self._consumer.position(place) <= offset:
                        batches = self._consumer.poll(timeout_ms=500, max_records=1)
                        silence.check(batches)
                        for record in batches.get(place, ()):
                            if record.offset == offset:
                                return _letter(record, self._settings)
        raise NotFoundError(
            "no such letter", got=f"{partition}:{offset}", allowed=f"partitions 0 to {len(self._partitions) - 1}, kept for 30 days",
            remedy="see `perennial dlq ls`",
        )  # fmt: skip


def rehearse(letters: DeadLetters, selection: Selection, *, max_replays: int, limit: int = 0) -> RedriveReport:
    """What a replay would do now; sends and saves nothing."""
    report, progress, is_erased = RedriveReport(), letters.progress(), letters.erasures()
    for letter in letters.scan(selection.since):
        room = limit - report.sent.total() if limit else 1
        decided = decide([letter], selection, progress, max_replays=max_replays, room=room, is_erased=is_erased)
        for each in decided.send:
            report.count(each)
        report.left.update(decided.left)
    return report


class Redriver:
    """Sends letters back, and saves which."""

    def __init__(self, settings: Settings, *, rate: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        """rate: letters per second, 0 for as fast as it goes."""
        if not 0 <= rate <= 1e6:
            raise SettingsError("the rate is not usable", got=rate, allowed="0 to 1000000 letters per second")
        self._settings = settings
        self._rate = rate
        self._monotonic = monotonic
        self._topic = settings.kafka.topic(TOPIC)
        self._batch = min(_MAX_BATCH, max(1, int(rate))) if rate else _MAX_BATCH
        self._saved = _Saved(settings)
        self._consumer = _consumer(settings, self._batch)
        try:
            self._partitions = _partitions(self._consumer, self._topic)
            self._producer = _producer(settings)
        except BaseException:
            self._consumer.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        close_producer(self._producer, 2)
        self._consumer.close()

    def run(
        self, selection: Selection, *, max_replays: int, limit: int = 0, stop: threading.Event | None = None,
        on_sent: Callable[[int], None] = lambda _n: None,
    ) -> RedriveReport:  # fmt: skip
        """Replay what is waiting now: letters that come meanwhile, refused again, are of the next run.

        limit: letters at most, 0 for all. stop: ends it after the batch under way. Raises DeadLetterError.
        """
        stop, report = stop or threading.Event(), RedriveReport()
        with _kafka(self._settings):
            ends = self._consumer.end_offsets(self._partitions)
            lows = self._consumer.beginning_offsets(self._partitions)
            saved = self._saved.load()
            progress = {each.partition: saved.get(each.partition) or RedriveProgress() for each in self._partitions}
            self._saved.save(progress)  # from here on a replay that began earlier ends
            self._consumer.assign(self._partitions)
            for each in self._partitions:
                progress[each.partition].advance(lows[each])
                self._consumer.seek(each, progress[each.partition].first)
            next_s, silence = self._monotonic(), _Silence()
            while not stop.is_set() and not (limit and report.sent.total() >= limit):
                if all(self._consumer.position(each) >= ends[each] for each in self._partitions):
                    break
                batches = self._consumer.poll(timeout_ms=500, max_records=self._batch)
                silence.check(batches)
                batch = [
                    _letter(record, self._settings)
                    for each, records in batches.items()
                    for record in records
                    if record.offset < ends[each]
                ]
                room = limit - report.sent.total() if limit else len(batch)
                decided = decide(
                    batch, selection, progress, max_replays=max_replays, room=room,
                    is_erased=_Erasures(self._saved.store),
                )  # fmt: skip
                report.left.update(decided.left)
                sent = self._replay(decided.send, decided.never, report, progress)
                on_sent(sent)
                if self._rate:
                    next_s = max(next_s, self._monotonic()) + sent / self._rate
                    stop.wait(max(0.0, next_s - self._monotonic()))
        report.stopped = stop.is_set()
        return report

    def _replay(
        self,
        letters: Sequence[DeadLetterRecord],
        never: Sequence[DeadLetterRecord],
        report: RedriveReport,
        progress: dict[int, RedriveProgress],
    ) -> int:
        """Send, wait for every acknowledgement, save. Returns how many were sent."""
        if not letters and not never:
            return 0
        futures = [self._send(resend(letter)) for letter in letters]
        done = list(never)
        for letter, future in zip(letters, futures, strict=True):
            try:
                future.get(timeout=_ACK_S)
            except MessageSizeTooLargeError:  # its topic takes less than it did
                report.left["too large for its topic"] += 1
            else:
                report.count(letter)
                done.append(letter)
        failpoint("dlq.send")
        for letter in done:
            progress[letter.partition].add(letter.offset, letter.offset + 1)
        self._saved.save(progress)
        failpoint("dlq.save")
        return len(done) - len(never)

    def _send(self, back: Resend) -> Any:
        topic = self._settings.kafka.topic(back.topic)
        known = self._producer.partitions_for(topic)
        partition = back.partition if back.partition in known else None  # a topic made again may have fewer
        headers = [(name, raw or b"") for name, raw in back.headers]  # kafka-python writes no null header
        return self._producer.send(topic, key=back.key, value=back.value, headers=headers, partition=partition)


def _letter(record: Any, settings: Settings) -> DeadLetterRecord:
    return read_dead_letter(
        record.partition, record.offset, record.key, record.value, record.headers, settings.kafka.topic_prefix
    )


def _consumer(settings: Settings, batch: int) -> Any:
    with _kafka(settings):
        return connect(
            KafkaConsumer,
            settings.kafka.require_bootstrap(),
            _CONNECT_S,
            client_id=settings.kafka.topic("dlq"),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_poll_records=batch,
            max_partition_fetch_bytes=_MAX_FETCH_BYTES,
            fetch_max_bytes=2 * _MAX_FETCH_BYTES,
        )


def _producer(settings: Settings) -> Any:
    with _kafka(settings):
        return connect(
            KafkaProducer,
            settings.kafka.require_bootstrap(),
            _CONNECT_S,
            client_id=settings.kafka.topic("dlq"),
            acks="all",
            # An idempotent producer is dead after one record too large for its topic. A retry here may send twice,
            # as a crash may: the window drops it.
            enable_idempotence=False,
            max_in_flight_requests_per_connection=1,
            max_request_size=2 * MAX_DEAD_LETTER_BYTES,
        )


def _partitions(consumer: Any, topic: str) -> list[TopicPartition]:
    numbers = sorted(consumer.partitions_for_topic(topic) or ())
    if not numbers:
        raise missing_topics_error([topic])
    return [TopicPartition(topic, number) for number in numbers]


class _Silence:
    """Ends a wait for records that do not come."""

    def __init__(self) -> None:
        self._heard_s = time.monotonic()

    def check(self, batches: Mapping[TopicPartition, Any]) -> None:
        """Raises KafkaTimeoutError where nothing came for a minute."""
        if batches:
            self._heard_s = time.monotonic()
        elif time.monotonic() - self._heard_s > _SILENT_S:
            raise KafkaTimeoutError(f"no records for {_SILENT_S:.0f} s")


@contextmanager
def _kafka(settings: Settings) -> Iterator[None]:
    """Turns kafka-python's errors into ours."""
    try:
        yield
    except (KafkaError, OSError) as error:
        raise KafkaUnavailableError(
            "Kafka did not do what was asked", got=f"{type(error).__name__}: {error}",
            allowed=f"a broker at {settings.kafka.bootstrap}",
            remedy="see that the broker runs, then run it again: what was not saved is sent again and dropped",
        ) from error  # fmt: skip
