"""What becomes of retention requests: what each turn over the book writes, sends and changes. Pure.

A turn takes the book and what the store says, and gives the book as it will be, changes to quarantines, and
events. The caller performs the changes, then sends the events, then saves the book: every change is idempotent
and every job has a name made from its request, so a turn that was cut off anywhere is simply taken again.

Holds win: a job is made only while no hold stands on any example that the store has and the job means. Time is
the guarded one of streams/clock.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import ClassVar, Final, Protocol

from perennial.storage.registry.quarantine import LegalHold, Quarantine, QuarantineEntry, RequestOutcome
from perennial.streams.events.cloudevents import WireError
from perennial.streams.events.models import (
    PERMANENT,
    Event,
    ForgetRequested,
    RetentionKind,
    RetentionProgressed,
    RetentionRequested,
    RetentionState,
    RollbackRequested,
)
from perennial.streams.retain.ledger import (
    AdapterProgress,
    Phase,
    RequestLedger,
    RequestRecord,
    StoredExample,
    covers,
    meanings_of_holds,
    ms_of,
    plain,
    same_holds,
)
from perennial.streams.retention.kinds import KINDS, refusal_of

KEEP_MS: Final = 30 * 86_400_000
"""How long an ended request stays: longer than an example of before can be under way, at a week per topic."""
KEEP_OWN: Final = 256
"""How many ended expiries of the calendar's own stay: a stream under a policy makes one after another, for ever."""
RESEND_MS: Final = 86_400_000
"""After so long without an end a job is sent again: it may have left its topic while no learner ran."""


@dataclass(frozen=True)
class AliasPosition:
    """What an alias points at; version None where nothing is live."""

    version: str | None
    generation: int


class Facts(Protocol):
    """What a turn asks of the store and of the acknowledgements."""

    def adapters(self) -> Iterable[str]:
        """Every adapter that has anything in the store."""
        ...

    def known(self, adapter: str) -> Sequence[StoredExample]:
        """The examples whose text the store has."""
        ...

    def done(self, adapter: str, request_id: str) -> RequestOutcome | None:
        """What the learner noted on the request's entry."""
        ...

    def live(self, adapter: str) -> AliasPosition:
        """Where the alias points."""
        ...

    def is_revoked(self, adapter: str, version: str) -> bool:
        """Whether the version was revoked."""
        ...

    def lagging(self, adapter: str, generation: int) -> Sequence[str]:
        """Replicas that may still serve a revoked version, as far as that generation replaces it."""
        ...


@dataclass(frozen=True)
class Change:
    """What to make of an adapter's quarantine: exactly these holds, one more entry, more suppressed, some entries less."""

    adapter: str
    holds: tuple[LegalHold, ...]
    entry: QuarantineEntry | None = None
    suppress: frozenset[str] = frozenset()
    drop: tuple[str, ...] = ()

    def apply(self, quarantine: Quarantine) -> Quarantine:
        """The quarantine with the change; the same again where it has it already."""
        quarantine = quarantine.with_holds(self.holds)
        if self.entry is not None:
            quarantine = quarantine.with_entry(self.entry)
        return quarantine.suppressing(self.suppress).without(self.drop)


def job_id_of(request_id: str, adapter: str) -> str:
    """The name of the job that a request makes for an adapter: always the same."""
    return "sha256:" + sha256(f"{request_id}\n{adapter}".encode()).hexdigest()


@dataclass
class RequestProcessor:
    """One turn over the book. now_ms: guarded. at: the time that statuses carry."""

    book: RequestLedger
    now_ms: int
    at: datetime
    changes: list[Change] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    # ---- taking requests

    def receive(self, request: RetentionRequested, received_ms: int) -> None:
        """Take a request; one that was taken before only has its state said again. Raises WireError."""
        before = self.book.records.get(request.request_id)
        if before is not None:
            if before.request != request:
                raise WireError("bad-field", "request_id", got=request.request_id, allowed="an id not used before")
            self._say(before)
            return
        rules = KINDS[request.kind]
        record = RequestRecord(request=request, received_ms=received_ms, until_ms=received_ms)
        if rules.due_at == "start" and request.due_at is not None:
            record = record.model_copy(update={"until_ms": max(received_ms, ms_of(request.due_at) or 0)})
        self.add(record)
        refusal = refusal_of(request, received_ms)
        if refusal:
            self._end(record, "failed", refusal)
        elif rules.job is None:
            self._WITHOUT_JOB[request.kind](self, record)

    def add(self, record: RequestRecord) -> None:
        """Take a request into the book: it is accepted."""
        self._put(record)
        self._say(record)

    def _policy(self, record: RequestRecord) -> None:
        request = record.request
        for other in self.book.standing("policy"):
            if (other.request.adapter, other.request.selector) == (request.adapter, request.selector):
                self._end(other, "closed", f"replaced by {request.request_id}")
        if request.time_to_live == PERMANENT:
            self._end(record, "closed", "what it names no longer ends by policy")
        else:
            self._move(record, "executed", "in force until it is replaced")

    def _hold(self, record: RequestRecord) -> None:
        self._move(record, "executed", "in force until it is released")

    def _release(self, record: RequestRecord) -> None:
        request, holds = record.request, self.book.standing("hold")
        released = [hold for hold in holds if same_holds(hold.request, request)]
        if not released:
            listed = ", ".join(hold.request.request_id for hold in holds[:10]) or "none"
            self._end(
                record, "failed",
                "no hold stands for this adapter and selector; "
                f"release takes both as the hold gave them; holds: {listed}",
            )  # fmt: skip
            return
        for hold in released:
            self._lift(hold, f"released by {request.request_id}")
        self._end(record, "closed", f"released {len(released)} holds")

    _WITHOUT_JOB: ClassVar[dict[RetentionKind, Callable[[RequestProcessor, RequestRecord], None]]] = {
        "policy": _policy, "hold": _hold, "release": _release,
    }  # fmt: skip
    """What carries out the kinds that lead to no job."""

    def _lift(self, hold: RequestRecord, detail: str) -> None:
        hold = self._end(hold, "closed", detail)
        self.changes += [self._change(adapter) for adapter in hold.adapters]

    # ---- going on

    def advance(self, facts: Facts, only: Collection[str] | None = None) -> None:
        """Do whatever can be done now for every open request, holds first. only: for these request ids alone."""
        for hold in self.book.standing("hold"):
            if only is not None and hold.request.request_id not in only:
                continue
            end_ms = ms_of(hold.request.due_at)
            if end_ms is not None and end_ms <= self.now_ms:
                self._lift(hold, "its time ended")
            else:
                self._spread(hold, facts)
        for name, record in list(self.book.records.items()):
            if only is not None and name not in only:
                continue
            late = record.is_pattern and record.state == "closed"  # an adapter of the pattern may be new
            job = KINDS[record.request.kind].job
            if job == "forget" and (record.open or late):
                self._forget(record, facts)
            elif job == "rollback" and record.open:
                self._revoke(record, facts)
        self._prune()

    def _spread(self, hold: RequestRecord, facts: Facts) -> None:
        new = [adapter for adapter in _targets(hold, facts) if adapter not in hold.adapters]
        if new:
            self.changes += [self._change(adapter) for adapter in new]
            self._put(
                hold.model_copy(update={"adapters": hold.adapters | dict.fromkeys(new, AdapterProgress(phase="done"))})
            )

    def _forget(self, record: RequestRecord, facts: Facts) -> None:
        starts_later = KINDS[record.request.kind].due_at == "start"
        due_ms = ms_of(record.request.due_at) if starts_later else None
        if due_ms is not None and self.now_ms < due_ms:
            return
        targets = _targets(record, facts)
        if not record.open and all(adapter in record.adapters for adapter in targets):
            return
        adapters = dict(record.adapters)
        for adapter in targets:
            found = adapters.get(adapter, AdapterProgress(phase="waiting"))
            if found.phase in {"waiting", "held", "sent"}:
                adapters[adapter] = self._forget_in(adapter, record, found, facts)
        self._settle(record, adapters, facts)

    def _forget_in(self, adapter: str, record: RequestRecord, found: AdapterProgress, facts: Facts) -> AdapterProgress:
        request = record.request
        done = facts.done(adapter, request.request_id) if found.phase != "waiting" else None
        if done is not None:
            return AdapterProgress(
                phase="failed" if done.failure else "done", until_ms=found.until_ms, examples=done.examples,
                version=done.version, generation=done.generation, detail=done.failure,
            )  # fmt: skip
        known = facts.known(adapter)
        until_ms = found.until_ms or _until_ms(record, known)
        if until_ms is None:
            return found
        job = _job(record, adapter, until_ms)
        meant = [item for item in known if job.matches(item.example)]
        holds = meanings_of_holds(self.book, adapter)
        held = any(means(item.example) for item in meant for means in holds)
        phase: Phase = "held" if held else "sent"
        sent_ms = found.sent_ms
        if not held and (found.phase != "sent" or sent_ms + RESEND_MS <= self.now_ms):
            self.events.append(job)
            sent_ms = self.now_ms
        if phase != found.phase:
            entry = QuarantineEntry(
                request_id=request.request_id, job_id=job.job_id, kind=request.kind, selector=plain(job.selector),
                example_ids=record.example_ids, until_ms=until_ms, suppress=job.suppress,
            )  # fmt: skip
            hashes = {item.text_hash for item in meant if item.text_hash} if job.suppress and not held else set()
            self.changes.append(self._change(adapter, entry, frozenset(hashes)))
        return AdapterProgress(phase=phase, until_ms=until_ms, sent_ms=sent_ms, examples=len(meant))

    def _revoke(self, record: RequestRecord, facts: Facts) -> None:
        adapters = dict(record.adapters)
        for adapter in _targets(record, facts):
            found, live = adapters.get(adapter), facts.live(adapter)
            if found is None and live.version is None:
                nothing = "nothing is live: there is no version to revoke; see `perennial adapters show`"
                if not record.is_pattern:
                    adapters[adapter] = AdapterProgress(phase="failed", detail=nothing)
            elif found is None:
                adapters[adapter] = self._send_revocation(
                    record, adapter, AdapterProgress(phase="sent", version=live.version, generation=live.generation)
                )
            elif (
                found.phase == "sent"
                and facts.is_revoked(adapter, found.version or "")
                and live.version != found.version
                and live.generation > (found.generation or 0)
            ):
                adapters[adapter] = AdapterProgress(phase="done", version=live.version, generation=live.generation)
            elif found.phase == "sent" and found.sent_ms + RESEND_MS <= self.now_ms:
                adapters[adapter] = self._send_revocation(record, adapter, found)
        self._settle(record, adapters, facts)

    def _send_revocation(self, record: RequestRecord, adapter: str, progress: AdapterProgress) -> AdapterProgress:
        request = record.request
        self.events.append(
            RollbackRequested(
                job_id=job_id_of(request.request_id, adapter), adapter=adapter, version=progress.version,
                requested_by=request.requested_by, reason=request.reason, revoke=True,
            )
        )  # fmt: skip
        return progress.model_copy(update={"sent_ms": self.now_ms})

    def _settle(self, record: RequestRecord, adapters: dict[str, AdapterProgress], facts: Facts) -> None:
        """Put the adapters' progress together: the request is as far as the adapter that is furthest behind."""
        if adapters != record.adapters or not record.open:
            record = self._put(record.model_copy(update={"adapters": adapters, "ended_ms": None}))
        phases = {progress.phase for progress in adapters.values()}
        if "held" in phases:
            self._move(record, "held", "a hold stands on what it means")
        elif "waiting" in phases:
            self._move(record, "accepted", f"waits until {record.request.superseded_by} is learned")
        elif "sent" in phases and KINDS[record.request.kind].job == "rollback":
            self._move(record, "accepted", "the learner has the job")
        elif "sent" in phases:
            self._move(record, "quarantined", "no update learns it; the learner has the job")
        elif "failed" in phases:
            said = [f"{name}: {p.detail}" for name, p in adapters.items() if p.phase == "failed"]
            self._end(record, "failed", "; ".join(said)[:2000])
        elif not adapters:
            self._end(record, "closed", "no adapter of that pattern has anything in the store")
        else:
            self._close(record, adapters, facts)

    def _close(self, record: RequestRecord, adapters: Mapping[str, AdapterProgress], facts: Facts) -> None:
        behind = [
            replica
            for name, progress in adapters.items()
            if progress.generation is not None
            for replica in facts.lagging(name, progress.generation)
        ]
        if not behind:
            self._end(record, "closed", KINDS[record.request.kind].done)
            if record.example_ids:  # nothing that was learned comes back under its old mark
                self.changes += [self._change(name, drop=(record.request.request_id,)) for name in adapters]
        else:
            said = ", ".join(behind[:5]) + (f" and {len(behind) - 5} more" if len(behind) > 5 else "")
            self._move(record, "published", f"waits for replicas to drop what knew it: {said}")

    def _prune(self) -> None:
        """Let go of what ended long ago; a forgetting that failed stays for a person to see to."""
        gone = [
            record
            for record in self.book.records.values()
            if record.ended_ms is not None
            and record.ended_ms + KEEP_MS <= self.now_ms
            and not (record.state == "failed" and record.adapters)
        ]
        for record in gone:
            if KINDS[record.request.kind].job == "forget":
                drop = (record.request.request_id,)
                self.changes += [self._change(adapter, drop=drop) for adapter in record.adapters]
        # Their entries went when they were closed, and an example that comes due again is a new request.
        own = [r for r in self.book.records.values() if r.example_ids and r.state == "closed"]
        gone += sorted(own, key=lambda record: record.ended_ms or 0)[:-KEEP_OWN]
        if gone:
            ids = {record.request.request_id for record in gone}
            kept = {name: record for name, record in self.book.records.items() if name not in ids}
            self.book = self.book.model_copy(update={"records": kept})

    # ---- parts

    def _change(
        self, adapter: str, entry: QuarantineEntry | None = None, suppress: frozenset[str] = frozenset(), *,
        drop: tuple[str, ...] = (),
    ) -> Change:  # fmt: skip
        return Change(adapter, tuple(self.book.holds_on(adapter)), entry, suppress, drop)

    def _put(self, record: RequestRecord) -> RequestRecord:
        records = self.book.records | {record.request.request_id: record}
        self.book = self.book.model_copy(update={"records": records})
        return record

    def _move(
        self, record: RequestRecord, state: RetentionState, detail: str, ended_ms: int | None = None
    ) -> RequestRecord:
        if (record.state, record.detail, record.ended_ms) == (state, detail, ended_ms):
            return record
        record = self._put(record.model_copy(update={"state": state, "detail": detail, "ended_ms": ended_ms}))
        self._say(record)
        return record

    def _end(self, record: RequestRecord, state: RetentionState, detail: str) -> RequestRecord:
        return self._move(record, state, detail, self.now_ms)

    def _say(self, record: RequestRecord) -> None:
        request = record.request
        versions = [p.version for p in record.adapters.values() if p.phase == "done" and p.version]
        self.events.append(
            RetentionProgressed(
                request_id=request.request_id, adapter=request.adapter, kind=request.kind, state=record.state,
                examples=record.examples, version=versions[0] if len(versions) == 1 else None,
                detail=record.detail, at=self.at,
            )
        )  # fmt: skip


def _targets(record: RequestRecord, facts: Facts) -> list[str]:
    """The adapters of a request: the one it names, or those of its pattern that the store knows."""
    if not record.is_pattern:
        return [record.request.adapter]
    found = (adapter for adapter in facts.adapters() if covers(record.request.adapter, adapter))
    return sorted({*record.adapters, *found})


def _until_ms(record: RequestRecord, known: Sequence[StoredExample]) -> int | None:
    """Up to when what it means was published; None while the document that supersedes is not learned."""
    new_id = record.request.superseded_by
    if new_id is None:
        return record.until_ms
    new = [item.example.origin.timestamp_ms for item in known if item.learned and item.example.document_id == new_id]
    return min(record.until_ms, max(new) - 1) if new else None


def _job(record: RequestRecord, adapter: str, until_ms: int) -> ForgetRequested:
    request = record.request
    return ForgetRequested(
        job_id=job_id_of(request.request_id, adapter), request_id=request.request_id, kind=request.kind,
        adapter=adapter, selector=request.selector, example_ids=record.example_ids, until_ms=until_ms,
        suppress=KINDS[request.kind].suppresses_text, reason=request.reason,
    )  # fmt: skip
