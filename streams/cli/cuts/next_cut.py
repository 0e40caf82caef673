"""When curate cuts the next micro-batch of an adapter, and why then.

The examples that wait since the last cut are in the memory of curate alone, so this says what will cut them, and what held
at the last cut. How long the oldest example of all adapters has waited is the metric
`perennial_oldest_unlearned_event_age_seconds`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.registry.records import parse_record
from perennial.storage.registry.registry import Registry
from perennial.storage.registry.waiting_jobs import MAX_CURATE_STATE_BYTES, curate_state_key
from perennial.streams.curate.cutting.drift_trust import examples_for_drift, newest_updates_without_gain
from perennial.streams.curate.cutting.waiting import MAX_AGES
from perennial.streams.events.models import CutReason
from perennial.streams.settings import Settings

_Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class LastJob(_Part):
    """The job of the last cut."""

    reason: CutReason
    examples: _Count
    tokens: _Count
    cut_at: AwareDatetime


class ArmedDrift(_Part):
    """Drift that waits for examples."""

    signal: str


class CutState(_Part):
    """The part of curate's stored state that is shown; it is as of the last cut.

    Attributes:
        cuts: number of cuts so far.
        cooldown: examples that drift still had to wait for after a swap.
        armed: drift that waited for more examples.
        job: the last job; None before the first.
    """

    cuts: _Count = 0
    cooldown: _Count = 0
    armed: ArmedDrift | None = None
    job: LastJob | None = None


@dataclass(frozen=True)
class NextCut:
    """What cuts the next micro-batch, whichever comes first, by the settings of the command.

    Attributes:
        cuts: cuts so far.
        last_reason: why the last one was made; None before the first.
        last_at: when that was.
        last_examples: its examples.
        last_tokens: its tokens.
        max_age_s: seconds after which the oldest pending example cuts.
        min_tokens: pending tokens below which age does not cut before `max_wait_s`, unless one is a correction; 0: age
            alone decides.
        max_wait_s: seconds after which the oldest pending example cuts however few tokens wait.
        max_tokens: pending tokens that cut.
        max_examples: pending examples that cut.
        drift_examples: pending examples from which drift cuts.
        drift_waits: the signal whose drift waited for examples at the last cut; None: none did.
        cooldown_examples: examples that had to follow the last swap before drift cuts, as of the last cut.
        updates_without_gain: newest updates in a row that learned nothing.
        distrusted: True where drift needs more examples because of them.
        tenant_tokens_per_hour: the tenant's budget at the learner; None: no limit. It delays updates, never a cut.
        error: why curate's state cannot be read; the figures of the last cut are missing then.
    """

    cuts: int
    last_reason: CutReason | None
    last_at: datetime | None
    last_examples: int
    last_tokens: int
    max_age_s: float
    min_tokens: int
    max_wait_s: float
    max_tokens: int
    max_examples: int
    drift_examples: int
    drift_waits: str | None
    cooldown_examples: int
    updates_without_gain: int
    distrusted: bool
    tenant_tokens_per_hour: int | None
    error: str | None = None

    def facts(self) -> dict[str, object]:
        """Return the rows for people."""
        last = (f"unknown: {self.error}" if self.error else "none yet") if self.last_at is None else (
            f"number {self.cuts - 1}, by {self.last_reason}, at {self.last_at.isoformat(timespec='seconds')}: "
            f"{self.last_examples} examples, {self.last_tokens} tokens"
        )  # fmt: skip
        distrust = (
            f" (distrust: the last {self.updates_without_gain} updates learned nothing)" if self.distrusted else ""
        )
        later = f"; {self.max_wait_s:g} s if fewer than {self.min_tokens} tokens and no correction wait"
        parts = [
            f"{self.max_age_s:g} s after the first example that waits reaches curate{later if self.min_tokens else ''}",
            f"sooner by size, at {self.max_tokens} tokens or {self.max_examples} examples",
            f"by drift from {self.drift_examples} examples on{distrust}",
        ]
        if self.cooldown_examples:
            parts.append(f"not by drift in the {self.cooldown_examples} examples after the last cut, because of a swap")
        if self.drift_waits is not None:
            parts.append(f"drift of the {self.drift_waits.replace('_', ' ')} is found and waits for examples")
        if self.tenant_tokens_per_hour is not None:
            parts.append(
                f"its update may wait for the tenant's budget of {self.tenant_tokens_per_hour} tokens an hour, if others' "
                "updates wait"
            )
        return {"last cut": last, "next cut": "; ".join(parts)}


def next_cut(state: CutState, settings: Settings, adapter: str, without_gain: int) -> NextCut:
    """Return what cuts the next micro-batch of an adapter.

    Args:
        state: what curate stored at the last cut.
        settings: the bounds, as curate has them if its settings are the same.
        adapter: the adapter.
        without_gain: newest updates in a row that learned nothing.
    """
    curate, job = settings.curate, state.job
    needed = examples_for_drift(
        without_gain, curate.min_batch_examples, curate.max_batch_examples, curate.drift_patience_updates
    )
    return NextCut(
        cuts=state.cuts,
        last_reason=None if job is None else job.reason,
        last_at=None if job is None else job.cut_at,
        last_examples=0 if job is None else job.examples,
        last_tokens=0 if job is None else job.tokens,
        max_age_s=curate.max_age_s,
        min_tokens=curate.min_batch_tokens,
        max_wait_s=curate.max_age_s * MAX_AGES,
        max_tokens=curate.max_batch_tokens,
        max_examples=curate.max_batch_examples,
        drift_examples=needed,
        drift_waits=None if state.armed is None else state.armed.signal,
        cooldown_examples=state.cooldown,
        updates_without_gain=without_gain,
        distrusted=needed > curate.min_batch_examples,
        tenant_tokens_per_hour=settings.tenants.tokens_per_hour(adapter.partition("/")[0]),
    )


def read_next_cut(registry: Registry, settings: Settings, adapter: str) -> NextCut:
    """Return what cuts the next micro-batch of an adapter, by what the store has.

    Raises:
        StoreError: the store cannot be read.
    """
    key, state, error = curate_state_key(adapter), CutState(), None
    try:
        state = parse_record(CutState, key, registry.store.get(key, MAX_CURATE_STATE_BYTES).data)
    except NotFoundError:  # nothing was cut yet
        pass
    except IntegrityError as damaged:  # it must not hide what else is known of the adapter
        error = str(damaged)
    return replace(next_cut(state, settings, adapter, newest_updates_without_gain(registry, adapter)), error=error)
