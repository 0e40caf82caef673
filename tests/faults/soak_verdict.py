"""The soak's verdict: what became of every record of the input topics, what was erased and is gone, what was said on the way."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from perennial.learner.versions.micro_batches import MAX_BATCH_BYTES, batch_origins
from perennial.storage.errors import NotFoundError
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.streams.cli.adapters import open_registry
from perennial.streams.curate.agent import state_key
from perennial.streams.curate.batcher import MAX_STATE_BYTES
from perennial.streams.deadletters.model import read_dead_letter
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.models import (
    PERMANENT,
    Batch,
    ExampleAccepted,
    ExampleScored,
    Origin,
    RetentionRequested,
    UpdateRequested,
)
from perennial.streams.kafka.connect import connect
from perennial.streams.retain.ledger import RequestLedger, expires_ms, hold_matchers
from perennial.streams.retain.service import load_ledger
from perennial.streams.retention.kinds import KINDS
from perennial.streams.settings import Settings
from tests.faults import parts
from tests.faults.soak_load import ADAPTERS, Load
from tests.oracle import ERASED, PENDING, TERMS, Line, Place, Reckoning, read_line, reckon

_MARK = re.compile(rb"mark-\d{7}-kram")
_GROUPS = {
    "documents": "intake", "interactions": "intake", "examples": "scorer", "scored-examples": "curate",
    "adapter-jobs": "learner", "retention": "curate",
}  # fmt: skip
_OVERDUE_S = 20.0
_INPUTS = ("documents", "interactions")


@dataclass
class Verdict:
    """The figures, the equation, and what is wrong. unsettled: something may still move."""

    terms: dict[str, int]
    acknowledged: int
    wrong: dict[str, list[str]]
    unsettled: bool
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.wrong.values())

    def lines(self) -> Iterable[str]:
        """For people: the equation, then what offends."""
        sum_of = sum(self.terms.values())
        sign = "=" if sum_of == self.acknowledged else "!="
        yield f"acknowledged {self.acknowledged} {sign} " + " + ".join(f"{name} {n}" for name, n in self.terms.items())
        for what, found in self.wrong.items():
            yield f"{what}: {len(found)}"
            yield from (f"    {line}" for line in found[:20])


@dataclass
class _Seen:
    """What the topics and the store hold at one moment."""

    values: dict[Place, bytes]
    accepted: dict[Place, ExampleAccepted]
    letters: set[Place]
    job_letters: list[str]
    waiting: set[Place]
    lagging: int
    lines: dict[str, Line]
    reckoning: Reckoning
    book: RequestLedger


def judge(settings: Settings, load: Load) -> Verdict:
    """Read everything and hold it against what was acknowledged. Raises StoreError."""
    registry = open_registry(settings)
    seen = _look(settings, registry)
    reckoning, log = seen.reckoning, set(load.acked)
    learned = {place for line in seen.lines.values() for place in line.learned}
    served = {place for line in seen.lines.values() for place in line.served}
    meant = _meant(seen, load)
    erased = {place for place, terms in reckoning.terms.items() if ERASED in terms and place in seen.accepted}
    asked = list(load.asked.values())
    open_requests = [
        f"{name}: {record.state}: {record.detail}"
        for name, record in seen.book.records.items()
        if not KINDS[record.request.kind].stays_in_force and record.state not in {"closed", "held"}
    ]
    wrong = {
        "lost or counted twice": [
            f"{place[0]}@{place[1]}: {terms or 'no term'} {_excerpt(seen.values.get(place))}"
            for place, terms in reckoning.wrong([*seen.values, *log]).items()
        ],
        "acknowledged and not in its topic": [f"{p[0]}@{p[1]}" for p in log - set(seen.values)],
        "learned twice": [name for line in seen.lines.values() for name in line.twice],
        "stale publishes": parts.stale_publishes(settings, registry),
        "jobs that could not be done": seen.job_letters,
        "erased without a reason": [
            f"{place[0]}@{place[1]} {seen.accepted[place].document_id}"
            for place in erased
            if not _has_reason(seen.accepted[place], asked, seen.accepted.values())
        ],
        "erased and still learned": [f"{place[0]}@{place[1]}" for place in meant & (learned | served)],
        "erased and still readable": _readable(registry.store, seen, erased | meant, learned),
        "lived longer than it said": _overdue(seen, learned),
        "requests that nobody answered": sorted(load.heard - set(seen.book.records)),
        "requests neither closed nor held": open_requests,
    }
    terms = reckoning.count(log)
    kinds = [record.request.kind for record in seen.book.records.values() if record.state == "closed"]
    figures = {
        "acknowledged": len(log), **{name.replace(" ", "_"): n for name, n in terms.items()},
        "unknown": load.unknown, "unacknowledged_in_topics": len(set(seen.values) - log),
        "versions": sum(1 for adapter in ADAPTERS for _ in registry.versions(adapter)),
        "requests": len(load.asked), "erasures_closed": sum(KINDS[kind].job == "forget" for kind in kinds),
        **{what.replace(" ", "_"): len(found) for what, found in wrong.items()},
    }  # fmt: skip
    unsettled = bool(seen.lagging or terms[PENDING] or any(wrong.values()))
    return Verdict(terms, len(log), wrong, unsettled, figures)


def _look(settings: Settings, registry: Any) -> _Seen:
    values: dict[Place, bytes] = {}
    committed = _committed(settings)
    waiting: set[Place] = set()
    lagging = 0
    accepted: dict[Place, ExampleAccepted] = {}
    for topic in (*_INPUTS, "examples", "scored-examples", "adapter-jobs", "retention"):
        for record in parts.read_to_end(settings, topic):
            is_waiting = record.offset >= committed[topic, record.partition]
            lagging += is_waiting
            if topic in _INPUTS:
                place = f"{record.topic}/{record.partition}", record.offset
                values[place] = record.value
                places = [place]
            elif topic == "retention":
                continue
            else:
                event = decode(record.value, record.headers, topic).event
                if isinstance(event, ExampleAccepted):
                    accepted[_at(event.origin)] = event
                places = _covered(registry.store, event) if is_waiting else []
            if is_waiting:
                waiting.update(places)
    letters, job_letters = set(), []
    for record in parts.read_to_end(settings, "dead-letters"):
        letter = read_dead_letter(
            record.partition, record.offset, record.key, record.value, record.headers, settings.kafka.topic_prefix
        )
        if letter.source_topic in _INPUTS:
            letters.add(
                (
                    f"{settings.kafka.topic(letter.source_topic)}/{letter.dead_letter.partition}",
                    letter.dead_letter.offset,
                )
            )
        else:
            job_letters.append(f"{letter.source_topic}: {letter.dead_letter.reason}: {letter.dead_letter.detail}"[:400])
    lines = {adapter: read_line(registry, adapter) for adapter in ADAPTERS}
    carried = {place for adapter in ADAPTERS for place in _carried(registry.store, adapter)}
    contents = {place: _content(value) for place, value in values.items()}
    reckoning = reckon(contents, lines.values(), accepted, letters, carried, waiting)
    return _Seen(
        values, accepted, letters, job_letters, waiting, lagging, lines, reckoning, load_ledger(registry.store)[0]
    )


def _content(value: bytes) -> str:
    """What a record says, whichever fields that say nothing its writer left out."""
    try:
        said = json.loads(value)
    except ValueError:
        return value.hex()
    if isinstance(said, dict):
        said = {name: field for name, field in said.items() if field not in (None, [])}
    return json.dumps(said, sort_keys=True)


def _committed(settings: Settings) -> dict[tuple[str, int], int]:
    """The next offset of every role, by topic and partition."""
    found: dict[tuple[str, int], int] = {}
    for group in set(_GROUPS.values()):
        consumer = connect(
            KafkaConsumer, settings.kafka.bootstrap, 10, group_id=settings.kafka.topic(group), enable_auto_commit=False
        )
        try:
            for topic in (name for name, theirs in _GROUPS.items() if theirs == group):
                for number in consumer.partitions_for_topic(settings.kafka.topic(topic)):
                    at = consumer.committed(TopicPartition(settings.kafka.topic(topic), number))
                    found[topic, number] = at or 0
        finally:
            consumer.close()
    return found


def _covered(store: ObjectStore, event: object) -> list[Place]:
    """The places that an event inside is about."""
    if isinstance(event, ExampleAccepted):
        return [_at(event.origin)]
    if isinstance(event, ExampleScored):
        return [_at(event.example.origin)]
    if isinstance(event, UpdateRequested):
        with suppress(NotFoundError):  # made anew without what was erased: then the job is done
            batch = Batch.model_validate_json(get_blob(store, event.batch.digest, MAX_BATCH_BYTES))
            return [_at(origin) for origin in batch_origins(batch)]
    return []


def _carried(store: ObjectStore, adapter: str) -> list[Place]:
    """What curate skipped and keeps for its next cut."""
    try:
        state = json.loads(store.get(state_key(adapter), MAX_STATE_BYTES).data)
    except NotFoundError:
        return []
    return [_at(Origin.model_validate(skip["origin"])) for skip in state["carried"]]


def _at(origin: Origin) -> Place:
    return f"{origin.topic}/{origin.partition}", origin.offset


def _has_reason(example: ExampleAccepted, asked: list[RetentionRequested], others: Iterable[ExampleAccepted]) -> bool:
    """Whether anything that was published says that the example is to be forgotten."""
    if example.expires_at is not None or example.retention_class != PERMANENT:
        return True
    if any(
        request.kind == "erase" and request.adapter == example.adapter and request.selector
        and request.selector.matches(example) for request in asked
    ):  # fmt: skip
        return True
    return any(o.adapter == example.adapter and example.document_id in o.supersedes for o in others)


def _meant(seen: _Seen, load: Load) -> set[Place]:
    """What closed requests mean, and what lived as long as it said: none of it may be learned.

    An erasure means what was published before it came to its topic; one that a hold met is not counted here.
    """
    meant: set[Place] = set()
    closed = {
        n: r for n, r in seen.book.records.items() if r.state == "closed" and r.request.kind in {"erase", "expire"}
    }
    for place, example in seen.accepted.items():
        for record in closed.values():
            selector = record.request.selector
            if record.request.adapter != example.adapter or example.origin.timestamp_ms > record.until_ms:
                continue
            if example.example_id in record.example_ids or (selector is not None and selector.matches(example)):
                meant.add(place)
    return meant


def _overdue(seen: _Seen, learned: set[Place]) -> list[str]:
    """What is learned though its own fields ended its life a while ago, and no hold stands on it."""
    found = []
    for place, example in seen.accepted.items():
        end_ms = expires_ms(example, ())
        if place not in learned or end_ms is None or end_ms > (time.time() - _OVERDUE_S) * 1000:
            continue
        if not any(matches(example) for matches in hold_matchers(seen.book, example.adapter)):
            found.append(f"{place[0]}@{place[1]} {example.document_id}")
    return found


def _readable(store: ObjectStore, seen: _Seen, gone: set[Place], learned: set[Place]) -> list[str]:
    """Marks of erased texts that some object still holds, and blobs of states that knew them."""
    stays = {mark for place in learned for mark in _MARK.findall(seen.values.get(place, b""))}
    marks = {mark for place in gone for mark in _MARK.findall(seen.values.get(place, b""))} - stays
    found = [f"blob {digest}" for line in seen.lines.values() for digest in line.knew if store.exists(blob_key(digest))]
    for prefix in ("blobs/", "manifests/", "state/", "quarantine/", "retention/"):
        for key in store.list(prefix):
            try:
                data = store.get(key).data
            except NotFoundError:  # erased meanwhile
                continue
            found += [f"{mark.decode()} in {key}" for mark in marks & set(_MARK.findall(data))]
    return found


def _excerpt(value: bytes | None) -> str:
    return (value or b"")[:160].decode("utf-8", "replace")


__all__ = ["TERMS", "Verdict", "judge"]
