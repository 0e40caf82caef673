"""Run forget jobs: rebuild without the examples, publish, revoke, delete.

The served version stays in service until the rebuilt one takes its place; only an emergency takes it out at once.
Before anything changes, the adapter's pending deletes name what the job deletes at its end.

A job may be interrupted anywhere and run again: the updates that it has rebuilt are recorded as progress and are not
trained again. What is in the store decides every version that a job makes; nothing else does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from perennial.learner.forgetting.dependencies import Dependencies, names_no_example, revoked_dependencies
from perennial.learner.forgetting.forget_report import (
    ForgetReporter,
    count_of,
    counts_by_request,
    held_requests,
    is_done,
    revocation_reason,
)
from perennial.learner.forgetting.rebuild import UpdateRebuilder
from perennial.learner.forgetting.rebuild_plan import (
    BatchMatches,
    ExampleMatch,
    ForgetTarget,
    RebuildPlan,
    RemovedOffsets,
    plan_rebuild,
    state_version,
    trained_offsets,
)
from perennial.learner.forgetting.rebuild_progress import sweep_steps
from perennial.learner.forgetting.scan import FoundExamples, find_examples
from perennial.learner.forgetting.waiting_batches import leave_out_of_waiting
from perennial.learner.versions.alias_events import alias_event
from perennial.learner.versions.conflict_retry import retry_on_conflict
from perennial.learner.versions.garbage_collection import delete_unreferenced
from perennial.learner.versions.history import History, RecordedVersion, complete_index, index_version, load_history
from perennial.learner.versions.job_result import Completion, JobInterruptedError, JobResult
from perennial.learner.versions.micro_batches import batch_to_bytes, load_batch, without_examples
from perennial.learner.versions.rollback_job import take_back_interrupted
from perennial.learner.versions.version_writer import VersionWriter
from perennial.storage.errors import ConflictError, PerennialError, StoreUnavailableError
from perennial.storage.objects.keys import blob_key, digest_of
from perennial.storage.objects.object_store import put_blob
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.history.collected import load_collected
from perennial.storage.registry.history.rebuilt_steps import RebuiltStep
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.pending_deletes import (
    clear_pending_deletes,
    list_pending_deletes,
    load_pending_deletes,
    record_pending_deletes,
)
from perennial.storage.registry.quarantine import (
    LegalHold,
    load_quarantine,
    update_quarantine,
)
from perennial.storage.registry.refused_examples import add_refused_examples, remove_refused_examples
from perennial.storage.registry.registry import AliasState, Head, Publication
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.models import ForgetRequested

_log = logging.getLogger("perennial.learner")


@dataclass(frozen=True)
class _Scope:
    """The examples and micro-batches that one attempt forgets.

    Attributes:
        found: every stored example of the adapter.
        text_hashes: hashes of the texts that must never be learned again.
        learned: examples to remove from micro-batches of versions.
        unlearned: examples to remove from micro-batches of refused, interrupted and waiting jobs.
        depending: versions that depend on revoked versions of other adapters.
    """

    found: FoundExamples
    text_hashes: frozenset[str]
    learned: RemovedOffsets
    unlearned: RemovedOffsets
    depending: Dependencies

    @classmethod
    def of(cls, found: FoundExamples, target: ForgetTarget, depending: Dependencies | None = None) -> _Scope:
        hashes = target.hashes_to_suppress(found.all())
        return cls(
            found,
            hashes,
            learned=target.removed_offsets(found.learned, hashes),
            unlearned=target.removed_offsets({**found.refused, **found.unfinished, **found.waiting}, hashes),
            depending=depending or Dependencies(),
        )

    def removed_offsets(self) -> RemovedOffsets:
        return {**self.learned, **self.unlearned}


class ForgetExecutor:
    """Runs forget jobs.

    Args:
        writer: the adapter's versions and the updater.
        now: wall clock, for statuses.
        failpoint: called with a name at each step where fault tests may stop the process.
        publish: called with each event that must be published before the job ends.
        progress: called after each rebuilt update and each step of its training.
        should_stop: asked before each update that is rebuilt; True ends the job without a result.
    """

    def __init__(
        self,
        writer: VersionWriter,
        now: Callable[[], datetime],
        failpoint: Callable[[str], None],
        publish: Callable[[AdapterUpdate], None] = lambda _: None,
        progress: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._writer = writer
        self._registry = writer.registry
        self._store = writer.registry.store
        self._now = now
        self._failpoint = failpoint
        self._publish = publish
        self._report = ForgetReporter(writer, now)
        self._rebuilder = UpdateRebuilder(writer, progress, now, failpoint, should_stop)

    def forget(self, job: ForgetRequested, alias: str) -> JobResult:
        """Make the adapter as if it had never seen the examples; delete their text and every state that knew them.

        A job with `prepare` only rebuilds ahead of time: it changes and publishes nothing. The caller publishes the
        result's event and statuses, and records its completion when they are confirmed.

        Args:
            job: the job.
            alias: the alias that the new version is published under; every other alias that served an affected
                version is moved, too.

        Returns:
            The result; its outcome is `held` where a legal hold covers an example of the job: nothing was done.

        Raises:
            JobError: the job can never be done.
            JobInterruptedError: the process is to stop; the job's next run goes on from what was rebuilt.
            StoreError: the store failed.
        """
        if not job.prepare:
            # Before the first attempt only: what comes in between two attempts is forgotten by the later one.
            retry_on_conflict(
                self._registry, job.adapter, lambda: take_back_interrupted(self._writer, job.adapter, alias)
            )
            return retry_on_conflict(self._registry, job.adapter, lambda: self._attempt(job, alias))
        try:
            return retry_on_conflict(self._registry, job.adapter, lambda: self._prepare(job, alias))
        except (JobInterruptedError, StoreUnavailableError):
            raise
        except PerennialError as error:  # the request itself does not fail: its own job will say what is wrong
            _log.warning("%s cannot be rebuilt ahead of time, only when it is due: %s", job.request_id, error)
            return JobResult("unchanged", None, None)

    def give_up(self, job: ForgetRequested) -> None:
        """Delete what an attempt left in the store that did not end, for a job that will never be done.

        Raises:
            StoreError: the store failed.
        """
        self._drop_unpublished(job)
        clear_pending_deletes(self._store, job.adapter, job.job_id)

    def _prepare(self, job: ForgetRequested, alias: str) -> JobResult:
        """Rebuild what the job will need, and record it as progress."""
        began = time.perf_counter()
        quarantine = load_quarantine(self._store, job.adapter)
        head = self._writer.head(job.adapter)
        if head is not None and not is_done(quarantine, job):
            history = load_history(self._registry, job.adapter, head)
            target = ForgetTarget(job, quarantine, self._store)
            found = find_examples(self._store, job.adapter, history, target)
            self._sweep_progress(job.adapter)
            scope = _Scope.of(found, target)
            if history is not None and scope.learned and not target.is_held(found.all()):
                self._rebuilder.rebuild(job, self._plan(history, job.adapter, scope), alias)
        return JobResult("unchanged", None, None, stage_s={"forget": time.perf_counter() - began})

    def _attempt(self, job: ForgetRequested, alias: str) -> JobResult:
        began = time.perf_counter()
        self._registry.converge(job.adapter, alias)
        quarantine = load_quarantine(self._store, job.adapter)
        head = self._writer.head(job.adapter)
        history = load_history(self._registry, job.adapter, head) if head else None
        if history is not None:
            history = complete_index(self._registry, job.adapter, history)
        if is_done(quarantine, job):
            # Another learner may have done the job before this one deleted its own blobs.
            self._delete(job, self._sweep_progress(job.adapter))
            return self._report.result(job, alias, began)
        target = ForgetTarget(job, quarantine, self._store)
        found = find_examples(self._store, job.adapter, history, target)
        if target.is_held(found.all()):
            return self._held(job, alias, found.all())
        depending = revoked_dependencies(self._registry, job, history) if history is not None else Dependencies()
        scope = _Scope.of(found, target, depending)
        self._suppress_unlearned(job, scope)
        affected: frozenset[str] = frozenset()
        if head is not None and history is not None and (scope.learned or depending.versions):
            affected = self._forget_learned(job, alias, head, history, scope, quarantine.holds)
        if scope.learned or scope.unlearned:
            self._recheck_holds(job, quarantine.holds, history, scope.removed_offsets())
            leave_out_of_waiting(self._store, job.adapter, scope.unlearned)
            self._keep_held(job, {**found.learned, **found.refused}, scope.removed_offsets())
        self._let_return(job, found, history)
        # What other jobs have made so far may lie over a revoked version; which, only its manifests say. It only saves time.
        depends = bool(depending.versions) or names_no_example(job)
        progress = self._sweep_progress(job.adapter, drop=lambda _: depends)
        self._delete(job, progress - scope.unlearned.keys())
        # A version that took a state over before this deletion kept its blobs.
        self._require_no_later_version(job, affected)
        self._failpoint("learner.forget_deleted")
        return self._report.result(job, alias, began, held_requests(found.all()), affected)

    # ---- phases

    def _held(self, job: ForgetRequested, alias: str, matches: Sequence[ExampleMatch]) -> JobResult:
        """Return the result of a job that a hold stops; undo what an earlier attempt had half made."""
        status = self._report.held(job, matches)
        if load_pending_deletes(self._store, job.adapter, job.job_id) is None:
            return JobResult("held", None, None, statuses=(status,))
        # The hold came after an attempt had begun. Report where the alias was moved to, and delete what was half made:
        # it may hold the text of other examples.
        self._drop_unpublished(job)
        event = self._writer.current_alias_event(job.adapter, alias)
        return JobResult("held", None, event, statuses=(status,), completion=Completion(job.adapter, job.job_id))

    def _suppress_unlearned(self, job: ForgetRequested, scope: _Scope) -> None:
        """Record the micro-batches of jobs that no version names for deletion, and suppress the erased texts."""
        if scope.unlearned:
            counts = counts_by_request(job, scope.found.all())
            record_pending_deletes(self._store, job.adapter, job.job_id, scope.unlearned, counts)
            self._suppress(job, scope)

    def _forget_learned(
        self,
        job: ForgetRequested,
        alias: str,
        head: Head,
        history: History,
        scope: _Scope,
        holds: Sequence[LegalHold],
    ) -> frozenset[str]:
        """Take the examples out of the adapter's weights.

        The served version stays until the rebuilt one is published, except in an emergency. Where no update has to be
        rebuilt, a clean state is ready at once.

        Returns:
            The versions whose state knew the examples.
        """
        matches = scope.found.all()
        plan = self._plan(history, job.adapter, scope)
        self._failpoint("learner.forget_plan")
        self._record_pending_deletes(job, history, plan, matches)
        self._suppress(job, scope)
        if job.emergency or not plan.steps:
            head = self._serve_clean_state(job, alias, head, history, plan)
        self._failpoint("learner.forget_quarantine")
        if plan.steps:
            rebuilt = self._rebuilder.rebuild(job, plan, alias).step
            self._failpoint("learner.forget_replayed")
            self._recheck_holds(job, holds, history, scope.removed_offsets())
            self._rebuilder.settle_examples(plan, rebuilt)
            self._publish_rebuilt(job, alias, head, plan, rebuilt, count_of(job, matches))
        self._failpoint("learner.forget_published")
        self._revoke(job, history, plan.affected_versions)
        self._require_no_later_version(job, plan.affected_versions)
        return plan.affected_versions

    def _plan(self, history: History, adapter: str, scope: _Scope) -> RebuildPlan:
        collected = load_collected(self._store, adapter).all
        depending = scope.depending
        return plan_rebuild(history, scope.learned, collected, depending.versions, drops_start=depending.drops_start)

    def _record_pending_deletes(
        self, job: ForgetRequested, history: History, plan: RebuildPlan, matches: Sequence[ExampleMatch]
    ) -> None:
        """Persist which blobs this job will delete and how many examples each request had.

        Written before any change, so that a job that runs again deletes the same blobs. A request that also asks for
        held examples is not counted: this job does not complete it.
        """
        digests = set(plan.removed_offsets)
        for version in plan.affected_versions:
            manifest = history.manifests[version]
            # Other adapters may use the same general text, which holds nothing of anybody.
            kept = {manifest.batch, manifest.general}
            digests |= {ref.digest for ref in manifest.blobs() if ref not in kept}
        record_pending_deletes(self._store, job.adapter, job.job_id, digests, counts_by_request(job, matches))

    def _suppress(self, job: ForgetRequested, scope: _Scope) -> None:
        update_quarantine(self._store, job.adapter, lambda found: found.suppressing(scope.text_hashes))

    def _serve_clean_state(
        self, job: ForgetRequested, alias: str, head: Head, history: History, plan: RebuildPlan
    ) -> Head:
        """Serve the state from before the examples' first use, or nothing, in place of every contaminated version.

        The newest version must not be contaminated either: later updates would start from it.

        Returns:
            The head afterwards.
        """
        serving = [s for s in self._registry.aliases(job.adapter) if s.version in plan.contaminated_versions]
        if serving or head.version in plan.contaminated_versions:
            clean = plan.last_clean
            target = clean.manifest if clean and clean.manifest.optimizer else None
            parent = state_version(clean) if target else None
            manifest = self._writer.carry_forward_manifest(
                head, target, parent, "quarantine", job.job_id, revocation_reason(job)
            )
            publication = self._publish_manifest(manifest, target, alias)
            self._move(job, alias, serving, publication)
            head = Head(publication.manifest.seq, publication.version, publication.manifest)
        self._revoke(job, history, plan.contaminated_versions)
        state = self._registry.alias(job.adapter, alias)
        if state is not None:  # also where an earlier attempt moved the alias and was interrupted before publishing it
            self._publish(alias_event(self._registry, state))
        return head

    def _publish_rebuilt(
        self,
        job: ForgetRequested,
        alias: str,
        head: Head,
        plan: RebuildPlan,
        step: RecordedVersion | None,
        examples: int,
    ) -> None:
        """Publish the state that the rebuilt updates lead to, and point every alias of an affected version at it.

        Raises:
            ConflictError: another learner published a version meanwhile. The next attempt plans again and trains only
                what is new.
        """
        target = step.manifest if step is not None and step.manifest.optimizer else None
        parent = step.version if step else None
        manifest = self._writer.carry_forward_manifest(
            head, target, parent, "forget", job.job_id, revocation_reason(job)
        )
        figures = GateFigures(forgotten_examples=examples)
        elsewhere = sum(
            bool(trained_offsets(each.manifest)) and each.manifest.code != self._writer.code for each in plan.steps
        )
        if elsewhere:
            figures = figures.merged(GateFigures(other_engine_updates=elsewhere))
        manifest = manifest.model_copy(update={"gate": manifest.gate.merged(figures)})
        aliases = list(self._registry.aliases(job.adapter))
        publication = self._publish_manifest(manifest, target, alias)
        stale = {*plan.affected_versions, head.version} - {publication.version}
        self._move(job, alias, [state for state in aliases if state.version in stale], publication)

    def _publish_manifest(self, manifest: Manifest, target: Manifest | None, alias: str) -> Publication:
        """Publish a version that takes over the target's state, or without a target the adapter's initial state."""
        blobs = {} if target else self._writer.blobs_of_nothing(manifest)
        publication = self._registry.publish(manifest, blobs.values(), self._writer.verifier(blobs), alias)
        index_version(self._registry, publication.version, publication.manifest)
        return publication

    def _move(self, job: ForgetRequested, alias: str, states: Sequence[AliasState], publication: Publication) -> None:
        """Point these aliases at the published version, or retire them where it has nothing to serve."""
        manifest = publication.manifest
        for state in states:
            if manifest.outcome == "promoted":
                moved = self._registry.swap_alias(manifest, publication.version, state.alias)
            else:
                moved = self._registry.retire(job.adapter, state.alias, manifest.reason, state.version)
            if moved is not None and state.alias != alias:  # the job's own alias is in its result
                self._publish(alias_event(self._registry, moved))

    def _revoke(self, job: ForgetRequested, history: History, versions: frozenset[str]) -> None:
        for version in sorted(versions & history.published):
            if history.manifests[version].outcome == "promoted":
                self._registry.revoke(job.adapter, version, revocation_reason(job))

    def _require_no_later_version(self, job: ForgetRequested, affected: frozenset[str]) -> None:
        """Look for versions that took over a state that is forgotten.

        Rollbacks of the command line and of retain do not wait for the learner: one may have been published after the
        plan was made, and its state would be kept and served.

        Raises:
            ConflictError: there is one. The next attempt plans with it and trains only what is new.
        """
        history = load_history(self._registry, job.adapter) if affected else None
        if history is not None and history.descendants(affected) - affected:
            raise ConflictError(f"a version that {job.request_id} forgets was taken over meanwhile")

    def _recheck_holds(
        self, job: ForgetRequested, known: Sequence[LegalHold], history: History | None, removed_offsets: RemovedOffsets
    ) -> None:
        """Look for new holds before anything is deleted: a rebuild takes its time.

        Raises:
            ConflictError: a hold came that covers an example to remove. The job starts over; what was published stays,
                and so does the text.
        """
        quarantine = load_quarantine(self._store, job.adapter)
        if quarantine.holds == known:
            return
        target = ForgetTarget(job, quarantine, self._store)
        found = find_examples(self._store, job.adapter, history, target)
        matches = found.by_batch()
        newly_held = any(
            match.held and match.origin_offset in offsets
            for digest, offsets in removed_offsets.items()
            for match in matches.get(digest, ())
        )
        if newly_held:
            if not target.is_held(found.all()):
                clear_pending_deletes(self._store, job.adapter, job.job_id)
            raise ConflictError(f"a hold came while {job.request_id} was carried out", remedy="release it first")

    def _keep_held(self, job: ForgetRequested, matches: BatchMatches, removed_offsets: RemovedOffsets) -> None:
        """Store each micro-batch that the job deletes again, without the removed examples, if a hold covers any of the rest.

        A rebuild stores only the micro-batches that it trains again. A held example may also be in a micro-batch that
        the rebuild leaves out, or that belongs to a refused job. What is left of such a micro-batch is recorded as a
        refused job's, so that later forgettings find it.
        """
        for digest, offsets in removed_offsets.items():
            if not any(match.held and match.origin_offset not in offsets for match in matches.get(digest, ())):
                continue
            batch = load_batch(self._store, digest)
            if batch is not None:
                body = batch_to_bytes(without_examples(batch, offsets))
                kept = digest_of(body)
                record_pending_deletes(self._store, job.adapter, f"kept {kept}", [kept], refused=True)
                put_blob(self._store, body)

    def _let_return(self, job: ForgetRequested, found: FoundExamples, history: History | None) -> None:
        """List what was removed as refused, so that it may be published again as it is; take off the list what was erased.

        Intake would drop the next publication as a duplicate of one that is not learned any more. An example that is
        still learned from another publication is not listed.
        """
        matches = found.all()
        removed = {match.example_id for match in matches if match.request_id is not None}
        erased = {match.example_id for match in matches if match.request_id is not None and match.erased}
        kept = {match.example_id for match in matches if match.request_id is None}
        if history is not None:
            unread = {node.batch for node in history.versions.values() if node.batch is not None} - found.learned.keys()
            kept.update(row["example_id"] for digest in unread for row in history.rows(digest) or ())
        remove_refused_examples(self._store, job.adapter, erased)
        add_refused_examples(self._store, job.adapter, removed - erased - kept, int(self._now().timestamp() * 1000))

    def _delete(self, job: ForgetRequested, keep: Collection[str], *, unpublished: bool = False) -> None:
        """Delete the job's pending blobs from the store and from this process's memory."""
        deleted = delete_unreferenced(self._registry, job.adapter, job.job_id, unpublished=unpublished, keep=keep)
        self._writer.drop_cached(deleted)
        if deleted:
            for pending in list_pending_deletes(self._store, job.adapter):
                if pending.refused and deleted.issuperset(pending.digests):  # nothing is left to search
                    clear_pending_deletes(self._store, job.adapter, pending.job_id)

    def _drop_unpublished(self, job: ForgetRequested) -> None:
        """Delete what attempts of a job left behind that goes no further, its progress included."""
        progress = self._sweep_progress(job.adapter, drop=lambda step: step.job_id == job.job_id)
        self._delete(job, progress, unpublished=True)

    def _sweep_progress(self, adapter: str, drop: Callable[[RebuiltStep], bool] = lambda _: False) -> set[str]:
        """Remove progress that no rebuild can use any more; return the blobs of the rest."""

        def delete(digests: Collection[str]) -> None:
            for digest in sorted(digests):
                self._store.delete(blob_key(digest))
            self._writer.drop_cached(digests)

        def history() -> History | None:
            return load_history(self._registry, adapter)

        return sweep_steps(self._registry, adapter, history, self._now(), drop=drop, delete_blobs=delete)
