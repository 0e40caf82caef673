"""Specify every topic with its configs, create missing topics, and report how existing ones differ.

All producers choose the partition by murmur2 over the key, as Java's default partitioner does. kafka-python does so by
default, librdkafka only with `partitioner=murmur2_random`. With a mixture, records of one key would be in two
partitions and lose their order.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from perennial.storage.errors import PerennialError
from perennial.streams.events.cloudevents import MAX_HEADER_BYTES, MAX_INSIDE_VALUE_BYTES, MAX_VALUE_BYTES
from perennial.streams.events.dead_letter import MAX_DEAD_LETTER_BYTES
from perennial.streams.events.models import EVENTS
from perennial.streams.events.tenants import base_topic, with_tenants
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.settings import Settings

_UNCOMPRESSED = {"compression.type": "uncompressed"}
"""Makes the broker decompress what it receives. Hazard: kafka-python and aiokafka cannot read lz4, snappy or zstd without
further packages. One record that another program compressed would stop every reader of the topic for good."""
_MINUTE_MS = 60_000
_DAY_MS = 24 * 60 * _MINUTE_MS
_BATCH_OVERHEAD_BYTES = 4 * 1024

WEEK_MS = 7 * _DAY_MS
MAX_OUTSIDE_MESSAGE_BYTES = MAX_VALUE_BYTES + MAX_HEADER_BYTES + _BATCH_OVERHEAD_BYTES
MAX_INSIDE_MESSAGE_BYTES = MAX_INSIDE_VALUE_BYTES + MAX_HEADER_BYTES + _BATCH_OVERHEAD_BYTES

BOOTSTRAP_TIMEOUT_MS = 10_000

Cleanup = Literal["delete", "compact"]


class TopicError(PerennialError):
    """A topic is missing, or cannot be created as specified."""


@dataclass(frozen=True)
class TopicSpec:
    """The specification of a topic.

    Attributes:
        name: The topic's name without the prefix.
        key: What the records' keys are, in words, for docs/asyncapi.json.
        cleanup: The cleanup policy.
        configs: The topic's configs.
        partitioned: Whether the topic has the settings' partition count; otherwise it has one partition.
    """

    name: str
    key: str
    cleanup: Cleanup
    configs: Mapping[str, str]
    partitioned: bool = True

    @property
    def event_types(self) -> tuple[str, ...]:
        """CloudEvents types of the topic's events."""
        return tuple(name for name, model in EVENTS.items() if model.topic == base_topic(self.name))

    def partitions(self, settings: Settings) -> int:
        """Return the number of partitions that `provision` gives the topic."""
        return settings.kafka.partitions if self.partitioned else 1


def _deleting_topic(
    name: str, key: str, *, retention_ms: int = WEEK_MS, max_message_bytes: int = MAX_INSIDE_MESSAGE_BYTES,
    broker_time: bool = False, any_codec: bool = False,
) -> TopicSpec:  # fmt: skip
    configs = {
        **({} if any_codec else _UNCOMPRESSED),
        "cleanup.policy": "delete",
        "retention.ms": str(retention_ms),
        "max.message.bytes": str(max_message_bytes),
    }
    if broker_time:
        # Expiry and age are measured by the broker's clock at the append, so that a producer's clock decides nothing.
        configs["message.timestamp.type"] = "LogAppendTime"
    return TopicSpec(name, key, "delete", MappingProxyType(configs))


def _compacted_topic(name: str, key: str, *, broker_time: bool = False) -> TopicSpec:
    configs = {
        **_UNCOMPRESSED,
        "cleanup.policy": "compact",
        "max.message.bytes": str(MAX_INSIDE_MESSAGE_BYTES),
        # Kafka never compacts the segment that it writes to. A small, short-lived segment therefore leaves a reader
        # that starts at the beginning few outdated records.
        "segment.bytes": str(4 * 1024 * 1024),
        "segment.ms": str(10 * _MINUTE_MS),
        "min.cleanable.dirty.ratio": "0.05",
        "max.compaction.lag.ms": str(60 * _MINUTE_MS),
        # A reader that was away for less time than this still sees the tombstone of a deleted key.
        "delete.retention.ms": str(WEEK_MS),
    }
    if broker_time:  # see _deleting_topic; a lease begins when the broker stored its record
        configs["message.timestamp.type"] = "LogAppendTime"
    return TopicSpec(name, key, "compact", MappingProxyType(configs))


TOPICS: Mapping[str, TopicSpec] = MappingProxyType({
    spec.name: spec
    for spec in (
        _deleting_topic(
            "documents", "any", max_message_bytes=MAX_OUTSIDE_MESSAGE_BYTES, broker_time=True, any_codec=True
        ),
        _deleting_topic(
            "interactions", "any", max_message_bytes=MAX_OUTSIDE_MESSAGE_BYTES, broker_time=True, any_codec=True
        ),
        _deleting_topic("examples", "adapter"),
        _deleting_topic("scored-examples", "adapter"),
        _deleting_topic("drift", "adapter", retention_ms=30 * _DAY_MS),
        _deleting_topic("adapter-jobs", "adapter"),
        _deleting_topic(
            "retention", "any", retention_ms=3650 * _DAY_MS, max_message_bytes=MAX_OUTSIDE_MESSAGE_BYTES,
            broker_time=True,
        ), _compacted_topic("retention-status", "request id"), _compacted_topic("adapter-updates", "adapter#alias"),
        _compacted_topic("adapter-acks", "adapter#replica", broker_time=True), _deleting_topic("dead-letters", "source key",
        retention_ms=30 * _DAY_MS, max_message_bytes=MAX_DEAD_LETTER_BYTES),
    )
})  # fmt: skip


def topics_of(settings: Settings) -> Mapping[str, TopicSpec]:
    """Return the specification of every topic of an installation, those of its tenants included.

    Args:
        settings: Name the tenants.
    """
    names = topic_names(settings, TOPICS)
    return {name: replace(TOPICS[base_topic(name)], name=name) for name in names}


def topic_names(settings: Settings, names: Iterable[str]) -> tuple[str, ...]:
    """Return topics, each followed by those that tenants have in its place.

    Args:
        settings: Name the tenants.
        names: Names of TOPICS.
    """
    return with_tenants(names, settings.tenants.names)


@dataclass(frozen=True)
class TopicReport:
    """The result of `provision` for one topic.

    Attributes:
        name: The topic's name with the prefix.
        created: Whether the topic was missing. It was then created, except on a dry run.
        differences: How an existing topic differs from its specification, one line per config or partition count.
    """

    name: str
    created: bool
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClusterIds:
    """The ids that distinguish a cluster and its topics from others of the same name.

    Attributes:
        cluster_id: The cluster's id.
        topic_ids: Topic ids by name with the prefix.
        partitions: Partition counts by name with the prefix; empty where they were not read.
    """

    cluster_id: str
    topic_ids: Mapping[str, str]
    partitions: Mapping[str, int] = field(default_factory=dict)


def provision(
    settings: Settings, dry_run: bool = False, partitions: Mapping[str, int] | None = None
) -> list[TopicReport]:
    """Create missing topics, and report how existing ones differ from their specification without altering them.

    Args:
        settings: Name the brokers, the topic prefix, the tenants, the partition count and the replication factor.
        dry_run: Create nothing.
        partitions: Partition counts by topic name without the prefix, instead of the settings' count.

    Returns:
        One report per topic.

    Raises:
        KafkaUnavailableError: Kafka does not answer.
        TopicError: A topic cannot be created.
        SettingsError: No brokers are set.
    """
    with admin_client(settings) as admin:
        existing, specs = set(admin.list_topics()), topics_of(settings)
        names = {settings.kafka.topic(name): spec for name, spec in specs.items()}
        counts = {
            settings.kafka.topic(name): (partitions or {}).get(name) or spec.partitions(settings)
            for name, spec in specs.items()
        }
        missing = {name: spec for name, spec in names.items() if name not in existing}
        if missing and not dry_run:
            created = _create(admin, missing, settings, counts)
            missing = {name: spec for name, spec in missing.items() if name in created}
        present = [name for name in names if name not in missing]
        described = {topic["name"]: topic for topic in admin.describe_topics(present)} if present else {}
        configs = _configs(admin, present)
    return [
        TopicReport(name, True)
        if name in missing
        else TopicReport(
            name, False, _differences(spec, counts[name], configs[name], len(described[name]["partitions"]))
        )
        for name, spec in names.items()
    ]


def identify(settings: Settings, names: Sequence[str] | None = None) -> ClusterIds:
    """Return the ids of the cluster and of topics, and the topics' partition counts.

    Args:
        settings: Name the brokers and the topic prefix.
        names: Topic names without the prefix; None means every topic of the installation that exists.

    Returns:
        The ids.

    Raises:
        TopicError: A topic of `names` does not exist.
        KafkaUnavailableError: Kafka does not answer.
        SettingsError: No brokers are set.
    """
    with admin_client(settings) as admin:
        cluster_id = str(admin.describe_cluster()["cluster_id"])
        existing = set(admin.list_topics())
        wanted = [settings.kafka.topic(name) for name in (names if names is not None else topics_of(settings))]
        missing = sorted(set(wanted) - existing)
        if missing and names is not None:
            raise missing_topics_error(missing)
        found = [name for name in wanted if name in existing]
        topics = admin.describe_topics(found) if found else []
    return ClusterIds(
        cluster_id,
        {topic["name"]: topic_id(topic["topic_id"]) for topic in topics},
        {topic["name"]: len(topic["partitions"]) for topic in topics},
    )


def missing_topics_error(names: Sequence[str]) -> TopicError:
    """Return the error that names the topics that must be created."""
    return TopicError(
        "topics are missing", got=", ".join(names), allowed="existing topics", remedy="run `perennial topics create`"
    )


def topic_id(raw: uuid.UUID | str) -> str:
    """Return a topic's id as manifests and origins write it: a UUID in hexadecimal with dashes."""
    return str(raw if isinstance(raw, uuid.UUID) else uuid.UUID(raw))


def connect_admin(settings: Settings) -> Any:
    """Return a new KafkaAdminClient.

    Raises:
        KafkaError: Kafka does not answer.
        KafkaSecurityError: The broker and the settings of TLS and SASL do not agree.
        SettingsError: No brokers are set, or a file of TLS or SASL cannot be used.
    """
    from kafka.admin import KafkaAdminClient

    from perennial.streams.kafka.connect import secured

    with secured(settings, BOOTSTRAP_TIMEOUT_MS / 1000) as options:
        return KafkaAdminClient(
            bootstrap_servers=settings.kafka.require_bootstrap().split(","),
            client_id=settings.kafka.topic("topics"),
            bootstrap_timeout_ms=BOOTSTRAP_TIMEOUT_MS,
            **options,
        )


@contextmanager
def admin_client(settings: Settings) -> Iterator[Any]:
    """Open a KafkaAdminClient and close it at the end of the block.

    Raises:
        KafkaUnavailableError: A call in the block fails: Kafka does not answer.
        SettingsError: No brokers are set.
    """
    from kafka.errors import KafkaError

    servers = settings.kafka.require_bootstrap()
    try:
        admin = connect_admin(settings)
        try:
            yield admin
        finally:
            admin.close()
    except KafkaError as error:
        raise KafkaUnavailableError(
            got=f"{type(error).__name__}: {error}",
            allowed=f"a broker at {servers}",
            remedy="check that the broker runs",
        ) from error


def _create(admin: Any, missing: Mapping[str, TopicSpec], settings: Settings, counts: Mapping[str, int]) -> set[str]:
    """Create topics. Return the names of those that no other process created in the meantime."""
    from kafka.errors import TopicAlreadyExistsError

    wanted = {
        name: {
            "num_partitions": counts[name],
            "replication_factor": settings.kafka.replication,
            "configs": dict(spec.configs),
        }
        for name, spec in missing.items()
    }
    answer = admin.create_topics(wanted, raise_errors=False)
    created = set()
    for topic in answer["topics"]:
        code = topic["error_code"]
        if code == 0:
            created.add(topic["name"])
        elif code != TopicAlreadyExistsError.errno:
            raise TopicError(
                f"topic {topic['name']} cannot be created",
                got=topic.get("error_message") or f"Kafka error {code}",
                allowed="a topic with the configs of streams/kafka/topics.py",
                remedy="check the broker's limits (replication, authorisation)",
            )
    admin.wait_for_topics(list(missing))
    return created


def _configs(admin: Any, names: Sequence[str]) -> dict[str, dict[str, str | None]]:
    from kafka.admin import ConfigResource, ConfigResourceType

    if not names:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    found: dict[str, dict[str, dict[str, Any]]] = admin.describe_configs(resources, config_filter="all")["topic"]
    return {name: {key: entry["value"] for key, entry in found[name].items()} for name in names}


def _differences(
    spec: TopicSpec, wanted_partitions: int, configs: Mapping[str, str | None], partitions: int
) -> tuple[str, ...]:
    wanted = {"partitions": str(wanted_partitions), **spec.configs}
    actual = {"partitions": str(partitions), **configs}
    return tuple(
        f"{name} is {actual.get(name)}, should be {value}"
        for name, value in wanted.items()
        if actual.get(name) != value
    )
