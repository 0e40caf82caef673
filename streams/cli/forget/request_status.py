"""`perennial forget status`, and the reader of the topic retention-status."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Self

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from rich.console import Console
from rich.text import Text

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.cli.flow import BrokerUnreachableError
from perennial.streams.cli.forget.outcome import print_adapters
from perennial.streams.cli.forget.selection import describe_selection
from perennial.streams.cli.tables import Column, Row, print_facts, print_table, shown_version
from perennial.streams.cli.terminal.times import spoken_time
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.models import RetentionProgressed
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.connect import connect
from perennial.streams.retain.ledger import RequestRecord, selector_json
from perennial.streams.retain.request_store import load_request
from perennial.streams.retention.kinds import DEPENDANT_PREFIX
from perennial.streams.settings import Settings

_TOPIC = RetentionProgressed.topic
_CONNECT_S = 5.0
_ENDED = frozenset({"closed", "failed"})
_COLOURS = {"closed": "green", "failed": "red", "held": "yellow", "unapproved": "yellow"}
_COLUMNS = (
    Column("request"),
    Column("kind", 1),
    Column("adapter", 1),
    Column("selects", 3, wraps=True),
    Column("state"),
    Column("since (UTC)", 4),
    Column("examples", 5, right=True),
    Column("detail", 2, wraps=True),
)


def show_requests(request_id: str, *, limit: int, as_json: bool) -> int:
    """Print the state of one request, or of those that changed last.

    Args:
        request_id: The request; empty: all.
        limit: How many requests to show.
        as_json: Print JSON, with each request's selector.

    Raises:
        NotFoundError: No state of that request was published.
    """
    settings = connected_settings()
    with StatusReader(settings) as statuses:
        found = statuses.latest()
    if request_id and request_id not in found:
        raise NotFoundError(
            "no such request", got=request_id, allowed="the id of a request whose state was published",
            remedy="`perennial forget status` lists them; retain, in the role streams, publishes the first state",
        )  # fmt: skip
    events = [found[request_id]] if request_id else sorted(found.values(), key=lambda event: event.at)[-limit:]
    store = open_store(settings.store.uri, settings.s3) if settings.store.uri else None
    loaded = {event.request_id: load_request(store, event.request_id) for event in events} if store else {}
    records = {name: record for name, record in loaded.items() if record is not None}
    if as_json:
        print(json.dumps([_facts(event, records.get(event.request_id)) for event in events]))
    elif request_id:
        _print_one(events[0], records.get(request_id), store)
    elif events:
        print_table(_COLUMNS, [_row(event, records.get(event.request_id)) for event in events])
    else:
        Console(stderr=True).print("no request yet; `perennial forget --help` says how to send one", soft_wrap=True)
    return 0


def _facts(event: RetentionProgressed, record: RequestRecord | None) -> dict[str, Any]:
    return event.model_dump(mode="json") | {"selector": record and selector_json(record.request.selector)}


def _row(event: RetentionProgressed, record: RequestRecord | None) -> Row:
    return (
        event.request_id, event.kind, event.adapter, describe_selection(record) if record else "-", _state(event),
        f"{event.at:%Y-%m-%d %H:%M:%S}", str(event.examples), event.detail,
    )  # fmt: skip


def _print_one(event: RetentionProgressed, record: RequestRecord | None, store: ObjectStore | None) -> None:
    console = Console()
    facts: dict[str, object] = {
        "request": event.request_id, "kind": event.kind, "adapter": event.adapter,
        "selects": describe_selection(record) if record else "-", "state": _state(event),
        "since": f"{event.at:%Y-%m-%d %H:%M:%S} UTC", "examples": event.examples,
        "version": shown_version(event.version, console), "detail": event.detail or "-",
    }  # fmt: skip
    if record is not None:
        request = record.request
        facts |= {"requested by": request.requested_by, "reason": request.reason or "-"}
        if record.approval is not None:
            facts["approved by"] = record.approval.approved_by or "-"
        if request.due_at is not None:
            facts["due"] = spoken_time(int(request.due_at.timestamp() * 1000))
    facts |= {"confirmed by": _names(event.acknowledged), "not confirmed by": _names(event.missing)}
    print_facts(facts, console=console)
    if record is not None and store is not None:
        print_adapters(store, record)


def _state(event: RetentionProgressed) -> Text:
    if event.exceptions:
        return Text(f"{event.state} with exceptions", "red")
    return Text(event.state, _COLOURS.get(event.state, ""))


def _names(names: list[str]) -> str:
    return ", ".join(names) or "-"


class StatusReader:
    """A reader of retention-status from its beginning, without a consumer group. Use as a context manager.

    Args:
        settings: The broker and the topics.

    Raises:
        BrokerUnreachableError: The broker does not answer.
        NotFoundError: The topic does not exist.
    """

    def __init__(self, settings: Settings) -> None:
        try:
            self._consumer: Any = connect(
                KafkaConsumer, settings.kafka.require_bootstrap(), _CONNECT_S,
                security=settings.kafka_security, group_id=None, enable_auto_commit=False,
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
        """Return the reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the consumer."""
        self._consumer.close()

    def latest(self) -> dict[str, RetentionProgressed]:
        """Return the latest state of every request, by request id."""
        ends = self._consumer.end_offsets(self._partitions)
        found: dict[str, RetentionProgressed] = {}
        while any(self._consumer.position(partition) < end for partition, end in ends.items()):
            found |= {event.request_id: event for event in self._poll()}
        return found

    def follow(self, request_id: str, wait_s: float) -> Iterator[RetentionProgressed | None]:
        """Yield the states of one request, and None while it waits, until it ended or `wait_s` seconds are over."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            for event in self._poll():
                if event.request_id == request_id:
                    yield event
                    if event.state in _ENDED:
                        return
            yield None

    def _poll(self) -> list[RetentionProgressed]:
        found = []
        for batch in self._consumer.poll(timeout_ms=200).values():
            for record in batch:
                try:
                    event = decode(record.value, record.headers, _TOPIC).event
                except WireError:  # a newer version wrote it, in a form that this one cannot show
                    continue
                # Jobs that rebuild what depends on an adapter are parts of a request, not requests.
                if isinstance(event, RetentionProgressed) and not event.request_id.startswith(DEPENDANT_PREFIX):
                    found.append(event)
        return found
