"""Rebuild recorded updates without the examples that are to be forgotten.

A rebuild trains the recorded schedule again from the last state that never saw the examples, with each update's own
recipe, seed, cut number and thread count. The same store gives the same bytes, so a job that was interrupted and runs
again makes the same versions; updates that it has made already are not trained again (see `rebuild_progress`).

A rebase trains the whole schedule on another base, with this worker's own recipe: see `rebase_executor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any

from perennial.learner.bases.compute_dtype import DTYPES
from perennial.learner.forgetting.rebuild_plan import RebuildPlan, RemovedOffsets, state_version, trained_offsets
from perennial.learner.forgetting.rebuild_progress import find_step, record_step, step_key
from perennial.learner.model.tokenization import ExampleError
from perennial.learner.training.personal.shared_versions import VersionBeneath
from perennial.learner.training.recipe import DEVICE_DTYPE, Recipe, UnknownFieldError
from perennial.learner.training.state import StateRefs, TrainingState, to_blobs
from perennial.learner.training.thinning.contradictions import OUTVOTED
from perennial.learner.training.update import Updater, UpdateResult
from perennial.learner.versions.history import RecordedVersion
from perennial.learner.versions.job_result import JobError, JobInterruptedError
from perennial.learner.versions.micro_batches import (
    BatchRows,
    OriginOffset,
    batch_to_bytes,
    example_ids_of,
    load_batch,
    origin_offset,
    skipped_example,
    without_examples,
)
from perennial.learner.versions.version_writer import VersionWriter
from perennial.learner.versions.votes import NO_TEXT_ON_BASE, reasons_not_learned, vote
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import put_blob
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.history.example_ids import with_keyed_ids
from perennial.storage.registry.history.rebuilt_steps import RebuiltStep
from perennial.storage.registry.manifest import BlobRef, Manifest, OtherVersion, SkippedExample, Start
from perennial.storage.registry.refused_examples import add_refused_examples, remove_refused_examples
from perennial.storage.registry.registry import Head
from perennial.streams.events.models import Batch, ExampleAccepted, ForgetRequested, RebaseRequested


@dataclass(frozen=True)
class RebuiltState:
    """The state and position that a rebuild has reached.

    Attributes:
        step: the last version of the rebuilt schedule; None before its first one. Its manifest names the state's blobs.
        version: the version that trained the state; None if it is the adapter's initial state.
        seed: the seed of the adapter's initial state.
        start: what the initial state is, where users' adapters may be learned from.
    """

    step: RecordedVersion | None
    version: str | None
    seed: int
    start: Start | None = None


@dataclass(frozen=True)
class _RemainingUpdate:
    """The part of a recorded update that is trained again.

    Attributes:
        recorded: the version as it was made.
        cut: the cut number of its job.
        batch: its micro-batch without the removed examples.
        ref: the blob of that micro-batch.
        new_body: the blob's bytes, to be stored; None if nothing was removed.
        examples: what is trained.
        outvoted: corrections that are not trained because others outvote them.
        removed: the offsets that were removed from it.
        no_text: examples that have nothing to train under another base's tokenizer.
    """

    recorded: Manifest
    cut: int
    batch: Batch
    ref: BlobRef
    new_body: bytes | None
    examples: list[ExampleAccepted]
    outvoted: list[ExampleAccepted]
    removed: set[OriginOffset]
    no_text: list[ExampleAccepted]

    @property
    def blobs(self) -> dict[str, bytes]:
        """The micro-batch to store, by digest; none if nothing was removed."""
        return {} if self.new_body is None else {self.ref.digest: self.new_body}


class UpdateRebuilder:
    """Rebuilds the updates of an adapter.

    Args:
        writer: trains and prepares manifests.
        progress: called after each update, and after each step of its training.
        now: wall clock, for the records of progress.
        failpoint: called with a name at each step where fault tests may stop the process.
        should_stop: asked before each update is trained; True ends the rebuild.
        anew: trains every update, in place of an updater with the recipe and the base that the update names.
    """

    def __init__(
        self,
        writer: VersionWriter,
        progress: Callable[[], None],
        now: Callable[[], datetime],
        failpoint: Callable[[str], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        anew: Updater | None = None,
    ) -> None:
        self._anew = anew
        self._total = 0
        self._writer = writer
        self._registry = writer.registry
        self._store = writer.registry.store
        self._progress = progress
        self._now = now
        self._failpoint = failpoint
        self._should_stop = should_stop

    def rebuild(self, job: ForgetRequested | RebaseRequested, plan: RebuildPlan, alias: str) -> RebuiltState:
        """Rebuild the affected updates without the removed examples.

        Args:
            job: the job.
            plan: the updates and the examples to leave out.
            alias: the alias that says which version of a shared adapter is live.

        Returns:
            The state after the last update.

        Raises:
            JobError: an update's micro-batch is gone, or its recipe does not fit this worker.
            JobInterruptedError: the process is to stop; the updates made so far stay for the next attempt.
        """
        steps = [step for step in plan.steps if trained_offsets(step.manifest) or step.manifest.skipped]
        current = self._start(plan, steps)
        self._total = len(steps)
        try:
            for step in steps:
                current = self.rebuild_update(job, current, step, plan.removed_offsets, alias)
                self._progress()
        finally:
            self._writer.use_threads(self._writer.threads)
        return current

    def settle_examples(self, plan: RebuildPlan, reached: RecordedVersion | None) -> None:
        """List the examples that the rebuilt updates do not learn as refused, and take off the list those that they do.

        Without the removed examples, others may win the vote or pass the gate. Intake drops a publication of what is
        learned as a duplicate, and lets pass what is listed. Called before the result is published: an attempt that ends
        in between does it again.

        Args:
            plan: the updates that were rebuilt.
            reached: the last of them; None if nothing was left.
        """
        if reached is None:
            return
        last_clean = plan.last_clean.version if plan.last_clean else None
        learned, refused = set[str](), set[str]()
        adapter = reached.manifest.adapter
        version: str | None = reached.version
        while version is not None and version != last_clean:
            manifest = self._registry.manifest(adapter, version)
            reasons = reasons_not_learned(manifest)
            judged = [item for item in manifest.skipped if item.reason in reasons]
            if manifest.batch is not None and (judged or manifest.learned):
                self._progress()
                batch = load_batch(self._store, manifest.batch.digest)
                learned.update(example_ids_of(batch, manifest.learned))
                refused.update(example_ids_of(batch, judged))
            version = manifest.head
        if learned:
            remove_refused_examples(self._store, adapter, learned)
        if refused - learned:
            add_refused_examples(self._store, adapter, refused - learned, int(self._now().timestamp() * 1000))

    def _start(self, plan: RebuildPlan, steps: Sequence[RecordedVersion]) -> RebuiltState:
        seed = steps[0].manifest.seed if steps and self._anew is None else self._writer.updater.recipe.seed
        start = steps[0].manifest.start if steps else None
        if start is not None and (plan.drops_start or self._anew is not None):
            start = start.bare
        return RebuiltState(plan.last_clean, state_version(plan.last_clean), seed, start)

    def _state(self, adapter: str, reached: RebuiltState) -> TrainingState:
        """Load the state that the rebuild has reached; not before an update is trained from it."""
        if reached.step is None:
            return self._writer.initial_state(adapter, reached.seed, reached.start)
        manifest = reached.step.manifest
        return self._writer.state_at(Head(manifest.seq, reached.step.version, manifest), adapter)[0]

    def rebuild_update(
        self,
        job: ForgetRequested | RebaseRequested,
        before: RebuiltState,
        step: RecordedVersion,
        removed_offsets: RemovedOffsets,
        alias: str,
    ) -> RebuiltState:
        """Train one recorded update again, unless it was made before; return `before` if nothing is left of it."""
        removed = _removed(step, removed_offsets)
        if trained_offsets(step.manifest) <= removed:
            return self._keep_skipped(job, before, step, removed)
        over = self._beneath(step.manifest, alias)
        key = self._key(job, before, step, removed, over)
        made = find_step(self._registry, key)
        if made is not None:
            return _reached(before, made)
        if self._should_stop():
            raise JobInterruptedError(
                f"the rebuild of {job.adapter} stops before {step.version}; it will go on from there"
            )
        update = self._remaining(step, removed)
        if not update.examples:
            return self._keep_skipped(job, before, step, removed, update if update.no_text else None)
        updater = self._writer.over(self._updater_of(update.recorded), over)
        state = self._state(job.adapter, before)
        found = vote(updater.recipe, update.examples, state.replay_index, self._writer.rows.example)
        update = replace(update, examples=found.trained, outvoted=found.outvoted)
        if not update.examples:
            return self._keep_skipped(job, before, step, removed, update)
        result = self._train(job, state, update, updater)
        blobs = update.blobs
        if result.outcome == "promoted":
            state = result.state
            refs, state_blobs = to_blobs(state)
            blobs |= state_blobs
        elif before.step is None:
            refs, state_blobs = to_blobs(state)
            blobs |= state_blobs
        else:
            refs = StateRefs.of_manifest(before.step.manifest)
        manifest = self._manifest(before, update, updater, result, refs, over)
        self._failpoint("learner.forget_trained")
        new_batch = None if update.new_body is None else update.ref.digest
        self._store_step(job, key, step, new_batch, manifest, blobs)
        self._writer.cache_state(refs, state)
        self._failpoint("learner.forget_step")
        return _reached(before, RecordedVersion(manifest.digest(), manifest))

    def _keep_skipped(
        self,
        job: ForgetRequested | RebaseRequested,
        before: RebuiltState,
        step: RecordedVersion,
        removed: set[OriginOffset],
        update: _RemainingUpdate | None = None,
    ) -> RebuiltState:
        """Record what an update skipped, where nothing is left in it to train; return `before` if it skipped nothing.

        Ratings and duplicates beside the removed examples are not asked to be forgotten: they stay on record.
        """
        recorded = step.manifest
        judged = trained_offsets(recorded) | removed
        skipped = [item for item in recorded.skipped if item.origin_offset not in judged]
        batch, blobs = None if removed else recorded.batch, dict[str, bytes]()
        if update is not None:  # all of it is outvoted, and may be given votes by a later forgetting
            skipped += _left_out(update)
            batch, blobs = update.ref, update.blobs
        if not skipped:
            return before
        key = self._key(job, before, step, removed)
        made = find_step(self._registry, key)
        if made is not None:
            return _reached(before, made)
        if before.step is None:
            refs, state_blobs = to_blobs(self._state(job.adapter, before))
            blobs |= state_blobs
        else:
            refs = StateRefs.of_manifest(before.step.manifest)
        manifest = self._following(before, recorded).model_copy(
            update={
                "outcome": "unchanged", "reason": "nothing-to-learn", "code": self._writer.code,
                "batch": batch, "learned": [], "skipped": skipped,
                **refs.manifest_fields(), "gate": GateFigures(), "probes": {}, "tokens": 0,
                "pass_adapters": 1,
                "published_from_ms": None, "published_to_ms": None,
            }
        )  # fmt: skip
        manifest = with_keyed_ids(manifest, self._writer.text_keys.of(job.adapter))
        new_batch = update.ref.digest if update is not None and update.blobs else None
        self._store_step(job, key, step, new_batch, manifest, blobs)
        return _reached(before, RecordedVersion(manifest.digest(), manifest))

    def _store_step(
        self,
        job: ForgetRequested | RebaseRequested,
        key: str,
        step: RecordedVersion,
        new_batch: str | None,
        manifest: Manifest,
        blobs: Mapping[str, bytes],
    ) -> None:
        """Record a rebuilt update as progress, then store its blobs and its manifest."""
        made = RebuiltStep(
            adapter=job.adapter,
            job_id=job.job_id,
            recorded=step.version,
            rebuilt=manifest.digest(),
            batch=new_batch,
            blobs=sorted(blobs),
            made_at=self._now(),
            total=self._total,
        )
        record_step(self._store, key, made)
        for body in blobs.values():
            put_blob(self._store, body)
        self._registry.record(manifest)

    def _key(
        self,
        job: ForgetRequested | RebaseRequested,
        before: RebuiltState,
        step: RecordedVersion,
        removed: set[OriginOffset],
        over: VersionBeneath | None = None,
    ) -> str:
        fields = self.fields_anew(before.start, over.ref if over else None)
        general = fields.pop("general", None)
        anew: list[object] = [fields, general.digest if general else None] if fields else []
        if before.step is None and before.start is not None and before.start.weights is not None:
            anew.append(before.start.weights.digest)
        if over is not None:
            anew.append(over.ref.version)
        return step_key(job.adapter, before.step, before.seed, step.version, removed, anew)

    def fields_anew(self, start: Start | None, over: OtherVersion | None) -> dict[str, Any]:
        """Return the fields of a manifest that name base, recipe and engine; none where those of the updates stay.

        Args:
            start: what the adapter begins with, where users' adapters may be learned from.
            over: the shared version that lies beneath the update; None: the base alone.
        """
        if self._anew is None:
            return {}
        recipe, writer = self._anew.recipe, self._writer
        return {
            "base_model": writer.base.name, "base_sha256": writer.base.digest, "rank": recipe.rank,
            "config": recipe.config_of(start, over), "seed": recipe.seed, "threads": writer.threads,
            "general": self._anew.general.ref,
        }  # fmt: skip

    def _following(self, before: RebuiltState, recorded: Manifest, over: OtherVersion | None = None) -> Manifest:
        """Return the recorded manifest at its place among the rebuilt updates."""
        return recorded.model_copy(
            update={
                "seq": before.step.manifest.seq + 1 if before.step else 1, "kind": "replayed", "parent": before.version,
                "head": before.step.version if before.step else None, "start": before.start, "over": over, **self.fields_anew(before.start, over),
            }
        )  # fmt: skip

    def _beneath(self, recorded: Manifest, alias: str) -> VersionBeneath | None:
        """Return the shared version that an update is trained over: the recorded one or, where that is gone, the live one."""
        if self._anew is not None:
            return self._writer.beneath(recorded.adapter, alias)
        if recorded.over is None:
            return None
        shared = self._writer.shared
        return shared.recorded(recorded.over) or shared.live(recorded.adapter, recorded.over.adapter, alias)

    def _remaining(self, step: RecordedVersion, removed: set[OriginOffset]) -> _RemainingUpdate:
        """Return what is left of an update. Raise JobError if its micro-batch is not stored."""
        recorded = step.manifest
        if recorded.batch is None or recorded.cut is None:
            raise JobError("missing-batch", "an update names no micro-batch", got=step.version)
        batch = load_batch(self._store, recorded.batch.digest)
        if batch is None:
            raise JobError("missing-batch", "an update's micro-batch is not stored", got=recorded.batch.digest)
        ref, new_body = recorded.batch, None
        if removed:
            batch = without_examples(batch, removed)
            new_body = batch_to_bytes(batch)
            ref = BlobRef(digest=digest_of(new_body), size_bytes=len(new_body))
        trained = trained_offsets(recorded) - removed
        examples = [example for example in batch.examples if origin_offset(example) in trained]
        no_text = self._without_rows(recorded, examples)
        examples = [example for example in examples if example not in no_text] if no_text else examples
        return _RemainingUpdate(recorded, recorded.cut, batch, ref, new_body, examples, [], removed, no_text)

    def _without_rows(self, recorded: Manifest, examples: Sequence[ExampleAccepted]) -> list[ExampleAccepted]:
        """Return the examples that have nothing to train under the base on which the update is trained."""
        if self._anew is not None:
            return [each for each in examples if not _has_rows(self._anew, each)]
        known = {item.origin_offset for item in recorded.skipped if item.reason == NO_TEXT_ON_BASE}
        return [each for each in examples if origin_offset(each) in known]

    def _updater_of(self, recorded: Manifest) -> Updater:
        """Return an updater with the recipe and the general text that the version was made by."""
        if self._anew is not None:
            return self._anew
        updater = self._writer.updater
        try:
            recipe = Recipe.recorded(recorded.config)
        except KeyError as error:
            raise JobError("recipe-mismatch", "an update's recipe is incomplete", got=f"no {error}") from error
        except UnknownFieldError as error:
            raise JobError(
                "recipe-mismatch", "an update was made by a later release, with settings that this one does not know",
                got=str(error), allowed=", ".join(field.name for field in fields(Recipe)),
                remedy="upgrade this learner, then unpark the adapter",
            ) from error  # fmt: skip
        if (recipe.rank, recipe.alpha) != (updater.recipe.rank, updater.recipe.alpha):
            raise JobError(
                "recipe-mismatch", "an update was made with another LoRA than this worker's",
                got=f"rank {updater.recipe.rank}, alpha {updater.recipe.alpha}",
                allowed=f"rank {recipe.rank}, alpha {recipe.alpha}",
            )  # fmt: skip
        if recipe.dtype not in {DEVICE_DTYPE, *DTYPES}:
            raise JobError(
                "recipe-mismatch", "an update was made in a number format that this worker does not know",
                got=recipe.dtype, allowed=", ".join((DEVICE_DTYPE, *DTYPES)),
            )  # fmt: skip
        general = self._writer.general_text_of(recorded)
        alone = updater.shared and updater.shared.alone()
        return replace(updater, recipe=recipe, general=general.cut_to(recipe.row_tokens), shared=alone)

    def _train(
        self, job: ForgetRequested | RebaseRequested, state: TrainingState, update: _RemainingUpdate, updater: Updater
    ) -> UpdateResult:
        rows = self._writer.rows
        if updater.recipe.row_tokens != self._writer.updater.recipe.row_tokens:
            rows = BatchRows(self._store, updater.rows)
        rows.put(update.ref.digest, update.batch.examples)
        self._writer.use_threads(update.recorded.threads if self._anew is None else self._writer.threads)
        return updater.update(
            state,
            update.examples,
            adapter=job.adapter,
            cut=update.cut,
            batch=update.ref.digest,
            replayed=rows,
            on_step=self._progress,
        )

    def _manifest(
        self,
        before: RebuiltState,
        update: _RemainingUpdate,
        updater: Updater,
        result: UpdateResult,
        refs: StateRefs,
        over: VersionBeneath | None,
    ) -> Manifest:
        """Return the manifest of a rebuilt update: as recorded, less the removed examples."""
        recorded, promoted = update.recorded, result.outcome == "promoted"
        judged = trained_offsets(recorded) | update.removed
        skipped = [item for item in recorded.skipped if item.origin_offset not in judged]
        skipped += _left_out(update)
        if promoted:
            reason = recorded.reason if recorded.outcome == "promoted" else "replayed"
        else:
            reason = result.reason
            skipped += [skipped_example(example, result.reason) for example in update.examples]
        learned = update.examples if promoted else []
        times = [example.origin.timestamp_ms for example in learned]
        manifest = self._following(before, recorded, over.ref if over else None).model_copy(
            update={
                "outcome": result.outcome, "reason": reason, "code": self._writer.code, "batch": update.ref,
                "learned": self._writer.learned_examples(learned, result.merged, updater),
                "skipped": skipped, **refs.manifest_fields(), "gate": result.gate, "probes": result.probes,
                "tokens": result.tokens, "pass_adapters": result.pass_adapters,
                "published_from_ms": min(times, default=None), "published_to_ms": max(times, default=None),
            }
        )  # fmt: skip
        return with_keyed_ids(manifest, self._writer.text_keys.of(manifest.adapter))


def _has_rows(updater: Updater, example: ExampleAccepted) -> bool:
    try:
        return bool(updater.rows(example))
    except ExampleError:
        return False


def _left_out(update: _RemainingUpdate) -> list[SkippedExample]:
    """Return the manifest's records of the examples that are not trained although they were to be."""
    outvoted = [skipped_example(example, OUTVOTED) for example in update.outvoted]
    return outvoted + [skipped_example(example, NO_TEXT_ON_BASE) for example in update.no_text]


def _removed(step: RecordedVersion, removed_offsets: RemovedOffsets) -> set[OriginOffset]:
    """Return the offsets of the examples that are left out of an update's micro-batch."""
    batch = step.manifest.batch
    return set(removed_offsets.get(batch.digest, ())) if batch is not None else set()


def _reached(before: RebuiltState, made: RecordedVersion) -> RebuiltState:
    promoted = made.version if made.manifest.outcome == "promoted" else before.version
    return RebuiltState(made, promoted, before.seed, before.start)
