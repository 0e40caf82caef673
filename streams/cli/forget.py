"""`perennial forget`: what a request would mean, sending it, and following it until it is closed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal, Self

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.factory import open_store
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.flow import BrokerUnreachableError
from perennial.streams.cli.tables import short_version
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.cloudevents import WireError, decode
from perennial.streams.events.models import AdapterPattern, RetentionProgressed, RetentionRequested, Selector
from perennial.streams.kafka.connect import connect
from perennial.streams.retain.example_index import ExampleIndex
from perennial.streams.retain.ledger import RequestLedger, RequestRecord, StoredExample, covers, hold_matchers
from perennial.streams.retain.service import load_ledger
from perennial.streams.settings import Settings, SettingsError

_TOPIC = RetentionProgressed.topic
_CONNECT_S = 5.0
_ENDED = frozenset({"closed", "failed"})
_SHOWN = 20
_NAMED = 5
_NAMES = {"erase": "forget", "hold": "hold", "release": "release"}
_MEANINGS = {
    "executed": "the adapter was made anew without it, text and weights that knew it are deleted",
    "published": "subscribers are told",
}
_PAST = {"erase": "forgotten", "hold": "in force", "release": "released"}


def selector_of(adapter: str, documents: list[str], subjects: list[str], sources: list[str]) -> Selector:
    """What the options mean. Raises SettingsError."""
    named = {"document_ids": documents, "subjects": subjects, "sources": sources}
    check_pattern(adapter)
    if not any(named.values()):
        raise _unusable("the selection", "", "at least one of --document, --subject, --source")
    try:
        return Selector.model_validate({name: values for name, values in named.items() if values})
    except ValidationError as error:
        first = error.errors()[0]
        shown = ", ".join(f"{name} {values}" for name, values in named.items() if values)
        raise _unusable("the selection", shown, first["msg"].removeprefix("Value error, ")) from None


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def check_pattern(adapter: str) -> None:
    """Refuse what names no adapters. Raises SettingsError."""
    try:
        TypeAdapter(AdapterPattern).validate_python(adapter)
    except ValidationError:
        raise _unusable("--adapter", adapter, "one adapter (acme/support), a pattern (acme/*), or * for all") from None


def _unusable(what: str, got: str, allowed: str) -> SettingsError:
    return SettingsError(
        f"{what} is not usable", got=got or "nothing", allowed=allowed,
        remedy="for example: perennial forget --adapter acme/support --document ID (or --subject, --source)",
    )  # fmt: skip


def show_plan(pattern: str, selector: Selector, *, as_json: bool) -> int:
    """Print what would be forgotten; exit code 4 where nothing of it is in the store."""
    settings = connected_settings()
    registry = open_registry(settings)
    book = load_ledger(registry.store)[0]
    plans = [_plan(registry, book, name, selector) for name in registry.adapters() if covers(pattern, name)]
    plans = [plan for plan in plans if plan["examples"]]
    if as_json:
        print(json.dumps({"adapter": pattern, "selector": selector.model_dump(mode="json"), "adapters": plans}))
        return 0 if plans else 4
    console = Console()
    for plan in plans:
        examples = plan["examples"]
        console.print(
            f"[bold]{plan['adapter']}[/]: {_count(len(examples), 'example')}, known to "
            f"{_count(len(plan['versions']), 'version')}; {_count(plan['replayed'], 'update')} would be made again"
        )
        table = Table("document", "published", "learned in version", "held")
        for item in examples[:_SHOWN]:
            table.add_row(
                escape(item["document_id"]), item["published_at"],
                f"{item['seq']} {short_version(item['version'])}" if item["learned"] else "not learned",
                "yes" if item["held"] else "no",
            )  # fmt: skip
        console.print(table)
        if len(examples) > _SHOWN:
            console.print(f"… and {len(examples) - _SHOWN} more (--json lists all)")
        held = sum(item["held"] for item in examples)
        if held:
            console.print(f"{held} of them held: the whole request would wait for the release")
    if not plans:
        Console(stderr=True).print(
            "nothing of it is in the store; a request would still keep out what is under way in the topics"
        )
    return 0 if plans else 4


def _plan(registry: Registry, book: RequestLedger, adapter: str, selector: Selector) -> dict[str, Any]:
    meant = [item for item in ExampleIndex(registry).of(adapter) if selector.matches(item.example)]
    ids = {item.example.example_id for item in meant}
    knew: list[str] = []
    replayed = 0
    for version, learned, has_batch in _lineage(registry, adapter):
        if knew or learned & ids:
            knew.append(version)
            replayed += has_batch
    holds = hold_matchers(book, adapter)
    return {
        "adapter": adapter,
        "versions": knew,
        "replayed": replayed,
        "examples": [_facts(item, any(matches(item.example) for matches in holds)) for item in meant],
    }


def _facts(item: StoredExample, held: bool) -> dict[str, Any]:
    return {
        "example_id": item.example.example_id, "document_id": item.example.document_id, "seq": item.seq,
        "version": item.version, "learned": item.learned, "held": held,
        "published_at": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(item.example.origin.timestamp_ms / 1000)),
    }  # fmt: skip


def _lineage(registry: Registry, adapter: str) -> list[tuple[str, set[str], bool]]:
    """Versions that the newest stems from, oldest first, with the ids that each learned and whether it has a batch."""
    found: list[tuple[str, set[str], bool]] = []
    head = registry.head(adapter)
    version = head.version if head else None
    while version is not None:
        manifest = registry.manifest(adapter, version)
        if manifest.outcome == "promoted":
            learned = {item.example_id for item in manifest.learned}
            found.append((version, learned, manifest.batch is not None))
        version = manifest.parent
    return found[::-1]


def ask_to_forget(pattern: str, selector: Selector, *, reason: str, wait_s: float, as_json: bool) -> int:
    """Send the request and follow it; exit code 1 where it failed or is not closed in time."""
    return _ask("erase", pattern, selector, reason=reason, wait_s=wait_s, as_json=as_json)


def ask_to_hold(
    kind: Literal["hold", "release"],
    pattern: str,
    selector: Selector | None,
    *,
    reason: str,
    wait_s: float,
    as_json: bool,
) -> int:
    """Send a hold or its release and wait until it is in force; exit code 1 where it failed or is not in time."""
    return _ask(kind, pattern, selector, reason=reason, wait_s=wait_s, as_json=as_json)


def _ask(
    kind: Literal["erase", "hold", "release"], pattern: str, selector: Selector | None, *,
    reason: str, wait_s: float, as_json: bool,
) -> int:  # fmt: skip
    settings = connected_settings()
    request = RetentionRequested(
        request_id=f"{_NAMES[kind]}-{uuid.uuid4().hex[:16]}", kind=kind, adapter=pattern, selector=selector,
        requested_by="command line", reason=reason,
    )  # fmt: skip
    with Publisher(settings.kafka.require_bootstrap(), settings=settings) as publisher:
        publisher.publish(request).result(30)
    console = Console(stderr=True)
    console.print(f"asked: {request.request_id}", highlight=False)
    wanted = "executed" if kind == "hold" else "closed"
    last: RetentionProgressed | None = None
    if wait_s > 0:
        with Statuses(settings) as statuses:
            for event in statuses.follow(request.request_id, wait_s):
                if last is None or (event.state, event.detail) != (last.state, last.detail):
                    said = escape(event.detail or (_MEANINGS.get(event.state, "") if event.examples else ""))
                    console.print(f"  {event.at:%H:%M:%S}Z [bold]{event.state}[/] {said}", highlight=False)
                last = event
                if event.state == wanted:
                    break
    if as_json:
        print(json.dumps({"request_id": request.request_id, "status": last and last.model_dump(mode="json")}))
    if last is not None and last.state == wanted:
        if kind == "erase":
            console.print(
                f"{_count(last.examples, 'example')} forgotten" if last.examples else
                "nothing of it was in the store; what of it is still under way in the topics is kept out", highlight=False,
            )  # fmt: skip
    elif wait_s <= 0:
        console.print(f"`perennial forget status {request.request_id}` shows how far it is", highlight=False)
    elif last is None or last.state != "failed":
        console.print(
            f"not {_PAST[kind]} after {wait_s:.0f} s: {_why_open(last)} "
            f"`perennial forget status {request.request_id}` shows how far it is",
            highlight=False,
        )
    return 0 if wait_s <= 0 or (last is not None and last.state == wanted) else 1


def _why_open(last: RetentionProgressed | None) -> str:
    if last is not None and last.state == "held":
        return "`perennial forget release` ends a hold;"
    if last is not None and last.state == "published":
        return "it is forgotten, but a replica that is named above did not say that it serves the new version;"
    return "are the roles streams and learner running?"


def show_requests(request_id: str, *, limit: int, as_json: bool) -> int:
    """Print the state of one request, or of those that changed last. Raises NotFoundError."""
    settings = connected_settings()
    with Statuses(settings) as statuses:
        found = statuses.last()
    if request_id and request_id not in found:
        raise NotFoundError(
            "no such request", got=request_id, allowed="a request id that retain answered",
            remedy="`perennial forget status` lists them; a request not answered yet waits for the role streams",
        )  # fmt: skip
    events = [found[request_id]] if request_id else sorted(found.values(), key=lambda event: event.at)[-limit:]
    if as_json:
        print(json.dumps([event.model_dump(mode="json") for event in events]))
        return 0
    records = load_ledger(open_store(settings.store.uri, settings.s3))[0].records if settings.store.uri else {}
    table = Table("request", "state", "examples", "detail", show_lines=True)
    table.columns[0].overflow = "fold"  # an id that is cut short cannot be asked for
    colours = {"closed": "green", "failed": "red", "held": "yellow"}
    for event in events:
        colour = colours.get(event.state, "default")
        record = records.get(event.request_id)
        what = f": {meaning(record)}" if record else ""
        table.add_row(
            f"{escape(event.request_id)}\n{escape(f'{event.kind} in {event.adapter}{what}')}",
            f"[{colour}]{event.state}[/]\n{event.at:%m-%d %H:%M:%S}Z", str(event.examples), escape(event.detail),
        )  # fmt: skip
    Console().print(table if events else "no request was answered yet")
    return 0


def meaning(record: RequestRecord) -> str:
    """What a request means in its adapters, in the words of the command line."""
    selector = record.request.selector
    if record.example_ids:
        return _count(len(record.example_ids), "example")
    if selector is None:
        return "everything" if record.request.kind in {"hold", "release"} else "-"
    named = (("document", selector.document_ids), ("subject", selector.subjects), ("source", selector.sources))
    said = [f"{kind} {value}" for kind, values in named for value in values or ()]
    if selector.retention_class is not None:
        said.append(f"class {selector.retention_class}")
    if selector.before is not None:
        said.append(f"before {selector.before:%Y-%m-%d %H:%M}")
    return ", ".join(said[:_NAMED]) + (f" and {len(said) - _NAMED} more" if len(said) > _NAMED else "")


class Statuses:
    """Reads retention-status from its beginning, without a group. Raises BrokerUnreachableError."""

    def __init__(self, settings: Settings) -> None:
        try:
            self._consumer: Any = connect(
                KafkaConsumer, settings.kafka.require_bootstrap(), _CONNECT_S, group_id=None, enable_auto_commit=False,
                auto_offset_reset="earliest",
            )  # fmt: skip
            topic = settings.kafka.topic(_TOPIC)
            numbers = self._consumer.partitions_for_topic(topic) or ()
            if not numbers:
                self._consumer.close()
                raise NotFoundError(f"no topic {topic}", remedy="make it with `perennial topics create`")
            self._partitions = [TopicPartition(topic, number) for number in numbers]
            self._consumer.assign(self._partitions)
            self._consumer.seek_to_beginning(*self._partitions)
        except (KafkaError, ValueError, OSError) as error:
            raise BrokerUnreachableError(
                got=f"{settings.kafka.bootstrap}: {error}", remedy="`perennial doctor` checks it"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def last(self) -> dict[str, RetentionProgressed]:
        """The last word on every request."""
        ends = self._consumer.end_offsets(self._partitions)
        found: dict[str, RetentionProgressed] = {}
        while any(self._consumer.position(partition) < end for partition, end in ends.items()):
            found |= {event.request_id: event for event in self._poll()}
        return found

    def follow(self, request_id: str, wait_s: float) -> Iterator[RetentionProgressed]:
        """What is said of a request, until it ended or the time is over."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            for event in self._poll():
                if event.request_id == request_id:
                    yield event
                    if event.state in _ENDED:
                        return

    def _poll(self) -> list[RetentionProgressed]:
        found = []
        for batch in self._consumer.poll(timeout_ms=200).values():
            for record in batch:
                try:
                    event = decode(record.value, record.headers, _TOPIC).event
                except WireError:  # a newer version's: nothing that this one could show
                    continue
                if isinstance(event, RetentionProgressed):
                    found.append(event)
        return found
