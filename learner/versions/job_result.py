"""The result of a job, and the error of a job that can never be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from perennial.storage.errors import PerennialError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.history.update_costs import UpdateCost
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.pending_deletes import clear_pending_deletes
from perennial.storage.registry.quarantine import RequestOutcome, finish_entry
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.models import RetentionProgressed

JobErrorReason = Literal[
    "missing-batch", "bad-batch", "wrong-adapter", "base-mismatch", "rank-mismatch", "unknown-version",
    "revoked-version", "not-promoted", "nothing-to-roll-back-to", "recipe-mismatch", "unsupported",
    "unexpected-cut", "out-of-order", "given-up", "bad-job", "collected-version", "rebase-refused",
    "alpha-mismatch",
]  # fmt: skip


class JobError(PerennialError):
    """A job cannot be done as it is.

    It goes to the dead letters, and the next job is taken. Where the fault is not in the job (a base or a rank that is
    not this worker's), its adapter is parked instead.

    Args:
        reason: the dead letter record's reason, or why the adapter is parked.
        message: one sentence for people.
        got: the value that was found.
        allowed: the values that would have been accepted.
        remedy: what to do now.
    """

    def __init__(
        self, reason: JobErrorReason, message: str, *, got: object = None, allowed: object = None,
        remedy: str = "correct what the job names and request it again",
    ) -> None:  # fmt: skip
        self.reason: JobErrorReason = reason
        super().__init__(message, got=got, allowed=allowed, remedy=remedy)


class JobInterruptedError(PerennialError):
    """The process is to stop while a job runs: the job is not committed, and its next run goes on from its progress."""


@dataclass(frozen=True)
class Completion:
    """Records for the store, to be written once Kafka has confirmed everything that the job sends.

    Attributes:
        adapter: the job's adapter.
        job_id: the job whose pending deletes are cleared.
        outcomes: the outcome of each retention request that the job carried out, by request id.
    """

    adapter: str
    job_id: str
    outcomes: Mapping[str, RequestOutcome] = field(default_factory=dict)

    def record(self, store: ObjectStore) -> None:
        """Mark the requests as done, then clear the job's pending deletes.

        Call it only after the job's statuses were confirmed: the retain role reports the next states of a request as
        soon as it sees the outcome, and those must come after the job's own statuses.
        """
        for request_id, outcome in self.outcomes.items():
            finish_entry(store, self.adapter, request_id, outcome)
        clear_pending_deletes(store, self.adapter, self.job_id)


@dataclass(frozen=True)
class JobResult:
    """The result of a job.

    Attributes:
        outcome: `promoted`, `refused` and `unchanged` as in the manifest; `repeated`: an earlier run did the job;
            `held`: a legal hold forbids it and nothing was done; `parked`: the job waits until an operator has mended
            what its adapter is parked for.
        manifest: the version that the job made, if any.
        event: the state of the alias, to be published; None if there is nothing to tell. A repeated job has one too: its
            earlier run may have stopped before it published.
        stage_s: seconds that each stage took, by stage.
        statuses: progress of retention requests, to be published after the event.
        completion: to be recorded when everything that was published is confirmed.
        cost: what the update cost; None if this run trained nothing.
    """

    outcome: Literal["promoted", "refused", "unchanged", "repeated", "held", "parked"]
    manifest: Manifest | None
    event: AdapterUpdate | None
    stage_s: dict[str, float] = field(default_factory=dict)
    statuses: tuple[RetentionProgressed, ...] = ()
    completion: Completion | None = None
    cost: UpdateCost | None = None
