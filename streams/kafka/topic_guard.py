"""Check while a role runs that its topics are still the recorded ones, and route keys by the recorded counts.

Clients look a topic's id and partition count up rarely (librdkafka and aiokafka every 5 minutes by default) and by the
topic's name. A topic that is deleted and created again is read on from the old position, and added partitions move keys
at a time that differs from client to client. So producers of the internal topics choose the partition themselves, from
the count in the installation record, and consumers verify the topic after they have fetched and before they work: an id
changes only once, so records that were fetched before a check that still finds the recorded id are of that topic.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Self

from kafka.errors import KafkaError, for_code
from kafka.partitioner.default import murmur2

from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.kafka.installation import (
    Installation,
    InstallationError,
    RecordedTopic,
    first_difference,
    load_installation,
    open_store_of,
    record_found,
)
from perennial.streams.kafka.maintenance import allowed_counts
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.kafka.topics import (
    ClusterIds,
    TopicError,
    connect_admin,
    identify,
    missing_topics_error,
    topic_id,
)
from perennial.streams.settings import Settings

PATIENCE_S: Final = 30.0
MAX_CACHED_KEYS: Final = 65_536
_RETRY_S: Final = 0.25
# Kafka's error codes UNKNOWN_TOPIC_OR_PARTITION, NONE and LEADER_NOT_AVAILABLE.
_UNKNOWN_TOPIC: Final = 3
_WITH_ID: Final = (0, 5)


class KeyPartitions(dict[bytes, int]):
    """The partition of every key, computed at the first look-up, as Java's default partitioner computes it.

    Args:
        partitions: The partition count.

    Example:
        >>> KeyPartitions(4)[b"acme/support"]
        3
    """

    def __init__(self, partitions: int) -> None:
        super().__init__()
        self._count = partitions

    def __missing__(self, key: bytes) -> int:
        if len(self) >= MAX_CACHED_KEYS:
            self.clear()
        self[key] = (int(murmur2(key)) & 0x7FFFFFFF) % self._count
        return self[key]


class KeyRouting:
    """Choose the partition of a record by its key and the recorded partition count.

    Args:
        counts: Partition counts by topic name without the prefix.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._partitions = {name: KeyPartitions(count) for name, count in counts.items()}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the routing by the installation record, empty where there is no store or no record.

        Raises:
            StoreError: The store does not answer.
        """
        store = open_store_of(settings)
        record = load_installation(store) if store else None
        return cls(record.routed_partitions() if record else {})

    def partition(self, topic: str, key: bytes | None) -> int | None:
        """Return the partition of a record, or None where the client chooses it.

        Args:
            topic: The topic's name without the prefix.
            key: The record's key.
        """
        partitions = self._partitions.get(topic)
        return None if partitions is None or key is None else partitions[key]

    def partitions(self, topic: str) -> Mapping[bytes, int]:
        """Return the partition of every key of a topic.

        Raises:
            KeyError: The topic's partition count is not recorded.
        """
        return self._partitions[topic]


class TopicGuard:
    """Compares topics with the installation record again and again, over one connection. Thread-safe.

    Args:
        settings: Name the brokers and the topic prefix.
        names: The topics that the role reads or writes, without the prefix.
        writes: Those of them that the role writes by key.
        fixed: Input topics among them that must not be created again while the guard is used.
        store: The object store with the record. None: the topics are compared with those that were found first.
        patience_s: Seconds for which a broker that does not answer, or a topic that is missing, is asked again.
        clock: A monotonic clock, in seconds.

    Raises:
        InstallationError: A topic is not the recorded one.
        TopicError: A topic does not exist.
        KafkaUnavailableError: Kafka does not answer.
        StoreError: The store does not answer.
    """

    def __init__(
        self,
        settings: Settings,
        names: Sequence[str],
        store: ObjectStore | None = None,
        *,
        writes: Sequence[str] = (),
        fixed: Sequence[str] = (),
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._names = tuple(names)
        self._full = [settings.kafka.topic(name) for name in names]
        self._store = store
        self._patience_s = patience_s
        self._clock = clock
        self._lock = threading.Lock()
        self._admin: Any = None
        self._verified_s = clock()
        found = identify(settings, names)
        self._cluster_id = found.cluster_id
        self._first = {full: found.topic_ids[full] for full in map(settings.kafka.topic, fixed)}
        if store is not None:
            self._record = record_found(settings, store, found, names, allowed_counts(store))
        else:
            self._record = _record_of(settings, found, names)
        self._counts = {name: count for name, count in self._record.partitions().items() if name in writes}

    @property
    def routing(self) -> KeyRouting:
        """The routing by the recorded counts of all topics."""
        return KeyRouting(self._record.routed_partitions())

    def verify(self, max_age_s: float = 0.0) -> None:
        """Compare every topic with the record. One request to the broker, a few milliseconds.

        Call it after records were fetched and before anything is done with them.

        Args:
            max_age_s: Do nothing where the last comparison is not older than this.

        Raises:
            InstallationError: A topic is not the recorded one, or the recorded count of a written topic has changed.
            TopicError: A topic does not exist, or an input topic was created again since the guard was made: positions
                in the old topic mean nothing in the new one.
            KafkaUnavailableError: Kafka does not answer.
            StoreError: The store does not answer.
        """
        with self._lock:
            if self._clock() - self._verified_s < max_age_s:
                return
            found = self._patiently(self._describe)
            error = first_difference(self._settings, self._record, found, self._names)
            if error is not None and self._store is not None:  # a repartitioning may run, or may have ended
                self._record = load_installation(self._store) or self._record
                counts = allowed_counts(self._store)
                error = first_difference(self._settings, self._record, found, self._names, counts)
            if error is not None:
                raise error
            for name, count in self._counts.items():
                if self._record.topics[name].partitions != count:
                    raise InstallationError(
                        f"{name} was repartitioned while this process was frozen or cut off",
                        got=f"{self._record.topics[name].partitions} partitions", allowed=f"{count} partitions",
                        remedy="start the role again; nothing of the batch in hand was written",
                    )  # fmt: skip
            for full, first in self._first.items():
                if found.topic_ids[full] != first:
                    raise _created_again(full, found.topic_ids[full], first)
            self._verified_s = self._clock()

    def _patiently(self, call: Callable[[], ClusterIds]) -> ClusterIds:
        deadline = self._clock() + self._patience_s
        while True:
            try:
                return call()
            except (KafkaError, OSError, ValueError) as error:
                self._disconnect()
                if self._clock() >= deadline:
                    raise KafkaUnavailableError(
                        got=f"{type(error).__name__}: {error}",
                        allowed=f"a broker at {self._settings.kafka.bootstrap}",
                        remedy="check that the broker runs; nothing was committed, nothing is lost",
                    ) from error
            except (KafkaUnavailableError, TopicError):
                if self._clock() >= deadline:
                    raise
            time.sleep(_RETRY_S)

    def _describe(self) -> ClusterIds:
        if self._admin is None:
            self._admin = connect_admin(self._settings)
        topics = self._admin.describe_topics(self._full)
        missing = [topic["name"] for topic in topics if topic["error_code"] == _UNKNOWN_TOPIC]
        if missing:
            raise missing_topics_error(sorted(missing))
        for topic in topics:  # an answer with an error holds no id, which must not pass for another id
            if topic["error_code"] not in _WITH_ID:
                raise for_code(topic["error_code"])(topic["name"])
        return ClusterIds(
            self._cluster_id,
            {topic["name"]: topic_id(topic["topic_id"]) for topic in topics},
            {topic["name"]: len(topic["partitions"]) for topic in topics},
        )

    def _disconnect(self) -> None:
        admin, self._admin = self._admin, None
        if admin is not None:
            with suppress(KafkaError, OSError):
                admin.close()

    def close(self) -> None:
        """Close the connection; a later `verify` opens another."""
        with self._lock:
            self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _record_of(settings: Settings, found: ClusterIds, names: Sequence[str]) -> Installation:
    topics = {}
    for name in names:
        full = settings.kafka.topic(name)
        topics[name] = RecordedTopic(topic_id=found.topic_ids[full], partitions=found.partitions[full])
    return Installation(cluster_id=found.cluster_id, topics=topics)


def _created_again(full: str, found: str, first: str) -> TopicError:
    return TopicError(
        f"the topic {full} was deleted and created again while this role was reading it",
        got=f"topic id {found}", allowed=f"topic id {first}",
        remedy="start the role again: it reads the new topic from its beginning",
    )  # fmt: skip
