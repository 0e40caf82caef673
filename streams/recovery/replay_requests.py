"""Accept the retention requests since the backup once more, before any role reads the restored store.

retain's own service does it, so a request has the quarantine entries, the jobs and the ledger that it would have had. A
request that the restored store knows is not accepted twice; whether it has its quarantine entries is looked at all the same,
because the backup or a crash may lie between the two. Requests to revoke are left out: they were about the version
that was live then, and the restored store has another one.

Hazard: retain judges by the settings of today. A request that was carried out under other keys, or before its tenant had
topics, may count for nothing now, and what it erased is live again. Those are listed, for a person to send them again.
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
from perennial.streams.events.tenants import request_in_tenant, split_topic, tenant_of_id
from perennial.streams.events.wire_error import PURE_ERRORS, WireError
from perennial.streams.kafka.group import ConfirmingProducer
from perennial.streams.observe.metrics import Metrics
from perennial.streams.replicas.acks import AckReader
from perennial.streams.retain.ledger import RequestRecord
from perennial.streams.retain.request_store import RequestStore, hash_of, load_requests
from perennial.streams.retain.service import RetainService
from perennial.streams.retain.store_facts import StoreFacts
from perennial.streams.retention.kinds import KINDS, is_pattern
from perennial.streams.settings import Settings

_MAX_TICKS: Final = 10_000
_TOPIC: Final = RetentionRequested.topic
_UNPROVEN: Final = frozenset({"bad-signature", "bad-approval", "missing-field", "expired"})
"""Reasons for which a request or an approval is refused that had counted under other keys or settings."""


@dataclass
class ReplayReport:
    """What became of the requests since the backup.

    Attributes:
        accepted: Ids of requests that the restored store did not know.
        known: Requests that it knew.
        refused: Records that are no requests, or that reuse an id; retain had refused them, too, unless their ids are in
            `unapproved` or `ambiguous`.
        revocations: Ids of requests to revoke, which were left out.
        unapproved: Ids of requests over patterns without an approval that counts: nobody approved them, or their
            signatures do not count by today's keys. They are not carried out.
        ambiguous: Ids that begin with a tenant's name and that both this tenant and somebody on `retention` used. One of
            the two is not carried out.
    """

    accepted: list[str] = field(default_factory=list)
    known: int = 0
    refused: int = 0
    revocations: list[str] = field(default_factory=list)
    unapproved: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether every request was carried out that may have been carried out before."""
        return not (self.unapproved or self.ambiguous)


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
        reader = _Reader(settings, service, requests, report)
        for record in records:
            await reader.accept(record)
            on_request()
        report.unapproved = reader.unapproved()
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


class _Reader:
    """Accepts records of `retention`, and of the topics of this kind that tenants have.

    Args:
        settings: Name the topic prefix and the tenants.
        service: Accepts the requests.
        requests: The ledger.
        report: Gets what became of each record.
    """

    def __init__(
        self, settings: Settings, service: RetainService, requests: RequestStore, report: ReplayReport
    ) -> None:
        self._settings = settings
        self._service = service
        self._requests = requests
        self._report = report
        self._over_patterns: dict[str, None] = {}  # in the order of the log
        self._senders: dict[str, str | None] = {}  # who sent the requests whose ids begin with the name of a tenant

    async def accept(self, record: Any) -> None:
        """Accept a record, unless it is a revocation."""
        report = self._report
        try:
            request = decode(record.value, record.headers, _TOPIC).event
            if not isinstance(request, RetentionRequested):
                report.refused += 1
                return
            _, tenant = split_topic(record.topic.removeprefix(self._settings.kafka.topic_prefix))
            named = request_in_tenant(request, tenant, ())
            request_id = named.request_id
            found = self._requests.load(hash_of(request_id))
            known = found is not None
            if KINDS[request.kind].job == "rollback" and (not known or request.approved_by is not None):
                if request_id not in report.revocations:
                    report.revocations.append(request_id)
                return
            if self._is_ambiguous(named, tenant, found[0] if found else None):
                report.refused += 1
                if request_id not in report.ambiguous:
                    report.ambiguous.append(request_id)
                return
        except (WireError, *PURE_ERRORS):  # retain had sent it to the dead letters
            report.refused += 1
            return
        try:
            await self._service.receive(request, record.timestamp, tenant, is_read_again=True)
        except (WireError, *PURE_ERRORS) as error:
            report.refused += 1
            if isinstance(error, WireError) and error.reason in _UNPROVEN and is_pattern(request.adapter):
                self._over_patterns[request_id] = None
            return
        if is_pattern(request.adapter):
            self._over_patterns[request_id] = None
        if not known:
            report.accepted.append(request_id)
        elif request.approved_by is None:
            report.known += 1

    def unapproved(self) -> list[str]:
        """Return the ids of requests over patterns that were read and have no approval that counts."""
        loaded = {name: self._requests.load(hash_of(name)) for name in self._over_patterns}
        return [name for name, found in loaded.items() if found is None or found[0].unapproved]

    def _is_ambiguous(self, request: RetentionRequested, tenant: str | None, known: RequestRecord | None) -> bool:
        """Return whether the request that is known by this id may be another sender's.

        Hazard: `acme:r1` is the id of the tenant acme's request `r1`, and also of a request `acme:r1` that somebody sent
        to `retention` before acme had topics.
        """
        if tenant_of_id(request.request_id, self._settings.tenants.names) is None:
            return False
        if request.request_id in self._senders:
            return self._senders[request.request_id] != tenant
        if request.approved_by is not None:  # of a request that was read before the backup
            return tenant is None and known is not None
        if known is not None and known.request != request:
            return True
        self._senders[request.request_id] = tenant
        return False


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
