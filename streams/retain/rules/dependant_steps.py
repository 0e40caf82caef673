"""Steps of a request at the adapters that depend on versions of its adapter. Pure.

When an adapter forgets, its versions that knew the examples are revoked. An adapter that began with one of them as part of
its start, or was trained over one of them, is rebuilt without them: by a job that names no example, with a quarantine
entry under an id of its own. Such a job makes the learner look what the adapter's versions depend on.

What is rebuilt so has dependants in turn: a tenant's user, and those who began with this user. They are looked at in rounds:
the dependants of one round get their jobs when all of the round are carried out, each one job for all that it depends on.

Hazard: dependants may be looked up only when the outcome of the adapter's own job is known. An adapter is recorded before
it looks up the versions that it will depend on. So whoever is not in the list looks up versions that know nothing of the
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
from perennial.streams.retention.kinds import DEPENDANT_PREFIX

WINDOW: Final = 64
"""The most dependants that one step looks at."""
MAX_REPLICAS: Final = 8
"""The most replicas that are named for one dependant: a request may have thousands, and is one object."""
MAX_ROUNDS: Final = 3
"""Users depend on their tenant, and users who began with them on these: two rounds. Records that a stranger has written could
go round in a circle."""
_ENDED: Final = frozenset({"done", "failed"})


def dependant_request_id(request_id: str, adapter: str, round_number: int = 1) -> str:
    """Return the id under which a request reaches the dependants of its adapter.

    It is another one than the request's: a pattern may cover an adapter and its dependants, so that one quarantine has an
    entry of each.

    Args:
        request_id: The request.
        adapter: The adapter that forgets.
        round_number: 1 for its own dependants, 2 for theirs.
    """
    text = f"{request_id}\n{adapter}" + (f"\n{round_number}" if round_number > 1 else "")
    return DEPENDANT_PREFIX + sha256(text.encode()).hexdigest()[:32]


def dependant_job(
    record: RequestRecord, adapter: str, dependant: str, until_ms: int, round_number: int = 1
) -> ForgetRequested:
    """Return the job that makes the learner rebuild an adapter without what it depends on, if that is revoked.

    Args:
        record: The request.
        adapter: The adapter that forgets.
        dependant: The adapter that may depend on a version of it.
        until_ms: What the job of the adapter that forgets has, in milliseconds since 1970; this job matches no example.
        round_number: 1 for the adapter's own dependants, 2 for theirs.
    """
    request = record.request
    own_id = dependant_request_id(request.request_id, adapter, round_number)
    return ForgetRequested(
        job_id=job_id_of(own_id, dependant), request_id=own_id, kind=request.kind, adapter=dependant, until_ms=until_ms,
        suppress=False, emergency=request.emergency, reason=f"it depends on what {adapter} forgets",
    )  # fmt: skip


def dependant_of(name: str) -> tuple[int, str]:
    """Return the round and the adapter that a name in a record's progress stands for.

    >>> dependant_of("acme/support/zoe"), dependant_of("2:acme/support/zoe")
    ((1, 'acme/support/zoe'), (2, 'acme/support/zoe'))
    """
    round_number, _, adapter = name.rpartition(":")
    return int(round_number or 1), adapter


def observe_dependants(users: Mapping[str, AdapterProgress], own: Observation) -> Observation:
    """Return what is observed about an adapter whose own job was carried out.

    Args:
        users: Progress of its dependants, by name; see `dependant_of`.
        own: What is observed about the adapter's own replicas.
    """
    phases = {progress.phase for progress in users.values()}
    if phases - {"published", *_ENDED}:
        return Observation.DEPENDANTS_REMAIN
    if "published" in phases or own is Observation.DONE:
        return Observation.DONE
    return Observation.FAILED if "failed" in phases else own


def dependant_failures(users: Mapping[str, AdapterProgress]) -> str:
    """Return why dependants could not be rebuilt: the first one, and how many others there are."""
    failed = [(name, progress.detail) for name, progress in sorted(users.items()) if progress.phase == "failed"]
    if not failed:
        return ""
    name, why = failed[0]
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"{dependant_of(name)[1]}, which depends on it{more}: {why}"


@dataclass
class DependantSteps:
    """Takes steps of one request at the dependants of one adapter, and adds their effects to those of its own step.

    Attributes:
        facts: The state of the store and of the replicas.
        record: The request.
        adapter: The adapter that forgets.
        until_ms: What its own job has, in milliseconds since 1970.
        now_ms: The guarded time, in milliseconds since 1970.
        changes: Where changes of quarantines are added.
        events: Where jobs are added.
    """

    facts: Facts
    record: RequestRecord
    adapter: str
    until_ms: int
    now_ms: int
    changes: list[QuarantineChange]
    events: list[Event]

    def step(self, users: Mapping[str, AdapterProgress]) -> dict[str, AdapterProgress]:
        """Take one step at up to WINDOW dependants that have not ended, and return the progress of all of them."""
        after = dict(users)
        for name in self._window(users):
            after[name] = self._step(name, users[name])
            if users[name].phase == "sent" and after[name].phase == "published":
                after = self._dependants_of(name) | after
        return after

    def _dependants_of(self, name: str) -> dict[str, AdapterProgress]:
        """Return the dependants of one that was rebuilt: they are of the next round."""
        round_number, adapter = dependant_of(name)
        if round_number >= MAX_ROUNDS:
            return {}
        names = (f"{round_number + 1}:{dependant}" for dependant in self.facts.dependants(adapter))
        return dict.fromkeys(names, AdapterProgress(phase="waiting"))

    def _window(self, users: Mapping[str, AdapterProgress]) -> list[str]:
        """Return the dependants of this step: first those without a job, then others from a point that changes.

        Those of a round wait until all of the rounds before it are carried out.

        Hazard: some adapters may be parked for long. From a fixed point, they could keep all others from being looked at.
        """
        open_ = sorted(name for name, progress in users.items() if progress.phase not in _ENDED)
        now = min((dependant_of(n)[0] for n in open_ if users[n].phase != "published"), default=MAX_ROUNDS)
        open_ = [name for name in open_ if dependant_of(name)[0] <= now]
        if len(open_) <= WINDOW:
            return open_
        waiting = [name for name in open_ if users[name].phase == "waiting"][:WINDOW]
        others = [name for name in open_ if users[name].phase != "waiting"]
        first = int(sha256(str(self.now_ms).encode()).hexdigest()[:8], 16) % max(1, len(others))
        return [*waiting, *(others[first:] + others[:first])[: WINDOW - len(waiting)]]

    def _step(self, name: str, progress: AdapterProgress) -> AdapterProgress:
        round_number, user = dependant_of(name)
        job = dependant_job(self.record, self.adapter, user, self.until_ms, round_number)
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
        if phase == "done":  # else the quarantine of a dependant would grow with every such erasure
            self.changes.append(QuarantineChange(job.adapter, drop=(job.request_id,)))
        after = with_replicas(progress.model_copy(update={"phase": phase}), report, seen)
        few = {"acknowledged": after.acknowledged[:MAX_REPLICAS], "missing": after.missing[:MAX_REPLICAS]}
        return after.model_copy(update=few)
