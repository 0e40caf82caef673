"""The installation record: which cluster, topic ids and partition counts the stored high-water marks rest on.

The object `installation/topics` is created by the first role that starts, or by `perennial topics create`. Every role
compares the broker with it before it reads a record:

- Another cluster, or another id of an internal topic, means that records were deleted and that committed offsets belong
  to another log.
- Another number of partitions of an ordered topic means that new records of a key go to another partition than those
  that wait. Consumers take a record at or below their high-water marks for a duplicate, so the waiting ones would be
  lost.

Input topics may be deleted and created again: their topic id is part of every origin. The record lists all ids that an
input topic has had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perennial.storage.errors import IntegrityError, NotFoundError, PerennialError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.recovery.restored_store import load_restored
from perennial.storage.registry.compare_and_swap import update_object
from perennial.streams.events.tenants import base_topic, split_topic
from perennial.streams.kafka.maintenance import allowed_counts
from perennial.streams.kafka.topics import TOPICS, ClusterIds, TopicReport, identify, provision, topic_names, topics_of
from perennial.streams.settings import Settings

KEY: Final = "installation/topics"
MAX_BYTES: Final = 1024 * 1024
MAX_SEEN_IDS: Final = 1000

INPUT_TOPICS: Final = ("documents", "interactions", "retention")
"""Written by outside programs with any key: no role relies on the order between two partitions."""
ORDERED_TOPICS: Final = ("examples", "scored-examples", "drift", "adapter-jobs")
"""Keyed by adapter, read in order: the partition count may change by `perennial topics repartition` only."""
LATEST_TOPICS: Final = tuple(name for name, spec in TOPICS.items() if spec.cleanup == "compact")
"""Compacted: the latest record of a key is its whole state, and readers compare what it says. Partitions may be added."""
ROUTED_TOPICS: Final = (*ORDERED_TOPICS, "retention-status")
"""The roles choose the partition of a key by the recorded count. Not so in `adapter-updates` and `adapter-acks`:
subscribers, which need no store, find a key's partition by the count that the broker reports."""

ROLE_TOPICS: Final[Mapping[str, tuple[str, ...]]] = {
    "intake": ("documents", "interactions", "examples", "dead-letters"),
    "streams": (
        "scored-examples", "retention", "adapter-jobs", "drift", "retention-status", "adapter-acks", "dead-letters",
    ),
    "scorer": ("examples", "scored-examples", "dead-letters"),
    "learner": ("adapter-jobs", "adapter-updates", "retention-status", "dead-letters"),
}  # fmt: skip
"""The topics that each role reads or writes; `role_topics` adds those of tenants."""

_Id = Annotated[str, Field(min_length=1, max_length=200)]


def role_topics(settings: Settings, role: str) -> tuple[str, ...]:
    """Return the topics that a role reads or writes, those of tenants included.

    Args:
        settings: Name the tenants.
        role: A key of ROLE_TOPICS.
    """
    return topic_names(settings, ROLE_TOPICS[role])


class InstallationError(PerennialError):
    """The broker's topics are not those that this installation's state rests on."""


class RecordedTopic(BaseModel):
    """What the record holds of one topic.

    Attributes:
        topic_id: The id that the topic had last.
        partitions: The partition count by which the roles route records of a key.
        seen: Every id that an input topic has had, oldest first; empty for internal topics.
    """

    model_config = ConfigDict(frozen=True)

    topic_id: _Id
    partitions: Annotated[int, Field(gt=0)]
    seen: tuple[_Id, ...] = ()


class Installation(BaseModel):
    """The object `installation/topics`.

    Attributes:
        schema_version: Version of this format.
        cluster_id: The id of the Kafka cluster.
        topics: The topics by name without the prefix.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    cluster_id: _Id
    topics: dict[str, RecordedTopic] = Field(default_factory=dict)

    def partitions(self) -> dict[str, int]:
        """Return the recorded partition count of every internal topic."""
        return {name: self.topics[name].partitions for name in (*ORDERED_TOPICS, *LATEST_TOPICS) if name in self.topics}

    def routed_partitions(self) -> dict[str, int]:
        """Return the recorded partition count of every topic in which the roles choose the partition of a key by it."""
        return {name: count for name, count in self.partitions().items() if name in ROUTED_TOPICS}

    def known_topic_ids(self, name: str) -> tuple[str, ...]:
        """Return every id that an input topic has had.

        Args:
            name: The topic's name without the prefix.
        """
        topic = self.topics.get(name)
        return () if topic is None else topic.seen or (topic.topic_id,)

    def with_topic(self, name: str, topic: RecordedTopic) -> Installation:
        """Return a copy that holds this topic."""
        return self.model_copy(update={"topics": {**self.topics, name: topic}})


def load_installation(store: ObjectStore) -> Installation | None:
    """Return the installation record, or None where no role has recorded one yet.

    Raises:
        IntegrityError: The object cannot be read as an installation record.
        StoreError: The store does not answer.
    """
    return _load(store)[0]


def _load(store: ObjectStore) -> tuple[Installation | None, str | None]:
    try:
        stored = store.get(KEY, MAX_BYTES)
    except NotFoundError:
        return None, None
    try:
        return Installation.model_validate_json(stored.data), stored.etag
    except ValidationError as error:
        raise IntegrityError(
            f"{KEY} is not readable", got=stored.data[:100], allowed="the record of `perennial topics create`",
            remedy="restore the object from a copy; if there is none, delete it while all roles are stopped and no "
            "records wait (`perennial status`), and run `perennial topics create`",
        ) from error  # fmt: skip


def check_installation(settings: Settings, store: ObjectStore, names: Sequence[str]) -> Installation:
    """Compare the broker with the record, and record what is not recorded yet.

    A role calls it at its start, before it reads a record. Where an input topic may have been created again, it first
    deals with its committed offsets in the old one.

    Args:
        settings: Name the brokers and the topic prefix.
        store: The object store.
        names: The topics that the caller reads or writes, without the prefix.

    Returns:
        The record, which then holds these topics.

    Raises:
        InstallationError: Another cluster, another id or partition count of an internal topic; a tenant whose topics are
            recorded is not set; or the store was restored from a backup and is not reconciled with Kafka.
        TopicError: A topic does not exist.
        KafkaUnavailableError: Kafka does not answer.
        StoreError: The store does not answer.
    """
    require_reconciled(store)
    require_recorded_tenants(settings, store)
    return record_found(settings, store, identify(settings, names), names, allowed_counts(store), by_reader=True)


def require_recorded_tenants(settings: Settings, store: ObjectStore, names: Iterable[str] = ()) -> None:
    """Check that the settings name every tenant whose topics this installation has used.

    Hazard: without one of them, its requests to forget are not read, and in a restore not read again.

    Args:
        settings: Name the tenants.
        store: The object store, with the record.
        names: Further topics that were used, without the prefix.

    Raises:
        InstallationError: They do not.
        StoreError: The store does not answer.
    """
    record = load_installation(store)
    error = tenants_error(settings, [*(record.topics if record else ()), *names])
    if error is not None:
        raise error


def tenants_error(settings: Settings, names: Iterable[str]) -> InstallationError | None:
    """Return the error that names the tenants of topics that the settings do not name; None where they name all.

    Args:
        settings: Name the tenants.
        names: Topics that were used, without the prefix.
    """
    used = {tenant for _, tenant in map(split_topic, names) if tenant is not None}
    missing = sorted(used.difference(settings.tenants.names))
    if not missing:
        return None
    wanted = ",".join((*settings.tenants.names, *missing))
    return InstallationError(
        f"tenants that have topics are not set: {', '.join(missing)}; their requests to forget would not be read, and in "
        "a restore their documents and requests would be left out",
        got=f"PERENNIAL_TENANTS={settings.tenants.tenants}", allowed=f"PERENNIAL_TENANTS={wanted}",
        remedy="set it so for all roles and commands; of a tenant that has left, keep the name and the topics, and take its "
        "ACLs away (`perennial acls`)",
    )  # fmt: skip


def require_reconciled(store: ObjectStore) -> None:
    """Raise InstallationError where the store was restored and Kafka's offsets are still those from before."""
    restored = load_restored(store)
    if restored is not None:
        raise InstallationError(
            "the store was restored and is not reconciled with Kafka: examples would be lost, and erased texts learned",
            got=f"backup {restored.backup_id} of {restored.began_at:%Y-%m-%d %H:%M:%S %Z}", allowed="no object restored/backup",
            remedy="run `perennial backup reconcile`; if objects are still being copied, `perennial backup restore` first",
        )  # fmt: skip


def record_found(
    settings: Settings, store: ObjectStore, found: ClusterIds, names: Iterable[str],
    allowed: Mapping[str, int] | None = None, *, by_reader: bool = False,
) -> Installation:  # fmt: skip
    """Compare ids and counts that were read from the broker with the record, and record those that are new.

    Args:
        settings: Name the topic prefix.
        store: The object store.
        found: What the broker reported.
        names: The topics to compare, without the prefix.
        allowed: Partition counts that are accepted besides the recorded ones: those of a repartitioning that runs.
        by_reader: True where the caller is the role that reads the input topics and has dealt with its old positions.
            Another id of an input topic is recorded only then: the reader must see that the id is new.

    Returns:
        The record as it is then stored.

    Raises:
        InstallationError: Another cluster, another id or partition count of an internal topic.
        StoreError: The store does not answer.
    """
    names = tuple(names)

    def change(record: Installation) -> Installation:
        difference = first_difference(settings, record, found, names, allowed)
        if difference is not None:
            raise difference
        for name in names:
            topic_id, count = _found_topic(settings, found, name)
            if name not in record.topics:
                seen = (topic_id,) if base_topic(name) in INPUT_TOPICS else ()
                record = record.with_topic(name, RecordedTopic(topic_id=topic_id, partitions=count, seen=seen))
            elif base_topic(name) in INPUT_TOPICS and not by_reader:
                continue
            elif name not in ORDERED_TOPICS and name not in LATEST_TOPICS:
                record = _with_input_id(record, name, topic_id, count)
        return record

    return _update(store, change, Installation(cluster_id=found.cluster_id))


def _update(
    store: ObjectStore, change: Callable[[Installation], Installation], empty: Installation | None = None
) -> Installation:
    def load() -> tuple[Installation, str | None]:
        record, etag = _load(store)
        if record is None:
            record = empty
        if record is None:
            raise missing_record_error()
        return record, etag

    return update_object(store, KEY, load, change, _to_bytes, always_create=empty is not None)


def missing_record_error() -> InstallationError:
    """Return the error that reports a store without an installation record."""
    return InstallationError(
        "no topics are recorded for this store yet", got=f"no object {KEY}",
        remedy="run `perennial topics create` with PERENNIAL_STORE set",
    )  # fmt: skip


def _to_bytes(record: Installation) -> bytes:
    return record.model_dump_json().encode()


def _found_topic(settings: Settings, found: ClusterIds, name: str) -> tuple[str, int]:
    full = settings.kafka.topic(name)
    return found.topic_ids[full], found.partitions[full]


def first_difference(
    settings: Settings, record: Installation, found: ClusterIds, names: Iterable[str],
    allowed: Mapping[str, int] | None = None,
) -> InstallationError | None:  # fmt: skip
    """Return the error of the first topic that differs from the record; None where all agree.

    Args:
        settings: Name the topic prefix.
        record: The installation record.
        found: What the broker reported.
        names: The topics to compare, without the prefix. Topics that are not recorded agree.
        allowed: Partition counts that are accepted besides the recorded ones.
    """
    if found.cluster_id != record.cluster_id:
        return InstallationError(
            "this store belongs to another Kafka cluster", got=f"cluster {found.cluster_id}",
            allowed=f"cluster {record.cluster_id}",
            remedy="correct PERENNIAL_KAFKA or PERENNIAL_STORE; if the installation moved to this cluster for good, "
            "run `perennial topics adopt --all`",
        )  # fmt: skip
    for name in names:
        topic = record.topics.get(name)
        if topic is None or (name not in ORDERED_TOPICS and name not in LATEST_TOPICS):
            continue
        topic_id, count = _found_topic(settings, found, name)
        if topic_id != topic.topic_id:
            return other_topic_error(settings, name, topic_id, topic.topic_id)
        if name in ORDERED_TOPICS and count not in {topic.partitions, (allowed or {}).get(name)}:
            return other_count_error(settings, name, count, topic.partitions)
    return None


def other_topic_error(settings: Settings, name: str, found: str, recorded: str) -> InstallationError:
    """Return the error that reports an internal topic that was deleted and created again.

    Args:
        settings: Name the topic prefix.
        name: The topic's name without the prefix.
        found: The topic's id now.
        recorded: The recorded id.
    """
    return InstallationError(
        f"the topic {settings.kafka.topic(name)} was deleted and created again: records that waited in it are gone",
        got=f"topic id {found}", allowed=f"topic id {recorded}",
        remedy=f"stop the roles and run `perennial topics adopt {name}`, which says what can be read again",
    )  # fmt: skip


def other_count_error(settings: Settings, name: str, found: int, recorded: int) -> InstallationError:
    """Return the error that reports an ordered topic whose partition count is not the recorded one.

    Args:
        settings: Name the topic prefix.
        name: The topic's name without the prefix.
        found: The partition count now.
        recorded: The recorded partition count.
    """
    return InstallationError(
        f"the topic {settings.kafka.topic(name)} has another number of partitions than this installation recorded; "
        "records of a key that wait in one partition would be overtaken in another, and lost",
        got=f"{found} partitions", allowed=f"{recorded} partitions",
        remedy=f"run `perennial topics repartition {name} --partitions {found}`, which lets the waiting records be read "
        "first; nothing is lost until then",
    )  # fmt: skip


def add_input_topic_id(store: ObjectStore, name: str, topic_id: str) -> Installation:
    """Record that an input topic has this id now, keeping the ids that it had before.

    Call it before the first record of a topic that was created again is published as an example. It may be repeated.

    Args:
        store: The object store.
        name: The input topic's name without the prefix.
        topic_id: The id that the broker reports for the topic.

    Returns:
        The record as it is then stored.

    Raises:
        InstallationError: There is no record yet, or the topic had more than MAX_SEEN_IDS ids.
        StoreError: The store does not answer.
    """

    def change(record: Installation) -> Installation:
        topic = record.topics.get(name)
        return _with_input_id(record, name, topic_id, topic.partitions if topic else 1)

    return _update(store, change)


def _with_input_id(record: Installation, name: str, topic_id: str, partitions: int) -> Installation:
    topic = record.topics.get(name)
    seen = topic.seen if topic else ()
    if name in TOPICS and name not in INPUT_TOPICS:
        seen = ()  # dead-letters: no origin names its id
    elif topic_id not in seen:
        seen = (*seen, topic_id)
    if len(seen) > MAX_SEEN_IDS:
        raise InstallationError(
            f"the topic {name} was created again too often", got=f"{len(seen)} ids", allowed=f"{MAX_SEEN_IDS} ids",
            remedy="find out which program deletes the topic",
        )  # fmt: skip
    return record.with_topic(name, RecordedTopic(topic_id=topic_id, partitions=partitions, seen=seen))


def record_partitions(store: ObjectStore, name: str, partitions: int, *, was: int) -> Installation:
    """Record another partition count of a topic; the last step of a repartitioning.

    Args:
        store: The object store.
        name: The topic's name without the prefix.
        partitions: The partition count to record.
        was: The count that must be recorded now.

    Raises:
        InstallationError: Another count is recorded: another repartitioning was faster.
        StoreError: The store does not answer.
    """

    def change(record: Installation) -> Installation:
        topic = record.topics.get(name)
        if topic is None or topic.partitions not in {was, partitions}:
            raise InstallationError(
                f"another count was recorded for {name} meanwhile", got=topic.partitions if topic else "no record",
                allowed=was, remedy="run `perennial doctor`, then the same command again",
            )  # fmt: skip
        return record.with_topic(name, topic.model_copy(update={"partitions": partitions}))

    return _update(store, change)


def adopt_topics(settings: Settings, store: ObjectStore, found: ClusterIds, names: Iterable[str]) -> Installation:
    """Record the cluster, and the present ids of topics that were created again, with their present counts.

    Args:
        settings: Name the topic prefix.
        store: The object store.
        found: What the broker reported.
        names: The topics to adopt, without the prefix.

    Returns:
        The record as it is then stored.

    Raises:
        InstallationError: There is no record yet.
        StoreError: The store does not answer.
    """
    names = tuple(names)

    def change(record: Installation) -> Installation:
        record = record.model_copy(update={"cluster_id": found.cluster_id})
        for name in names:
            topic_id, count = _found_topic(settings, found, name)
            if name in ORDERED_TOPICS or name in LATEST_TOPICS:
                record = record.with_topic(name, RecordedTopic(topic_id=topic_id, partitions=count))
            else:
                record = _with_input_id(record, name, topic_id, count)
        return record

    return _update(store, change)


def provision_recorded(settings: Settings, store: ObjectStore | None, dry_run: bool = False) -> list[TopicReport]:
    """Create missing topics with their recorded partition counts, report differences, and record new topics.

    A topic that is recorded and had to be created again is not recorded with its new id: that needs
    `perennial topics adopt`.

    Args:
        settings: Name the brokers, the topic prefix, the partition count and the replication factor.
        store: The object store; None: nothing is recorded.
        dry_run: Create and record nothing.

    Returns:
        One report per topic.

    Raises:
        KafkaUnavailableError: Kafka does not answer.
        TopicError: A topic cannot be created.
        InstallationError: The store belongs to another cluster, or a topic differs from the record.
        StoreError: The store does not answer.
    """
    record = load_installation(store) if store else None
    reports = provision(settings, dry_run, record.partitions() if record else {})
    if store is not None and not dry_run:
        names = list(topics_of(settings))
        record_found(settings, store, identify(settings, names), names, allowed_counts(store))
    return reports


def open_store_of(settings: Settings) -> ObjectStore | None:
    """Return the object store of the settings; None where no store is set."""
    return open_store(settings.store.uri, settings.s3) if settings.store.uri else None
