"""Add partitions to an ordered topic without losing the order of a key, and adopt topics that were created again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kafka import TopicPartition
from kafka.errors import GroupIdNotFoundError, KafkaError

from perennial.storage.errors import PerennialError
from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.events.tenants import base_topic
from perennial.streams.kafka.group_offsets import reader_positions
from perennial.streams.kafka.installation import (
    ORDERED_TOPICS,
    Installation,
    adopt_topics,
    first_difference,
    load_installation,
    missing_record_error,
    record_partitions,
)
from perennial.streams.kafka.maintenance import LEASE_S, POLL_S, MaintenanceLease
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.kafka.topics import TOPICS, TopicError, admin_client, identify
from perennial.streams.settings import Settings

GRACE_S: Final = 3 * POLL_S
"""Seconds for which the roles must have been away before the topic is altered: a process that was starting when the
command began has looked at the maintenance record by then."""
LOOK_S: Final = 0.5
BROKER_AWAY_S: Final = LEASE_S / 2


class RepartitionError(PerennialError):
    """A topic cannot be repartitioned now."""


@dataclass(frozen=True)
class Flow:
    """Who writes and who reads an ordered topic.

    Attributes:
        role: The role that writes it.
        writers: The consumer group of that role, without the prefix.
        readers: The consumer group that reads it, without the prefix; None: no role reads it.
        reader: The role of that group.
    """

    role: str
    writers: str
    readers: str | None
    reader: str


FLOWS: Final[dict[str, Flow]] = {
    "examples": Flow("intake", "intake", "scorer", "scorer"),
    "scored-examples": Flow("scorer", "scorer", "curate", "streams"),
    "drift": Flow("streams", "curate", None, ""),
    "adapter-jobs": Flow("streams", "curate", "learner", "learner"),
}


@dataclass(frozen=True)
class RepartitionPlan:
    """What `repartition` will do.

    Attributes:
        topic: The topic without the prefix.
        recorded: The recorded partition count.
        actual: The partition count that the broker reports.
        wanted: The partition count afterwards.
    """

    topic: str
    recorded: int
    actual: int
    wanted: int

    @property
    def flow(self) -> Flow:
        """Who writes and who reads the topic."""
        return FLOWS[self.topic]


def plan_repartition(settings: Settings, store: ObjectStore, topic: str, wanted: int) -> RepartitionPlan:
    """Return what must be done to give a topic that many partitions.

    Args:
        settings: Name the brokers and the topic prefix.
        store: The object store.
        topic: The topic without the prefix.
        wanted: The partition count afterwards.

    Raises:
        RepartitionError: The topic is not an ordered one, or would have fewer partitions.
        InstallationError: There is no record, or the cluster or the topic's id is another one.
        TopicError: The topic does not exist.
        KafkaUnavailableError: Kafka does not answer.
        StoreError: The store does not answer.
    """
    if topic not in ORDERED_TOPICS:
        free = (
            "its partitions may be added with Kafka's own tool at any time"
            if base_topic(topic) in TOPICS
            else "no such topic"
        )
        raise RepartitionError(
            "not a topic whose partition count is part of the installation", got=f"{topic}: {free}",
            allowed=", ".join(ORDERED_TOPICS), remedy="see `perennial topics create --dry-run`",
        )  # fmt: skip
    record = load_installation(store)
    if record is None or topic not in record.topics:
        raise missing_record_error()
    found = identify(settings, [topic])
    actual, recorded = found.partitions[settings.kafka.topic(topic)], record.topics[topic].partitions
    different = first_difference(settings, record, found, [topic], {topic: actual})
    if different is not None:
        raise different
    if wanted < max(actual, recorded):
        raise RepartitionError(
            f"{topic} cannot have fewer partitions: Kafka removes none, and records wait in all of them",
            got=f"--partitions {wanted}", allowed=f"at least {max(actual, recorded)}",
            remedy="to go down, make an installation with another PERENNIAL_TOPIC_PREFIX and publish to it",
        )  # fmt: skip
    return RepartitionPlan(topic, recorded, actual, wanted)


def repartition(
    settings: Settings,
    store: ObjectStore,
    plan: RepartitionPlan,
    on_progress: Callable[[str], None],
    wait_s: float,
    grace_s: float = GRACE_S,
) -> Installation:
    """Pause the roles that write the topic, wait until it is read to its end, add partitions, record the new count.

    The roles go on in every case: after an error nothing was altered, or the new partitions are not used because the
    count is not recorded.

    Args:
        settings: Name the brokers and the topic prefix.
        store: The object store.
        plan: What to do.
        on_progress: Is called with a line of text at every change.
        wait_s: Seconds to wait until the roles have paused and the topic is read to its end.
        grace_s: Seconds for which the writers must have been away.

    Returns:
        The installation record as it is then stored.

    Raises:
        RepartitionError: The roles did not pause, or the topic was not read to its end in time.
        MaintenanceError: Another such command runs, or the roles went on because this one was too slow.
        KafkaUnavailableError: Kafka does not answer.
        StoreError: The store does not answer.
    """
    lease = MaintenanceLease(store, plan.topic, plan.wanted, (plan.flow.role,))
    try:
        run = _Run(settings, plan, lease, on_progress, time.monotonic() + wait_s)
        run.drain(grace_s)
        if plan.actual < plan.wanted:
            run.alter()
        lease.renew()
        record = record_partitions(store, plan.topic, plan.wanted, was=plan.recorded)
        on_progress(f"recorded: {plan.topic} has {plan.wanted} partitions")
        return record
    finally:
        lease.end()


class _Run:
    """One repartitioning under a lease."""

    def __init__(
        self, settings: Settings, plan: RepartitionPlan, lease: MaintenanceLease, on_progress: Callable[[str], None],
        deadline_s: float,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._plan = plan
        self._lease = lease
        self._on_progress = on_progress
        self._deadline_s = deadline_s
        self._shown = ""

    def drain(self, grace_s: float) -> None:
        """Wait until no process writes the topic and its readers have committed its end."""
        flow, topic = self._plan.flow, self._plan.topic
        away_since: float | None = None
        renewed_s = time.monotonic()
        while True:
            if time.monotonic() - renewed_s >= LEASE_S / 6:
                self._lease.renew()
                renewed_s = time.monotonic()
            writing = self._ask(lambda admin: group_members(admin, self._settings.kafka.topic(flow.writers)))
            waiting = self._ask(lambda admin: waiting_records(admin, self._settings, topic, self._plan.actual))
            now_s = time.monotonic()
            away_since = None if writing else away_since or now_s
            if writing:
                self._show(f"waiting for {flow.role} to pause: {writing} processes are still members of its group")
            elif waiting:
                self._show(f"{flow.role} has paused; {waiting} records of {topic} wait for {flow.reader}")
            elif away_since is not None and now_s - away_since >= grace_s:
                self._lease.renew()
                self._show(f"{topic} is read to its end")
                return
            if now_s > self._deadline_s:
                raise self._too_late(writing, waiting)
            time.sleep(LOOK_S)

    def _too_late(self, writing: int, waiting: int) -> RepartitionError:
        flow, topic = self._plan.flow, self._plan.topic
        if writing:
            return RepartitionError(
                f"{flow.role} did not pause in time; nothing was changed, and the roles go on",
                got=f"{writing} processes in the group {self._settings.kafka.topic(flow.writers)}", allowed="none",
                remedy=f"stop these processes (releases before this command do not pause), then run "
                f"`perennial topics repartition {topic} --partitions {self._plan.wanted}` again",
            )  # fmt: skip
        return RepartitionError(
            f"{topic} was not read to its end in time; nothing was changed, and the roles go on",
            got=f"{waiting} records wait for {flow.reader}", allowed="none",
            remedy=f"start `perennial worker {flow.reader}`, or wait longer with --wait-s; `perennial status` shows the "
            "waiting records",
        )  # fmt: skip

    def alter(self) -> None:
        """Add the partitions and wait until the broker reports them."""
        name, wanted = self._settings.kafka.topic(self._plan.topic), self._plan.wanted
        self._ask(lambda admin: admin.create_partitions({name: wanted}))
        deadline_s = time.monotonic() + BROKER_AWAY_S
        while identify(self._settings, [self._plan.topic]).partitions[name] != wanted:
            if time.monotonic() > deadline_s:
                raise TopicError(f"the added partitions of {name} are not there yet", remedy="run the command again")
            time.sleep(LOOK_S)
        self._on_progress(f"added partitions: {self._plan.actual} → {wanted}")

    def _ask(self, call: Callable[[Any], Any]) -> Any:
        deadline_s = time.monotonic() + BROKER_AWAY_S
        while True:
            try:
                with admin_client(self._settings) as admin:
                    return call(admin)
            except KafkaUnavailableError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(LOOK_S)

    def _show(self, line: str) -> None:
        if line != self._shown:
            self._shown = line
            self._on_progress(line)


def group_members(admin: Any, group: str) -> int:
    """Return how many processes are members of a consumer group.

    Args:
        admin: A KafkaAdminClient.
        group: The group's name with the prefix.
    """
    try:
        return len(admin.describe_groups([group])[group]["members"])
    except GroupIdNotFoundError:
        return 0


def waiting_records(admin: Any, settings: Settings, topic: str, partitions: int) -> int:
    """Return how many records of an ordered topic its readers have not committed; 0 where no role reads it.

    Args:
        admin: A KafkaAdminClient.
        settings: Name the topic prefix.
        topic: The topic without the prefix.
        partitions: The topic's partition count.
    """
    readers = FLOWS[topic].readers
    if readers is None:
        return 0
    positions = reader_positions(admin, settings.kafka.topic(readers), settings.kafka.topic(topic), partitions)
    return sum(position.waiting for position in positions)


def adopt(settings: Settings, store: ObjectStore, names: Sequence[str]) -> Installation:
    """Record topics that were created again, and forget the committed offsets of their readers.

    Hazard: Kafka forgets committed offsets with the topic, but a reader that did not notice may have committed its old
    position afterwards. The reader would begin there, in the middle of the new topic.

    Args:
        settings: Name the brokers and the topic prefix.
        store: The object store.
        names: The topics to adopt, without the prefix.

    Returns:
        The installation record as it is then stored.

    Raises:
        InstallationError: There is no record.
        RepartitionError: A process still reads one of the topics.
        TopicError: A topic does not exist.
        KafkaUnavailableError: Kafka does not answer.
        StoreError: The store does not answer.
    """
    found = identify(settings, names)
    record = load_installation(store)
    if record is None:
        raise missing_record_error()
    with admin_client(settings) as admin:
        for name in names:
            full = settings.kafka.topic(name)
            recorded = record.topics.get(name)
            group = READERS.get(base_topic(name))
            if recorded is not None and recorded.topic_id != found.topic_ids[full] and group is not None:
                forget_offsets(admin, settings, group, name, found.partitions[full])
    return adopt_topics(settings, store, found, names)


READERS: Final = {
    "documents": "intake", "interactions": "intake", "retention": "curate",
    **{name: flow.readers for name, flow in FLOWS.items() if flow.readers},
}  # fmt: skip
"""The consumer group that reads each topic, without the prefix; the topics of tenants have the same readers."""


def forget_offsets(admin: Any, settings: Settings, group: str, topic: str, partitions: int) -> None:
    """Delete the committed offsets of a group in a topic.

    Args:
        admin: A KafkaAdminClient.
        settings: Name the topic prefix.
        group: The consumer group without the prefix.
        topic: The topic without the prefix.
        partitions: The topic's partition count.

    Raises:
        RepartitionError: A process still reads the topic.
        KafkaError: Kafka refuses.
    """
    each = [TopicPartition(settings.kafka.topic(topic), number) for number in range(partitions)]
    try:
        errors = admin.delete_group_offsets(settings.kafka.topic(group), each)
    except GroupIdNotFoundError:
        return
    for partition, error in errors.items():
        if error.errno == _SUBSCRIBED:
            raise RepartitionError(
                f"a process of the group {settings.kafka.topic(group)} still reads {partition.topic}",
                remedy="stop the roles that read it, wait 10 s, and run the command again",
            )
        if error.errno:
            raise KafkaError(f"offsets of {group} in {partition} cannot be deleted: {error.__name__}")


_SUBSCRIBED: Final = 86  # Kafka's error code GROUP_SUBSCRIBED_TO_TOPIC
