"""Request a rebase, and show how far it comes."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass

from rich.console import Console

from perennial.storage.registry.history.rebuilt_steps import REBASE_JOB_PREFIX, rebases_under_way
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.parked import ParkedAdapter, load_parked
from perennial.storage.registry.registry import AliasState, Registry
from perennial.streams.cli.adapters import open_registry, require_adapter
from perennial.streams.cli.backup.step_line import StepLine
from perennial.streams.cli.tables import shown_version
from perennial.streams.cli.terminal.printable import printable_lines
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.models import RebaseRequested
from perennial.streams.recovery.waiting_work import open_forget_jobs

_DELIVERY_TIMEOUT_S = 30
_POLL_S = 0.5


@dataclass(frozen=True)
class _Outcome:
    """What became of the job: the version that names it, or why its adapter is parked; neither while it runs."""

    version: str | None = None
    manifest: Manifest | None = None
    parked: ParkedAdapter | None = None

    @property
    def ended(self) -> bool:
        return self.version is not None or self.parked is not None


def rebase_adapter(adapter: str, *, min_learned_share: float, reason: str, wait_s: float, as_json: bool) -> int:
    """Publish the job, wait for its end, and show its progress meanwhile.

    Open requests to forget are published again after the job: on the old base, the learner could not carry them out.

    Args:
        adapter: Name of the adapter.
        min_learned_share: Share of the learned examples that must pass the gate on the new base.
        reason: Recorded in the version and in the job.
        wait_s: Seconds to wait; 0 returns at once.
        as_json: Print JSON instead of text.

    Returns:
        The exit code: 1 where the adapter was parked, or the job did not end in time.

    Raises:
        NotFoundError: The adapter does not exist.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    require_adapter(registry, adapter)
    job = RebaseRequested(
        job_id=f"{REBASE_JOB_PREFIX}{uuid.uuid4().hex}", adapter=adapter, min_learned_share=min_learned_share,
        requested_by="command line", reason=reason,
    )  # fmt: skip
    forgets = open_forget_jobs(registry.store, adapter, "sent again after the adapter was learned on another base")
    with Publisher(settings.kafka.require_bootstrap(), settings=settings) as publisher:
        for event in (job, *forgets):
            publisher.publish(event).result(_DELIVERY_TIMEOUT_S)
    outcome = _wait(registry, job, wait_s)
    if as_json:
        print(json.dumps(_facts(job, outcome)))
    else:
        _say(job, outcome, registry.alias(adapter, settings.serving.alias), wait_s)
        if not outcome.ended:
            _say_parked(load_parked(registry.store, adapter))
    return 0 if outcome.version is not None or (not wait_s and not outcome.ended) else 1


def _wait(registry: Registry, job: RebaseRequested, wait_s: float) -> _Outcome:
    deadline = time.monotonic() + wait_s
    with StepLine() as line:
        while not (outcome := _outcome_of(registry, job)).ended and time.monotonic() < deadline:
            under_way = rebases_under_way(registry.store, job.adapter).get(job.adapter)
            if under_way is None:
                line.show(f"{job.adapter}: the job waits for a learner, or its first update trains")
            else:
                line.show(f"{job.adapter}: {under_way.made} of {under_way.total} updates learned anew")
            time.sleep(_POLL_S)
    return outcome


def _outcome_of(registry: Registry, job: RebaseRequested) -> _Outcome:
    made = registry.version_of_job(job.adapter, job.job_id)
    if made is not None:
        return _Outcome(*made)
    parked = load_parked(registry.store, job.adapter)
    return _Outcome(parked=parked if parked is not None and parked.job_id == job.job_id else None)


def _facts(job: RebaseRequested, outcome: _Outcome) -> dict[str, object]:
    manifest, parked = outcome.manifest, outcome.parked
    return {
        "job_id": job.job_id, "adapter": job.adapter, "version": outcome.version,
        "rebased": manifest is not None and manifest.job_id == job.job_id,
        "base": None if manifest is None else {"model": manifest.base_model, "sha256": manifest.base_sha256},
        "rebase_of": None if manifest is None or manifest.job_id != job.job_id else manifest.head,
        "outcome": None if manifest is None else manifest.outcome, "reason": None if manifest is None else manifest.reason,
        "parked": None if parked is None else parked.model_dump(mode="json"),
    }  # fmt: skip


def _say_parked(parked: ParkedAdapter | None) -> None:
    """Say that the adapter is parked for another reason: the record does not tell if the rebase is refused."""
    if parked is not None:
        said = (
            f"{parked.adapter} is parked ({parked.reason}), and stays so whatever becomes of the rebase: where it is refused, "
            "the log of the learner says why"
        )
        Console(highlight=False, stderr=True).print(printable_lines(said), soft_wrap=True, markup=False)


def _say(job: RebaseRequested, outcome: _Outcome, state: AliasState | None, wait_s: float) -> None:
    out, err = (Console(highlight=False, stderr=stderr) for stderr in (False, True))
    manifest = outcome.manifest
    if outcome.parked is not None:
        said = f"{job.adapter} is not rebased, the old version stays live ({outcome.parked.reason}): {outcome.parked.detail}"
        err.print(printable_lines(said), soft_wrap=True, markup=False)
    elif manifest is None or outcome.version is None:
        if wait_s:
            err.print(
                f"the rebase of {job.adapter} was requested ({job.job_id}) and has not ended within {wait_s:.0f} s: "
                "`perennial status` shows how far it is, or is no learner with the new base running?",
                soft_wrap=True, markup=False,
            )  # fmt: skip
        else:
            out.print(f"the rebase of {job.adapter} is requested: {job.job_id}", soft_wrap=True, markup=False)
    elif manifest.job_id != job.job_id:
        out.print(
            f"nothing to do: {job.adapter} is on the learner's base already, {manifest.base_model}",
            soft_wrap=True, markup=False,
        )  # fmt: skip
    else:
        served = (
            f"live, generation {state.generation}" if state and state.version == outcome.version else manifest.outcome
        )
        said = f"{job.adapter} is on {manifest.base_model}: {shown_version(outcome.version, out)} is {served}. {manifest.reason}"
        out.print(printable_lines(said), soft_wrap=True, markup=False)
