"""Run rebase jobs: learn an adapter anew on this worker's base, then publish the result as its next version.

All recorded updates of the adapter's schedule are trained again, in order, from the initial state on the new base, with
this worker's recipe, and the gate judges each of them. The old version is served until then. The machinery is that of a
forgetting (`rebuild`): the updates made so far are recorded as progress, so a job that was interrupted goes on from there,
and the rebuilt updates are the adapter's schedule afterwards, so a later forgetting rebuilds them on the new base.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from datetime import datetime

from perennial.learner.forgetting.rebuild import RebuiltState, UpdateRebuilder
from perennial.learner.forgetting.rebuild_plan import RebuildPlan, trained_offsets
from perennial.learner.forgetting.rebuild_progress import sweep_steps
from perennial.learner.training.state import to_blobs
from perennial.learner.training.update import Updater
from perennial.learner.versions.alias_events import alias_event
from perennial.learner.versions.conflict_retry import retry_on_conflict
from perennial.learner.versions.history import RecordedVersion, complete_index, index_version, load_history
from perennial.learner.versions.job_result import JobError, JobResult
from perennial.learner.versions.micro_batches import OriginOffset, load_batch, origin_offset
from perennial.learner.versions.version_writer import VersionWriter
from perennial.storage.objects.keys import blob_key
from perennial.storage.recovery.rollback import finish_interrupted
from perennial.storage.registry.history.rebuilt_steps import RebuiltStep
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.quarantine import load_quarantine
from perennial.storage.registry.registry import Head, Publication
from perennial.storage.registry.waiting_jobs import record_job_version
from perennial.streams.events.models import ExampleAccepted, RebaseRequested
from perennial.streams.retention.quarantine_filter import QuarantineFilter

_log = logging.getLogger("perennial.learner")


class _OutdatedError(Exception):
    """What must not be learned has changed during the rebase: it begins again, with the updates before the change kept.

    No conflict with another writer, whose number is limited: each new beginning has a request of its own behind it.
    """


class RebaseExecutor:
    """Runs rebase jobs.

    Args:
        writer: the adapter's versions, and the updater on the new base.
        now: wall clock, for the records of progress.
        failpoint: called with a name at each step where fault tests may stop the process.
        progress: called after each update and each step of its training.
        should_stop: asked before each update; True ends the job without a result.
    """

    def __init__(
        self,
        writer: VersionWriter,
        now: Callable[[], datetime],
        failpoint: Callable[[str], None],
        progress: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._writer = writer
        self._registry = writer.registry
        self._store = writer.registry.store
        self._now = now
        self._failpoint = failpoint
        self._progress = progress
        self._should_stop = should_stop

    def rebase(self, job: RebaseRequested, alias: str) -> JobResult:
        """Learn the adapter's examples anew, and point the alias at the result.

        Args:
            job: the job.
            alias: the alias that the new version is published under. Others stay where they are.

        Returns:
            The result; its outcome is `unchanged` where the adapter has no version, or one of this base, rank and alpha.

        Raises:
            JobError: too little of what was learned passed the gate on the new base, or a micro-batch is gone.
            JobInterruptedError: the process is to stop; the job's next run goes on from what was learned.
            StoreError: the store failed.
        """
        while True:
            try:
                return retry_on_conflict(self._registry, job.adapter, lambda: self._attempt(job, alias))
            except _OutdatedError as error:
                _log.info("%s begins again: %s", job.job_id, error)

    def give_up(self, job: RebaseRequested) -> None:
        """Delete the progress of a job that will never be done.

        Raises:
            StoreError: the store failed.
        """
        self._sweep(job.adapter, lambda step: step.job_id == job.job_id)

    def _attempt(self, job: RebaseRequested, alias: str) -> JobResult:
        began = time.perf_counter()
        if self._registry.head(job.adapter) is None:
            return JobResult("unchanged", None, None)
        answered = self._writer.version_of_job(job.adapter, job.job_id)
        if answered is not None:
            if answered[1].job_id != job.job_id:  # there was nothing to do, and whoever waited was told
                return JobResult("unchanged", None, None)
            self._sweep(job.adapter)
            return JobResult("repeated", None, self._writer.current_alias_event(job.adapter, alias))
        finish_interrupted(self._registry, job.adapter, alias)
        head = self._writer.head(job.adapter, any_base=True)
        schedule = self._schedule(head) if head is not None else ()
        if head is None or self._fits(head.manifest, schedule):
            _log.warning(
                "%s is of this learner's base, rank and alpha already: there is nothing to rebase", job.adapter
            )
            if head is not None:  # so that whoever waits for the job learns that it was looked at
                record_job_version(self._store, job.adapter, job.job_id, head.version)
            return JobResult("unchanged", None, None)
        cut = self._first_revoked(job.adapter, schedule)
        steps = schedule[:cut]
        removed = self._removed(job.adapter, steps)
        plan = RebuildPlan(removed, frozenset(), frozenset(), None, steps)
        updater = self._updater()
        rebuilder = UpdateRebuilder(
            self._writer, self._progress, self._now, self._failpoint, self._should_stop, anew=updater
        )
        reached = rebuilder.rebuild(job, plan, alias)
        learned, kept = self._learned(job.adapter, reached), _kept(steps, removed)
        self._require_learned(job, learned & kept, kept)
        if self._removed(job.adapter, steps) != removed:
            raise _OutdatedError("examples that it learned anew are to be forgotten, or a hold on them ended or began")
        if self._first_revoked(job.adapter, schedule) != cut:
            raise _OutdatedError("versions that it learned anew are revoked")
        rebuilder.settle_examples(plan, reached.step)
        reason = job.reason or f"rebase of {head.version} from {head.manifest.base_model}"
        reason = f"{reason}: {len(learned & kept)} of {len(kept)} examples learned"
        if cut is not None:
            reason = f"{reason}, without what was learned from {schedule[cut].version} on, which is revoked"
        publication = self._publish(job, alias, head, rebuilder, reached, reason)
        self._sweep(job.adapter)
        event = alias_event(self._registry, publication.alias_state) if publication.alias_state else None
        return JobResult(
            publication.manifest.outcome, publication.manifest, event,
            stage_s={"rebase": time.perf_counter() - began},
        )  # fmt: skip

    def _fits(self, head: Manifest, schedule: Iterable[RecordedVersion]) -> bool:
        """Return whether the newest version and all trained updates are of this worker's base, rank and alpha.

        Releases from before 0076 compared no alpha, so the updates of one schedule may have two.
        """
        recipe = self._writer.updater.recipe
        wanted = self._writer.base.digest, recipe.rank, recipe.alpha
        trained = [step.manifest for step in schedule if trained_offsets(step.manifest)]
        return all((each.base_sha256, each.rank, each.config.get("alpha")) == wanted for each in (head, *trained))

    def _schedule(self, head: Head) -> tuple[RecordedVersion, ...]:
        """Return the updates that led to the newest version, in order."""
        history = load_history(self._registry, head.manifest.adapter, head)
        if history is None:
            return ()
        return tuple(complete_index(self._registry, head.manifest.adapter, history).schedule())

    def _first_revoked(self, adapter: str, schedule: Sequence[RecordedVersion]) -> int | None:
        """Return the index of the first update whose state is revoked; None where there is none.

        Where no learner of the old base could carry out a revocation, the alias is retired, and the revoked versions are
        still the newest ones.
        """
        return _first_revoked(schedule, {each.version for each in self._registry.revocations(adapter)})

    def _updater(self) -> Updater:
        """Return an updater on this worker's base, with the general text of an adapter that is new to it."""
        updater = self._writer.updater_of(None)
        return replace(updater, shared=updater.shared.alone() if updater.shared else None)

    def _removed(self, adapter: str, steps: Iterable[RecordedVersion]) -> dict[str, set[OriginOffset]]:
        """Return the offsets of examples that must not be learned, by the micro-batch's digest.

        They were accepted for forgetting, or have a text that was erased elsewhere. While a hold covers an example, neither
        takes it away, unless a request was carried out before the hold came.
        """
        quarantine = load_quarantine(self._store, adapter)
        if not (quarantine.entries or quarantine.suppresses_texts):
            return {}
        blocked = QuarantineFilter(quarantine, self._store)
        removed: dict[str, set[OriginOffset]] = {}
        for step in steps:
            batch = load_batch(self._store, step.manifest.batch.digest) if step.manifest.batch else None
            offsets = {origin_offset(each) for each in batch.examples if _is_removed(blocked, each)} if batch else set()
            if step.manifest.batch and offsets:
                removed[step.manifest.batch.digest] = offsets
        return removed

    def _learned(self, adapter: str, reached: RebuiltState) -> set[OriginOffset]:
        """Return the origins of the examples that the rebuilt updates learned."""
        found: set[OriginOffset] = set()
        step = reached.step
        while step is not None:
            found.update(item.origin_offset for item in step.manifest.learned)
            before = step.manifest.head
            step = RecordedVersion(before, self._registry.manifest(adapter, before)) if before else None
        return found

    def _require_learned(
        self, job: RebaseRequested, learned: Collection[OriginOffset], kept: Collection[OriginOffset]
    ) -> None:
        """Raise JobError where too little of what the old version knows passed the gate on the new base."""
        if kept and (not learned or len(learned) < job.min_learned_share * len(kept)):
            raise JobError(
                "rebase-refused",
                f"too little of what {job.adapter} has learned passed the gate on the new base; the old version stays live",
                got=f"{len(learned)} of {len(kept)} examples on {self._writer.base.name}",
                allowed=f"a share of {job.min_learned_share:g} or more",
                remedy="change the learning rate, the steps or the gate's limits for this base, or accept less with "
                "`--min-learned`",
            )

    def _publish(
        self,
        job: RebaseRequested,
        alias: str,
        head: Head,
        rebuilder: UpdateRebuilder,
        reached: RebuiltState,
        reason: str,
    ) -> Publication:
        """Publish the state that the rebuilt updates lead to, as a version that follows the head.

        Raises:
            ConflictError: another writer published a version meanwhile. The next attempt trains only what is new.
        """
        step, adapter = reached.step, job.adapter
        blobs: dict[str, bytes] = {}
        start = head.manifest.start and head.manifest.start.bare
        fields = rebuilder.fields_anew(start, step.manifest.over if step else None)
        if step is None:  # no update is on record: the adapter begins at its initial state on the new base
            refs, blobs = to_blobs(self._writer.initial_state(adapter, reached.seed, start))
            fields |= refs.manifest_fields()
        elif reached.version is not None:
            # The figures of the version that trained the state, not of a refused one after it.
            trained = self._registry.manifest(adapter, reached.version)
            fields |= {"gate": trained.gate, "probes": trained.probes}
        target, parent = (step.manifest, step.version) if step is not None else (None, None)
        manifest = self._writer.carry_forward_manifest(
            head, target, parent, "rebase", job.job_id, reason
        ).model_copy(update=fields)  # fmt: skip
        publication = self._registry.publish(manifest, blobs.values(), self._writer.verifier(blobs), alias)
        index_version(self._registry, publication.version, publication.manifest)
        return publication

    def _sweep(self, adapter: str, drop: Callable[[RebuiltStep], bool] = lambda _: False) -> None:
        """Remove progress that no rebuild can use any more."""

        def delete(digests: Collection[str]) -> None:
            for digest in sorted(digests):
                self._store.delete(blob_key(digest))
            self._writer.drop_cached(digests)

        sweep_steps(
            self._registry, adapter, lambda: load_history(self._registry, adapter), self._now(), drop=drop,
            delete_blobs=delete,
        )  # fmt: skip


def _is_removed(blocked: QuarantineFilter, example: ExampleAccepted) -> bool:
    suppressed = blocked.held_by(example) is None and blocked.suppresses(example)
    return suppressed or blocked.entry_of(example) is not None


def _kept(steps: Iterable[RecordedVersion], removed: dict[str, set[OriginOffset]]) -> set[OriginOffset]:
    """Return the origins of the examples that the recorded updates learned, without those that must not be learned.

    A rebuilt update keeps the origins of its examples, whatever key their ids are under.
    """
    found: set[OriginOffset] = set()
    for step in steps:
        batch = step.manifest.batch
        gone = removed.get(batch.digest, set()) if batch else set()
        found.update(item.origin_offset for item in step.manifest.learned if item.origin_offset not in gone)
    return found


def _first_revoked(steps: Sequence[RecordedVersion], revoked: Collection[str]) -> int | None:
    """Return the index of the first update whose state is revoked; None where there is none.

    Versions that an emergency forgetting set aside until its rebuild are revoked, too. Their updates are trained again
    without the examples that are to be forgotten, so they do not count.
    """
    index_of = {step.version: index for index, step in enumerate(steps)}
    set_aside: set[int] = set()
    for index, step in enumerate(steps):
        if step.manifest.kind == "quarantine":
            set_aside.update(range(index_of.get(step.manifest.parent or "", -1) + 1, index))
    first = next(
        (index for index, step in enumerate(steps) if step.version in revoked and index not in set_aside), None
    )
    if first is None:
        return None
    # A version that took over a state is revoked because of that state: of an update, or of a rebuild as a whole.
    while steps[first].manifest.kind not in {"update", "replayed"} and steps[first].manifest.parent in index_of:
        first = index_of[steps[first].manifest.parent or ""]
    while first and steps[first].manifest.kind == steps[first - 1].manifest.kind == "replayed":
        first -= 1
    return first
