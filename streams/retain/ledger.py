"""The ledger of retention requests, and what it says about an example: when its life ends, which holds are on it. Pure.

The calendar, too, is here: the requests that retain makes by itself, for examples whose life ended and for documents
that supersede others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from perennial.storage.registry.quarantine import LegalHold
from perennial.streams.events.fields import PERMANENT, duration_s
from perennial.streams.events.models import ExampleAccepted, RetentionRequested, RetentionState, Selector
from perennial.streams.events.times import bounded_end_ms
from perennial.streams.retention.kinds import KINDS

CALENDAR: Final = "perennial/retain"
"""The `requested_by` of requests that the calendar makes."""
MAX_IDS: Final = 10_000
"""The most examples that one request of the calendar names."""
STATES: Final[tuple[RetentionState, ...]] = (
    "accepted", "held", "quarantined", "executed", "published", "closed", "failed",
)  # fmt: skip
Phase = Literal["waiting", "held", "sent", "done", "failed"]
"""The phase of a request in one adapter; streams/retain/transitions.py has the transitions."""


class _LedgerPart(BaseModel):
    # An unknown field could be an order to forget that a newer version wrote: refuse it.
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterProgress(_LedgerPart):
    """The progress of a request in one adapter.

    Attributes:
        phase: Where the adapter is in the transition table.
        until_ms: Only examples published up to this time are selected, in milliseconds since 1970.
        sent_ms: When the job was sent last.
        examples: How many examples are selected, as far as is known.
        version: After a forgetting, the version that became live. Of a revocation, the version that was live when the
            job was sent, and in phase `done` the version that replaced it.
        generation: The alias's generation that belongs to `version`.
        detail: Why the phase is `failed`.
    """

    phase: Phase
    until_ms: int = 0
    sent_ms: int = 0
    examples: int = 0
    version: str | None = None
    generation: int | None = None
    detail: str = ""


class RequestRecord(_LedgerPart):
    """A request and how far it has come.

    Attributes:
        request: The request itself.
        received_ms: When the broker took it, in milliseconds since 1970.
        until_ms: Only examples published up to this time are meant, in milliseconds since 1970.
        example_ids: The examples of an expiry that the calendar made; empty for every other request.
        state: The state as published.
        detail: The explanation as published.
        adapters: Progress by adapter.
        ended_ms: When the request ended; None while it is open.
    """

    request: RetentionRequested
    received_ms: int
    until_ms: int
    example_ids: list[str] = []
    state: RetentionState = "accepted"
    detail: str = ""
    adapters: dict[str, AdapterProgress] = {}
    ended_ms: int | None = None

    @property
    def open(self) -> bool:
        """Whether the request has not ended."""
        return self.ended_ms is None

    @property
    def examples(self) -> int:
        """The number of examples that the request selects, as far as is known."""
        return sum(progress.examples for progress in self.adapters.values())

    @property
    def is_pattern(self) -> bool:
        """Whether the request also is for adapters that do not exist yet."""
        return self.request.adapter.endswith("*")


class RequestLedger(_LedgerPart):
    """All requests that count: open ones, policies and holds in force, and those that ended recently.

    Attributes:
        schema_version: The version of this format.
        revision: Grows with every change, so that no two states have equal bytes.
        records: Requests by id.
    """

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    revision: int = 0
    records: dict[str, RequestRecord] = {}

    def to_bytes(self) -> bytes:
        """Return canonical JSON."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)

    def in_force(self, kind: Literal["hold", "policy"]) -> list[RequestRecord]:
        """Return the holds, or the policies, in force."""
        return [r for r in self.records.values() if r.request.kind == kind and r.open and r.state == "executed"]

    def holds_on(self, adapter: str) -> list[LegalHold]:
        """Return the holds on an adapter, in the form that its quarantine lists them."""
        return [
            LegalHold(
                request_id=record.request.request_id,
                selector=selector_json(record.request.selector),
                until_ms=epoch_ms(record.request.due_at),
            )
            for record in self.in_force("hold")
            if covers(record.request.adapter, adapter)
        ]


@dataclass(frozen=True, slots=True)
class StoredExample:
    """An example whose text the store has.

    Attributes:
        example: The example without its text.
        text_hash: The hash that its text is suppressed by; None where it has no text.
        seq: The sequence number of the version whose micro-batch holds it.
        version: That version.
        learned: A version that may be live learned it.
    """

    example: ExampleAccepted
    text_hash: str | None
    seq: int
    version: str
    learned: bool


@dataclass(frozen=True, slots=True)
class LifetimeLimit:
    """A policy in force: examples that match the selector expire `time_to_live_s` seconds after their publication."""

    selector: Selector
    time_to_live_s: int


def covers(pattern: str, adapter: str) -> bool:
    """Return whether an adapter pattern (`acme/support`, `acme/*`, `*`) includes the adapter."""
    return pattern == adapter or (pattern.endswith("*") and adapter.startswith(pattern[:-1]))


def expires_ms(example: ExampleAccepted, policies: Iterable[LifetimeLimit]) -> int | None:
    """Return when the example's life ends, in milliseconds since 1970; None: never.

    It is the earliest of three ends: the example's own `expires_at`, the duration that its retention class names, and
    the time to live of each policy that matches it. An end after the year 9999 means never.

    Args:
        example: The example.
        policies: The policies in force for its adapter.
    """
    published_ms = example.origin.timestamp_ms
    ends = [published_ms + 1000 * policy.time_to_live_s for policy in policies if policy.selector.matches(example)]
    if example.retention_class != PERMANENT:
        ends.append(published_ms + 1000 * duration_s(example.retention_class))
    if example.expires_at is not None:
        ends.append(int(example.expires_at.timestamp() * 1000))
    return bounded_end_ms(min(ends)) if ends else None


def policies_on(ledger: RequestLedger, adapter: str) -> list[LifetimeLimit]:
    """Return the policies in force for an adapter."""
    return [
        LifetimeLimit(record.request.selector, duration_s(record.request.time_to_live))
        for record in ledger.in_force("policy")
        if covers(record.request.adapter, adapter) and record.request.selector and record.request.time_to_live
    ]


def calendar(ledger: RequestLedger, adapter: str, stored: Sequence[StoredExample], now_ms: int) -> list[RequestRecord]:
    """Return the requests that retain makes by itself: for expired examples and for documents that supersede others.

    At most one expiry per adapter is open at a time; what falls due in the meantime goes with the next one.

    Args:
        ledger: All requests so far.
        adapter: The adapter to look at.
        stored: The adapter's examples whose text the store has.
        now_ms: The guarded time, in milliseconds since 1970.
    """
    return [*_expiry(ledger, adapter, stored, now_ms), *_supersessions(ledger, adapter, stored, now_ms)]


def _expiry(ledger: RequestLedger, adapter: str, stored: Sequence[StoredExample], now_ms: int) -> list[RequestRecord]:
    if any(r.open and r.request.adapter == adapter and r.example_ids for r in ledger.records.values()):
        return []
    policies = policies_on(ledger, adapter)
    holds = hold_matchers(ledger, adapter)
    due: list[tuple[int, str]] = []
    for item in stored:
        end_ms = expires_ms(item.example, policies)
        if end_ms is not None and end_ms <= now_ms and not any(matches(item.example) for matches in holds):
            due.append((end_ms, item.example.example_id))
    ids = sorted({example_id for _, example_id in sorted(due)[:MAX_IDS]})
    if not ids:
        return []
    request = RetentionRequested(
        request_id=f"expire-{sha256(orjson.dumps([adapter, ids])).hexdigest()[:32]}", kind="expire", adapter=adapter,
        requested_by=CALENDAR, reason="time to live ended",
    )  # fmt: skip
    if request.request_id in ledger.records:
        return []
    return [RequestRecord(request=request, received_ms=now_ms, until_ms=now_ms, example_ids=ids)]


def _supersessions(
    ledger: RequestLedger, adapter: str, stored: Sequence[StoredExample], now_ms: int
) -> list[RequestRecord]:
    made: list[RequestRecord] = []
    for item in stored:
        new = item.example
        request_id = f"supersede-{new.example_id}"
        if not (new.supersedes and item.learned) or request_id in ledger.records:
            continue
        published_ms = new.origin.timestamp_ms
        older = (other.example for other in stored if other.example.origin.timestamp_ms < published_ms)
        if any(example.document_id in new.supersedes for example in older):
            request = RetentionRequested(
                request_id=request_id, kind="supersede", adapter=adapter,
                selector=Selector(document_ids=new.supersedes), superseded_by=new.document_id, requested_by=CALENDAR,
                reason=f"superseded by {new.document_id}"[:1024],
            )  # fmt: skip
            made.append(RequestRecord(request=request, received_ms=now_ms, until_ms=published_ms - 1))
    return made


def hold_matchers(ledger: RequestLedger, adapter: str) -> list[Callable[[ExampleAccepted], bool]]:
    """Return one function for each hold on the adapter; it says whether the hold is on an example."""
    found: list[Callable[[ExampleAccepted], bool]] = []
    for record in ledger.in_force("hold"):
        if covers(record.request.adapter, adapter):
            selector = record.request.selector
            found.append((lambda _: True) if selector is None else selector.matches)
    return found


def same_holds(hold: RetentionRequested, release: RetentionRequested) -> bool:
    """Return whether a release is for that hold: equal adapter and selector, in whatever order the selector lists."""
    return hold.adapter == release.adapter and _unordered(hold.selector) == _unordered(release.selector)


def _unordered(selector: Selector | None) -> dict[str, object] | None:
    if selector is None:
        return None
    fields = selector.model_dump(exclude_none=True)
    return {name: frozenset(value) if isinstance(value, list) else value for name, value in fields.items()}


def overdue(ledger: RequestLedger, now_ms: int) -> int:
    """Return how many open requests are past their `due_at`."""
    may_be_late = [r for r in ledger.records.values() if r.open and not KINDS[r.request.kind].stays_in_force]
    return sum((epoch_ms(record.request.due_at) or now_ms + 1) <= now_ms for record in may_be_late)


def count_states(records: Collection[RequestRecord]) -> dict[str, int]:
    """Return the number of requests in each state."""
    return {state: sum(record.state == state for record in records) for state in STATES}


def selector_json(selector: Selector | None) -> dict[str, object] | None:
    """Return a selector as JSON."""
    return None if selector is None else selector.model_dump(mode="json", exclude_none=True)


def epoch_ms(at: datetime | None) -> int | None:
    """Return a time in milliseconds since 1970."""
    return None if at is None else int(at.timestamp() * 1000)
