"""Reconcile a store that is older than Kafka: one that was restored, or a bucket that was set back.

The steps, each of which may be repeated after a crash:

1. Nothing runs: no consumer group has a member.
2. `restored/backup` says that the store is not reconciled, so no role starts meanwhile.
3. Group offsets go back to where the store stands (`offset_plan`); the learner's go to the end of its log.
4. Requests to forget since then are accepted again (`replay_requests`): their examples are in quarantine before anything
   reads an example.
5. Aliases go on above every generation that was announced (`alias_plan`); one whose version holds what was erased since is
   not served until it is forgotten again.
6. The jobs that wait in the store are published again, those that forget first.
7. The offsets of `retention` go to where step 4 ended, and the record of step 2 is deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

import orjson
from kafka.structs import OffsetAndMetadata

from perennial.storage.errors import IntegrityError, NotFoundError, PerennialError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.recovery.restored_store import (
    RECORD_KEY,
    RestoredBackup,
    drop_restored_alias,
    end_restore,
    load_restored,
    load_restored_alias,
    restored_alias_keys,
)
from perennial.storage.registry.compare_and_swap import AliasWriter, generation_floor
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import AliasState, Registry
from perennial.storage.signing.trust import Trust
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.models import ForgetRequested, UpdateRequested
from perennial.streams.events.tenants import base_topic
from perennial.streams.kafka.group import ConfirmingProducer
from perennial.streams.kafka.installation import first_difference, load_installation, require_recorded_tenants
from perennial.streams.kafka.topics import TOPICS, ClusterIds, admin_client, identify
from perennial.streams.observe.metrics import Metrics
from perennial.streams.recovery.alias_plan import WAITS, resumed_alias
from perennial.streams.recovery.announced import Announced, read_announced
from perennial.streams.recovery.kafka_positions import (
    GROUPS,
    KafkaPositions,
    members_of,
    offsets_at,
    partition_of,
    read_logs,
    used_topics,
)
from perennial.streams.recovery.log_reader import merge_by_time, read_range
from perennial.streams.recovery.offset_plan import LogRange, OffsetPlan, plan_offsets
from perennial.streams.recovery.replay_requests import ReplayReport, replay_requests
from perennial.streams.recovery.waiting_work import cuts_in_store, open_forget_jobs, waiting_updates
from perennial.streams.retain.service import CLOCK_KEY
from perennial.streams.retain.store_facts import StoreFacts
from perennial.streams.retention.quarantine_filter import QuarantineFilter
from perennial.streams.settings import Settings

REQUESTS_MARGIN_MS: Final = 7 * 24 * 3_600_000
"""Where nobody knows how far requests were read, they are read from so long before the store's newest trace."""


class ReconcileError(PerennialError):
    """The store cannot be reconciled with Kafka now."""


@dataclass(frozen=True)
class EventMaker:
    """How the event of an alias is made; the learner has it, which this room does not import.

    Attributes:
        event: Returns the event that says where an alias points.
        event_id: Returns its CloudEvents id.
    """

    event: Callable[[Registry, AliasState], AdapterUpdate]
    event_id: Callable[[AdapterUpdate], str]


@dataclass
class ReconcileReport:
    """What was done.

    Attributes:
        evidence: Why the store was taken for older than Kafka; empty where it was not, and then nothing was done.
        offsets: What was committed, by group, topic and partition.
        lost: Records that no log holds any more, by topic.
        requests: What became of the requests to forget since the backup.
        resumed: Aliases that are served again, by `adapter#alias`, with their generation.
        waiting: Aliases that are served again once the requests to forget are carried out.
        floors: Aliases of adapters that the store does not have; they begin above these generations.
        refused: Restored aliases that were not put back, by key, and why: they may be forged.
        claims: Aliases of which a replica says that it serves this generation, and no alias and no event has it.
        unproven: Events of aliases that no trusted key signed, and that counted for nothing.
        jobs: Update jobs that were published again.
        forget_jobs: Forget jobs that were published again.
    """

    evidence: list[str] = field(default_factory=list)
    offsets: Mapping[str, Mapping[str, Mapping[int, int]]] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)
    requests: ReplayReport = field(default_factory=ReplayReport)
    resumed: dict[str, int] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    floors: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    claims: dict[str, int] = field(default_factory=dict)
    unproven: int = 0
    jobs: int = 0
    forget_jobs: int = 0


def evidence_of_age(store: ObjectStore, announced: Announced, limit: int = 5) -> list[str]:
    """Return, as text, what shows that a store is older than Kafka; empty where nothing does.

    The alias is stored before its event is published. So a generation that was announced and that the store does not have
    is one that it had once. Where the alias is not there, the generation above which it will begin counts: a reconciliation
    notes it for adapters that were made after the backup.

    Args:
        store: The store.
        announced: The generations that were announced.
        limit: Return at most so many.
    """
    found = []
    record = load_restored(store)
    if record is not None:
        found.append(f"it was restored from backup {record.backup_id} and is not reconciled")
    registry = _registry(store)
    for (adapter, alias), generation in announced.generations.items():
        if len(found) >= limit:
            break
        state = registry.alias(adapter, alias)
        known = state.generation if state else generation_floor(store, adapter, alias)
        if known < generation:
            found.append(f"{adapter}#{alias} has generation {known}, and {generation} was announced")
    return found


def reconcile(
    settings: Settings,
    store: ObjectStore,
    events: EventMaker,
    *,
    accept_lost: bool = False,
    anyway: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> ReconcileReport:
    """Bring a store that is older than Kafka and Kafka together.

    Args:
        settings: Name the brokers, the topic prefix and the alias.
        store: The store.
        events: Makes the events of aliases.
        accept_lost: Go on although records are gone.
        anyway: Go on where nothing shows that the store is older.
        on_progress: Called with a line of text at each step, and often during long ones.

    Raises:
        ReconcileError: A role runs, the restore is not finished, records are gone, or aliases are signed and no key to
            sign with is set.
        InstallationError: The topics are not those of this store, or the settings lack a tenant that has topics.
        KafkaUnavailableError: Kafka does not answer.
        StoreError: The store failed.
    """
    report = ReconcileReport()
    record = load_restored(store)
    if record is not None and not record.copied:
        raise ReconcileError(
            f"backup {record.backup_id} is not completely restored", remedy="run `perennial backup restore` again"
        )
    require_stopped(settings)
    ids = _require_same_topics(settings, store, record)
    on_progress("reading which generations were announced")
    announced = read_announced(settings)
    report.evidence, report.unproven = evidence_of_age(store, announced), announced.unproven
    if not report.evidence and not anyway:
        return report
    require_signing_key(store, settings.signing.trust())
    positions = None
    if record is None:  # a bucket that was set back: from now on no role starts
        record = RestoredBackup(backup_id="none", began_at=datetime.now(UTC), copied=True)
        store.put_if_absent(RECORD_KEY, record.to_bytes())
    elif record.positions is not None:
        positions = KafkaPositions.model_validate(record.positions)
        for name, generation in positions.generations.items():
            adapter, _, alias = name.rpartition("#")
            announced.note(adapter, alias, generation)
    store_ms = newest_trace_ms(store)
    on_progress("comparing the logs with the store")
    logs = _log_ranges(settings, ids, positions, store_ms)
    plan = plan_offsets(logs, store_ms)
    _require_all_there(plan, logs, accept_lost=accept_lost)
    _commit(settings, plan.commits)
    report.offsets, report.lost = plan.commits, plan.lost
    metrics = Metrics("backup", settings)
    producer = ConfirmingProducer(settings, "backup", metrics, lambda: datetime.now(UTC))
    try:
        on_progress("accepting the requests to forget since then")
        report.requests = replay_requests(settings, store, _requests(settings, logs), producer, metrics)
        resume_aliases(settings, store, announced, events, producer, report, on_progress)
        _publish_waiting(store, producer, report, on_progress)
    finally:
        producer.close()
    read = {topic: {log.partition: log.end for log in each} for topic, each in _request_logs(logs).items()}
    _commit(settings, {"curate": read})
    end_restore(store)
    return report


def newest_trace_ms(store: ObjectStore) -> int | None:
    """Return the newest time that a store shows, in milliseconds since 1970; None where it shows none.

    retain writes its clock every 20 seconds; where it never ran, the aliases' times are looked at.
    """
    with suppress(NotFoundError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return int(orjson.loads(store.get(CLOCK_KEY, 1024).data)["shown_ms"])
    registry = _registry(store)
    times = [state.published_at for adapter in registry.adapters() for state in registry.aliases(adapter)]
    return int(max(times).timestamp() * 1000) if times else None


def _registry(store: ObjectStore, trust: Trust | None = None) -> Registry:
    return Registry(store, trust=trust)


def require_stopped(settings: Settings) -> None:
    """Raise ReconcileError where a consumer group of the roles has a member."""
    running = {group: count for group in GROUPS if (count := members_of(settings, group))}
    if running:
        raise ReconcileError(
            "roles are running", got=", ".join(f"{count} processes in the group {group}" for group, count in running.items()),
            allowed="no member in any group",
            remedy="stop intake, scorer, streams and learner on all machines, wait 10 s, then run the command again",
        )  # fmt: skip


def _require_same_topics(settings: Settings, store: ObjectStore, restored: RestoredBackup | None) -> ClusterIds:
    require_recorded_tenants(settings, store, used_topics(settings, restored.positions if restored else None))
    ids = identify(settings)
    record = load_installation(store)
    if record is not None:
        names = [name for name in TOPICS if settings.kafka.topic(name) in ids.topic_ids]
        difference = first_difference(settings, record, ids, names)
        if difference is not None:
            raise difference
    return ids


def _log_ranges(
    settings: Settings, ids: ClusterIds, positions: KafkaPositions | None, store_ms: int | None
) -> dict[str, list[LogRange]]:
    """Return the log of every partition that a role reads, with the offset at which the restored store stands."""
    found: dict[str, list[LogRange]] = {}
    with admin_client(settings) as admin:
        logs = read_logs(settings, admin, ids.partitions)
        for topic, readers in logs.items():
            topic_id = ids.topic_ids.get(settings.kafka.topic(topic))
            wanted = positions.recorded(topic, topic_id, ids.cluster_id) if positions else {}
            if base_topic(topic) == "retention" and not wanted and store_ms is not None:
                wanted = offsets_at(admin, readers, store_ms - REQUESTS_MARGIN_MS)
            found[topic] = [
                LogRange(r.partition.partition, r.begin, r.end, wanted.get(r.partition.partition)) for r in readers
            ]
    if positions is None:
        found = {topic: [_with_first(settings, topic, log) for log in each] for topic, each in found.items()}
    return found


def _with_first(settings: Settings, topic: str, log: LogRange) -> LogRange:
    if log.begin == 0 or log.begin >= log.end:
        return log
    first = next(
        iter(read_range(settings, partition_of(settings, topic, log.partition), log.begin, log.begin + 1)), None
    )
    return log if first is None else LogRange(log.partition, log.begin, log.end, log.wanted, first.timestamp)


def _require_all_there(plan: OffsetPlan, logs: Mapping[str, list[LogRange]], *, accept_lost: bool) -> None:
    lost = dict(plan.lost)
    for topic, each in _request_logs(logs).items():
        requests = sum(max(0, log.begin - log.wanted) for log in each if log.wanted is not None)
        lost |= {topic: requests} if requests else {}
    if accept_lost or not (lost or plan.unknown):
        return
    said = [f"{count} records of {topic} were deleted since" for topic, count in lost.items()]
    said += [f"{topic} begins after the store's newest trace" for topic in plan.unknown]
    raise ReconcileError(
        "Kafka no longer holds everything that the restored store lacks", got="; ".join(said),
        allowed="logs that reach back to the backup",
        remedy="restore a newer backup, if there is one; else add --accept-lost, publish the documents of that time again "
        "from their source, and send lost requests to forget again. Raise retention.ms above the age of your backups",
    )  # fmt: skip


def _commit(settings: Settings, commits: Mapping[str, Mapping[str, Mapping[int, int]]]) -> None:
    """Commit offsets for groups that have no members.

    Raises:
        ReconcileError: Kafka refuses one.
    """
    with admin_client(settings) as admin:
        for group, topics in commits.items():
            offsets = {
                partition_of(settings, topic, number): OffsetAndMetadata(offset, "", -1)
                for topic, each in topics.items() for number, offset in each.items()
            }  # fmt: skip
            if not offsets:
                continue
            errors = admin.alter_group_offsets(settings.kafka.topic(group), offsets)
            refused = {partition: error for partition, error in errors.items() if getattr(error, "errno", 0)}
            if refused:
                partition, error = next(iter(refused.items()))
                raise ReconcileError(
                    f"offsets of the group {settings.kafka.topic(group)} cannot be set", got=f"{partition}: {error.__name__}",
                    remedy="stop the roles on all machines, wait 10 s, then run the command again",
                )  # fmt: skip


def _requests(settings: Settings, logs: Mapping[str, list[LogRange]]) -> Iterator[Any]:
    ranges = []
    for topic, each in _request_logs(logs).items():
        for log in each:
            start = log.begin if log.wanted is None else min(max(log.begin, log.wanted), log.end)
            ranges.append(read_range(settings, partition_of(settings, topic, log.partition), start, log.end))
    return merge_by_time(ranges)


def _request_logs(logs: Mapping[str, list[LogRange]]) -> dict[str, list[LogRange]]:
    """Return the logs of `retention`, and of the topics of this kind that tenants have."""
    return {topic: each for topic, each in logs.items() if base_topic(topic) == "retention"}


def resume_aliases(
    settings: Settings,
    store: ObjectStore,
    announced: Announced,
    events: EventMaker,
    producer: ConfirmingProducer,
    report: ReconcileReport,
    on_progress: Callable[[str], None],
) -> None:
    """Put every alias back above the generations that were announced, and announce those that are served.

    An alias under `restored/` that no trusted key signed, or that is another one than its key says, stays there.

    Args:
        settings: Name the alias, the keys and the times of retention.
        store: The store.
        announced: The generations that were announced.
        events: Makes the events of aliases.
        producer: Sends them.
        report: Gets what became of each alias.
        on_progress: Called with a line of text for each alias.

    Raises:
        ReconcileError: Another process moves an alias.
        IntegrityError: An alias in its place is damaged, or no trusted key signed it.
        StoreError: The store failed.
    """
    registry = _registry(store, settings.signing.trust())
    writer = AliasWriter(store, lambda: uuid4().hex, lambda: datetime.now(UTC), registry.trust)
    facts = StoreFacts(settings, store, None)
    for number, (state, is_staged) in enumerate(_aliases(store, registry, report.refused), 1):
        on_progress(f"aliases: {number}")
        name = f"{state.adapter}#{state.alias}"
        if name in report.resumed or name in report.waiting:
            continue  # it has just been put back
        current = registry.alias(state.adapter, state.alias)
        key = (state.adapter, state.alias)
        if not (is_staged and current is not None):  # else an earlier run had put it back
            facts.begin()
            wanted = resumed_alias(
                state, _newest_served(registry, state), announced.generations.get(key, 0), announced.versions.get(key),
                holds_erased=_holds_erased(facts, state.adapter),
            )  # fmt: skip
            current = _written(writer, state, wanted, is_staged=is_staged)
        if is_staged:
            drop_restored_alias(store, *key)
        if (current.kind, current.reason) == ("retired", WAITS):
            report.waiting.append(name)  # and no event: its generation was announced with another version
            continue
        report.resumed[name] = current.generation
        event = events.event(registry, current)
        producer.send(event, event_id=events.event_id(event), occurred_at=datetime.now(UTC))
    producer.flush()
    for (adapter, alias), generation in announced.generations.items():
        if registry.alias(adapter, alias) is None:
            writer.raise_floor(adapter, alias, generation)
            report.floors[f"{adapter}#{alias}"] = generation
    for (adapter, alias), generation in announced.acknowledged.items():
        current = registry.alias(adapter, alias)
        if generation > max(announced.generations.get((adapter, alias), 0), current.generation if current else 0):
            report.claims[f"{adapter}#{alias}"] = generation


def _written(writer: AliasWriter, state: AliasState, wanted: AliasState, *, is_staged: bool) -> AliasState:
    if wanted == state and not is_staged:
        return state
    written = writer.resume(wanted, None if is_staged else state.etag)
    if written is None:
        raise ReconcileError(
            f"another process moves {state.adapter}#{state.alias}",
            remedy="stop the roles and other commands, try again",
        )
    return written


def _aliases(store: ObjectStore, registry: Registry, refused: dict[str, str]) -> Iterator[tuple[AliasState, bool]]:
    """Yield every alias of the store, and whether it waits under `restored/`; note by key which of those are refused."""
    for key in restored_alias_keys(store):
        try:
            state = load_restored_alias(store, key, registry.trust)
        except IntegrityError as error:
            refused[key] = str(error)
            continue
        yield state, True
    for adapter in registry.adapters():
        for state in registry.aliases(adapter):
            yield state, False


def require_signing_key(store: ObjectStore, trust: Trust) -> None:
    """Check that this process can sign aliases, where the store has a signed one.

    Args:
        store: The store.
        trust: The keys of this process.

    Raises:
        ReconcileError: An alias is signed, and there is no key: the alias would be written without a signature.
        IntegrityError: An alias in its place is damaged.
    """
    if trust.signing_key is not None:
        return
    states = (state for state, _ in _aliases(store, _registry(store), {}))
    signed = next((f"{state.adapter}#{state.alias}" for state in states if state.signature is not None), None)
    if signed is not None:
        raise ReconcileError(
            "the aliases of this store are signed, and this process has no key to sign them with",
            got=f"{signed} is signed, PERENNIAL_SIGNING_KEY_FILE is not set", allowed="the key that the learners sign with",
            remedy="set PERENNIAL_SIGNING_KEY_FILE as for a learner, then run `perennial backup reconcile`",
        )  # fmt: skip


def _newest_served(registry: Registry, state: AliasState) -> tuple[int, str] | None:
    """Return the newest version after the alias's that may be served; None where there is none."""
    head = registry.head(state.adapter)
    seq, version = (head.seq, head.version) if head else (0, "")
    while seq > state.seq:
        manifest: Manifest = registry.manifest(state.adapter, version)
        if manifest.outcome == "promoted" and not registry.is_contaminated(manifest):
            return seq, version
        seq, version = seq - 1, manifest.head or ""
    return None


def _holds_erased(facts: StoreFacts, adapter: str) -> bool:
    """Return whether a version that may be live learned an example of a request that is not carried out."""
    quarantine = facts.quarantine(adapter)
    open_entries = [entry for entry in quarantine.entries if entry.done is None]
    if not open_entries:
        return False
    selects = QuarantineFilter(quarantine.model_copy(update={"entries": open_entries}), facts.store)
    return any(each.learned and selects.entry_of(each.example) is not None for each in facts.examples(adapter))


def _publish_waiting(
    store: ObjectStore, producer: ConfirmingProducer, report: ReconcileReport, on_progress: Callable[[str], None]
) -> None:
    """Publish the jobs of every adapter that wait in the store; those that forget come first."""
    registry = _registry(store)
    adapters = {*registry.adapters(), *(key.removeprefix("state/curate/") for key in store.list("state/curate/"))}
    for number, adapter in enumerate(sorted(adapters), 1):
        on_progress(f"jobs of adapters: {number} of {len(adapters)}")
        forgets = open_forget_jobs(store, adapter, "sent again after a restore")
        updates = waiting_updates(store, adapter, cuts_in_store(store, adapter)[0])
        jobs: list[ForgetRequested | UpdateRequested] = [*forgets, *updates]
        for job in jobs:
            producer.send(job, event_id=job.job_id, occurred_at=datetime.now(UTC))
        producer.flush()
        report.forget_jobs += len(forgets)
        report.jobs += len(updates)
