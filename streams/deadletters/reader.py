"""Read the topic `dead-letters` without a consumer group, so that reading leaves no trace."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Self

from cachetools import LRUCache
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from perennial.storage.errors import ConflictError, NotFoundError, StoreError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.quarantine import load_quarantine
from perennial.storage.registry.records import check_adapter
from perennial.streams.deadletters.model import (
    DeadLetterError,
    DeadLetterRecord,
    Selection,
    as_example,
    read_dead_letter,
)
from perennial.streams.deadletters.redrive_plan import (
    STATE_PREFIX,
    RedriveProgress,
    RedriveReport,
    dump_progress,
    load_progress,
    plan_redrive,
)
from perennial.streams.events.dead_letter import MAX_DEAD_LETTER_BYTES
from perennial.streams.kafka.connect import connect
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.kafka.topics import identify, missing_topics_error
from perennial.streams.retention.quarantine_filter import QuarantineFilter
from perennial.streams.settings import Settings

TOPIC = "dead-letters"
MAX_BATCH = 100
CONNECT_S = 10.0

_IDLE_S = 60.0
_MAX_FETCH_BYTES = 2 * MAX_DEAD_LETTER_BYTES
_MAX_ADAPTERS = 1000


class ErasureCheck:
    """Tells whether a request to forget that came after a record was refused matches its dead letter.

    An adapter's quarantine is read once and kept, so make a new check for every batch.

    Args:
        store: The object store, which has the quarantines.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._filters: LRUCache[str, QuarantineFilter] = LRUCache(_MAX_ADAPTERS)

    def __call__(self, record: DeadLetterRecord) -> bool:
        """Return whether a request to forget matches the dead letter."""
        example = as_example(record)
        found = self._filters.get(example.adapter)
        if found is None:
            try:
                name = check_adapter(example.adapter)
            except StoreError:  # not a valid name of an adapter: intake will refuse the record again
                return False
            found = self._filters[name] = QuarantineFilter(load_quarantine(self._store, name), self._store)
        return found.blocks(example)


class ProgressStore:
    """The progress of redrives in the object store.

    Args:
        settings: Name the store, the brokers and the topic prefix.

    Raises:
        TopicError: The topic `dead-letters` does not exist.
        KafkaUnavailableError: Kafka does not answer.
        SettingsError: No brokers or no store are set.
    """

    def __init__(self, settings: Settings) -> None:
        topic = settings.kafka.topic(TOPIC)
        self.store = open_store(settings.store.require_uri(), settings.s3)
        self._key = f"{STATE_PREFIX}{topic}"
        self._topic_id = identify(settings, [TOPIC]).topic_ids[topic]
        self._etag: str | None = None

    def load(self) -> dict[int, RedriveProgress]:
        """Return the progress by partition; empty where none is stored.

        Raises:
            DeadLetterError: The stored progress cannot be read.
        """
        try:
            stored = self.store.get(self._key)
        except NotFoundError:
            self._etag = None
            return {}
        self._etag = stored.etag
        return load_progress(stored.data, self._topic_id)

    def save(self, progress: Mapping[int, RedriveProgress]) -> None:
        """Replace the progress that was loaded.

        Args:
            progress: The progress by partition.

        Raises:
            DeadLetterError: Another redrive has replaced it since it was loaded.
        """
        data = dump_progress(self._topic_id, progress)
        try:
            self._etag = self.store.compare_and_swap(self._key, data, self._etag)
        except ConflictError as error:
            raise DeadLetterError(
                "another redrive runs", got="progress that another redrive saved", allowed="one redrive at a time",
                remedy="wait until it ends, then run this again",
            ) from error  # fmt: skip


class DeadLetterReader:
    """Reads the topic `dead-letters` and changes nothing. It keeps one fetch in memory. A context manager.

    Args:
        settings: The installation's settings.

    Raises:
        TopicError: The topic does not exist.
        KafkaUnavailableError: Kafka does not answer.
        SettingsError: No brokers or no store are set.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = settings.kafka.topic(TOPIC)
        self._saved = ProgressStore(settings)
        self._consumer = make_consumer(settings, MAX_BATCH)
        self._partitions = partitions_of(self._consumer, self._topic)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def progress(self) -> dict[int, RedriveProgress]:
        """Return what redrives have handled, by partition."""
        return self._saved.load()

    def scan(self, since: datetime | None = None) -> Iterator[DeadLetterRecord]:
        """Yield the dead letters that exist now, within each partition in the order of their offsets.

        Args:
            since: The earliest time of refusal, with its zone. Up to a second earlier ones may be among the results.

        Yields:
            The dead letters.

        Raises:
            KafkaUnavailableError: Kafka does not answer.
        """
        with translated_errors(self._settings):
            ends = self._consumer.end_offsets(self._partitions)
            starts = self._consumer.beginning_offsets(self._partitions)
            if (
                since is not None
            ):  # Kafka has the time of the write, a little later than the refusal, in whole milliseconds
                moment = max(0, int(since.timestamp() * 1000) - 1000)
                found = self._consumer.offsets_for_times(dict.fromkeys(self._partitions, moment))
                starts = {each: found[each].offset if found.get(each) else ends[each] for each in self._partitions}
            self._consumer.assign(self._partitions)
            for each, offset in starts.items():
                self._consumer.seek(each, offset)
        idle = IdleTimeout()
        while True:
            with translated_errors(self._settings):
                if at_end(self._consumer, ends):
                    return
                batches = self._consumer.poll(timeout_ms=500)
                idle.check(batches)
            yield from decode_records(batches, ends, self._settings)

    def read(self, partition: int, offset: int) -> DeadLetterRecord:
        """Return one dead letter.

        Args:
            partition: Its partition in `dead-letters`.
            offset: Its offset in `dead-letters`.

        Returns:
            The dead letter.

        Raises:
            NotFoundError: There is none at that position.
            KafkaUnavailableError: Kafka does not answer.
        """
        wanted = TopicPartition(self._topic, partition)
        if wanted in self._partitions:
            with translated_errors(self._settings):
                low = self._consumer.beginning_offsets([wanted])[wanted]
                end = self._consumer.end_offsets([wanted])[wanted]
                if low <= offset < end:
                    self._consumer.assign([wanted])
                    self._consumer.seek(wanted, offset)
                    idle = IdleTimeout()
                    while self._consumer.position(wanted) <= offset:
                        batches = self._consumer.poll(timeout_ms=500, max_records=1)
                        idle.check(batches)
                        for record in batches.get(wanted, ()):
                            if record.offset == offset:
                                return _decode(record, self._settings)
        raise NotFoundError(
            "no such dead letter", got=f"{partition}:{offset}",
            allowed=f"partitions 0 to {len(self._partitions) - 1}, kept for 30 days", remedy="see `perennial dlq ls`",
        )  # fmt: skip

    def dry_run(self, selection: Selection, *, max_redrives: int, limit: int = 0) -> RedriveReport:
        """Return what a redrive would do now; send and save nothing.

        Args:
            selection: Which dead letters are selected.
            max_redrives: The most times that a record is sent back.
            limit: The most dead letters to send, 0 for all.

        Returns:
            The report.

        Raises:
            KafkaUnavailableError: Kafka does not answer.
            DeadLetterError: The progress of earlier redrives cannot be read.
        """
        report, progress, is_erased = RedriveReport(), self.progress(), ErasureCheck(self._saved.store)
        for record in self.scan(selection.since):
            room = limit - report.sent.total() if limit else 1
            plan = plan_redrive(
                [record], selection, progress, max_redrives=max_redrives, room=room, is_erased=is_erased
            )
            for each in plan.send:
                report.add_sent(each)
            report.left.update(plan.left)
        return report


def _decode(record: Any, settings: Settings) -> DeadLetterRecord:
    return read_dead_letter(
        record.partition, record.offset, record.key, record.value, record.headers, settings.kafka.topic_prefix
    )


def decode_records(
    batches: Mapping[TopicPartition, Sequence[Any]], ends: Mapping[TopicPartition, int], settings: Settings
) -> Iterator[DeadLetterRecord]:
    """Yield the dead letters of a poll that existed when the run began."""
    for partition, records in batches.items():
        yield from (_decode(record, settings) for record in records if record.offset < ends[partition])


def at_end(consumer: Any, ends: Mapping[TopicPartition, int]) -> bool:
    """Return whether the consumer has read up to these offsets."""
    return all(consumer.position(partition) >= end for partition, end in ends.items())


def make_consumer(settings: Settings, batch: int) -> Any:
    """Return a consumer without a group that returns at most `batch` records per poll."""
    with translated_errors(settings):
        return connect(
            KafkaConsumer,
            settings.kafka.require_bootstrap(),
            CONNECT_S,
            security=settings.kafka_security,
            client_id=settings.kafka.topic("dlq"),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_poll_records=batch,
            max_partition_fetch_bytes=_MAX_FETCH_BYTES,
            fetch_max_bytes=2 * _MAX_FETCH_BYTES,
        )


def partitions_of(consumer: Any, topic: str) -> list[TopicPartition]:
    """Return a topic's partitions; raise TopicError where the topic does not exist."""
    numbers = sorted(consumer.partitions_for_topic(topic) or ())
    if not numbers:
        raise missing_topics_error([topic])
    return [TopicPartition(topic, number) for number in numbers]


class IdleTimeout:
    """Ends the wait for records that never arrive."""

    def __init__(self) -> None:
        self._received_s = time.monotonic()

    def check(self, batches: Mapping[TopicPartition, Any]) -> None:
        """Raise KafkaTimeoutError where no record has arrived for a minute."""
        if batches:
            self._received_s = time.monotonic()
        elif time.monotonic() - self._received_s > _IDLE_S:
            raise KafkaTimeoutError(f"no records for {_IDLE_S:.0f} s")


@contextmanager
def translated_errors(settings: Settings) -> Iterator[None]:
    """Raise KafkaUnavailableError in place of kafka-python's errors."""
    # No retry loop stands around it: progress is saved per batch, so running the command again is the retry.
    try:
        yield
    except (KafkaError, OSError) as error:
        raise KafkaUnavailableError(
            "dead letters cannot be read or sent back", got=f"{type(error).__name__}: {error}",
            allowed=f"a broker at {settings.kafka.bootstrap}",
            remedy="check that the broker runs, then run this again: unsaved progress is sent again and dropped by intake",
        ) from error  # fmt: skip
