"""Accept the retention requests since the backup once more, before any role reads the restored store.

retain's own service does it, so a request has the quarantine entries, the jobs and the ledger that it would have had. A
request that the restored store knows is not accepted twice. Requests to revoke are left out: they were about the version
that was live then, and the restored store has another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from perennial.storage.errors import PerennialError
from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.fields import Event
from perennial.streams.events.models import RetentionRequested
from perennial.streams.events.wire_error import PURE_ERRORS, WireError
from perennial.streams.kafka.group import ConfirmingProducer
from perennial.streams.observe.metrics import Metrics
from perennial.streams.replicas.acks import AckReader
from perennial.streams.retain.request_store import RequestStore, hash_of
from perennial.streams.retain.service import RetainService
from perennial.streams.retain.store_facts import StoreFacts
from perennial.streams.retention.kinds import KINDS
from perennial.streams.settings import Settings

_MAX_TICKS: Final = 10_000
_TOPIC: Final = RetentionRequested.topic


@dataclass
class ReplayReport:
    """What became of the requests since the backup.

    Attributes:
        accepted: Ids of requests that the restored store did not know.
        known: Requests that it knew.
        refused: Records that are no requests, or that reuse an id; retain had refused them, too.
        revocations: Ids of requests to revoke, which were left out.
    """

    accepted: list[str] = field(default_factory=list)
    known: int = 0
    refused: int = 0
    revocations: list[str] = field(default_factory=list)


def replay_requests(
    settings: Settings,
    store: ObjectStore,
    records: Iterable[Any],
    producer: ConfirmingProducer,
    metrics: Metrics,
    on_request: Callable[[], None] = lambda: None,
) -> ReplayReport:
    """Accept requests, and bring those over patterns to every adapter that they cover.

    Args:
        settings: The alias, the clock, and the times of retention.
        store: The restored store.
        records: Records of `retention`, in the order of their timestamps.
        producer: Sends jobs and states.
        metrics: Where figures go.
        on_request: Called after each record and each step of the requests over patterns.

    Raises:
        StoreError: The store failed.
        KafkaLinkError: An event was not delivered.
    """

    async def send(event: Event, event_id: str) -> None:
        producer.send(event, event_id=event_id, occurred_at=datetime.now(UTC))
        producer.flush()

    requests, report = RequestStore(store), ReplayReport()

    async def run() -> None:
        service = RetainService(settings, metrics, StoreFacts(settings, store, acks), send)
        for record in records:
            await _accept(service, requests, record, report)
            on_request()
        for _ in range(_MAX_TICKS):
            if not any(_waits(requests, request_id) for request_id in report.accepted):
                return
            await service.tick()
            on_request()
        raise PerennialError(
            "the requests since the backup did not reach all adapters", got=f"{_MAX_TICKS} steps",
            remedy="run `perennial backup reconcile` again; it goes on from here",
        )  # fmt: skip

    with closing(AckReader(settings, grace=True)) as acks:
        asyncio.run(run())
    return report


async def _accept(service: RetainService, requests: RequestStore, record: Any, report: ReplayReport) -> None:
    try:
        request = decode(record.value, record.headers, _TOPIC).event
        if not isinstance(request, RetentionRequested):
            report.refused += 1
            return
        known = requests.load(hash_of(request.request_id)) is not None
        if KINDS[request.kind].job == "rollback" and not known:
            report.revocations.append(request.request_id)
            return
        await service.receive(request, record.timestamp)
        if known:
            report.known += 1
        else:
            report.accepted.append(request.request_id)
    except (WireError, *PURE_ERRORS):  # retain had sent it to the dead letters
        report.refused += 1


def _waits(requests: RequestStore, request_id: str) -> bool:
    """Return whether a request over a pattern has not reached all of its adapters yet."""
    found = requests.load(hash_of(request_id))
    if found is None or not found[0].open or not found[0].is_pattern:
        return False
    record = found[0]
    rules = KINDS[record.request.kind]
    if rules.job is None:
        return record.state == "accepted"
    is_early = rules.due_at == "start" and record.until_ms > record.received_ms
    return "waiting" in record.phases and not is_early
