"""The state machine of retention requests: what one step does about a request in one adapter. Pure.

A step takes a request's progress in an adapter and facts from the store, and returns the progress after it. It leaves
changes of quarantines and events in the `RequestProcessor`. The caller applies the changes, then sends the events, then
saves the progress. Every change is idempotent and the id of every job follows from its request and adapter, so a step
that was interrupted anywhere is simply repeated.

Holds win: a job is sent only while no hold is on any stored example that the job would forget. `now_ms` is the time of
the guarded clock (streams/retain/clock.py). The tables of phases and states are in streams/retain/rules/transitions.py.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, islice
from typing import Final

from perennial.storage.registry.quarantine import (
    NOTHING_MATCHED,
    OTHER_ENGINE,
    QuarantineEntry,
    RequestOutcome,
)
from perennial.streams.events.fields import Event
from perennial.streams.events.models import (
    ForgetRequested,
    RetentionProgressed,
    RetentionState,
    RollbackRequested,
    Selector,
)
from perennial.streams.retain.ledger import (
    AdapterProgress,
    RequestRecord,
    StoredExample,
    epoch_ms,
)
from perennial.streams.retain.rules.confirmations import observe_replicas, with_replicas
from perennial.streams.retain.rules.dependant_steps import DependantSteps, dependant_failures, observe_dependants
from perennial.streams.retain.rules.in_force import InForce
from perennial.streams.retain.rules.jobs import RESEND_MS, QuarantineChange, entry_of, job_id_of
from perennial.streams.retain.rules.replica_report import MAX_NAMED, ReplicaReport
from perennial.streams.retain.rules.step_facts import Facts
from perennial.streams.retain.rules.transitions import (
    FORGET_TRANSITIONS,
    REQUEST_STATES,
    ROLLBACK_TRANSITIONS,
    Action,
    Observation,
    furthest_behind,
)
from perennial.streams.retention.kinds import KINDS

DUE_MARGIN_MS: Final = 3_600_000
"""A request with a due time is not gathered any longer when this much time is left until then."""
_NOTHING_MATCHED: Final = (
    f"{NOTHING_MATCHED}: the store had no such example; those on their way through the topics are kept out"
)
MAX_DETAIL_CHARS: Final = 2000
_MAX_LISTED: Final = 5


@dataclass
class RequestProcessor:
    """Steps of requests in adapters; collects their effects for the caller to perform.

    Attributes:
        facts: The state of the store and of the replicas.
        in_force: The holds and policies in force.
        now_ms: The guarded time, in milliseconds since 1970.
        at: The time that published states carry.
        gather_ms: How long requests are gathered, so that one rebuild serves them, in milliseconds.
        changes: Changes of quarantines to apply first.
        events: Events to send after the changes.
    """

    facts: Facts
    in_force: InForce
    now_ms: int
    at: datetime
    gather_ms: int = 0
    changes: list[QuarantineChange] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    # ---- a request in one adapter

    def step(self, record: RequestRecord, adapter: str, progress: AdapterProgress) -> AdapterProgress:
        """Take one step of a request in an adapter and return the adapter's progress after it."""
        if progress.phase in {"done", "failed"}:
            return progress
        if progress.phase == "published":
            return self._carried_out(record, adapter, progress)
        if KINDS[record.request.kind].job == "rollback":
            return self._rollback_step(record, adapter, progress)
        return self._forget_step(record, adapter, progress)

    def _forget_step(self, record: RequestRecord, adapter: str, progress: AdapterProgress) -> AdapterProgress:
        """Take one step of FORGET_TRANSITIONS."""
        entry = None
        if progress.phase != "waiting":
            entry = self.facts.quarantine(adapter).entry(record.request.request_id)
            if entry is not None and entry.done is not None:
                return self._forgotten(record, adapter, progress, entry.done)
        quiet = entry is not None and not self._is_overdue(progress) and not self.in_force.hold_matchers(adapter)
        if progress.phase == "sent" and quiet:
            return progress  # the usual case, so that waiting for the learner costs one look at the quarantine
        stored = self.facts.examples(adapter)
        job = self._forget_job(record, adapter, progress, stored)
        if job is None:
            return progress.model_copy(
                update={"phase": FORGET_TRANSITIONS[progress.phase, Observation.NOT_READY].phase}
            )
        selected = [item for item in stored if job.matches(item.example)]
        seen = self._observe_job(record, adapter, selected, progress, entry)
        transition = FORGET_TRANSITIONS[progress.phase, seen]
        if Action.SEND_JOB in transition.actions:
            self.events.append(job)
        if Action.QUARANTINE in transition.actions:
            suppress = job.suppress and Action.SUPPRESS in transition.actions
            hashes = {item.text_hash for item in selected if item.text_hash} if suppress else set()
            self.changes.append(QuarantineChange(adapter, entry_of(job), frozenset(hashes)))
        sent_ms = self.now_ms if Action.SEND_JOB in transition.actions else progress.sent_ms
        return AdapterProgress(
            phase=transition.phase, until_ms=job.until_ms, sent_ms=sent_ms, examples=len(selected),
            dependants=progress.dependants,
        )  # fmt: skip

    def _forgotten(
        self, record: RequestRecord, adapter: str, progress: AdapterProgress, outcome: RequestOutcome
    ) -> AdapterProgress:
        after = AdapterProgress(
            phase=progress.phase, until_ms=progress.until_ms, examples=outcome.examples, version=outcome.version,
            generation=outcome.generation, detail=outcome.failure or outcome.detail,
        )  # fmt: skip
        if outcome.failure:
            return after.model_copy(update={"phase": FORGET_TRANSITIONS[progress.phase, Observation.FAILED].phase})
        users = progress.dependants
        if users is None:  # not before the outcome is known: streams/retain/rules/dependant_steps.py says why
            users = dict.fromkeys(self.facts.dependants(adapter), AdapterProgress(phase="waiting"))
        return self._carried_out(record, adapter, after.model_copy(update={"dependants": users or None}))

    def _observe_job(
        self,
        record: RequestRecord,
        adapter: str,
        selected: Sequence[StoredExample],
        progress: AdapterProgress,
        entry: QuarantineEntry | None,
    ) -> Observation:
        holds = self.in_force.hold_matchers(adapter)
        if any(matches(item.example) for item in selected for matches in holds):
            return Observation.HELD
        if progress.phase == "sent" and entry is None:
            return Observation.UNKNOWN
        if progress.phase == "sent":
            return Observation.OVERDUE if self._is_overdue(progress) else Observation.READY
        return Observation.EARLY if self.now_ms < gathered_until_ms(record, self.gather_ms) else Observation.READY

    def _is_overdue(self, progress: AdapterProgress) -> bool:
        return progress.sent_ms + RESEND_MS <= self.now_ms

    def _forget_job(
        self, record: RequestRecord, adapter: str, progress: AdapterProgress, stored: Sequence[StoredExample]
    ) -> ForgetRequested | None:
        """Return the job; None while a superseding document is not learned."""
        request, until_ms, selector = record.request, record.until_ms, record.request.selector
        if request.superseded_by is not None:
            new = newest_learned(stored, request.superseded_by)
            if new is None and progress.phase == "waiting":
                return None
            if new is not None:
                until_ms = min(until_ms, new.example.origin.timestamp_ms - 1)
                selector = _within_source(selector, new.example.source)
        return ForgetRequested(
            job_id=job_id_of(request.request_id, adapter), request_id=request.request_id, kind=request.kind,
            adapter=adapter, selector=selector, example_ids=record.example_ids,
            until_ms=until_ms if progress.phase == "waiting" else progress.until_ms,
            suppress=KINDS[request.kind].suppresses_text, emergency=request.emergency, reason=request.reason,
        )  # fmt: skip

    def _rollback_step(self, record: RequestRecord, adapter: str, progress: AdapterProgress) -> AdapterProgress:
        """Take one step of ROLLBACK_TRANSITIONS."""
        live = self.facts.live(adapter)
        if progress.phase == "waiting" and live.version is None:
            if record.is_pattern:  # a pattern takes what is live, wherever something is
                return AdapterProgress(phase="done")
            phase = ROLLBACK_TRANSITIONS["waiting", Observation.FAILED].phase
            return AdapterProgress(
                phase=phase,
                detail="nothing is live: there is no version to revoke; see `perennial adapters show`",
            )
        moved = {"version": live.version, "generation": live.generation}
        if progress.phase == "waiting":
            seen, after = Observation.READY, progress.model_copy(update=moved)
        else:
            replaced = live.version != progress.version and live.generation > (progress.generation or 0)
            if replaced and self.facts.is_revoked(adapter, progress.version or ""):
                return self._carried_out(record, adapter, progress.model_copy(update=moved))
            seen, after = Observation.OVERDUE if self._is_overdue(progress) else Observation.READY, progress
        transition = ROLLBACK_TRANSITIONS[progress.phase, seen]
        if Action.SEND_JOB not in transition.actions:
            return after
        request = record.request
        self.events.append(
            RollbackRequested(
                job_id=job_id_of(request.request_id, adapter), adapter=adapter, version=after.version,
                requested_by=request.requested_by, reason=request.reason, revoke=True,
            )
        )  # fmt: skip
        return after.model_copy(update={"phase": transition.phase, "sent_ms": self.now_ms})

    def _carried_out(self, record: RequestRecord, adapter: str, progress: AdapterProgress) -> AdapterProgress:
        """Return the progress of an adapter whose job was carried out: the replicas may still have to confirm it."""
        job = KINDS[record.request.kind].job
        table = FORGET_TRANSITIONS if job == "forget" else ROLLBACK_TRANSITIONS
        users = progress.dependants or {}
        if users:
            steps = DependantSteps(
                self.facts, record, adapter, progress.until_ms, self.now_ms, self.changes, self.events
            )
            users = steps.step(users)
            progress = progress.model_copy(update={"dependants": users})
        if observe_dependants(users, Observation.CONFIRMED) is Observation.DEPENDANTS_REMAIN:
            return progress.model_copy(update={"phase": table[progress.phase, Observation.DEPENDANTS_REMAIN].phase})
        report = ReplicaReport()
        if progress.generation is not None:
            report = self.facts.replicas(adapter, progress.generation)
        seen = observe_dependants(users, observe_replicas(record, report, self.now_ms))
        if seen is Observation.FAILED:
            progress = progress.model_copy(update={"detail": dependant_failures(users)})
        progress = progress.model_copy(update={"phase": table[progress.phase, seen].phase})
        return with_replicas(progress, report, seen)

    # ---- the state of a request as a whole

    def settle(self, record: RequestRecord) -> RequestRecord:
        """Return the record with the state that follows from its adapters' phases, and publish the state if it is new."""
        phases, request = record.phases, record.request
        summary = furthest_behind(phases)
        state = REQUEST_STATES[KINDS[request.kind].job or "forget", summary]
        detail = state.detail.format(
            waits=f"waits until {request.superseded_by} is learned" if request.superseded_by else "",
            failures=_failures(record), replicas=_listed(_behind(record)), progress=_share_done(record),
            dependants=_dependants_done(record), done=_done_text(record),
        )  # fmt: skip
        return self.set_state(
            record.model_copy(update={"exceptions": record.exceptions and state.state == "closed"}),
            state.state, detail[:MAX_DETAIL_CHARS], self.now_ms if state.ends else None,
        )  # fmt: skip

    def set_state(
        self, record: RequestRecord, state: RetentionState, detail: str, ended_ms: int | None = None
    ) -> RequestRecord:
        """Return the record with a state, and publish it; the same record where it has the state already."""
        if (record.state, record.detail) == (state, detail) and record.open == (ended_ms is None):
            return record
        record = record.model_copy(update={"state": state, "detail": detail, "ended_ms": ended_ms})
        self.publish_state(record)
        return record

    def publish_state(self, record: RequestRecord) -> None:
        """Publish the state of a request as it is in the record."""
        request = record.request
        versions = [p.version for p in record.adapters.values() if p.phase in {"published", "done"} and p.version]
        self.events.append(
            RetentionProgressed(
                request_id=request.request_id, adapter=request.adapter, kind=request.kind, state=record.state,
                examples=record.examples, version=versions[0] if len(versions) == 1 else None, detail=record.detail,
                acknowledged=record.acknowledged, missing=record.missing, exceptions=record.exceptions, at=self.at,
            )
        )  # fmt: skip


def with_progress(record: RequestRecord, adapters: dict[str, AdapterProgress]) -> RequestRecord:
    """Return the record with these adapters' part in its lists of replicas; a replica is missing if it is so anywhere.

    Args:
        record: The request.
        adapters: The adapters whose progress changed.
    """
    done = [p for p in adapters.values() if p.phase == "done"]
    ended = done or [p for p in adapters.values() if p.phase == "published"]
    if not (done or (ended and not record.is_pattern)):
        return record
    ended = [part for p in ended for part in p.parts() if part.phase in {"published", "done"}]
    missing = {*(record.missing if record.is_pattern else ()), *(name for p in ended for name in p.missing)}
    before = record.acknowledged if record.is_pattern else ()
    acknowledged = {*before, *(name for p in ended for name in p.acknowledged)} - missing
    return record.model_copy(
        update={
            "acknowledged": sorted(acknowledged)[:MAX_NAMED], "missing": sorted(missing)[:MAX_NAMED],
            "exceptions": record.exceptions or any(p.exceptions for p in ended),
        }
    )  # fmt: skip


def gathered_until_ms(record: RequestRecord, gather_ms: int) -> int:
    """Return until when a request waits for others, in milliseconds since 1970.

    Only kinds with a deadline wait, and not in an emergency: an expiry is carried out at its hour.
    """
    request = record.request
    if KINDS[request.kind].due_at != "deadline" or request.emergency:
        return 0
    due_ms = epoch_ms(request.due_at)
    end_ms = record.received_ms + gather_ms
    return end_ms if due_ms is None else min(end_ms, due_ms - DUE_MARGIN_MS)


def newest_learned(stored: Sequence[StoredExample], document_id: str) -> StoredExample | None:
    """Return the newest learned example of a document; None where none is learned."""
    wanted = unicodedata.normalize("NFC", document_id)
    found = [
        item for item in stored if item.learned and unicodedata.normalize("NFC", item.example.document_id) == wanted
    ]
    return max(found, key=lambda item: item.example.origin.timestamp_ms, default=None)


def _within_source(selector: Selector | None, source: str | None) -> Selector:
    """Return the selector for examples of one source only; a document without a source replaces only such documents."""
    selector = selector or Selector(sources=[source])
    if selector.sources is not None:
        named = {s and unicodedata.normalize("NFC", s) for s in selector.sources}
        if (source and unicodedata.normalize("NFC", source)) not in named:
            return selector.model_copy(update={"sources": []})
    return selector.model_copy(update={"sources": [source]})


def _done_text(record: RequestRecord) -> str:
    rules = KINDS[record.request.kind]
    nothing = rules.job == "forget" and not record.examples
    notes = (p.detail for p in _parts(record) if p.detail.startswith(OTHER_ENGINE))
    done = _NOTHING_MATCHED if nothing else "; ".join([rules.done, *islice(notes, 1)])
    if record.exceptions:
        return f"{done} with exceptions: not confirmed at its due time by {_listed(record.missing)}"
    if record.missing:
        return f"{done}; replicas that left or whose lease ended had not confirmed it: {_listed(record.missing)}"
    return done


def _failures(record: RequestRecord) -> str:
    own = [f"{name}: {p.detail}" for name, p in record.adapters.items() if p.phase == "failed"]
    return "; ".join([*own, *(page.failure for page in record.pages.values() if page.failure)][:_MAX_LISTED])


def _behind(record: RequestRecord) -> list[str]:
    names = {name for p in _parts(record) if p.phase == "published" for name in p.missing}
    return sorted(names.union(*(page.behind for page in record.pages.values())))


def _share_done(record: RequestRecord) -> str:
    """Return how far a request over many adapters is, in steps of ten percent so that few states are published."""
    phases = record.phases
    total = sum(phases.values())
    if not record.is_pattern or total < 10:
        return ""
    return (
        f"; {10 * (10 * (total - sum(phases.get(p, 0) for p in _NOT_CARRIED_OUT)) // total)} % of {total} adapters done"
    )


def _dependants_done(record: RequestRecord) -> str:
    """Return how many of the adapters that depend on the request's own are rebuilt, in about ten steps."""
    phases = [p.phase for own in record.adapters.values() for p in (own.dependants or {}).values()]
    if not phases:
        return ""
    step = -(-len(phases) // 10)
    rebuilt = sum(phase in {"published", "done"} for phase in phases) // step * step
    return f"; {rebuilt} of {len(phases)} adapters that depend on it are rebuilt"


def _parts(record: RequestRecord) -> Iterator[AdapterProgress]:
    return chain.from_iterable(progress.parts() for progress in record.adapters.values())


_NOT_CARRIED_OUT: Final = ("held", "waiting", "gathering", "sent")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
