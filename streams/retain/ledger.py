"""A retention request and its progress, and what is known of a stored example. Pure.

Each request is an object of its own in the store; streams/retain/request_store.py has the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from itertools import chain
from typing import Final, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_serializer

from perennial.streams.events.event_times import bounded_end_ms
from perennial.streams.events.fields import PERMANENT, duration_s
from perennial.streams.events.input_events import is_none
from perennial.streams.events.models import ExampleAccepted, RetentionRequested, RetentionState, Selector
from perennial.streams.retention.kinds import KINDS, is_pattern

MAX_IDS: Final = 10_000
"""The most examples that one request of the calendar names."""
_MAX_BEHIND: Final = 8
STATES: Final[tuple[RetentionState, ...]] = (
    "unapproved", "accepted", "held", "quarantined", "executed", "published", "closed", "failed",
)  # fmt: skip
Phase = Literal["waiting", "gathering", "held", "sent", "published", "done", "failed"]
"""The phase of a request in one adapter; streams/retain/rules/transitions.py has the transitions."""


class LedgerPart(BaseModel):
    """Base of everything that the ledger stores."""

    # An unknown field could be an order to forget that a newer version wrote: refuse it.
    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> bytes:
        """Return canonical JSON."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)


class AdapterProgress(LedgerPart):
    """The progress of a request in one adapter.

    Attributes:
        phase: Where the adapter is in the transition table.
        until_ms: Only examples published up to this time are selected, in milliseconds since 1970.
        sent_ms: When the job was sent last.
        examples: How many examples are selected, as far as is known.
        version: After a forgetting, the version that became live. Of a revocation, the version that was live when the
            job was sent, and from phase `published` on the version that replaced it.
        generation: The alias's generation that belongs to `version`.
        detail: Why the phase is `failed`, or what is remarkable about its end.
        acknowledged: Replicas that confirmed that they serve no affected version, in phases `published` and `done`.
        missing: Replicas that did not confirm it.
        exceptions: The request's due time ended the wait for replicas that had not confirmed it.
        dependants: The same of the adapters that may depend on a version of this one, by name, and of theirs with the number of
            the round in front, `2:acme/support/zoe`; None: they were not looked up, or there are none. Left out of the JSON then, so that an older release
            reads it.
    """

    phase: Phase
    until_ms: int = 0
    sent_ms: int = 0
    examples: int = 0
    version: str | None = None
    generation: int | None = None
    detail: str = ""
    acknowledged: list[str] = []
    missing: list[str] = []
    exceptions: bool = False
    dependants: dict[str, AdapterProgress] | None = Field(default=None, exclude_if=is_none)

    @field_serializer("dependants")
    def _compact(self, users: dict[str, AdapterProgress] | None) -> dict[str, object] | None:
        """Leave defaults out: there may be many thousands."""
        if users is None:
            return None
        return {name: one.model_dump(mode="json", exclude_defaults=True) for name, one in users.items()}

    def parts(self) -> Iterator[AdapterProgress]:
        """Yield this progress and that of its dependants."""
        yield self
        yield from (self.dependants or {}).values()


class PageSummary(LedgerPart):
    """The progress of a request in the adapters of one page, added up.

    Attributes:
        phases: Number of adapters in each phase.
        examples: Number of selected examples.
        failure: The name of one adapter in phase `failed`, and why; empty where there is none.
        behind: Some of the replicas that adapters in phase `published` wait for.
    """

    phases: dict[Phase, int]
    examples: int = 0
    failure: str = ""
    behind: list[str] = []


class ProgressPage(LedgerPart):
    """The progress of one request in some of the adapters of its pattern: those whose names have the page's hash.

    Attributes:
        revision: Grows with every change, so that no two states have equal bytes.
        adapters: Progress by adapter.
    """

    revision: int = 0
    adapters: dict[str, AdapterProgress] = {}

    def summary(self) -> PageSummary:
        """Return the sums over the page's adapters."""
        phases: dict[Phase, int] = {}
        for progress in self.adapters.values():
            phases[progress.phase] = phases.get(progress.phase, 0) + 1
        failures = (f"{name}: {p.detail}" for name, p in self.adapters.items() if p.phase == "failed")
        parts = chain.from_iterable(p.parts() for p in self.adapters.values())
        behind = {name for p in parts if p.phase == "published" for name in p.missing}
        return PageSummary(
            phases=phases, examples=sum(p.examples for p in self.adapters.values()), failure=next(failures, "")[:500],
            behind=sorted(behind)[:_MAX_BEHIND],
        )  # fmt: skip


class Approval(LedgerPart):
    """The second approver that a request needs.

    Attributes:
        until_ms: An approval that the broker took later does not count, in milliseconds since 1970.
        requester_key: Id of the key that signed the request; None where no signature is asked for.
        approved_by: Who approved it; None: nobody yet.
        approver_key: Id of the key that signed the approval; None where no signature is asked for.
        approved_ms: When the broker took the approval, in milliseconds since 1970; None: none came yet.
    """

    until_ms: int
    requester_key: str | None = None
    approved_by: str | None = None
    approver_key: str | None = None
    approved_ms: int | None = None


class RequestRecord(LedgerPart):
    """A request and how far it has come.

    Attributes:
        schema_version: The version of this format.
        revision: Grows with every change, so that no two states have equal bytes.
        request: The request itself.
        received_ms: When the broker took it, in milliseconds since 1970.
        until_ms: Only examples published up to this time are meant, in milliseconds since 1970.
        example_ids: The examples of an expiry that the calendar made; empty for every other request.
        state: The state as published.
        detail: The explanation as published.
        adapters: Progress by adapter; empty where the request has pages.
        pages: Sums of the pages of a request that names adapters by a pattern, by page.
        acknowledged: Replicas that confirmed that they serve no affected version.
        missing: Replicas that did not confirm it.
        exceptions: The request was closed at its due time although replicas had not confirmed it.
        ends: Requests that this one ends: the holds of a release, the earlier policies of a policy.
        ending: Of a hold: why it is no longer in force, while quarantines may still list it; empty while it is.
        ended_ms: When the request ended; None while it is open.
        approval: The second approver; None where the request needs none. Left out of the JSON then, so that an older
            release reads the requests that it knows how to carry out.
    """

    schema_version: Literal[1] = 1
    revision: int = 0
    request: RetentionRequested
    received_ms: int
    until_ms: int
    example_ids: list[str] = []
    state: RetentionState = "accepted"
    detail: str = ""
    adapters: dict[str, AdapterProgress] = {}
    pages: dict[str, PageSummary] = {}
    acknowledged: list[str] = []
    missing: list[str] = []
    exceptions: bool = False
    ends: list[str] = []
    ending: str = ""
    ended_ms: int | None = None
    approval: Approval | None = Field(default=None, exclude_if=is_none)

    @classmethod
    def of(cls, request: RetentionRequested, received_ms: int) -> Self:
        """Return a new request: what was published until it came is meant, or until its due_at where it begins then.

        Args:
            request: The request.
            received_ms: When the broker took it, in milliseconds since 1970.
        """
        begins_ms = epoch_ms(request.due_at) if KINDS[request.kind].due_at == "start" else None
        return cls(request=request, received_ms=received_ms, until_ms=max(received_ms, begins_ms or 0))

    @property
    def unapproved(self) -> bool:
        """Whether nobody approved a request that needs a second approver, so that nothing may be done about it."""
        return self.approval is not None and self.approval.approved_by is None

    @property
    def open(self) -> bool:
        """Whether the request has not ended."""
        return self.ended_ms is None

    @property
    def examples(self) -> int:
        """The number of examples that the request selects, as far as is known."""
        in_adapters = sum(progress.examples for progress in self.adapters.values())
        return in_adapters + sum(page.examples for page in self.pages.values())

    @property
    def is_pattern(self) -> bool:
        """Whether the request also is for adapters that do not exist yet."""
        return is_pattern(self.request.adapter)

    @property
    def in_force(self) -> bool:
        """Whether the request is a hold or a policy in force."""
        return self.open and KINDS[self.request.kind].stays_in_force and not self.ending and not self.unapproved

    def is_early(self, now_ms: int) -> bool:
        """Return whether the request begins only at its due_at, and that is later; one without its approver can end before."""
        due_ms = epoch_ms(self.request.due_at) if KINDS[self.request.kind].due_at == "start" else None
        return due_ms is not None and now_ms < due_ms and not self.unapproved

    @property
    def phases(self) -> Mapping[Phase, int]:
        """The number of adapters in each phase."""
        found: dict[Phase, int] = {}
        for progress in self.adapters.values():
            found[progress.phase] = found.get(progress.phase, 0) + 1
        for page in self.pages.values():
            for phase, number in page.phases.items():
                found[phase] = found.get(phase, 0) + number
        return found


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
    return pattern == adapter or (is_pattern(pattern) and adapter.startswith(pattern[:-1]))


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


def page_of(adapter: str) -> str:
    """Return the page of a request's progress that an adapter belongs to: one of 256."""
    return sha256(adapter.encode()).hexdigest()[:2]


def by_page(adapters: Iterable[str]) -> dict[str, list[str]]:
    """Return adapters by their page, in the order in which they come."""
    found: dict[str, list[str]] = {}
    for adapter in adapters:
        found.setdefault(page_of(adapter), []).append(adapter)
    return found


def patterns_over(adapter: str) -> list[str]:
    """Return the adapter's name and every pattern that covers it, such as `acme/*` and `*`."""
    segments = adapter.split("/")
    return [adapter, *("/".join([*segments[:n], "*"]) for n in range(len(segments)))]


def selector_json(selector: Selector | None) -> dict[str, object] | None:
    """Return a selector as JSON."""
    return None if selector is None else selector.model_dump(mode="json", exclude_none=True)


def epoch_ms(at: datetime | None) -> int | None:
    """Return a time in milliseconds since 1970."""
    return None if at is None else int(at.timestamp() * 1000)
