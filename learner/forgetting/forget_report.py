"""The result of a forget job: its statuses, and the outcomes of the requests that it carried out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime

from perennial.learner.forgetting.rebuild_plan import ExampleMatch
from perennial.learner.versions.job_result import Completion, JobResult
from perennial.learner.versions.version_writer import VersionWriter
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.pending_deletes import load_pending_deletes
from perennial.storage.registry.quarantine import (
    NOTHING_MATCHED,
    OTHER_ENGINE,
    Quarantine,
    RequestOutcome,
    load_quarantine,
)
from perennial.streams.events.models import ForgetRequested, RetentionProgressed, RetentionState
from perennial.streams.retention.kinds import DEPENDANT_PREFIX


class ForgetReporter:
    """Makes the results of forget jobs from what is in the store.

    Args:
        writer: the adapter's versions.
        now: wall clock, for statuses.
    """

    def __init__(self, writer: VersionWriter, now: Callable[[], datetime]) -> None:
        self._writer = writer
        self._store = writer.registry.store
        self._now = now

    def result(
        self,
        job: ForgetRequested,
        alias: str,
        began_s: float,
        held: Collection[str] = frozenset(),
        affected: Collection[str] = frozenset(),
    ) -> JobResult:
        """Return the result of a job that is done, whether this attempt or an earlier one did it.

        Args:
            job: the job.
            alias: the alias that it published under.
            began_s: when the attempt began, by the performance counter.
            held: requests that this attempt did not carry out because a hold covers some of their examples. An earlier
                attempt, before the hold came, may have counted them.
            affected: the versions whose state knew the examples, as far as this attempt found them.
        """
        event = self._writer.current_alias_event(job.adapter, alias)
        if is_done(load_quarantine(self._store, job.adapter), job):
            return JobResult("repeated", None, event, completion=Completion(job.adapter, job.job_id))
        made = self._writer.version_of_job(job.adapter, job.job_id, "forget")
        version: str | None = None
        generation: int | None = None
        if event is not None and (made is not None or affected or self._revoked_any(job)):
            version, generation = made[0] if made else event.version, event.generation
        manifest = made[1] if made else None
        counts = {name: count for name, count in self._counts(job, manifest).items() if name not in held}
        statuses = self._statuses(job, counts, version, _engine_note(manifest))
        outcomes = {
            status.request_id: RequestOutcome(
                at_ms=int(status.at.timestamp() * 1000), examples=status.examples, version=version,
                generation=generation, detail=status.detail,
            )
            for status in statuses
        }  # fmt: skip
        return JobResult(
            manifest.outcome if manifest else "unchanged",
            manifest,
            event,
            stage_s={"forget": time.perf_counter() - began_s},
            statuses=tuple(status for status in statuses if not status.request_id.startswith(DEPENDANT_PREFIX)),
            completion=Completion(job.adapter, job.job_id, outcomes),
        )

    def held(self, job: ForgetRequested, matches: Sequence[ExampleMatch]) -> RetentionProgressed:
        """Return the status of a job that a legal hold stops."""
        return self._status(job, "held", count_of(job, matches), None, "a hold stands on it")

    def _revoked_any(self, job: ForgetRequested) -> bool:
        """Return whether the job took versions out of service that replicas may still have.

        Where it made no version, another one had taken their place before, such as a rebase without the examples. An attempt
        that was interrupted may have deleted what this one would find them by.
        """
        reason = revocation_reason(job)
        return any(found.reason == reason for found in self._writer.registry.revocations(job.adapter))

    def _counts(self, job: ForgetRequested, made: Manifest | None) -> dict[str, int]:
        """Return how many examples were removed, by request id."""
        counts = {job.request_id: (made.gate.forgotten_examples if made else None) or 0}
        pending = load_pending_deletes(self._store, job.adapter, job.job_id)
        return counts | pending.requests if pending else counts

    def _statuses(
        self, job: ForgetRequested, counts: Mapping[str, int], version: str | None, note: str
    ) -> list[RetentionProgressed]:
        """Return the statuses of the job's request and of every open request that the same rebuild carried out."""
        quarantine = load_quarantine(self._store, job.adapter)
        statuses: list[RetentionProgressed] = []
        for request_id, count in counts.items():
            entry = quarantine.entry(request_id)
            if request_id != job.request_id and (entry is None or entry.done is not None):
                continue
            request = job if entry is None else job.model_copy(update={"request_id": request_id, "kind": entry.kind})
            detail = note if count else NOTHING_MATCHED
            statuses.append(self._status(request, "executed", count, version, detail))
            statuses.append(self._status(request, "published", count, version, detail))
        return statuses

    def _status(
        self, job: ForgetRequested, state: RetentionState, count: int, version: str | None, detail: str = ""
    ) -> RetentionProgressed:
        return RetentionProgressed(
            request_id=job.request_id, adapter=job.adapter, kind=job.kind, state=state, examples=count,
            version=version, detail=detail, at=self._now(),
        )  # fmt: skip


def _engine_note(made: Manifest | None) -> str:
    """Return, for people, that the rebuild has other bits than one by the engine that had trained the updates."""
    updates = made.gate.other_engine_updates if made else None
    if not updates:
        return ""
    return (
        f"{OTHER_ENGINE}: {updates} of the rebuilt updates had been trained by another release, torch or kind of device"
    )


def revocation_reason(job: ForgetRequested) -> str:
    """Return the reason of the versions that the job publishes and of those that it revokes."""
    return f"{job.kind} {job.request_id}"


def is_done(quarantine: Quarantine, job: ForgetRequested) -> bool:
    """Return whether the job's request was carried out before."""
    entry = quarantine.entry(job.request_id)
    return entry is not None and entry.done is not None


def count_of(job: ForgetRequested, matches: Sequence[ExampleMatch]) -> int:
    """Return how many examples the job's own request removes."""
    return len({match.example_id for match in matches if match.request_id == job.request_id})


def counts_by_request(job: ForgetRequested, matches: Sequence[ExampleMatch]) -> dict[str, int]:
    """Return how many examples each request removes.

    A request that also asks for held examples is left out: this job does not complete it.
    """
    held = held_requests(matches)
    ids: dict[str, set[str]] = {job.request_id: set()}
    for match in matches:
        if match.request_id is not None and match.request_id not in held:
            ids.setdefault(match.request_id, set()).add(match.example_id)
    return {request_id: len(found) for request_id, found in ids.items()}


def held_requests(matches: Sequence[ExampleMatch]) -> frozenset[str]:
    """Return the requests that also ask for held examples."""
    return frozenset(match.wanted_by for match in matches if match.held and match.wanted_by is not None)
