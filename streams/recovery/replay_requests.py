"""Accept the retention requests since the backup once more, before any role reads the restored store.

retain's own service does it, so a request has the quarantine entries, the jobs and the ledger that it would have had. A
request that the restored store knows is not accepted twice; whether it has its quarantine entries is looked at all the same,
because the backup or a crash may lie between the two. Requests to revoke are left out: they were about the version
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
from perennial.streams.events.tenants import request_in_tenant, split_topic
from perennial.streams.events.wire_error import PURE_ERRORS, WireError
from perennial.streams.kafka.group import ConfirmingProducer
from perennial.streams.observe.metrics import Metrics
from perennial.streams.replicas.acks import AckReader
from perennial.streams.retain.ledger import RequestRecord
from perennial.streams.retain.request_store import RequestStore, hash_of, load_requests
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
    """Accept requests, and bring every open one of the ledger to each adapter that it covers.

    Args:
        settings: The alias, the clock, and the times of retention.
        store: The restored store.
        records: Records of `retention`, in the order of their timestamps.
        producer: Sends jobs and states.
        metrics: Where figures go.
        on_request: Called after each record and each step of the open requests.

    Raises:
        PerennialError: The requests did not reach all adapters.
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
            await _accept(settings, service, requests, record, report)
            on_request()
        waiting = _indexed(requests)
        for _ in range(_MAX_TICKS):
            loaded = {name: requests.load(name) for name in waiting}
            waiting = [name for name, found in loaded.items() if found is not None and _waits(found[0])]
            if not waiting:
                return
            await service.tick()
            on_request()
        raise PerennialError(
            "open requests to forget did not reach all adapters",
            got=f"{len(waiting)} requests after {_MAX_TICKS} steps",
            remedy="run `perennial backup reconcile` again; it goes on from here",
        )  # fmt: skip

    with closing(AckReader(settings, grace=True)) as acks:
        asyncio.run(run())
    return report


async def _accept(
    settings: Settings, service: RetainService, requests: RequestStore, record: Any, report: ReplayReport
) -> None:
    try:
        request = decode(record.value, record.headers, _TOPIC).event
        if not isinstance(request, RetentionRequested):
            report.refused += 1
            return
        _, tenant = split_topic(record.topic.removeprefix(settings.kafka.topic_prefix))
        request_id = request_in_tenant(request, tenant, settings.tenants.names).request_id
        known = requests.load(hash_of(request_id)) is not None
        if KINDS[request.kind].job == "rollback" and (not known or request.approved_by is not None):
            if request_id not in report.revocations:
                report.revocations.append(request_id)
            return
        await service.receive(request, record.timestamp, tenant)
        if not known:
            report.accepted.append(request_id)
        elif request.approved_by is None:
            report.known += 1
    except (WireError, *PURE_ERRORS):  # retain had sent it to the dead letters
        report.refused += 1


def _indexed(requests: RequestStore) -> list[str]:
    """Return the hashes of the open requests, after writing the index entries that they lack.

    Hazard: a backup copies the indexes before the requests, so one that came in between is in the ledger and in no index,
    and ticks never see it.
    """
    records = [record for record in load_requests(requests.objects).values() if record.open]
    for record in records:
        requests.add_to_indexes(record)
    return [hash_of(record.request.request_id) for record in records]


def _waits(record: RequestRecord) -> bool:
    """Return whether a request has not reached all of its adapters yet, and retain's ticks bring it to them at once."""
    rules = KINDS[record.request.kind]
    if not record.open or rules.job == "rollback":
        return False
    if rules.job is None:
        return record.state == "accepted"
    is_early = rules.due_at == "start" and record.until_ms > record.received_ms
    if is_early or record.request.superseded_by is not None:  # it waits for a time, or for a document
        return False
    return "waiting" in record.phases or not (record.is_pattern or record.adapters)
