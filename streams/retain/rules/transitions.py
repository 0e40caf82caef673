"""Transition tables of retention requests: per adapter, and for a request as a whole. Pure data.

A request that leads to jobs has a phase in each of its adapters. At every step retain observes something about the
adapter and looks up (phase, observation) to get the next phase and what to do. The state that people see in
`retention-status` follows from the phase of the adapter that is furthest behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

from perennial.streams.events.models import RetentionState
from perennial.streams.retain.ledger import Phase
from perennial.streams.retention.kinds import Job


class Observation(StrEnum):
    """The one thing that decides what happens next to a request in one adapter."""

    NOT_READY = "the document that supersedes is not learned yet"
    HELD = "a legal hold is on a stored example that the job would forget"
    EARLY = "the job can wait for other requests, so that one rebuild serves them all"
    READY = "nothing is in the way of the job"
    OVERDUE = "the job was sent so long ago that it may be lost"
    UNKNOWN = "the job was sent, and the quarantine has no entry of the request, so that no outcome can be found"
    DEPENDANTS_REMAIN = "the job was carried out; adapters that depend on what it revoked are not rebuilt yet"
    DONE = "the job was carried out; a replica that may serve an affected version has not confirmed it"
    CONFIRMED = "the job was carried out, and no replica with a lease may serve an affected version"
    UNCONFIRMED = "the job was carried out, and the due time ends the wait for replicas that have not confirmed it"
    FAILED = "the job cannot be carried out"


class Action(StrEnum):
    """The actions of a transition, besides changing the phase."""

    QUARANTINE = "write the request's quarantine entry, so that no update learns the examples"
    SUPPRESS = "suppress the texts of the examples that the store has, if the kind suppresses texts"
    SEND_JOB = "send the job to the learner"


@dataclass(frozen=True, slots=True)
class Transition:
    """The next phase, and the actions on the way to it."""

    phase: Phase
    actions: frozenset[Action] = frozenset()


def _to(phase: Phase, *actions: Action) -> Transition:
    return Transition(phase, frozenset(actions))


_CARRIED_OUT: Final[Mapping[Observation, Transition]] = {
    Observation.DONE: _to("published"),
    Observation.CONFIRMED: _to("done"),
    Observation.UNCONFIRMED: _to("done"),
}
FORGET_TRANSITIONS: Final[Mapping[tuple[Phase, Observation], Transition]] = MappingProxyType({
    ("waiting", Observation.NOT_READY): _to("waiting"),
    ("waiting", Observation.HELD): _to("held", Action.QUARANTINE),
    ("waiting", Observation.EARLY): _to("gathering", Action.QUARANTINE, Action.SUPPRESS),
    ("waiting", Observation.READY): _to("sent", Action.QUARANTINE, Action.SUPPRESS, Action.SEND_JOB),
    ("gathering", Observation.HELD): _to("held", Action.QUARANTINE),
    ("gathering", Observation.EARLY): _to("gathering"),
    ("gathering", Observation.READY): _to("sent", Action.QUARANTINE, Action.SUPPRESS, Action.SEND_JOB),
    ("gathering", Observation.FAILED): _to("failed"),
    ("held", Observation.HELD): _to("held"),
    ("held", Observation.EARLY): _to("gathering", Action.QUARANTINE, Action.SUPPRESS),
    ("held", Observation.READY): _to("sent", Action.QUARANTINE, Action.SUPPRESS, Action.SEND_JOB),
    ("held", Observation.FAILED): _to("failed"),
    ("sent", Observation.HELD): _to("held", Action.QUARANTINE),  # the learner asks for holds again before it begins
    ("sent", Observation.READY): _to("sent"),
    ("sent", Observation.OVERDUE): _to("sent", Action.SEND_JOB),
    ("sent", Observation.UNKNOWN): _to("sent", Action.QUARANTINE, Action.SEND_JOB),
    ("sent", Observation.FAILED): _to("failed"),
    ("gathering", Observation.DEPENDANTS_REMAIN): _to("sent"),
    ("held", Observation.DEPENDANTS_REMAIN): _to("sent"),
    ("sent", Observation.DEPENDANTS_REMAIN): _to("sent"),
    ("published", Observation.FAILED): _to("failed"),  # a dependant could not be rebuilt
    # A request that was gathered may be carried out by the rebuild of another one. A request that is held may have been
    # carried out before the learner saw the hold.
    **{(phase, seen): to for phase in ("gathering", "held", "sent", "published") for seen, to in _CARRIED_OUT.items()},
})  # fmt: skip
"""For kinds with `job="forget"`."""

ROLLBACK_TRANSITIONS: Final[Mapping[tuple[Phase, Observation], Transition]] = MappingProxyType({
    ("waiting", Observation.FAILED): _to("failed"),  # nothing is live
    ("waiting", Observation.READY): _to("sent", Action.SEND_JOB),
    ("sent", Observation.READY): _to("sent"),
    ("sent", Observation.OVERDUE): _to("sent", Action.SEND_JOB),
    **{(phase, seen): to for phase in ("sent", "published") for seen, to in _CARRIED_OUT.items()},
})  # fmt: skip
"""For kinds with `job="rollback"`."""

Summary = Phase | Literal["no adapters"]
"""The phase of the adapter that is furthest behind, or `no adapters` where the request's pattern covers none."""
_FURTHEST_BEHIND_FIRST: Final[tuple[Phase, ...]] = (
    "held", "waiting", "gathering", "sent", "published", "failed", "done",
)  # fmt: skip
OPEN_PHASES: Final[frozenset[Phase]] = frozenset({"waiting", "gathering", "held", "sent", "published"})
"""The phases of an adapter that something can still change."""


def furthest_behind(phases: Iterable[Phase]) -> Summary:
    """Return the phase that decides the state of the whole request."""
    found = set(phases)
    return next((phase for phase in _FURTHEST_BEHIND_FIRST if phase in found), "no adapters")


@dataclass(frozen=True, slots=True)
class RequestState:
    """The state of a request as published in `retention-status`.

    Attributes:
        state: The published state.
        detail: The published explanation, a template for `str.format` with the names waits, failures, replicas,
            progress, dependants and done.
        ends: The request is over.
    """

    state: RetentionState
    detail: str
    ends: bool = False


_EITHER: Final[Mapping[Summary, RequestState]] = {
    "failed": RequestState("failed", "{failures}", ends=True),
    "no adapters": RequestState(
        "closed", "nothing matched: no adapter of that pattern has anything in the store", ends=True
    ),
    "published": RequestState("published", "waits for replicas that may serve a version trained on it: {replicas}"),
    "done": RequestState("closed", "{done}", ends=True),
}
REQUEST_STATES: Final[Mapping[tuple[Job, Summary], RequestState]] = MappingProxyType({
    ("forget", "held"): RequestState("held", "waits: a legal hold is on examples that the request selects"),
    ("forget", "waiting"): RequestState("accepted", "{waits}"),
    ("forget", "gathering"): RequestState(
        "quarantined", "no update learns it any more; waits for other requests, so that one rebuild serves them"
    ),
    ("forget", "sent"): RequestState("quarantined", "no update learns it any more; the learner has the job{progress}{dependants}"),
    ("rollback", "waiting"): RequestState("accepted", ""),
    ("rollback", "sent"): RequestState("accepted", "the learner has the job{progress}"),
    **{("forget", summary): state for summary, state in _EITHER.items()},
    **{("rollback", summary): state for summary, state in _EITHER.items()},
    ("rollback", "published"): RequestState("published", "waits for replicas that may serve it: {replicas}"),
})  # fmt: skip
