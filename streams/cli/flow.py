"""Read the flow for `status` and `watch`: topic ends, lag per role, adapters and how many subscribers serve them.

The reader changes nothing and joins no consumer group, so that it never disturbs a role.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Self

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from perennial.storage.errors import IntegrityError, NotFoundError, PerennialError
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.history.rebuilt_steps import rebases_under_way
from perennial.storage.registry.parked import list_parked
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapters import open_registry
from perennial.streams.kafka.connect import secured
from perennial.streams.kafka.group_offsets import group_offsets
from perennial.streams.kafka.topics import topic_names, topics_of
from perennial.streams.replicas.replica_status import ReplicaTable
from perennial.streams.retain.request_store import load_unapproved
from perennial.streams.settings import Settings

GROUPS: dict[str, tuple[str, ...]] = {
    "intake": ("documents", "interactions"),
    "scorer": ("examples",),
    "curate": ("scored-examples", "retention"),
    "learner": ("adapter-jobs",),
}
"""Consumer group of each role and the topics that it reads; those of tenants come to these."""

_CONNECT_S = 5.0
_CONNECT_MS = 5000
_MAX_ADAPTERS = 20
_MAX_UNAPPROVED = 20


class BrokerUnreachableError(PerennialError):
    """The broker does not answer."""

    exit_code = 3


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter as `perennial status` shows it.

    Attributes:
        adapter: Name of the adapter.
        generation: How often the alias changed; 0 where no version is live.
        version: The live version, or None.
        seq: Sequence number of the newest version.
        outcome: What the gate decided on the newest version.
        held_out_before_nats: Loss on held-out examples before the newest update, in nats per token.
        held_out_after_nats: The same loss after the update.
        served_by: Number of subscribers with a lease that serve the live version.
        failing: Number of subscribers with a lease whose last acknowledgement is a failure.
    """

    adapter: str
    generation: int
    version: str | None
    seq: int
    outcome: str
    held_out_before_nats: float | None
    held_out_after_nats: float | None
    served_by: int
    failing: int


@dataclass
class FlowSnapshot:
    """One reading of the whole flow.

    Attributes:
        taken_at: Seconds since 1970.
        written: Sum of the end offsets of each topic; the topics are named without the prefix.
        lag: Records that wait for each role.
        adapters: The first 20 adapters by name.
        more_adapters: True where the registry has more adapters than that.
        missing_topics: Topics that the broker does not have, with the prefix.
        parked: Why adapters wait for an operator, by adapter.
        unapproved: Until when requests over a pattern wait for a second approver, in milliseconds since 1970, by request
            id; the first 20.
        rebases: Updates that rebases have learned anew, and all that they have to, by adapter.
    """

    taken_at: float
    written: dict[str, int] = field(default_factory=dict)
    lag: dict[str, int] = field(default_factory=dict)
    adapters: list[AdapterStatus] = field(default_factory=list)
    more_adapters: bool = False
    missing_topics: list[str] = field(default_factory=list)
    parked: dict[str, str] = field(default_factory=dict)
    unapproved: dict[str, int] = field(default_factory=dict)
    rebases: dict[str, tuple[int, int]] = field(default_factory=dict)


class FlowReader:
    """Read the flow repeatedly over the same connections; a context manager.

    Args:
        settings: Where broker and store are.

    Raises:
        BrokerUnreachableError: The broker does not answer.
        KafkaSecurityError: The broker and the settings of TLS and SASL do not agree.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        bootstrap = settings.kafka.require_bootstrap().split(",")
        try:
            with secured(settings, _CONNECT_S) as options:
                self.consumer = KafkaConsumer(
                    bootstrap_servers=bootstrap,
                    enable_auto_commit=False,
                    bootstrap_timeout_ms=_CONNECT_MS,
                    request_timeout_ms=15000,
                    **options,
                )
                self.admin = KafkaAdminClient(bootstrap_servers=bootstrap, bootstrap_timeout_ms=_CONNECT_MS, **options)
        except (KafkaError, ValueError, OSError) as error:  # ValueError: an address that is not host:port
            raise BrokerUnreachableError(
                got=f"{settings.kafka.bootstrap}: {error}",
                remedy="start it, or set PERENNIAL_KAFKA to its address; `perennial doctor` checks the connection",
            ) from error
        self.registry: Registry = open_registry(settings)
        self._replicas = ReplicaTable(settings.signing.replica_readers_trust())
        self._ack_partitions: list[TopicPartition] = []
        self._followed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.consumer.close()
        self.admin.close()

    def read(self) -> FlowSnapshot:
        """Return the flow as it is now.

        Raises:
            BrokerUnreachableError: The broker does not answer.
        """
        try:
            return self._read()
        except KafkaError as error:
            raise BrokerUnreachableError(
                got=f"{self.settings.kafka.bootstrap}: {error}",
                remedy="start the broker; `perennial doctor` checks the connection",
            ) from error

    def _read(self) -> FlowSnapshot:
        flow = FlowSnapshot(time.time())
        known = self.consumer.topics()
        partitions: list[TopicPartition] = []
        for name in topics_of(self.settings):
            topic = self.settings.kafka.topic(name)
            if topic in known:
                partitions += [TopicPartition(topic, p) for p in self.consumer.partitions_for_topic(topic) or ()]
            else:
                flow.missing_topics.append(topic)
        ends: dict[TopicPartition, int] = self.consumer.end_offsets(partitions)
        for name in topics_of(self.settings):
            flow.written[name] = sum(end for tp, end in ends.items() if tp.topic == self.settings.kafka.topic(name))
        flow.lag = {role: self._lag(role, names, ends) for role, names in GROUPS.items()}
        self._read_acks(partitions)
        adapters = list(islice(self.registry.adapters(), _MAX_ADAPTERS + 1))
        flow.more_adapters = len(adapters) > _MAX_ADAPTERS
        flow.adapters = [self._adapter(name) for name in adapters[:_MAX_ADAPTERS]]
        flow.parked = {record.adapter: record.reason for record in list_parked(self.registry.store)}
        waiting = islice(load_unapproved(self.registry.store), _MAX_UNAPPROVED)
        flow.unapproved = {one.request.request_id: one.approval.until_ms for one in waiting if one.approval}
        under_way = rebases_under_way(self.registry.store)
        flow.rebases = {adapter: (rebase.made, rebase.total) for adapter, rebase in under_way.items()}
        return flow

    def _lag(self, role: str, names: tuple[str, ...], ends: dict[TopicPartition, int]) -> int:
        offsets = group_offsets(self.admin, self.settings.kafka.topic(role))
        topics = {self.settings.kafka.topic(name) for name in topic_names(self.settings, names)}
        return sum(max(0, end - offsets.get(tp, 0)) for tp, end in ends.items() if tp.topic in topics)

    def _read_acks(self, partitions: list[TopicPartition]) -> None:
        topic = self.settings.kafka.topic("adapter-acks")
        wanted = [tp for tp in partitions if tp.topic == topic]
        if wanted and wanted != self._ack_partitions:
            self.consumer.assign(wanted)
            self.consumer.seek_to_beginning(*wanted)
            self._ack_partitions, self._followed = wanted, False
            self._replicas.clear()
        while wanted and (records := self.consumer.poll(timeout_ms=150, max_records=1000)):
            for record in (record for batch in records.values() for record in batch):
                self._replicas.apply(record, time.time_ns() // 1_000_000, following=self._followed)
        self._followed = True

    def _adapter(self, name: str) -> AdapterStatus:
        try:
            alias, head = self.registry.alias(name, self.settings.serving.alias), self.registry.head(name)
        except (IntegrityError, NotFoundError):  # one damaged adapter must not hide the others
            return AdapterStatus(name, 0, None, 0, "unreadable", None, None, 0, 0)
        gate = head.manifest.gate if head else GateFigures()
        now_ms = time.time_ns() // 1_000_000
        replicas = [(status, status.state(now_ms)) for status in self._replicas.of(name, self.settings.serving.alias)]
        before, after = gate.held_out_before, gate.held_out_after
        return AdapterStatus(
            name, alias.generation if alias else 0, alias.version if alias else None, head.seq if head else 0,
            head.manifest.outcome if head else "-",
            before, after,
            sum(state == "serving" and alias is not None and status.version == alias.version for status, state in replicas),
            sum(state == "failing" for _, state in replicas),
        )  # fmt: skip
