"""Check that the origin of an example is one that the broker can have given: cluster, topic, offset and leader epoch.

High-water marks rest on origins. One forged record with the offset 2**63 - 1 would raise a mark above every later
record of an adapter. So scorer and curate refuse an origin that is beyond the log's end, or that names a cluster
or a topic that this installation never read.

The answers of the broker are cached. They are asked for again only where a record exceeds them: offsets and epochs only
rise, and an id that is new is recorded before the first example with it is published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, Self

from kafka import TopicPartition
from kafka.admin import KafkaAdminClient, OffsetSpec
from kafka.errors import KafkaError

from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.events.high_water_marks import Position
from perennial.streams.events.models import Origin
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.connect import require_listener
from perennial.streams.kafka.installation import Installation, load_installation
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.kafka.security.options import kafka_python_options
from perennial.streams.kafka.topics import BOOTSTRAP_TIMEOUT_MS, topic_id
from perennial.streams.settings import Settings

ORIGIN_TOPICS = ("documents", "interactions")
"""The topics whose records become examples: these, and those of single tenants such as `documents.acme`."""
MAX_FOREIGN = 10_000
"""Origin partitions of other clusters and topics that are remembered, so that nobody is asked about them again."""


class LogEnd(NamedTuple):
    """The end of a partition's log.

    Attributes:
        start: the first offset that the log still has.
        end: the offset behind the last record; negative while the partition has no leader to ask.
        epoch: the partition's leader epoch; None where the broker does not report it.
    """

    start: int
    end: int
    epoch: int | None


class Logs(Protocol):
    """What a broker and the installation record report; `BrokerLogs` asks for it."""

    def cluster_ids(self) -> set[str]:
        """Return the ids of this installation's cluster."""

    def topic_ids(self, topic: str) -> list[str]:
        """Return every id that a topic has had, the present one last; empty where it is no topic of examples.

        Args:
            topic: the topic's name with the prefix.
        """

    def ends(self, topic: str) -> Mapping[int, LogEnd]:
        """Return the end of every partition of a topic.

        Args:
            topic: the topic's name with the prefix.
        """

    def close(self) -> None:
        """Close the connection."""


class BrokerLogs:
    """Asks the broker and the store. Not thread-safe; the connection is opened at the first question.

    Args:
        settings: names the brokers and the topic prefix.
        store: holds the installation record.
    """

    def __init__(self, settings: Settings, store: ObjectStore) -> None:
        self._settings = settings
        self._store = store
        self._installation: Installation | None = None
        self._admin: Any = None

    def cluster_ids(self) -> set[str]:
        """Return the cluster's id, as the broker reports it and as it was recorded.

        Raises:
            KafkaUnavailableError: Kafka does not answer.
            StoreError: the store does not answer.
        """
        record = self._record()
        recorded = {record.cluster_id} if record else set()
        return recorded | {str(self._ask(lambda admin: admin.describe_cluster()["cluster_id"]))}

    def topic_ids(self, topic: str) -> list[str]:
        """Return every recorded id of a topic, then the present one; empty where it is no topic of examples.

        Raises:
            KafkaUnavailableError: Kafka does not answer.
            StoreError: the store does not answer.
        """
        prefix = self._settings.kafka.topic_prefix
        name = topic.removeprefix(prefix)
        if not topic.startswith(prefix) or name.split(".", 1)[0] not in ORIGIN_TOPICS:
            return []
        record = self._record()
        described = self._describe(topic)
        present = topic_id(described["topic_id"]) if described else ""
        recorded = [each for each in (record.known_topic_ids(name) if record else ()) if each != present]
        return [*recorded, present]

    def ends(self, topic: str) -> Mapping[int, LogEnd]:
        """Return start, end and leader epoch of every partition; empty where the topic does not exist.

        Raises:
            KafkaUnavailableError: Kafka does not answer.
        """
        described = self._describe(topic)
        if not described:
            return {}
        leaderless = {each["partition_index"] for each in described["partitions"] if each.get("leader_id", 0) < 0}
        numbers = {each["partition_index"] for each in described["partitions"]} - leaderless
        partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
        starts = self._offsets(partitions, OffsetSpec.EARLIEST)
        ends = self._offsets(partitions, OffsetSpec.LATEST)
        found = {
            each.partition: LogEnd(starts[each].offset, ends[each].offset, ends[each].leader_epoch)
            for each in partitions
        }
        return found | dict.fromkeys(leaderless, LogEnd(-1, -1, None))

    def _record(self) -> Installation | None:
        """Return the installation record; while the store is away, as it was read last.

        It cannot lack an id then: intake records an id before it publishes the first example with it.
        """
        try:
            self._installation = load_installation(self._store)
        except StoreUnavailableError:
            if self._installation is None:
                raise
        return self._installation

    def _describe(self, topic: str) -> Any:
        found = self._ask(lambda admin: admin.describe_topics([topic]))
        return next((each for each in found if each["name"] == topic and not each.get("error_code")), None)

    def _offsets(self, partitions: list[TopicPartition], spec: Any) -> Any:
        if not partitions:
            return {}
        return self._ask(lambda admin: admin.list_partition_offsets(dict.fromkeys(partitions, spec)))

    def _ask(self, question: Any) -> Any:
        servers = self._settings.kafka.require_bootstrap()
        try:
            if self._admin is None:
                # kafka-python 3.0.12 leaks a socket with every refused attempt, and this is tried again and again.
                security = self._settings.kafka_security
                listening = require_listener(servers, BOOTSTRAP_TIMEOUT_MS / 1000, security)
                self._admin = KafkaAdminClient(
                    bootstrap_servers=listening, client_id=self._settings.kafka.topic("origins"),
                    bootstrap_timeout_ms=BOOTSTRAP_TIMEOUT_MS, **kafka_python_options(security),
                )  # fmt: skip
            return question(self._admin)
        except (KafkaError, OSError) as error:
            self.close()
            raise KafkaUnavailableError(
                got=f"{type(error).__name__}: {error}", allowed=f"a broker at {servers}",
                remedy="check that the broker runs",
            ) from error  # fmt: skip

    def close(self) -> None:
        """Close the connection; the next question opens it again."""
        admin, self._admin = self._admin, None
        if admin is not None:
            with suppress(KafkaError, OSError):
                admin.close()


class OriginCheck:
    """Tells origins that the broker can have given from others. Not thread-safe.

    Args:
        logs: what the broker and the installation record report.

    Example:
        >>> class Fixed:
        ...     def cluster_ids(self): return {"c"}
        ...     def topic_ids(self, topic): return ["t"]
        ...     def ends(self, topic): return {0: LogEnd(0, 10, 2)}
        ...     def close(self): pass
        >>> check = OriginCheck(Fixed())
        >>> origin = Origin(cluster_id="c", topic="documents", topic_id="t", partition=0, offset=9, timestamp_ms=0)
        >>> check.error(origin) is None
        True
        >>> print(check.error(origin.model_copy(update={"offset": 2**63 - 1})).detail)
        the origin lies beyond the log's end; got: documents[0]@9223372036854775807; allowed: an offset below 10
    """

    def __init__(self, logs: Logs) -> None:
        self._logs = logs
        self._clusters: set[str] = set()
        self._ids: dict[str, list[str]] = {}
        self._ends: dict[str, Mapping[int, LogEnd]] = {}
        self._foreign: set[str] = set()

    @classmethod
    def of(cls, settings: Settings, store: ObjectStore) -> Self:
        """Return a check that asks the broker of these settings."""
        return cls(BrokerLogs(settings, store))

    def is_known(self, origin: Origin) -> bool:
        """Return whether the cached answers already say that the origin is plausible. Asks nobody."""
        return self._cached_error(origin) is None

    def close(self) -> None:
        """Close the connection to the broker."""
        self._logs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def error(self, origin: Origin) -> WireError | None:
        """Return why the broker cannot have given this origin; None where it can.

        Raises:
            KafkaUnavailableError: Kafka does not answer.
            StoreError: the store does not answer.
        """
        error = self._cached_error(origin)
        if error is None:
            return None
        self._refresh(origin)
        return self._fresh_error(origin)

    def errors(self, origins: Iterable[Origin]) -> list[WireError | None]:
        """Return what `error` returns for each origin of a batch; each topic is asked about once at most.

        Raises:
            KafkaUnavailableError: Kafka does not answer.
            StoreError: the store does not answer.
        """
        found: list[WireError | None] = []
        asked: set[tuple[str, str]] = set()
        for origin in origins:
            error = self._cached_error(origin)
            question = (origin.cluster_id, origin.topic)
            if error is not None:
                if question not in asked:
                    asked.add(question)
                    self._refresh(origin)
                error = self._fresh_error(origin)
            found.append(error)
        return found

    def mark_problem(self, partition: str, position: Position) -> str | None:
        """Return why a high-water mark is none that the log can have given; None where it may be right.

        Args:
            partition: origin partition key.
            position: leader epoch and offset of the mark.

        Raises:
            KafkaUnavailableError: Kafka does not answer.
            StoreError: the store does not answer.
        """
        origin = _origin(partition, position)
        if origin is None:
            return f"not a position in an origin partition; got: {partition[:200]}, {position}"
        if self.is_foreign(partition):
            return None
        if not self.is_known(origin):
            self._refresh(origin)
        error, log = self._cached_error(origin), self.log_end(origin.topic, origin.partition)
        if error is None or (log is not None and log.end < 0):
            return None  # nobody leads the partition now: the mark may be right
        epoch, offset = position
        if log is not None and log.epoch is not None and epoch < log.epoch and offset >= log.end:
            return None  # the log's tail was lost since: what follows has a later epoch, and is new
        return error.detail

    def is_foreign(self, partition: str) -> bool:
        """Return whether an origin partition is of another cluster, or of a topic that is not recorded.

        Nothing that this installation reads compares with its mark, so the mark does no harm.

        Raises:
            KafkaUnavailableError: Kafka does not answer.
            StoreError: the store does not answer.
        """
        if partition in self._foreign:
            return True
        origin = _origin(partition, (0, 0))
        if origin is None:
            return False
        if self._is_read(origin):
            return False
        self._refresh(origin)
        if self._is_read(origin):
            return False
        if len(self._foreign) >= MAX_FOREIGN:
            self._foreign.clear()
        self._foreign.add(partition)
        return True

    def _is_read(self, origin: Origin) -> bool:
        return origin.cluster_id in self._clusters and origin.topic_id in self._ids.get(origin.topic, ())

    def present_topic_id(self, topic: str) -> str | None:
        """Return the id that a topic had when it was asked about last; None where it is not known."""
        return self._ids[topic][-1] if topic in self._ids else None

    def log_end(self, topic: str, partition: int) -> LogEnd | None:
        """Return the end of a partition's log as it was asked for last; None where it is not known."""
        return self._ends.get(topic, {}).get(partition)

    def _refresh(self, origin: Origin) -> None:
        self._clusters = self._logs.cluster_ids()
        if origin.cluster_id not in self._clusters:
            return
        ids = self._logs.topic_ids(origin.topic)
        if not ids:
            return  # names of no topic are not cached: there is no bound on how many of them can be forged
        self._ids[origin.topic] = ids
        if origin.topic_id == ids[-1]:
            self._ends[origin.topic] = self._logs.ends(origin.topic)
            if self._cached_error(origin) is not None:  # the topic may have been deleted between the two questions
                self._ids[origin.topic] = self._logs.topic_ids(origin.topic) or ids

    def _fresh_error(self, origin: Origin) -> WireError | None:
        """Return `_cached_error` after a refresh. Raise KafkaUnavailableError where nobody leads the partition."""
        error = self._cached_error(origin)
        log = self.log_end(origin.topic, origin.partition)
        if error is not None and log is not None and log.end < 0:
            raise KafkaUnavailableError(
                "the end of a log cannot be asked for", got=f"{origin.topic}[{origin.partition}] has no leader",
                remedy="start the broker that has the partition",
            )  # fmt: skip
        return error

    def _cached_error(self, origin: Origin) -> WireError | None:
        if origin.cluster_id not in self._clusters:
            return _implausible("the origin names another cluster", origin.cluster_id, sorted(self._clusters))
        ids = self._ids.get(origin.topic, [])
        if origin.topic_id not in ids:
            return _implausible(
                "the origin names a topic that was never read", f"{origin.topic}, id {origin.topic_id}", ids
            )
        if origin.topic_id != ids[-1]:
            return None  # the topic was deleted since: nothing comes after this origin, and its log's end is unknown
        log = self._ends.get(origin.topic, {}).get(origin.partition)
        shown = f"{origin.topic}[{origin.partition}]@{origin.offset}"
        if log is None:
            return _implausible("the origin names a partition that does not exist", shown, "an existing partition")
        if origin.offset >= log.end:
            return _implausible("the origin lies beyond the log's end", shown, f"an offset below {log.end}")
        if log.epoch is not None and origin.leader_epoch > log.epoch:
            return _implausible("the origin has a leader epoch to come", origin.leader_epoch, f"at most {log.epoch}")
        return None


def _origin(partition: str, position: Position) -> Origin | None:
    """Return the origin of a record at a position of an origin partition; None where there can be none."""
    try:
        cluster_id, topic_id, topic, number = partition.rsplit("/", 3)
        return Origin(
            cluster_id=cluster_id, topic_id=topic_id, topic=topic, partition=int(number), leader_epoch=position[0],
            offset=position[1], timestamp_ms=0,
        )  # fmt: skip
    except ValueError:
        return None


def _implausible(message: str, got: object, allowed: object) -> WireError:
    return WireError("implausible-origin", message, got=got, allowed=allowed)
