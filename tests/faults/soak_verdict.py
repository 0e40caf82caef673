"""The soak's verdict: what became of every input record, whether erased texts are unreadable, what was published."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from perennial.learner.versions.job_order import waiting_jobs
from perennial.learner.versions.micro_batches import MAX_BATCH_BYTES, batch_origins
from perennial.storage.errors import NotFoundError
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.storage.registry.parked import list_parked
from perennial.storage.registry.waiting_jobs import MAX_CURATE_STATE_BYTES, curate_state_key
from perennial.streams.cli.adapters import open_registry
from perennial.streams.deadletters.model import read_dead_letter
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.fields import PERMANENT
from perennial.streams.events.models import (
    Batch,
    ExampleAccepted,
    ExampleScored,
    Origin,
    RetentionRequested,
    UpdateRequested,
)
from perennial.streams.kafka.connect import connect
from perennial.streams.retain.ledger import RequestRecord, expires_ms
from perennial.streams.retain.request_store import load_requests
from perennial.streams.retain.rules.in_force import InForce
from perennial.streams.retention.kinds import KINDS
from perennial.streams.settings import Settings
from tests.faults import parts
from tests.faults.service_watch import ServiceWatch
from tests.faults.soak_load import ADAPTERS, Load
from tests.oracle import ERASED, PENDING, TERMS, AdapterRecord, Classification, Position, classify, read_adapter

_TEXT_MARK = re.compile(rb"mark-\d{7}-kram")
_GROUPS = {
    "documents": "intake", "interactions": "intake", "examples": "scorer", "scored-examples": "curate",
    "adapter-jobs": "learner", "retention": "curate",
}  # fmt: skip
_OVERDUE_S = 20.0
_INPUTS = ("documents", "interactions")


@dataclass
class Verdict:
    """The figures of a soak, its equation, and what is wrong.

    Attributes:
        terms: How many acknowledged records each term of the equation has.
        acknowledged: How many records were acknowledged.
        wrong: What does not hold, by the kind of fault; empty lists where all is well.
        unsettled: Some role is still at work, or something is wrong that may be right a little later.
        figures: Everything that the line of JSON reports.
    """

    terms: dict[str, int]
    acknowledged: int
    wrong: dict[str, list[str]]
    unsettled: bool
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Return whether nothing is wrong."""
        return not any(self.wrong.values())

    def lines(self) -> Iterable[str]:
        """Return the verdict for people: the equation, then what is wrong."""
        sum_of = sum(self.terms.values())
        sign = "=" if sum_of == self.acknowledged else "!="
        yield f"acknowledged {self.acknowledged} {sign} " + " + ".join(f"{name} {n}" for name, n in self.terms.items())
        for what, found in self.wrong.items():
            yield f"{what}: {len(found)}"
            yield from (f"    {line}" for line in found[:20])


@dataclass
class _Seen:
    """What the topics and the store hold at one moment.

    Attributes:
        values: The input records.
        accepted: The examples that intake wrote.
        dead_letters: The input records that were refused.
        failed_jobs: Dead letter records of other topics and parked adapters, as text.
        uncommitted: Positions of records that some role has not committed yet, or that wait in the store.
        lagging: How many records of all topics are not committed yet.
        adapters: What the manifests say, by adapter.
        classification: The terms of every input record.
        ledger: The requests to forget, by id.
    """

    values: dict[Position, bytes]
    accepted: dict[Position, ExampleAccepted]
    dead_letters: set[Position]
    failed_jobs: list[str]
    uncommitted: set[Position]
    lagging: int
    adapters: dict[str, AdapterRecord]
    classification: Classification
    ledger: dict[str, RequestRecord]


def judge(settings: Settings, load: Load, watch: ServiceWatch, failed_commands: list[str]) -> Verdict:
    """Read everything and compare it with what was acknowledged.

    Args:
        settings: Names the broker and the store.
        load: What was published.
        watch: Saw what was served all the while.
        failed_commands: The operator's commands that failed, as text.

    Raises:
        StoreError: The store cannot be read, or an adapter changed while it was read.
    """
    registry = open_registry(settings)
    seen = _read_all(settings, registry)
    classification, log = seen.classification, set(load.acked)
    published = {at: (example.origin.timestamp_ms, example.returned) for at, example in seen.accepted.items()}
    learned = {position for record in seen.adapters.values() for position in record.learned}
    served = {position for record in seen.adapters.values() for position in record.served}
    matched = _matched(seen.accepted, seen.ledger)
    erased = {
        position for position, terms in classification.terms.items() if ERASED in terms and position in seen.accepted
    }
    requests = list(load.requests.values())
    open_requests = [
        f"{name}: {record.state}: {record.detail}"
        for name, record in seen.ledger.items()
        if not KINDS[record.request.kind].stays_in_force and record.state not in {"closed", "held"}
    ]
    wrong = {
        "lost or counted twice": [
            f"{position[0]}@{position[1]}: {terms or 'no term'} {_excerpt(seen.values.get(position))}"
            for position, terms in classification.wrong([*seen.values, *log]).items()
        ],
        "acknowledged and not in its topic": [f"{p[0]}@{p[1]}" for p in log - set(seen.values)],
        "learned twice": [name for record in seen.adapters.values() for name in record.learned_twice(published)],
        "stale publishes": parts.stale_publishes(settings, registry),
        "jobs that could not be done": seen.failed_jobs,
        "erased without a reason": [
            f"{position[0]}@{position[1]} {seen.accepted[position].document_id}"
            for position in erased
            if not _has_reason(seen.accepted[position], requests, seen.accepted.values())
        ],
        "erased and still learned": [f"{position[0]}@{position[1]}" for position in matched & (learned | served)],
        "erased and still readable": _readable(registry.store, seen, erased | matched, learned),
        "lived longer than it said": _overdue(seen, learned),
        "requests that nobody answered": sorted(load.acked_requests - set(seen.ledger)),
        "requests neither closed nor held": open_requests,
        "service gaps": watch.gaps,
        "commands that failed": failed_commands,
    }
    terms = classification.count(log)
    kinds = [record.request.kind for record in seen.ledger.values() if record.state == "closed"]
    figures = {
        "acknowledged": len(log), **{name.replace(" ", "_"): n for name, n in terms.items()},
        "unknown": load.unknown, "unacknowledged_in_topics": len(set(seen.values) - log),
        "versions": sum(1 for adapter in ADAPTERS for _ in registry.versions(adapter)),
        "requests": len(load.requests), "erasures_closed": sum(KINDS[kind].job == "forget" for kind in kinds),
        "expiries_closed": kinds.count("expire"), "supersedes_closed": kinds.count("supersede"),
        "returned": sum(returned for _, returned in published.values()), "service_gap_s": round(watch.gap_s, 1),
        **{what.replace(" ", "_"): len(found) for what, found in wrong.items()},
    }  # fmt: skip
    unsettled = bool(seen.lagging or terms[PENDING] or any(wrong.values()))
    return Verdict(terms, len(log), wrong, unsettled, figures)


def _read_all(settings: Settings, registry: Any) -> _Seen:
    values: dict[Position, bytes] = {}
    committed = _committed(settings)
    uncommitted: set[Position] = set()
    lagging = 0
    accepted: dict[Position, ExampleAccepted] = {}
    for topic in (*_INPUTS, "examples", "scored-examples", "adapter-jobs", "retention"):
        for record in parts.read_to_end(settings, topic):
            is_uncommitted = record.offset >= committed[topic, record.partition]
            lagging += is_uncommitted
            if topic in _INPUTS:
                position = f"{record.topic}/{record.partition}", record.offset
                values[position] = record.value
                positions = [position]
            elif topic == "retention":
                continue
            else:
                event = decode(record.value, record.headers, topic).event
                if isinstance(event, ExampleAccepted):
                    accepted[_position(event.origin)] = event
                positions = _covered(registry.store, event) if is_uncommitted else []
            if is_uncommitted:
                uncommitted.update(positions)
    dead_letters, failed_jobs = set(), []
    for record in parts.read_to_end(settings, "dead-letters"):
        found = read_dead_letter(
            record.partition, record.offset, record.key, record.value, record.headers, settings.kafka.topic_prefix
        )
        if found.source_topic in _INPUTS:
            dead_letters.add(
                (
                    f"{settings.kafka.topic(found.source_topic)}/{found.dead_letter.partition}",
                    found.dead_letter.offset,
                )
            )
        else:
            failed_jobs.append(f"{found.source_topic}: {found.dead_letter.reason}: {found.dead_letter.detail}"[:400])
    for adapter in ADAPTERS:  # before the manifests: a job that is settled in between is in those
        for job in waiting_jobs(registry.store, adapter):
            uncommitted.update(_covered(registry.store, job))
    failed_jobs += [
        f"{parked.adapter} is parked: {parked.reason}: {parked.detail}" for parked in list_parked(registry.store)
    ]
    ledger = load_requests(registry.store)  # before the manifests, so that these have what closed requests came to
    forgotten = _matched(accepted, ledger)
    adapters = {adapter: read_adapter(registry, adapter, forgotten) for adapter in ADAPTERS}
    carried = {position for adapter in ADAPTERS for position in _carried(registry.store, adapter)}
    contents = {position: _content(value) for position, value in values.items()}
    documents = {position: _document(value) for position, value in values.items()}
    classification = classify(contents, adapters.values(), accepted, dead_letters, carried, uncommitted, documents)
    return _Seen(
        values,
        accepted,
        dead_letters,
        failed_jobs,
        uncommitted,
        lagging,
        adapters,
        classification,
        ledger,
    )


def _content(value: bytes) -> str:
    """Return what makes a record a repeat of another: its content without `supersedes` and without empty fields.

    Intake knows a document by its text. A text that returned without its `supersedes` is repeated by a late delivery of the
    first publication, which has it.
    """
    try:
        fields = json.loads(value)
    except ValueError:
        return value.hex()
    if isinstance(fields, dict):
        fields = {name: field for name, field in fields.items() if field not in (None, []) and name != "supersedes"}
    return json.dumps(fields, sort_keys=True)


def _document(value: bytes) -> str:
    """Return the adapter and the id of the document or interaction that a record is about; the record where it has none."""
    try:
        fields = json.loads(value)
    except ValueError:
        return value.hex()
    if not isinstance(fields, dict):
        return value.hex()
    return json.dumps([fields.get("adapter"), fields.get("document_id", fields.get("interaction_id"))])


def _committed(settings: Settings) -> dict[tuple[str, int], int]:
    """Return the committed offset of the role that reads each topic, by topic and partition."""
    found: dict[tuple[str, int], int] = {}
    for group in set(_GROUPS.values()):
        consumer = connect(
            KafkaConsumer,
            settings.kafka.bootstrap,
            10,
            security=settings.kafka_security,
            group_id=settings.kafka.topic(group),
            enable_auto_commit=False,
        )
        try:
            for topic in (name for name, theirs in _GROUPS.items() if theirs == group):
                for number in consumer.partitions_for_topic(settings.kafka.topic(topic)):
                    at = consumer.committed(TopicPartition(settings.kafka.topic(topic), number))
                    found[topic, number] = at or 0
        finally:
            consumer.close()
    return found


def _covered(store: ObjectStore, event: object) -> list[Position]:
    """Return the input positions that an internal event is about."""
    if isinstance(event, ExampleAccepted):
        return [_position(event.origin)]
    if isinstance(event, ExampleScored):
        return [_position(event.example.origin)]
    if isinstance(event, UpdateRequested):
        with suppress(NotFoundError):  # forgetting has rebuilt the update, so the job is done
            batch = Batch.model_validate_json(get_blob(store, event.batch.digest, MAX_BATCH_BYTES))
            return [_position(origin) for origin in batch_origins(batch)]
    return []


def _carried(store: ObjectStore, adapter: str) -> list[Position]:
    """Return what curate skipped and will list in its next micro-batch."""
    try:
        state = json.loads(store.get(curate_state_key(adapter), MAX_CURATE_STATE_BYTES).data)
    except NotFoundError:
        return []
    return [_position(Origin.model_validate(skip["origin"])) for skip in state["carried"]]


def _position(origin: Origin) -> Position:
    return f"{origin.topic}/{origin.partition}", origin.offset


def _has_reason(
    example: ExampleAccepted, requests: list[RetentionRequested], others: Iterable[ExampleAccepted]
) -> bool:
    """Return whether any published record or request says that the example is to be forgotten."""
    if example.expires_at is not None or example.retention_class != PERMANENT:
        return True
    if any(
        request.kind == "erase" and request.adapter == example.adapter and request.selector
        and request.selector.matches(example) for request in requests
    ):  # fmt: skip
        return True
    return any(
        o.adapter == example.adapter and example.document_id in o.supersedes and o.source == example.source
        for o in others
    )


def _matched(accepted: Mapping[Position, ExampleAccepted], ledger: Mapping[str, RequestRecord]) -> set[Position]:
    """Return what closed requests match: none of it may be learned.

    An erasure matches what was published before the request. Requests that a hold blocks are not closed.
    """
    matched: set[Position] = set()
    closed = {n: r for n, r in ledger.items() if r.state == "closed" and r.request.kind in {"erase", "expire"}}
    for position, example in accepted.items():
        for record in closed.values():
            selector = record.request.selector
            if record.request.adapter != example.adapter or example.origin.timestamp_ms > record.until_ms:
                continue
            if example.example_id in record.example_ids or (selector is not None and selector.matches(example)):
                matched.add(position)
    return matched


def _overdue(seen: _Seen, learned: set[Position]) -> list[str]:
    """Return what is learned although its own fields made it expire a while ago and no hold covers it."""
    found = []
    in_force = InForce(seen.ledger.values())
    for position, example in seen.accepted.items():
        end_ms = expires_ms(example, ())
        if position not in learned or end_ms is None or end_ms > (time.time() - _OVERDUE_S) * 1000:
            continue
        if not any(matches(example) for matches in in_force.hold_matchers(example.adapter)):
            found.append(f"{position[0]}@{position[1]} {example.document_id}")
    return found


def _readable(store: ObjectStore, seen: _Seen, removed: set[Position], learned: set[Position]) -> list[str]:
    """Return marks of erased texts that some object still holds, and blobs of states that were trained on them."""
    still_learned = {mark for position in learned for mark in _TEXT_MARK.findall(seen.values.get(position, b""))}
    marks = {
        mark for position in removed for mark in _TEXT_MARK.findall(seen.values.get(position, b""))
    } - still_learned
    found = [
        f"blob {digest}"
        for record in seen.adapters.values()
        for digest in record.contaminated_blobs
        if store.exists(blob_key(digest))
    ]
    for prefix in ("blobs/", "manifests/", "state/", "quarantine/", "retention/"):
        for key in store.list(prefix):
            try:
                data = store.get(key).data
            except NotFoundError:  # deleted meanwhile
                continue
            found += [f"{mark.decode()} in {key}" for mark in marks & set(_TEXT_MARK.findall(data))]
    return found


def _excerpt(value: bytes | None) -> str:
    return (value or b"")[:160].decode("utf-8", "replace")


__all__ = ["TERMS", "Verdict", "judge"]
