"""What the fair queue needs to know of a job: its tenant, its tokens, its age, and what it is expected to gain."""

from __future__ import annotations

from typing import NamedTuple

from perennial.streams.events.fields import Event
from perennial.streams.events.models import UpdateRequested

BYTES_PER_TOKEN = 4
"""For jobs that name no number of tokens; English text has about four bytes a token."""
LOSS_SIGNALS = frozenset({"base_loss", "live_loss"})
"""The signals of drift that are in nats per token."""


def tenant_of(adapter: str) -> str:
    """Return the first segment of an adapter's name.

    Example:
        >>> tenant_of("acme/support/de"), tenant_of("support")
        ('acme', 'support')
    """
    return adapter.partition("/")[0]


class JobFigures(NamedTuple):
    """What the queue needs to know of a job.

    Attributes:
        adapter: the adapter that the job changes.
        tokens: tokens of the micro-batch; 0 for other jobs.
        oldest_s: when its oldest example was published, in seconds since 1970.
        drift_nats: by how much the loss rose where drift cut the micro-batch, in nats per token; else 0.
        is_update: False for a job that forgets, rolls back or revokes.
    """

    adapter: str
    tokens: int = 0
    oldest_s: float = 0.0
    drift_nats: float = 0.0
    is_update: bool = True


def figures_of(job: Event) -> JobFigures:
    """Return the figures of a job that was read from `adapter-jobs`."""
    if not isinstance(job, UpdateRequested):
        return JobFigures(str(getattr(job, "adapter", "")), is_update=False)
    drift = job.drift
    rise = drift.after - drift.before if drift is not None and drift.signal in LOSS_SIGNALS else 0.0
    tokens = job.tokens or job.batch.size_bytes // BYTES_PER_TOKEN
    return JobFigures(job.adapter, max(1, tokens), job.oldest_ms / 1000, max(0.0, rise))
