"""The book of retention requests, and what it says about an example: when its life ends, which holds are on it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from perennial.storage.registry.quarantine import LegalHold
from perennial.streams.events.models import (
    PERMANENT,
    ExampleAccepted,
    RetentionRequested,
    RetentionState,
    Selector,
    duration_s,
)
from perennial.streams.retention.kinds import KINDS

ITSELF: Final = "perennial/retain"
MAX_IDS: Final = 10_000
"""Examples that one request of the calendar names at most."""
STATES: Final[tuple[RetentionState, ...]] = (
    "accepted", "held", "quarantined", "executed", "published", "closed", "failed",
)  # fmt: skip
Phase = Literal["waiting", "held", "sent", "done", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterProgress(_Part):
    """How far one adapter of a request has come.

    version, generation: of a forgetting, what went live; of a revocation, while it is sent, what was live.
    sent_ms: when its job was sent last.
    """

    phase: Phase
    until_ms: int = 0
    sent_ms: int = 0
    examples: int = 0
    version: str | None = None
    generation: int | None = None
    detail: str = ""


class RequestRecord(_Part):
    """A request and what became of it. example_ids: of the calendar's own requests. until_ms: see ForgetRequested."""

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
        """Whether something may still become of it."""
        return self.ended_ms is None

    @property
    def examples(self) -> int:
        """How many examples it means, as far as is known."""
        return sum(progress.examples for progress in self.adapters.values())

    @property
    def is_pattern(self) -> bool:
        """Whether it is for adapters that may be made later too."""
        return self.request.adapter.endswith("*")


class RequestLedger(_Part):
    """All requests that count: those open, policies and holds in force, and those ended not long ago."""

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    revision: int = 0
    records: dict[str, RequestRecord] = {}

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)

    def standing(self, kind: Literal["hold", "policy"]) -> list[RequestRecord]:
        """The holds, or the policies, in force."""
        return [r for r in self.records.values() if r.request.kind == kind and r.open and r.state == "executed"]

    def holds_on(self, adapter: str) -> list[LegalHold]:
        """The holds on an adapter, as its quarantine lists them."""
        return [
            LegalHold(
                request_id=record.request.request_id,
                selector=plain(record.request.selector),
                until_ms=ms_of(record.request.due_at),
            )
            for record in self.standing("hold")
            if covers(record.request.adapter, adapter)
        ]


@dataclass(frozen=True, slots=True)
class StoredExample:
    """An example whose text the store has. example: without its text. learned: by a version that may be live."""

    example: ExampleAccepted
    text_hash: str | None
    seq: int
    version: str
    learned: bool


def covers(pattern: str, adapter: str) -> bool:
    """Whether an adapter pattern (`acme/support`, `acme/*`, `*`) means the adapter."""
    return pattern == adapter or (pattern.endswith("*") and adapter.startswith(pattern[:-1]))


def expires_ms(example: ExampleAccepted, policies: Iterable[Selector], times_s: Sequence[int]) -> int | None:
    """When the example's life ends: the earliest of its own time, its class's duration and the policies'.

    policies, times_s: those of its adapter, with their times to live. None: never.
    """
    born_ms = example.origin.timestamp_ms
    ends = [born_ms + 1000 * ttl for policy, ttl in zip(policies, times_s, strict=True) if policy.matches(example)]
    if example.retention_class != PERMANENT:
        ends.append(born_ms + 1000 * duration_s(example.retention_class))
    if example.expires_at is not None:
        ends.append(int(example.expires_at.timestamp() * 1000))
    return min(ends, default=None)


def policies_on(book: RequestLedger, adapter: str) -> tuple[list[Selector], list[int]]:
    """The selectors of the policies in force for an adapter, and their times to live in seconds."""
    found = [
        (record.request.selector, duration_s(record.request.time_to_live))
        for record in book.standing("policy")
        if covers(record.request.adapter, adapter) and record.request.selector and record.request.time_to_live
    ]
    return [selector for selector, _ in found], [ttl for _, ttl in found]


def calendar(book: RequestLedger, adapter: str, known: Sequence[StoredExample], now_ms: int) -> list[RequestRecord]:
    """The requests that retain itself makes: for examples whose life ended, and for documents that name others.

    At most one expiry per adapter is open at a time, so what falls due meanwhile goes with the next.
    """
    return [*_expiry(book, adapter, known, now_ms), *_supersessions(book, adapter, known, now_ms)]


def _expiry(book: RequestLedger, adapter: str, known: Sequence[StoredExample], now_ms: int) -> list[RequestRecord]:
    open_ones = [r for r in book.records.values() if r.open and r.request.adapter == adapter and r.example_ids]
    if open_ones:
        return []
    selectors, times_s = policies_on(book, adapter)
    holds = meanings_of_holds(book, adapter)
    due: list[tuple[int, str]] = []
    for item in known:
        end_ms = expires_ms(item.example, selectors, times_s)
        if end_ms is not None and end_ms <= now_ms and not any(means(item.example) for means in holds):
            due.append((end_ms, item.example.example_id))
    ids = sorted({example_id for _, example_id in sorted(due)[:MAX_IDS]})
    if not ids:
        return []
    name = sha256(orjson.dumps([adapter, ids])).hexdigest()[:32]
    return _own(book, adapter, f"expire-{name}", "expire", "time to live ended", now_ms, now_ms, ids)


def _supersessions(
    book: RequestLedger, adapter: str, known: Sequence[StoredExample], now_ms: int
) -> list[RequestRecord]:
    made: list[RequestRecord] = []
    for item in known:
        new = item.example
        if not (new.supersedes and item.learned):
            continue
        born_ms = new.origin.timestamp_ms
        if any(k.example.document_id in new.supersedes and k.example.origin.timestamp_ms < born_ms for k in known):
            made += _own(
                book, adapter, f"supersede-{new.example_id}", "supersede", f"superseded by {new.document_id}"[:1024],
                now_ms, born_ms - 1, [], Selector(document_ids=new.supersedes), new.document_id,
            )  # fmt: skip
    return made


def _own(
    book: RequestLedger,
    adapter: str,
    request_id: str,
    kind: Literal["expire", "supersede"],
    reason: str,
    now_ms: int,
    until_ms: int,
    ids: list[str],
    selector: Selector | None = None,
    superseded_by: str | None = None,
) -> list[RequestRecord]:
    if request_id in book.records:
        return []
    request = RetentionRequested(
        request_id=request_id, kind=kind, adapter=adapter, selector=selector, superseded_by=superseded_by,
        requested_by=ITSELF, reason=reason,
    )  # fmt: skip
    return [RequestRecord(request=request, received_ms=now_ms, until_ms=until_ms, example_ids=ids)]


def meanings_of_holds(book: RequestLedger, adapter: str) -> list[Callable[[ExampleAccepted], bool]]:
    """For each hold on the adapter, whether it is on an example."""
    found: list[Callable[[ExampleAccepted], bool]] = []
    for record in book.standing("hold"):
        if covers(record.request.adapter, adapter):
            selector = record.request.selector
            found.append((lambda _: True) if selector is None else selector.matches)
    return found


def same_holds(hold: RetentionRequested, release: RetentionRequested) -> bool:
    """Whether a release is for that hold: the same adapters and the same selector, in whatever order it lists."""
    return hold.adapter == release.adapter and _unordered(hold.selector) == _unordered(release.selector)


def _unordered(selector: Selector | None) -> dict[str, object] | None:
    if selector is None:
        return None
    fields = selector.model_dump(exclude_none=True)
    return {name: frozenset(value) if isinstance(value, list) else value for name, value in fields.items()}


def overdue(book: RequestLedger, now_ms: int) -> int:
    """How many open requests should have come to their end by now."""
    waits = [r for r in book.records.values() if r.open and not KINDS[r.request.kind].stays_in_force]
    return sum((ms_of(record.request.due_at) or now_ms + 1) <= now_ms for record in waits)


def count_states(records: Collection[RequestRecord]) -> dict[str, int]:
    """How many requests are in each state."""
    return {state: sum(record.state == state for record in records) for state in STATES}


def plain(selector: Selector | None) -> dict[str, object] | None:
    """A selector as JSON."""
    return None if selector is None else selector.model_dump(mode="json", exclude_none=True)


def ms_of(at: datetime | None) -> int | None:
    """A time in milliseconds since 1970."""
    return None if at is None else int(at.timestamp() * 1000)
