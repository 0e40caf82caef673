"""Carries a forgetting out: quarantine, replay without the examples, publish, delete. May be cut off and done again.

Before anything changes, the adapter's tombstone names what is to be deleted; it grows by what the replay makes, so
that an attempt that was cut off leaves nothing behind either. Every version made follows from the store alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from perennial.learner.forgetting.scan import Traces, find_examples
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.training.state import StateRefs, TrainingState, to_blobs
from perennial.learner.training.update import Recipe, Updater, UpdateResult
from perennial.learner.versions.alias_events import alias_event
from perennial.learner.versions.conflict_retry import retry_on_conflict
from perennial.learner.versions.garbage_collection import delete_unreferenced, load_history
from perennial.learner.versions.history import (
    ExampleMatch,
    ForgetTarget,
    History,
    OriginOffset,
    RebuildPlan,
    RecordedVersion,
    batch_to_bytes,
    origin_offset,
    tried_offsets,
    without_examples,
)
from perennial.learner.versions.micro_batches import BatchRows, JobError, load_batch, skipped_example
from perennial.learner.versions.update_job import JobResult, VersionWriter
from perennial.storage.errors import ConflictError
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import put_blob
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.manifest import BlobRef, LearnedExample, Manifest
from perennial.storage.registry.pending_deletes import (
    clear_pending_deletes,
    load_pending_deletes,
    record_pending_deletes,
)
from perennial.storage.registry.quarantine import LegalHold, finish_entry, load_quarantine, update_quarantine
from perennial.storage.registry.quarantine import RequestOutcome as Mark
from perennial.storage.registry.registry import AliasState, Head
from perennial.streams.events.models import (
    AdapterUpdate,
    ExampleAccepted,
    ForgetRequested,
    RetentionProgressed,
    RetentionState,
)

MAX_LOOK_BACK = 256


@dataclass(frozen=True)
class _Made:
    """The last version of a schedule that is made anew, and the state that it has."""

    step: RecordedVersion | None
    promoted: str | None
    state: TrainingState
    refs: StateRefs


class ForgetExecutor:
    """Does forget jobs on a learner's lines.

    tell: takes events that are to be sent before the job is through. progress: called after each update made anew.
    """

    def __init__(
        self,
        lineage: VersionWriter,
        now: Callable[[], datetime],
        failpoint: Callable[[str], None],
        tell: Callable[[AdapterUpdate], None] = lambda _: None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._lineage = lineage
        self._registry = lineage.registry
        self._store = lineage.registry.store
        self._now = now
        self._failpoint = failpoint
        self._tell = tell
        self._progress = progress

    def forget(self, job: ForgetRequested, alias: str) -> JobResult:
        """Make the adapter as if it had never seen the examples, and delete their text and all that knew them.

        Outcome `held`: a hold stands on one of them, nothing was done. The caller sends the event and the statuses,
        then calls `close`. Raises JobError where the job cannot be done, StoreError where the store is at fault.
        """
        return retry_on_conflict(self._registry, job.adapter, lambda: self._attempt(job, alias))

    def _attempt(self, job: ForgetRequested, alias: str) -> JobResult:
        began = time.perf_counter()
        adapter = job.adapter
        self._registry.converge(adapter, alias)
        quarantine = load_quarantine(self._store, adapter)
        entry = quarantine.entry(job.request_id)
        head = self._lineage.head(adapter)
        history = load_history(self._registry, adapter) if head else None
        if entry is not None and entry.done is not None:
            self._lineage.drop(
                delete_unreferenced(self._registry, adapter, job.job_id)
            )  # a rival may have been faster than this
            return self._ended(job, alias, began)
        aim = ForgetTarget(job, quarantine)
        found = find_examples(self._store, adapter, history, aim)
        everything = [trace for group in found.all().values() for trace in group]
        if aim.is_held(everything):
            return self._held(job, alias, everything)
        hashes = aim.hashes(everything)
        gone, unlearned = (
            {digest: places for digest, group in traces.items() if (places := aim.gone(group, hashes))}
            for traces in (found.learned, {**found.refused, **found.left})
        )
        if unlearned:
            record_pending_deletes(self._store, adapter, job.job_id, unlearned)
            update_quarantine(self._store, adapter, lambda found: found.suppressing(hashes))
        if head is not None and history is not None and gone:
            plan = history.plan(gone)
            self._failpoint("learner.forget_plan")
            self._bury(job, history, plan, everything)
            update_quarantine(self._store, adapter, lambda found: found.suppressing(hashes))
            head = self._quarantine(job, alias, head, history, plan)
            self._failpoint("learner.forget_quarantine")
            if plan.steps:
                self._make_anew(job, alias, head, plan, everything)
            self._failpoint("learner.forget_published")
            self._revoke(job, history, plan.touched)
        if gone or unlearned:
            self._heed_holds(job, quarantine.holds, history, {**gone, **unlearned})
            self._keep_held(job, {**found.learned, **found.refused}, {**gone, **unlearned})
        self._lineage.drop(delete_unreferenced(self._registry, adapter, job.job_id))
        self._failpoint("learner.forget_deleted")
        return self._ended(job, alias, began)

    def _held(self, job: ForgetRequested, alias: str, traces: Sequence[ExampleMatch]) -> JobResult:
        count = len({trace.example_id for trace in traces if trace.request_id == job.request_id})
        status = self._status(job, "held", count, None, "a hold stands on it")
        if load_pending_deletes(self._store, job.adapter, job.job_id) is None:
            return JobResult("held", None, None, statuses=(status,))
        # The hold came in mid-way: what was moved is told, what was half made goes, for it may hold other texts.
        self._lineage.drop(delete_unreferenced(self._registry, job.adapter, job.job_id, unpublished=True))
        event = self._lineage.standing(job.adapter, alias)
        lift = partial(clear_pending_deletes, self._store, job.adapter, job.job_id)
        return JobResult("held", None, event, statuses=(status,), close=lift)

    def give_up(self, job: ForgetRequested) -> None:
        """Delete what a job half made that never will be done. Raises StoreError."""
        self._lineage.drop(delete_unreferenced(self._registry, job.adapter, job.job_id, unpublished=True))
        clear_pending_deletes(self._store, job.adapter, job.job_id)

    # ---- looking

    def _heed_holds(
        self,
        job: ForgetRequested,
        known: Sequence[LegalHold],
        history: History | None,
        gone: Mapping[str, Collection[OriginOffset]],
    ) -> None:
        """Look once more before anything is deleted: a replay takes its time, and a hold may have come meanwhile.

        Raises ConflictError where it has, so that all is decided anew; what was published stays, the text too.
        """
        quarantine = load_quarantine(self._store, job.adapter)
        if quarantine.holds == known:
            return
        aim = ForgetTarget(job, quarantine)
        traces = find_examples(self._store, job.adapter, history, aim).all()
        if any(
            trace.held and trace.place in places for digest, places in gone.items() for trace in traces.get(digest, ())
        ):
            if not aim.is_held(trace for group in traces.values() for trace in group):
                clear_pending_deletes(self._store, job.adapter, job.job_id)
            raise ConflictError(f"a hold came while {job.request_id} was carried out", remedy="release it first")

    # ---- changing

    def _keep_held(self, job: ForgetRequested, traces: Traces, gone: Mapping[str, Collection[OriginOffset]]) -> None:
        """Store the rest of a body that is deleted whole where a hold stands on some of it, as a refused job's.

        A replay makes only what was learned anew; a held example beside it may have been skipped, or its job refused.
        """
        for digest, places in gone.items():
            if not any(trace.held and trace.place not in places for trace in traces.get(digest, ())):
                continue
            batch = load_batch(self._store, digest)
            if batch is not None:
                body = batch_to_bytes(without_examples(batch, places))
                kept = digest_of(body)
                record_pending_deletes(self._store, job.adapter, f"kept {kept}", [kept], refused=True)
                put_blob(self._store, body)

    def _bury(self, job: ForgetRequested, history: History, plan: RebuildPlan, traces: Sequence[ExampleMatch]) -> None:
        """Put down what is to be deleted at the end, and how many examples each request had.

        A request that also means what is held is not through with this, so it is not among them.
        """
        held = {trace.wanted_by for trace in traces if trace.held}
        ids: dict[str, set[str]] = {job.request_id: set()}
        for trace in traces:
            if trace.request_id is not None and trace.request_id not in held:
                ids.setdefault(trace.request_id, set()).add(trace.example_id)
        counts = {request_id: len(found) for request_id, found in ids.items()}
        digests = set(plan.gone)
        for version in plan.touched:
            manifest = history.manifests[version]
            digests |= {ref.digest for ref in manifest.blobs() if ref != manifest.batch}
        record_pending_deletes(self._store, job.adapter, job.job_id, digests, counts)

    def _quarantine(self, job: ForgetRequested, alias: str, head: Head, history: History, plan: RebuildPlan) -> Head:
        """Serve the version from before the first use, or nothing, wherever a version that knows is served.

        The head as it then is. The newest version must not know either: later updates would go on from it.
        """
        adapter = job.adapter
        knowing = [state for state in self._registry.aliases(adapter) if state.version in plan.knows]
        if knowing or head.version in plan.knows:
            before = plan.before
            target = before.manifest if before and before.manifest.optimizer else None
            parent = _promoted(before) if target else None
            manifest = self._lineage.passing(head, target, parent, "quarantine", job.job_id, _reason(job))
            blobs = {} if target else to_blobs(self._lineage.initial(adapter, manifest.seed))[1]
            publication = self._registry.publish(manifest, blobs.values(), self._lineage.verifier(blobs), alias)
            self._move(job, knowing, publication.manifest, publication.version)
            head = Head(publication.manifest.seq, publication.version, publication.manifest)
        self._revoke(job, history, plan.knows)
        state = self._registry.alias(adapter, alias)
        if state is not None:  # also where an attempt before this one moved it and could not say so
            self._tell(alias_event(self._registry, state))
        return head

    def _make_anew(
        self, job: ForgetRequested, alias: str, head: Head, plan: RebuildPlan, traces: Sequence[ExampleMatch]
    ) -> None:
        made = self._replay(job, plan)
        self._failpoint("learner.forget_replayed")
        target = None
        if made.step is not None and made.step.manifest.optimizer:
            target = made.step.manifest
        parent = made.step.version if made.step else None
        manifest = self._lineage.passing(head, target, parent, "forget", job.job_id, _reason(job))
        count = len({trace.example_id for trace in traces if trace.request_id == job.request_id})
        manifest = manifest.model_copy(update={"gate": manifest.gate.merged(GateFigures(forgotten_examples=count))})
        blobs = {} if target else to_blobs(self._lineage.initial(job.adapter, manifest.seed))[1]
        aliases = list(self._registry.aliases(job.adapter))
        publication = self._registry.publish(manifest, blobs.values(), self._lineage.verifier(blobs), alias)
        stale = {*plan.touched, head.version} - {publication.version}
        self._move(job, [s for s in aliases if s.version in stale], publication.manifest, publication.version)

    def _move(self, job: ForgetRequested, states: Sequence[AliasState], manifest: Manifest, version: str) -> None:
        """Point these aliases at the version, or at nothing where it has nothing to serve."""
        for state in states:
            if manifest.outcome == "promoted":
                self._registry.swap_alias(manifest, version, state.alias)
            else:
                self._registry.retire(job.adapter, state.alias, manifest.reason, state.version)

    def _revoke(self, job: ForgetRequested, history: History, versions: frozenset[str]) -> None:
        for version in sorted(versions & history.line):
            if history.manifests[version].outcome == "promoted":
                self._registry.revoke(job.adapter, version, _reason(job))

    # ---- replaying

    def _replay(self, job: ForgetRequested, plan: RebuildPlan) -> _Made:
        """Make the touched updates again without the examples, from the last state that never saw them."""
        steps = [step for step in plan.steps if tried_offsets(step.manifest)]
        made = self._start(job.adapter, plan.before, steps)
        try:
            for step in steps:
                made = self._again(job, made, step, plan.gone)
                self._progress()
        finally:
            make_deterministic(self._lineage.threads)
        return made

    def _start(self, adapter: str, before: RecordedVersion | None, steps: Sequence[RecordedVersion]) -> _Made:
        if before is None:
            seed = steps[0].manifest.seed if steps else self._lineage.updater.recipe.seed
            state = self._lineage.initial(adapter, seed)
            return _Made(None, None, state, to_blobs(state)[0])
        manifest = before.manifest
        state, _ = self._lineage.state_at(Head(manifest.seq, before.version, manifest), adapter)
        return _Made(before, _promoted(before), state, StateRefs.of_manifest(manifest))

    def _again(
        self, job: ForgetRequested, made: _Made, step: RecordedVersion, gone: Mapping[str, Collection[OriginOffset]]
    ) -> _Made:
        """One update once more; the same as it was where nothing is left of it."""
        old = step.manifest
        if old.batch is None or old.cut is None:
            raise JobError("missing-batch", "an update names no micro-batch", got=step.version)
        batch = load_batch(self._store, old.batch.digest)
        if batch is None:
            raise JobError("missing-batch", "an update's micro-batch is not stored", got=old.batch.digest)
        places = set(gone.get(old.batch.digest, ()))
        wanted = tried_offsets(old) - places
        ref, blobs = old.batch, {}
        if places:
            batch = without_examples(batch, places)
            body = batch_to_bytes(batch)
            ref = BlobRef(digest=digest_of(body), size_bytes=len(body))
            blobs[ref.digest] = body
        examples = [example for example in batch.examples if origin_offset(example) in wanted]
        if not examples:
            return made
        updater = self._updater(old)
        rows = self._lineage.rows
        if updater.recipe.row_tokens != self._lineage.updater.recipe.row_tokens:
            rows = BatchRows(self._store, updater.rows)
        rows.put(ref.digest, batch.examples)
        make_deterministic(old.threads)
        candidate = updater.update(
            made.state, examples, adapter=job.adapter, cut=old.cut, batch=ref.digest, replayed=rows
        )
        state, refs = made.state, made.refs
        if candidate.outcome == "promoted":
            state = candidate.state
            refs, new = to_blobs(state)
            blobs |= new
        elif made.step is None:
            blobs |= to_blobs(made.state)[1]
        learned = [self._lineage.learned(example, updater) for example in examples]
        manifest = self._manifest(made, step, candidate, examples, learned, ref, refs, places)
        version = manifest.digest()
        record_pending_deletes(self._store, job.adapter, job.job_id, blobs)
        for body in blobs.values():
            put_blob(self._store, body)
        self._registry.record(manifest)
        promoted = version if candidate.outcome == "promoted" else made.promoted
        return _Made(RecordedVersion(version, manifest), promoted, state, refs)

    def _updater(self, manifest: Manifest) -> Updater:
        """The updater with the recipe that the version was made by."""
        updater = self._lineage.updater
        fields = Recipe.__dataclass_fields__
        try:
            recipe = Recipe(**{name: manifest.config[name] for name in fields})  # type: ignore[arg-type]
        except KeyError as error:
            raise JobError("recipe-mismatch", "an update's recipe is not whole", got=f"no {error}") from error
        if (recipe.rank, recipe.alpha) != (updater.recipe.rank, updater.recipe.alpha):
            raise JobError(
                "recipe-mismatch", "an update was made with another LoRA than this worker's",
                got=f"rank {updater.recipe.rank}, alpha {updater.recipe.alpha}",
                allowed=f"rank {recipe.rank}, alpha {recipe.alpha}",
            )  # fmt: skip
        return replace(updater, recipe=recipe, general=updater.general.cut_to(recipe.row_tokens))

    def _manifest(
        self,
        made: _Made,
        step: RecordedVersion,
        candidate: UpdateResult,
        examples: Sequence[ExampleAccepted],
        learned: Sequence[LearnedExample],
        batch: BlobRef,
        refs: StateRefs,
        places: set[OriginOffset],
    ) -> Manifest:
        """What is recorded of an update made anew: as the one it replaces, less the examples."""
        old, promoted = step.manifest, candidate.outcome == "promoted"
        tried = tried_offsets(old)
        skipped = [s for s in old.skipped if (s.partition, s.offset) not in tried | places]
        if not promoted:
            skipped += [skipped_example(example, candidate.reason) for example in examples]
        times = [example.origin.timestamp_ms for example in examples] if promoted else []
        reason = candidate.reason if not promoted else old.reason if old.outcome == "promoted" else "replayed"
        return old.model_copy(
            update={
                "seq": made.step.manifest.seq + 1 if made.step else 1, "kind": "replayed",
                "outcome": candidate.outcome, "reason": reason, "parent": made.promoted,
                "head": made.step.version if made.step else None, "code": self._lineage.code, "batch": batch,
                "learned": list(learned) if promoted else [], "skipped": skipped,
                **refs.manifest_fields(), "gate": candidate.gate,
                "tokens": candidate.tokens, "published_from_ms": min(times, default=None),
                "published_to_ms": max(times, default=None),
            }
        )  # fmt: skip

    # ---- ending

    def _ended(self, job: ForgetRequested, alias: str, began: float) -> JobResult:
        """What the job came to, in this attempt or in one before it."""
        adapter = job.adapter
        event = self._lineage.standing(adapter, alias)
        entry = load_quarantine(self._store, adapter).entry(job.request_id)
        if entry is not None and entry.done is not None:
            return JobResult(
                "repeated", None, event, close=lambda: clear_pending_deletes(self._store, adapter, job.job_id)
            )
        found = self._published(job)
        tombstone = load_pending_deletes(self._store, adapter, job.job_id)
        counts = {job.request_id: 0}
        if found is not None:
            counts[job.request_id] = found[1].gate.forgotten_examples or 0
        if tombstone is not None:
            counts |= tombstone.requests
        version, generation = None, None
        if found is not None and event is not None:
            version, generation = found[0], event.generation
        quarantine = load_quarantine(self._store, adapter)
        statuses: list[RetentionProgressed] = []
        for request_id, count in counts.items():
            other = quarantine.entry(request_id)
            if request_id != job.request_id and (other is None or other.done is not None):
                continue
            request = job if other is None else job.model_copy(update={"request_id": request_id, "kind": other.kind})
            statuses.append(self._status(request, "executed", count, version))
            statuses.append(self._status(request, "published", count, version))
        marks = {
            status.request_id: Mark(
                at_ms=int(status.at.timestamp() * 1000), examples=status.examples, version=version, generation=generation
            )
            for status in statuses
        }  # fmt: skip

        def close() -> None:
            # Only now: what retain says of the request from here on must come after what was said here.
            for request_id, mark in marks.items():
                finish_entry(self._store, adapter, request_id, mark)
            clear_pending_deletes(self._store, adapter, job.job_id)

        stage_s = {"forget": time.perf_counter() - began}
        if found is None:
            return JobResult("unchanged", None, event, stage_s, tuple(statuses), close)
        return JobResult(found[1].outcome, found[1], event, stage_s, tuple(statuses), close)

    def _published(self, job: ForgetRequested) -> tuple[str, Manifest] | None:
        """The version that the job made, in this attempt or in one before it."""
        for _, version in self._registry.versions(job.adapter, limit=MAX_LOOK_BACK):
            manifest = self._registry.manifest(job.adapter, version)
            if manifest.kind == "forget" and manifest.job_id == job.job_id:
                return version, manifest
        return None

    def _status(
        self, job: ForgetRequested, state: RetentionState, count: int, version: str | None, detail: str = ""
    ) -> RetentionProgressed:
        return RetentionProgressed(
            request_id=job.request_id, adapter=job.adapter, kind=job.kind, state=state, examples=count,
            version=version, detail=detail, at=self._now(),
        )  # fmt: skip


def _promoted(step: RecordedVersion | None) -> str | None:
    """The version that a step's state is of: itself, or of a refused one its parent."""
    if step is None:
        return None
    return step.version if step.manifest.outcome == "promoted" else step.manifest.parent


def _reason(job: ForgetRequested) -> str:
    return f"{job.kind} {job.request_id}"
