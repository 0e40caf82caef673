"""The jobs that retain makes, their ids, and the changes of quarantines that go with them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from perennial.storage.registry.quarantine import LegalHold, Quarantine, QuarantineEntry
from perennial.streams.events.models import ForgetRequested
from perennial.streams.retain.ledger import selector_json

RESEND_MS: Final = 86_400_000
"""A job without an outcome is sent again after this time: Kafka may have deleted it while no learner ran."""


@dataclass(frozen=True)
class QuarantineChange:
    """A change of one adapter's quarantine, besides that it then lists exactly the holds that are on the adapter.

    Attributes:
        adapter: The adapter.
        entry: An entry to add.
        suppress: Hashes of texts to suppress.
        drop: Ids of requests whose entries go.
    """

    adapter: str
    entry: QuarantineEntry | None = None
    suppress: frozenset[str] = frozenset()
    drop: tuple[str, ...] = ()

    def apply(self, quarantine: Quarantine, holds: Sequence[LegalHold]) -> Quarantine:
        """Return the quarantine with the change; an equal one where it has the change already."""
        quarantine = quarantine.with_holds(holds)
        if self.entry is not None:
            quarantine = quarantine.with_entry(self.entry)
        return quarantine.suppressing(self.suppress).without(self.drop)


def job_id_of(request_id: str, adapter: str) -> str:
    """Return the id of the job that a request makes for an adapter; always the same for the same two."""
    return "sha256:" + sha256(f"{request_id}\n{adapter}".encode()).hexdigest()


def entry_of(job: ForgetRequested) -> QuarantineEntry:
    """Return the quarantine entry that belongs to a job; the learner marks it as done."""
    return QuarantineEntry(
        request_id=job.request_id, job_id=job.job_id, kind=job.kind, selector=selector_json(job.selector),
        example_ids=job.example_ids, until_ms=job.until_ms, suppress=job.suppress,
    )  # fmt: skip
