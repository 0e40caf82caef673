"""Retention requests without Kafka: a store in memory, a learner that does what the design asks, and short notations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from perennial.storage.registry.history.dependants import dependants
from perennial.storage.registry.quarantine import (
    Quarantine,
    RequestOutcome,
    ensure_text_key,
    finish_entry,
    load_quarantine,
)
from perennial.streams.events.models import (
    ExampleAccepted,
    ForgetRequested,
    Origin,
    RetentionProgressed,
    RetentionRequested,
    RollbackRequested,
    Selector,
)
from perennial.streams.retain.ledger import RequestRecord, StoredExample
from perennial.streams.retain.request_store import RequestStore, load_requests
from perennial.streams.retain.request_worker import RequestWorker
from perennial.streams.retain.rules.approvals import ApprovalRules
from perennial.streams.retain.rules.jobs import QuarantineChange
from perennial.streams.retain.rules.replica_report import ReplicaReport
from perennial.streams.retain.rules.step_facts import AliasPosition
from perennial.streams.retain.work_slice import Slice
from perennial.streams.retention.quarantine_filter import QuarantineFilter, text_hash
from tests.memory_store import MemoryStore

A, B = "acme/support", "acme/sales"
DAY_MS = 86_400_000
AT = datetime(2026, 1, 1, tzinfo=UTC)
V1, V2 = ("sha256:" + letter * 64 for letter in "12")


def example(number: int, at_ms: int = 100, adapter: str = A, **fields: object) -> ExampleAccepted:
    given_fields = {"document_id": f"d{number}", "text": f"text {number}", **fields}
    return ExampleAccepted(
        adapter=adapter,
        example_id=f"{number:032x}",
        kind="document",
        learn=True,
        origin=Origin(cluster_id="c", topic="documents", topic_id="t", partition=0, offset=number, timestamp_ms=at_ms),
        **given_fields,
    )


def request(kind: str, request_id: str = "", **fields: object) -> RetentionRequested:
    selector = fields.pop("selector", None)
    given_fields = {"adapter": A, "requested_by": "ann", **fields}
    if isinstance(selector, dict):
        selector = Selector(**selector)
    return RetentionRequested(request_id=request_id or kind, kind=kind, selector=selector, **given_fields)


def doc(*numbers: int) -> dict[str, list[str]]:
    return {"document_ids": [f"d{number}" for number in numbers]}


@dataclass
class Effects:
    """What one step did."""

    changes: list[QuarantineChange] = field(default_factory=list)
    events: list[object] = field(default_factory=list)


@dataclass
class World:
    """A store in memory and a learner that does what the design asks of it: quarantine read at every job."""

    now_ms: int = 1000
    gather_ms: int = 0
    lead_ms: int = 0
    restarts: bool = False
    approvals: ApprovalRules = field(default_factory=ApprovalRules)
    stored: dict[str, dict[str, StoredExample]] = field(default_factory=dict)
    objects: MemoryStore = field(default_factory=MemoryStore)
    alive: dict[str, AliasPosition] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)
    report: ReplicaReport = field(default_factory=ReplicaReport)
    reports: dict[str, ReplicaReport] = field(default_factory=dict)
    looked_up: list[str] = field(default_factory=list)
    jobs: list[ForgetRequested | RollbackRequested] = field(default_factory=list)
    prepared: list[ForgetRequested] = field(default_factory=list)
    published: list[RetentionProgressed] = field(default_factory=list)
    forgotten: list[ExampleAccepted] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.worker = RequestWorker(
            RequestStore(self.objects), self, lambda: AT, gather_ms=self.gather_ms, lead_ms=self.lead_ms,
            approvals=self.approvals,
        )  # fmt: skip

    # facts
    def begin(self) -> None:
        pass

    def changed(self, quarantine: Quarantine) -> None:
        pass

    def adapters(self) -> list[str]:
        return sorted(self.stored)

    def examples(self, adapter: str) -> list[StoredExample]:
        return list(self.stored.get(adapter, {}).values())

    def due_before(self, adapter: str, end_ms: int) -> list[StoredExample]:
        return self.examples(adapter)

    def newest(self, adapter: str) -> str:
        return repr(sorted((name, item.learned) for name, item in self.stored.get(adapter, {}).items()))

    def quarantine(self, adapter: str) -> Quarantine:
        return load_quarantine(self.objects, adapter)

    def filter(self, adapter: str) -> QuarantineFilter:
        return QuarantineFilter(self.quarantine(adapter), self.objects)

    def live(self, adapter: str) -> AliasPosition:
        return self.alive.get(adapter, AliasPosition(V1, 1) if adapter in self.stored else AliasPosition(None, 0))

    def is_revoked(self, adapter: str, version: str) -> bool:
        return version in self.revoked

    def dependants(self, adapter: str) -> list[str]:
        self.looked_up.append(adapter)
        return dependants(self.objects, adapter)

    def replicas(self, adapter: str, generation: int) -> ReplicaReport:
        return self.reports.get(adapter, self.report)

    # what happens
    def learn(self, *new: ExampleAccepted, learned: bool = True) -> None:
        for item in new:
            if not self.filter(item.adapter).blocks(item):
                bare = item.model_copy(update={"text": None})
                self.stored.setdefault(item.adapter, {})[item.example_id] = StoredExample(
                    bare, text_hash(item, ensure_text_key(self.objects, item.adapter)), 1, V1, learned
                )

    def perform(self, slices: Iterator[Slice]) -> Effects:
        done = Effects()
        for piece in slices:
            for change in piece.changes:
                self.worker.apply(change)
            for save in piece.saves:
                save()
            for change in piece.removals:
                self.worker.apply(change)
            done.changes += [*piece.changes, *piece.removals]
            done.events += piece.events
        for event in done.events:
            if isinstance(event, RetentionProgressed):
                self.published.append(event)
            elif isinstance(event, ForgetRequested) and event.prepare:
                self.prepared.append(event)
            else:
                self.jobs.append(event)
        return done

    def step(self, *requests: RetentionRequested, received_ms: int | None = None) -> Effects:
        done = Effects()
        for one in requests:
            came_ms = self.now_ms if received_ms is None else received_ms
            made = self.perform(self.worker.receive(one, came_ms, self.now_ms))
            done.changes += made.changes
            done.events += made.events
        made = self.perform(self.worker.tick(self.now_ms))
        if self.restarts:
            self.restart()
        return Effects(done.changes + made.changes, done.events + made.events)

    def work(self, failure: str = "", detail: str = "") -> None:
        """The learner: forgets what each job matches, unless a hold is on any of it; `detail` is what it remarks."""
        while self.jobs:
            job = self.jobs.pop(0)
            if not isinstance(job, ForgetRequested):
                continue
            quarantine_filter = self.filter(job.adapter)
            selected = [item for item in self.examples(job.adapter) if job.matches(item.example)]
            if any(quarantine_filter.held_by(item.example) for item in selected):
                continue
            for item in selected if not failure else ():
                self.forgotten.append(self.stored[job.adapter].pop(item.example.example_id).example)
            done = RequestOutcome(
                at_ms=self.now_ms, examples=len(selected), version=V2 if selected else None,
                generation=2 if selected else None, failure=failure,
                detail=detail,
            )  # fmt: skip
            finish_entry(self.objects, job.adapter, job.request_id, done)

    def states(self, request_id: str) -> list[str]:
        return [event.state for event in self.published if event.request_id == request_id]

    def requests(self) -> dict[str, RequestRecord]:
        return load_requests(self.objects)
