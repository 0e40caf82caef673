"""The state machine of retention requests: what one step writes, sends and changes. Pure.

A step takes the ledger and facts from the store. It leaves its results in a `RequestProcessor`: the new ledger, changes
of quarantines, and events. The caller applies the changes, then sends the events, then saves the ledger. Every change
is idempotent and the id of every job follows from its request and adapter, so a step that was interrupted anywhere is
simply repeated.

Holds win: a job is sent only while no hold is on any stored example that the job would forget. `now_ms` is the time of
the guarded clock (streams/retain/clock.py). The tables of phases and states are in streams/retain/transitions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import ClassVar, Final, Protocol

from perennial.storage.registry.quarantine import LegalHold, Quarantine, QuarantineEntry, RequestOutcome
from perennial.streams.events.fields import PERMANENT, Event
from perennial.streams.events.models import (
    ForgetRequested,
    RetentionKind,
    RetentionProgressed,
    RetentionRequested,
    RetentionState,
    RollbackRequested,
)
from perennial.streams.events.wire_error import WireError
from perennial.streams.retain.ledger import (
    AdapterProgress,
    RequestLedger,
    RequestRecord,
    StoredExample,
    covers,
    epoch_ms,
    hold_matchers,
    same_holds,
    selector_json,
)
from perennial.streams.retain.transitions import (
    FORGET_TRANSITIONS,
    REQUEST_STATES,
    ROLLBACK_TRANSITIONS,
    Action,
    Observation,
    Summary,
    furthest_behind,
)
from perennial.streams.retention.kinds import KINDS, Job, refusal_of

KEEP_MS: Final = 30 * 86_400_000
"""Time for which an ended request is kept: longer than an example published before it can wait, at a week per topic."""
KEEP_OWN: Final = 256
"""Number of closed expiries of the calendar that are kept. On an endless stream a policy makes one after another."""
RESEND_MS: Final = 86_400_000
"""A job without an outcome is sent again after this time: Kafka may have deleted it while no learner ran."""
_MAX_DETAIL_CHARS: Final = 2000
_MAX_LISTED: Final = 5


@dataclass(frozen=True)
class AliasPosition:
    """The version that an alias points at.

    Attributes:
        version: The live version; None where nothing is live.
        generation: The alias's count of changes.
    """

    version: str | None
    generation: int


class Facts(Protocol):
    """The facts that a step needs from the store and from the acknowledgements of replicas."""

    def adapters(self) -> Iterable[str]:
        """Return every adapter that has anything in the store."""
        ...

    def examples(self, adapter: str) -> Sequence[StoredExample]:
        """Return the adapter's examples whose text the store has."""
        ...

    def outcome(self, adapter: str, request_id: str) -> RequestOutcome | None:
        """Return what the learner recorded on the request's quarantine entry; None while it is not done."""
        ...

    def live(self, adapter: str) -> AliasPosition:
        """Return where the adapter's alias points."""
        ...

    def is_revoked(self, adapter: str, version: str) -> bool:
        """Return whether the version was revoked."""
        ...

    def lagging(self, adapter: str, generation: int) -> Sequence[str]:
        """Return the replicas that may still serve a revoked version that this generation replaces."""
        ...


@dataclass(frozen=True)
class QuarantineChange:
    """A change of one adapter's quarantine.

    Attributes:
        adapter: The adapter.
        holds: Exactly the holds that are on the adapter from now on.
        entry: An entry to add.
        suppress: Hashes of texts to suppress.
        drop: Ids of requests whose entries go.
    """

    adapter: str
    holds: tuple[LegalHold, ...]
    entry: QuarantineEntry | None = None
    suppress: frozenset[str] = frozenset()
    drop: tuple[str, ...] = ()

    def apply(self, quarantine: Quarantine) -> Quarantine:
        """Return the quarantine with the change; an equal one where it has the change already."""
        quarantine = quarantine.with_holds(self.holds)
        if self.entry is not None:
            quarantine = quarantine.with_entry(self.entry)
        return quarantine.suppressing(self.suppress).without(self.drop)


def job_id_of(request_id: str, adapter: str) -> str:
    """Return the id of the job that a request makes for an adapter; always the same for the same two."""
    return "sha256:" + sha256(f"{request_id}\n{adapter}".encode()).hexdigest()


@dataclass
class RequestProcessor:
    """One step over the ledger; collects its effects for the caller to perform.

    Attributes:
        ledger: The ledger, replaced as the step goes on.
        now_ms: The guarded time, in milliseconds since 1970.
        at: The time that published states carry.
        changes: Changes of quarantines to apply first.
        events: Events to send after the changes.
    """

    ledger: RequestLedger
    now_ms: int
    at: datetime
    changes: list[QuarantineChange] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    # ---- accepting requests

    def receive(self, request: RetentionRequested, received_ms: int) -> None:
        """Accept or refuse a request; for a redelivered one only publish its state again.

        Args:
            request: The request as it came from the topic.
            received_ms: When the broker took it, in milliseconds since 1970.

        Raises:
            WireError: Another request had the same id.
        """
        before = self.ledger.records.get(request.request_id)
        if before is not None:
            if before.request != request:
                raise WireError("bad-field", "request_id", got=request.request_id, allowed="an id not used before")
            self._publish_state(before)
            return
        rules = KINDS[request.kind]
        until_ms = received_ms
        if rules.due_at == "start" and request.due_at is not None:
            until_ms = max(received_ms, epoch_ms(request.due_at) or 0)
        record = RequestRecord(request=request, received_ms=received_ms, until_ms=until_ms)
        self.add(record)
        refusal = refusal_of(request, received_ms)
        if refusal:
            self._end(record, "failed", refusal)
        elif rules.job is None:
            self._WITHOUT_JOB[request.kind](self, record)

    def add(self, record: RequestRecord) -> None:
        """Add an accepted request to the ledger and publish its state."""
        self._replace(record)
        self._publish_state(record)

    def _policy(self, record: RequestRecord) -> None:
        request = record.request
        for other in self.ledger.in_force("policy"):
            if (other.request.adapter, other.request.selector) == (request.adapter, request.selector):
                self._end(other, "closed", f"replaced by {request.request_id}")
        if request.time_to_live == PERMANENT:
            self._end(record, "closed", "the policy with this adapter and selector is ended")
        else:
            self._set_state(record, "executed", "in force until another policy replaces it")

    def _hold(self, record: RequestRecord) -> None:
        self._set_state(record, "executed", "in force until it is released")

    def _release(self, record: RequestRecord) -> None:
        request, holds = record.request, self.ledger.in_force("hold")
        released = [hold for hold in holds if same_holds(hold.request, request)]
        if not released:
            listed = ", ".join(hold.request.request_id for hold in holds[:10]) or "none"
            self._end(
                record, "failed",
                "no hold in force has this adapter and selector; a release must name both as the hold named them; "
                f"holds in force: {listed}",
            )  # fmt: skip
            return
        for hold in released:
            self._end_hold(hold, f"released by {request.request_id}")
        self._end(record, "closed", f"released {len(released)} hold{'' if len(released) == 1 else 's'}")

    _WITHOUT_JOB: ClassVar[dict[RetentionKind, Callable[[RequestProcessor, RequestRecord], None]]] = {
        "policy": _policy, "hold": _hold, "release": _release,
    }  # fmt: skip
    """The functions that carry out the kinds whose `job` is None."""

    def _end_hold(self, hold: RequestRecord, detail: str) -> None:
        hold = self._end(hold, "closed", detail)
        self.changes += [self._change(adapter) for adapter in hold.adapters]

    # ---- going on with open requests

    def advance(self, facts: Facts, only: Collection[str] | None = None) -> None:
        """Do whatever can be done now for every open request, holds first.

        Args:
            facts: The state of the store and of the replicas.
            only: Ids of the requests to go on with; None: all.
        """
        for hold in self.ledger.in_force("hold"):
            if only is not None and hold.request.request_id not in only:
                continue
            end_ms = epoch_ms(hold.request.due_at)
            if end_ms is not None and end_ms <= self.now_ms:
                self._end_hold(hold, "its due_at is reached")
            else:
                self._add_new_adapters_to_hold(hold, facts)
        for request_id, record in list(self.ledger.records.items()):
            if only is not None and request_id not in only:
                continue
            job = KINDS[record.request.kind].job
            reopens = record.is_pattern and record.state == "closed"  # an adapter that fits the pattern may be new
            if job == "forget" and (record.open or reopens):
                self._advance_forget(record, facts)
            elif job == "rollback" and record.open:
                self._advance_rollback(record, facts)
        self._prune()

    def _add_new_adapters_to_hold(self, hold: RequestRecord, facts: Facts) -> None:
        new = [adapter for adapter in _adapters_of(hold, facts) if adapter not in hold.adapters]
        if new:
            self.changes += [self._change(adapter) for adapter in new]
            progress = dict.fromkeys(new, AdapterProgress(phase="done"))
            self._replace(hold.model_copy(update={"adapters": hold.adapters | progress}))

    def _advance_forget(self, record: RequestRecord, facts: Facts) -> None:
        if KINDS[record.request.kind].due_at == "start" and self.now_ms < (epoch_ms(record.request.due_at) or 0):
            return
        targets = _adapters_of(record, facts)
        if not record.open and all(adapter in record.adapters for adapter in targets):
            return
        adapters = dict(record.adapters)
        for adapter in targets:
            progress = adapters.get(adapter, AdapterProgress(phase="waiting"))
            if progress.phase in {"waiting", "held", "sent"}:
                adapters[adapter] = self._forget_step(adapter, record, progress, facts)
        self._update_state("forget", record, adapters, facts)

    def _forget_step(
        self, adapter: str, record: RequestRecord, progress: AdapterProgress, facts: Facts
    ) -> AdapterProgress:
        """Take one step of FORGET_TRANSITIONS and return the adapter's progress after it."""
        outcome = facts.outcome(adapter, record.request.request_id) if progress.phase != "waiting" else None
        if outcome is not None:
            seen = Observation.FAILED if outcome.failure else Observation.DONE
            return AdapterProgress(
                phase=FORGET_TRANSITIONS[progress.phase, seen].phase, until_ms=progress.until_ms,
                examples=outcome.examples, version=outcome.version, generation=outcome.generation,
                detail=outcome.failure,
            )  # fmt: skip
        stored = facts.examples(adapter)
        until_ms = _until_ms(record, stored) if progress.phase == "waiting" else progress.until_ms
        if until_ms is None:
            return progress.model_copy(
                update={"phase": FORGET_TRANSITIONS[progress.phase, Observation.NOT_READY].phase}
            )
        job = _forget_job(record, adapter, until_ms)
        selected = [item for item in stored if job.matches(item.example)]
        transition = FORGET_TRANSITIONS[progress.phase, self._observe_job(adapter, selected, progress)]
        if Action.SEND_JOB in transition.actions:
            self.events.append(job)
        if Action.QUARANTINE in transition.actions:
            suppress = job.suppress and Action.SUPPRESS in transition.actions
            hashes = {item.text_hash for item in selected if item.text_hash} if suppress else set()
            self.changes.append(self._change(adapter, _entry_of(job), frozenset(hashes)))
        sent_ms = self.now_ms if Action.SEND_JOB in transition.actions else progress.sent_ms
        return AdapterProgress(phase=transition.phase, until_ms=until_ms, sent_ms=sent_ms, examples=len(selected))

    def _observe_job(self, adapter: str, selected: Sequence[StoredExample], progress: AdapterProgress) -> Observation:
        holds = hold_matchers(self.ledger, adapter)
        if any(matches(item.example) for item in selected for matches in holds):
            return Observation.HELD
        if progress.phase == "sent" and progress.sent_ms + RESEND_MS <= self.now_ms:
            return Observation.OVERDUE
        return Observation.READY

    def _advance_rollback(self, record: RequestRecord, facts: Facts) -> None:
        adapters = dict(record.adapters)
        for adapter in _adapters_of(record, facts):
            progress = adapters.get(adapter)
            if progress is None and record.is_pattern and facts.live(adapter).version is None:
                continue  # a pattern takes what is live, wherever something is
            if progress is None or progress.phase == "sent":
                adapters[adapter] = self._rollback_step(
                    adapter, record, progress or AdapterProgress(phase="waiting"), facts
                )
        self._update_state("rollback", record, adapters, facts)

    def _rollback_step(
        self, adapter: str, record: RequestRecord, progress: AdapterProgress, facts: Facts
    ) -> AdapterProgress:
        """Take one step of ROLLBACK_TRANSITIONS and return the adapter's progress after it."""
        live = facts.live(adapter)
        seen = self._observe_rollback(adapter, progress, live, facts)
        transition = ROLLBACK_TRANSITIONS[progress.phase, seen]
        changed: dict[str, object] = {"phase": transition.phase}
        if seen is Observation.FAILED:
            changed["detail"] = "nothing is live: there is no version to revoke; see `perennial adapters show`"
        elif progress.phase == "waiting" or seen is Observation.DONE:
            changed |= {"version": live.version, "generation": live.generation}
        after = progress.model_copy(update=changed)
        if Action.SEND_JOB not in transition.actions:
            return after
        request = record.request
        self.events.append(
            RollbackRequested(
                job_id=job_id_of(request.request_id, adapter), adapter=adapter, version=after.version,
                requested_by=request.requested_by, reason=request.reason, revoke=True,
            )
        )  # fmt: skip
        return after.model_copy(update={"sent_ms": self.now_ms})

    def _observe_rollback(
        self, adapter: str, progress: AdapterProgress, live: AliasPosition, facts: Facts
    ) -> Observation:
        if progress.phase == "waiting":
            return Observation.FAILED if live.version is None else Observation.READY
        replaced = live.version != progress.version and live.generation > (progress.generation or 0)
        if replaced and facts.is_revoked(adapter, progress.version or ""):
            return Observation.DONE
        return Observation.OVERDUE if progress.sent_ms + RESEND_MS <= self.now_ms else Observation.READY

    # ---- the state of the request as a whole

    def _update_state(
        self, job: Job, record: RequestRecord, adapters: dict[str, AdapterProgress], facts: Facts
    ) -> None:
        """Store the adapters' progress and publish the state that follows from REQUEST_STATES."""
        if adapters != record.adapters or not record.open:
            record = self._replace(record.model_copy(update={"adapters": adapters, "ended_ms": None}))
        summary: Summary = furthest_behind(progress.phase for progress in adapters.values())
        replicas = _lagging_replicas(adapters, facts) if summary == "done" else []
        if replicas:
            summary = "replicas lag"
        step = REQUEST_STATES[job, summary]
        detail = step.detail.format(
            superseded_by=record.request.superseded_by, failures=_failures(adapters), replicas=_listed(replicas),
            done=KINDS[record.request.kind].done,
        )  # fmt: skip
        self._set_state(record, step.state, detail[:_MAX_DETAIL_CHARS], self.now_ms if step.ends else None)
        if summary == "done" and record.example_ids:
            # The examples are at or below the high-water marks, so they cannot be learned again and the entries can go.
            self.changes += [self._change(adapter, drop=(record.request.request_id,)) for adapter in adapters]

    def _prune(self) -> None:
        """Remove requests that ended long ago; a forgetting that failed stays for a person to see to."""
        old = [
            record
            for record in self.ledger.records.values()
            if record.ended_ms is not None
            and record.ended_ms + KEEP_MS <= self.now_ms
            and not (record.state == "failed" and record.adapters)
        ]
        for record in old:
            if KINDS[record.request.kind].job == "forget":
                drop = (record.request.request_id,)
                self.changes += [self._change(adapter, drop=drop) for adapter in record.adapters]
        # The entries of these went when they were closed, and an example that comes due again is a new request.
        own = [r for r in self.ledger.records.values() if r.example_ids and r.state == "closed"]
        old += sorted(own, key=lambda record: record.ended_ms or 0)[:-KEEP_OWN]
        if old:
            ids = {record.request.request_id for record in old}
            kept = {request_id: record for request_id, record in self.ledger.records.items() if request_id not in ids}
            self.ledger = self.ledger.model_copy(update={"records": kept})

    # ---- helpers

    def _change(
        self, adapter: str, entry: QuarantineEntry | None = None, suppress: frozenset[str] = frozenset(), *,
        drop: tuple[str, ...] = (),
    ) -> QuarantineChange:  # fmt: skip
        return QuarantineChange(adapter, tuple(self.ledger.holds_on(adapter)), entry, suppress, drop)

    def _replace(self, record: RequestRecord) -> RequestRecord:
        records = self.ledger.records | {record.request.request_id: record}
        self.ledger = self.ledger.model_copy(update={"records": records})
        return record

    def _set_state(
        self, record: RequestRecord, state: RetentionState, detail: str, ended_ms: int | None = None
    ) -> RequestRecord:
        """Store a new state and publish it; do nothing where the request has it already."""
        if (record.state, record.detail, record.ended_ms) == (state, detail, ended_ms):
            return record
        record = self._replace(record.model_copy(update={"state": state, "detail": detail, "ended_ms": ended_ms}))
        self._publish_state(record)
        return record

    def _end(self, record: RequestRecord, state: RetentionState, detail: str) -> RequestRecord:
        return self._set_state(record, state, detail, self.now_ms)

    def _publish_state(self, record: RequestRecord) -> None:
        request = record.request
        versions = [p.version for p in record.adapters.values() if p.phase == "done" and p.version]
        self.events.append(
            RetentionProgressed(
                request_id=request.request_id, adapter=request.adapter, kind=request.kind, state=record.state,
                examples=record.examples, version=versions[0] if len(versions) == 1 else None,
                detail=record.detail, at=self.at,
            )
        )  # fmt: skip


def _adapters_of(record: RequestRecord, facts: Facts) -> list[str]:
    """Return the adapter that the request names, or the adapters in the store that fit its pattern."""
    if not record.is_pattern:
        return [record.request.adapter]
    fitting = (adapter for adapter in facts.adapters() if covers(record.request.adapter, adapter))
    return sorted({*record.adapters, *fitting})


def _until_ms(record: RequestRecord, stored: Sequence[StoredExample]) -> int | None:
    """Return up to which publication time examples are selected; None while a superseding document is not learned."""
    new_id = record.request.superseded_by
    if new_id is None:
        return record.until_ms
    new = [item.example.origin.timestamp_ms for item in stored if item.learned and item.example.document_id == new_id]
    return min(record.until_ms, max(new) - 1) if new else None


def _forget_job(record: RequestRecord, adapter: str, until_ms: int) -> ForgetRequested:
    request = record.request
    return ForgetRequested(
        job_id=job_id_of(request.request_id, adapter), request_id=request.request_id, kind=request.kind,
        adapter=adapter, selector=request.selector, example_ids=record.example_ids, until_ms=until_ms,
        suppress=KINDS[request.kind].suppresses_text, emergency=request.emergency, reason=request.reason,
    )  # fmt: skip


def _entry_of(job: ForgetRequested) -> QuarantineEntry:
    return QuarantineEntry(
        request_id=job.request_id, job_id=job.job_id, kind=job.kind, selector=selector_json(job.selector),
        example_ids=job.example_ids, until_ms=job.until_ms, suppress=job.suppress,
    )  # fmt: skip


def _lagging_replicas(adapters: Mapping[str, AdapterProgress], facts: Facts) -> list[str]:
    return [
        replica
        for adapter, progress in adapters.items()
        if progress.generation is not None
        for replica in facts.lagging(adapter, progress.generation)
    ]


def _failures(adapters: Mapping[str, AdapterProgress]) -> str:
    return "; ".join(f"{name}: {p.detail}" for name, p in adapters.items() if p.phase == "failed")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
