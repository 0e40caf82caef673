"""Steps of a request at the adapters that began with a learned start that its adapter is part of. Pure.

When an adapter forgets, its versions that knew the examples are revoked. Whoever began with a start that contains one of
them is rebuilt without the start: by a job that names no example, with a quarantine entry under an id of its own. Every
job to forget makes the learner look whether the adapter's start contains a revoked version, and if so rebuild it.

Hazard: they may be looked up only when the outcome of the adapter's own job is known. An adapter is recorded before it
looks up the versions that its start is made of. So whoever is not in the list looks up versions that know nothing of the
examples; before the outcome, it could still find the old ones.

Holds do not stop these jobs: they forget no example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from perennial.storage.registry.quarantine import QuarantineEntry, RequestOutcome
from perennial.streams.events.fields import Event
from perennial.streams.events.models import ForgetRequested
from perennial.streams.retain.ledger import AdapterProgress, RequestRecord
from perennial.streams.retain.rules.confirmations import observe_replicas, with_replicas
from perennial.streams.retain.rules.jobs import RESEND_MS, QuarantineChange, entry_of, job_id_of
from perennial.streams.retain.rules.replica_report import ReplicaReport
from perennial.streams.retain.rules.step_facts import Facts
from perennial.streams.retain.rules.transitions import FORGET_TRANSITIONS, Action, Observation
from perennial.streams.retention.kinds import START_PREFIX

WINDOW: Final = 64
"""The most start users that one step of their founder looks at."""
_ENDED: Final = frozenset({"done", "failed"})


def start_request_id(request_id: str, founder: str) -> str:
    """Return the id under which a request reaches those who began with a start that contains the founder.

    It is another one than the request's: a pattern may cover a founder and who began with its start, so that one
    quarantine has an entry of each.
    """
    return START_PREFIX + sha256(f"{request_id}\n{founder}".encode()).hexdigest()[:32]


def start_job(record: RequestRecord, founder: str, user: str, until_ms: int) -> ForgetRequested:
    """Return the job that makes the learner rebuild an adapter without its start, if that start contains a revoked version.

    Args:
        record: The request.
        founder: The adapter that forgets.
        user: The adapter that may have begun with a start that contains a version of the founder.
        until_ms: What the founder's own job has, in milliseconds since 1970; this job matches no example.
    """
    request, own_id = record.request, start_request_id(record.request.request_id, founder)
    return ForgetRequested(
        job_id=job_id_of(own_id, user), request_id=own_id, kind=request.kind, adapter=user, until_ms=until_ms,
        suppress=False, emergency=request.emergency, reason=f"its start contains what {founder} forgets",
    )  # fmt: skip


def observe_start_users(users: Mapping[str, AdapterProgress], own: Observation) -> Observation:
    """Return what is observed about a founder whose own job was carried out.

    Args:
        users: Progress of those who began with its start, by adapter.
        own: What is observed about the founder's own replicas.
    """
    phases = {progress.phase for progress in users.values()}
    if phases - {"published", *_ENDED}:
        return Observation.STARTS_REMAIN
    if "published" in phases or own is Observation.DONE:
        return Observation.DONE
    return Observation.FAILED if "failed" in phases else own


def start_failures(users: Mapping[str, AdapterProgress]) -> str:
    """Return why adapters could not be rebuilt without their start: the first one, and how many others there are."""
    failed = [(name, progress.detail) for name, progress in sorted(users.items()) if progress.phase == "failed"]
    if not failed:
        return ""
    name, why = failed[0]
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"{name}, which began with what it taught{more}: {why}"


@dataclass
class StartUserSteps:
    """Takes steps of one request at the start users of one founder, and adds their effects to those of its own step.

    Attributes:
        facts: The state of the store and of the replicas.
        record: The request.
        founder: The adapter that forgets.
        until_ms: What the founder's own job has, in milliseconds since 1970.
        now_ms: The guarded time, in milliseconds since 1970.
        changes: Where changes of quarantines are added.
        events: Where jobs are added.
    """

    facts: Facts
    record: RequestRecord
    founder: str
    until_ms: int
    now_ms: int
    changes: list[QuarantineChange]
    events: list[Event]

    def step(self, users: Mapping[str, AdapterProgress]) -> dict[str, AdapterProgress]:
        """Take one step at up to WINDOW start users that have not ended, and return the progress of all of them."""
        return {**users, **{name: self._step(name, users[name]) for name in self._window(users)}}

    def _window(self, users: Mapping[str, AdapterProgress]) -> list[str]:
        """Return the start users of this step: first those without a job, then others from a point that changes.

        Hazard: some adapters may be parked for long. From a fixed point, they could keep all others from being looked at.
        """
        open_ = sorted(name for name, progress in users.items() if progress.phase not in _ENDED)
        if len(open_) <= WINDOW:
            return open_
        waiting = [name for name in open_ if users[name].phase == "waiting"][:WINDOW]
        others = [name for name in open_ if users[name].phase != "waiting"]
        first = int(sha256(str(self.now_ms).encode()).hexdigest()[:8], 16) % max(1, len(others))
        return [*waiting, *(others[first:] + others[:first])[: WINDOW - len(waiting)]]

    def _step(self, user: str, progress: AdapterProgress) -> AdapterProgress:
        job = start_job(self.record, self.founder, user, self.until_ms)
        if progress.phase == "published":
            return self._await_replicas(job, progress)
        entry = self.facts.quarantine(user).entry(job.request_id) if progress.phase == "sent" else None
        if entry is not None and entry.done is not None:
            return self._carried_out(user, entry.done)
        transition = FORGET_TRANSITIONS[progress.phase, self._observe(progress, entry)]
        if Action.QUARANTINE in transition.actions:
            self.changes.append(QuarantineChange(user, entry_of(job)))
        if Action.SEND_JOB not in transition.actions:
            return progress
        self.events.append(job)
        return progress.model_copy(update={"phase": transition.phase, "sent_ms": self.now_ms})

    def _observe(self, progress: AdapterProgress, entry: QuarantineEntry | None) -> Observation:
        if progress.phase == "sent" and entry is None:
            return Observation.UNKNOWN
        is_overdue = progress.phase == "sent" and progress.sent_ms + RESEND_MS <= self.now_ms
        return Observation.OVERDUE if is_overdue else Observation.READY

    def _carried_out(self, user: str, outcome: RequestOutcome) -> AdapterProgress:
        """Return the progress with a job's outcome. It is stored before the entry goes, which is in the step after."""
        if outcome.failure:  # the entry stays, as that of every forgetting that failed, for a person to see to
            phase = FORGET_TRANSITIONS["sent", Observation.FAILED].phase
            return AdapterProgress(phase=phase, detail=outcome.failure)
        # Where nothing was left to do, the job of another request may have rebuilt the adapter a moment ago, and replicas
        # may not have confirmed that yet: wait for what is live. Where no version is revoked, no replica is behind.
        generation = outcome.generation if outcome.generation is not None else self.facts.live(user).generation
        return AdapterProgress(
            phase=FORGET_TRANSITIONS["sent", Observation.DONE].phase, version=outcome.version, generation=generation,
            detail=outcome.detail,
        )  # fmt: skip

    def _await_replicas(self, job: ForgetRequested, progress: AdapterProgress) -> AdapterProgress:
        report = ReplicaReport()
        if progress.generation is not None:
            report = self.facts.replicas(job.adapter, progress.generation)
        seen = observe_replicas(self.record, report, self.now_ms)
        phase = FORGET_TRANSITIONS[progress.phase, seen].phase
        if phase == "done":  # else the quarantine of a start user would grow with every erasure at its founders
            self.changes.append(QuarantineChange(job.adapter, drop=(job.request_id,)))
        return with_replicas(progress.model_copy(update={"phase": phase}), report, seen)
