"""Update jobs: train an adapter on one micro-batch and publish the next version."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from perennial.learner.costs.device_use import DeviceUse, take_use
from perennial.learner.costs.energy_meter import meter_of
from perennial.learner.training.personal.shared_versions import VersionBeneath
from perennial.learner.training.state import StateRefs, TrainingState, to_blobs
from perennial.learner.training.thinning.contradictions import OUTVOTED
from perennial.learner.training.update import UpdateResult
from perennial.learner.versions.alias_events import alias_event
from perennial.learner.versions.conflict_retry import retry_on_conflict
from perennial.learner.versions.garbage_collection import delete_unreferenced
from perennial.learner.versions.history import index_version
from perennial.learner.versions.job_order import stored_job
from perennial.learner.versions.job_result import JobError, JobResult
from perennial.learner.versions.micro_batches import (
    ExampleSelection,
    batch_origins,
    batch_to_bytes,
    example_ids_of,
    load_batch,
    origin_offset,
    read_batch,
    removed_examples,
    select_new_examples,
    skipped_example,
    without_examples,
)
from perennial.learner.versions.rollback_job import take_back_interrupted
from perennial.learner.versions.version_writer import VersionWriter
from perennial.learner.versions.votes import Vote, reasons_not_learned, vote
from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError, StoreError
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.history.example_ids import with_keyed_ids
from perennial.storage.registry.history.update_costs import UpdateCost, record_cost
from perennial.storage.registry.manifest import BlobRef, Manifest, OtherVersion, Outcome, Start, update_id
from perennial.storage.registry.pending_deletes import (
    clear_pending_deletes,
    load_pending_deletes,
    record_pending_deletes,
)
from perennial.storage.registry.quarantine import update_quarantine
from perennial.storage.registry.refused_examples import add_refused_examples, remove_refused_examples
from perennial.storage.registry.registry import Head, Publication
from perennial.storage.registry.scalars import Scalar
from perennial.storage.registry.waiting_jobs import delete_job, give_up_cut, load_given_up
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.high_water_marks import HighWaterMarks
from perennial.streams.events.models import Batch, ExampleAccepted, UpdateRequested
from perennial.streams.retention.quarantine_filter import QuarantineFilter, QuarantineFilters

_log = logging.getLogger("perennial.learner")


@dataclass(frozen=True)
class _AllowedBatch:
    """A job's micro-batch as stored, and without its quarantined examples.

    Attributes:
        stored: the micro-batch that the job names.
        allowed: the same without quarantined examples.
        ref: the blob that the version names; it holds `allowed`.
        new_body: bytes of `allowed`, to be stored; None if nothing was left out.
    """

    stored: Batch
    allowed: Batch
    ref: BlobRef
    new_body: bytes | None


@dataclass(frozen=True)
class _Start:
    """The state that an update starts from.

    Attributes:
        head: the version that it follows; None for the adapter's first.
        state: the state that it trains from.
        version: the version that produced this state; None for the initial state.
        begins: what the adapter's first update began with; None where users' adapters may not be learned from.
        blobs: blobs of that, to be stored with the first version, by digest.
    """

    head: Head | None
    state: TrainingState
    version: str | None
    begins: Start | None
    blobs: Mapping[str, bytes]

    def high_water_marks(self) -> HighWaterMarks:
        return _high_water_marks(self.head)


@dataclass(frozen=True)
class _Trained:
    """The outcome of one attempt, before anything of it is published.

    Attributes:
        start: where it started.
        batch: its micro-batch.
        selection: what was done with each example.
        vote: which of the new ones were trained.
        result: the outcome of the training; None if there was nothing new to learn.
        refs: the blobs of the state that the new version holds.
        general: the blob of the general text that was used; None for docstrings.
        blobs: bytes that may not be stored yet, by digest, in the order in which they are written.
        over: the shared version that was beneath; None: the base alone.
    """

    start: _Start
    batch: _AllowedBatch
    selection: ExampleSelection
    vote: Vote
    result: UpdateResult | None
    refs: StateRefs
    general: BlobRef | None
    blobs: dict[str, bytes]
    over: OtherVersion | None = None


class UpdateExecutor:
    """Runs update jobs."""

    def __init__(self, writer: VersionWriter) -> None:
        self._writer = writer
        self._registry = writer.registry
        self._store = writer.registry.store
        self._quarantines = QuarantineFilters(self._store)

    def update(self, job: UpdateRequested, alias: str) -> JobResult:
        """Learn the examples of the job's micro-batch above the head's high-water marks; publish the next version.

        Args:
            job: the job.
            alias: the alias that a promoted version is published under.

        Raises:
            JobError: the job can never be done.
            StoreError: the store failed.
            ConflictError: other learners were faster at every attempt.
        """
        received = self._writer.now()
        began = time.perf_counter()
        return retry_on_conflict(self._registry, job.adapter, lambda: self._attempt(job, alias, received, began))

    def record_refused(self, job: UpdateRequested) -> None:
        """Settle a job that will never be done.

        Its micro-batch is recorded, so that forgetting still finds its text; its examples may be published again as they
        are; later cuts do not wait for this one.
        """
        record_pending_deletes(self._store, job.adapter, job.job_id, [job.batch.digest], refused=True)
        try:
            ids = [example.example_id for example in read_batch(self._store, job).examples if example.learn]
        except (JobError, IntegrityError, NotFoundError):
            ids = []
        add_refused_examples(self._store, job.adapter, ids, self._now_ms())
        with suppress(IntegrityError):
            # What an attempt trained and did not publish: no forgetting would find it by the micro-batch.
            keep = {job.batch.digest}
            self._writer.drop_cached(
                delete_unreferenced(self._registry, job.adapter, job.job_id, unpublished=True, keep=keep)
            )
        give_up_cut(self._store, job.adapter, job.cut, job.job_id)
        with suppress(IntegrityError):  # a damaged object is not this job's to delete
            if stored_job(self._store, job) is not None:
                delete_job(self._store, job.adapter, job.cut)

    def _attempt(self, job: UpdateRequested, alias: str, received: datetime, began: float) -> JobResult:
        writer = self._writer
        waiting = stored_job(self._store, job)
        job = waiting or job
        take_back_interrupted(writer, job.adapter, alias)
        head = writer.head(job.adapter)
        if head is not None and (_is_covered(job, head) or self._is_named(job, head)):
            return self._repeated(job, alias, head, waits=waiting is not None)
        text_key = writer.text_keys.of(job.adapter)
        take_use()  # of another job, or of an attempt that found a conflict
        with writer.updater.compute.joining():
            stored = read_batch(self._store, job)
            quarantine = self._quarantines.of(job.adapter)
            batch = self._leave_out_quarantined(job, stored, quarantine)
            start = self._start(job.adapter, head, alias)
            writer.failpoint("learner.load")
            loaded = time.perf_counter()
            replayed: dict[str, ExampleAccepted] = {}
            trained = self._train(job, batch, start, quarantine, replayed, alias)
            used = take_use()
        manifest = with_keyed_ids(self._manifest(job, trained), text_key)
        writer.failpoint("learner.train")
        trained_at, trained_s = writer.now(), time.perf_counter()
        self._recheck_quarantine(job, batch.allowed, replayed)
        self._recheck_dependencies(job, manifest)
        publication = self._publish(job, alias, manifest, trained)
        self._settle(job, publication.manifest, stored, waits=waiting is not None)
        cost = self._record_cost(publication, used) if publication.was_new and trained.result else None
        stage_s = {
            "load": loaded - began, "train": trained_s - loaded, "publish": time.perf_counter() - trained_s,
        }  # fmt: skip
        event = self._event(job, publication, received, trained_at)
        return JobResult(publication.manifest.outcome, publication.manifest, event, stage_s, cost=cost)

    def _start(self, adapter: str, head: Head | None, alias: str) -> _Start:
        if head is None:
            begins, state, blobs = self._writer.begin(adapter, alias)
            return _Start(None, state, None, begins, blobs)
        return _Start(head, *self._writer.state_at(head, adapter), head.manifest.start, {})

    def _record_cost(self, publication: Publication, used: DeviceUse) -> UpdateCost:
        """Record what the update cost. Nothing depends on the record, so a store that fails does not fail the job."""
        manifest, device = publication.manifest, self._writer.base.device
        meter = meter_of(device)
        cost = UpdateCost(
            version=publication.version, seq=manifest.seq, outcome=manifest.outcome, tokens=manifest.tokens,
            training_flops=used.training_flops, measuring_flops=used.measuring_flops, seconds=used.seconds,
            joules=used.joules, energy_source=meter.source if meter is not None else "", device=device.type,
        )  # fmt: skip
        try:
            record_cost(self._store, manifest.adapter, cost)
        except StoreError as error:
            _log.warning("the cost of version %d of %s is not recorded: %s", manifest.seq, manifest.adapter, error)
        return cost

    def _is_named(self, job: UpdateRequested, head: Head) -> bool:
        """Return whether a version names a job of an earlier cut: a mark that it had raised may be repaired since."""
        next_cut = head.manifest.next_cut
        return next_cut is not None and job.cut < next_cut and self._version_of(job, head) is not None

    def _repeated(self, job: UpdateRequested, alias: str, head: Head, *, waits: bool) -> JobResult:
        """Return the result of a job that an earlier run did.

        Raises:
            JobError: no version names the job: its examples were never learned, and the high-water marks have passed
                them.
        """
        made = self._version_of(job, head)
        if made is None:
            given_up = load_given_up(self._store, job.adapter).get(job.cut) == job.job_id
            raise JobError(
                "given-up" if given_up else "out-of-order",
                "the job was given up before" if given_up else "no version names the job, and later cuts were learned",
                got=job.cut, allowed=head.manifest.next_cut,
                remedy="publish its documents again, as they are: they are not taken for duplicates",
            )  # fmt: skip
        self._clean_up(job, redelivered=True)
        if waits:
            batch = load_batch(self._store, made.batch.digest) if made.batch else None
            self._settle(job, made, batch, waits=True)
        return JobResult("repeated", None, self._writer.current_alias_event(job.adapter, alias))

    def _version_of(self, job: UpdateRequested, head: Head) -> Manifest | None:
        """Return the manifest that an earlier run of the job made; None if there is none."""
        version: str | None = head.version
        while version is not None:
            manifest = self._registry.manifest(job.adapter, version)
            batch = manifest.batch.digest if manifest.batch else None
            if manifest.job_id == job.job_id or batch == job.batch.digest:
                return manifest
            if manifest.cut is not None and manifest.cut < job.cut:
                return None
            version = manifest.head
        return None

    def _settle(self, job: UpdateRequested, manifest: Manifest, batch: Batch | None, *, waits: bool) -> None:
        """Record which examples were refused or learned, then delete the job: a version names its micro-batch now."""
        reasons = reasons_not_learned(manifest)
        ids = example_ids_of(batch, [item for item in manifest.skipped if item.reason in reasons])
        if ids:
            add_refused_examples(self._store, job.adapter, ids, self._now_ms())
        remove_refused_examples(self._store, job.adapter, example_ids_of(batch, manifest.learned))
        if waits:
            delete_job(self._store, job.adapter, job.cut)

    def _now_ms(self) -> int:
        return int(self._writer.now().timestamp() * 1000)

    def _leave_out_quarantined(self, job: UpdateRequested, batch: Batch, quarantine: QuarantineFilter) -> _AllowedBatch:
        """Leave out what must not be learned.

        The old body still holds the text, so it is recorded for deletion before anything names the new body.
        """
        blocked = {origin_offset(example) for example in batch.examples if quarantine.blocks(example)}
        if not blocked:
            ref = BlobRef(digest=job.batch.digest, size_bytes=job.batch.size_bytes)
            return _AllowedBatch(batch, batch, ref, None)
        allowed = without_examples(batch, blocked)
        update_quarantine(self._store, job.adapter, quarantine.suppression_of(batch.examples))
        record_pending_deletes(self._store, job.adapter, job.job_id, [job.batch.digest])
        body = batch_to_bytes(allowed)
        return _AllowedBatch(batch, allowed, BlobRef(digest=digest_of(body), size_bytes=len(body)), body)

    def _train(
        self,
        job: UpdateRequested,
        batch: _AllowedBatch,
        start: _Start,
        quarantine: QuarantineFilter,
        replayed: dict[str, ExampleAccepted],
        alias: str,
    ) -> _Trained:
        """Train on the new examples; `replayed` is filled with the earlier examples that were drawn for it."""
        writer = self._writer
        selection = select_new_examples(batch.allowed, start.high_water_marks(), writer.updater.rows)
        selection.skipped.extend(removed_examples(job))
        allowed = {origin_offset(example) for example in batch.allowed.examples}
        selection.skipped.extend(
            skipped_example(example, "quarantined")
            for example in batch.stored.examples
            if origin_offset(example) not in allowed
        )
        updater = writer.updater_of(start.head) if selection.new else writer.updater
        example_of = writer.rows.example_allowed_by(quarantine, replayed)
        found = vote(updater.recipe, selection.new, start.state.replay_index, example_of)
        selection.skipped.extend(skipped_example(example, OUTVOTED) for example in found.outvoted)
        result: UpdateResult | None = None
        over: VersionBeneath | None = None
        general = start.head.manifest.general if start.head else None
        if found.trained:
            writer.rows.put(batch.ref.digest, batch.allowed.examples)
            over = writer.beneath(job.adapter, alias)
            updater = writer.over(updater, over)
            general = updater.general.ref
            result = updater.update(
                start.state,
                found.trained,
                adapter=job.adapter,
                cut=job.cut,
                batch=batch.ref.digest,
                replayed=writer.rows.allowed_by(quarantine, replayed),
                on_step=writer.on_step,
            )
        # The order of these is the order in which the blobs are written.
        blobs = dict(start.blobs)
        if batch.new_body is not None:
            blobs[batch.ref.digest] = batch.new_body
        if start.head is not None and (result is None or result.outcome != "promoted"):
            refs = StateRefs.of_manifest(start.head.manifest)
        else:
            state = result.state if result else start.state
            refs, state_blobs = to_blobs(state)
            blobs |= state_blobs
            writer.cache_state(refs, state)
        return _Trained(start, batch, selection, found, result, refs, general, blobs, over.ref if over else None)

    def _manifest(self, job: UpdateRequested, trained: _Trained) -> Manifest:
        """Return the manifest of the version that was trained, with ids that are not keyed yet."""
        writer, recipe = self._writer, self._writer.updater.recipe
        start, batch, selection, result = trained.start, trained.batch, trained.selection, trained.result
        outcome: Outcome
        learned: list[ExampleAccepted] = []
        skipped = selection.skipped
        if result is None:
            outcome, reason = "unchanged", "nothing-to-learn"
        elif result.outcome == "promoted":
            outcome, reason, learned = "promoted", job.reason, trained.vote.trained
        else:
            outcome, reason = "refused", result.reason
            skipped = [*skipped, *(skipped_example(example, result.reason) for example in trained.vote.trained)]
        config: dict[str, Scalar] = {**recipe.config_of(start.begins, trained.over)}
        high_water_marks = _advanced(start.high_water_marks(), job, batch.stored)
        marks, epochs = high_water_marks.offsets, high_water_marks.epochs
        # Where a quarantine left out other examples, the update has another id. So a version that claimed its update
        # before a request to forget was accepted does not win over one that was trained after that.
        missing = result.gate.replay_missing if result else 0
        claim = {**config, "batch": batch.ref.digest, "missing": missing}
        if trained.vote.missing:
            claim["voters_missing"] = trained.vote.missing
        if start.begins is not None and start.begins.weights is not None:
            claim["start"] = start.begins.weights.digest
        if trained.over is not None:
            claim["over"] = trained.over.version
        times = [example.origin.timestamp_ms for example in learned]
        return Manifest(
            adapter=job.adapter,
            seq=start.head.seq + 1 if start.head else 1,
            kind="update",
            outcome=outcome,
            reason=reason,
            parent=start.version,
            head=start.head.version if start.head else None,
            update_id=update_id(job.adapter, start.version, marks, claim, epochs),
            job_id=job.job_id,
            base_model=writer.base.name,
            base_sha256=writer.base.digest,
            code=writer.code,
            config=config,
            seed=recipe.seed,
            threads=writer.threads,
            batch=batch.ref,
            cut=job.cut,
            next_cut=max(job.cut + 1, (start.head.manifest.next_cut if start.head else None) or 0),
            learned=writer.learned_examples(learned, result.merged if result else {}),
            skipped=skipped,
            dropped=selection.redelivered,
            marks=marks,
            epochs=epochs,
            general=trained.general,
            gate=result.gate if result else GateFigures(),
            probes=result.probes if result else {},
            tokens=result.tokens if result else 0,
            pass_adapters=result.pass_adapters if result else 1,
            rank=recipe.rank,
            extends=writer.extended_by(job.adapter),
            start=start.begins,
            over=trained.over,
            published_from_ms=min(times, default=None),
            published_to_ms=max(times, default=None),
            **trained.refs.manifest_fields(),
        )

    def _recheck_quarantine(
        self, job: UpdateRequested, allowed: Batch, replayed: Mapping[str, ExampleAccepted]
    ) -> None:
        """Raise ConflictError if anything that was trained on was accepted for forgetting in the meantime.

        No version that is published after the acceptance may have such an example in it.
        """
        quarantine = self._quarantines.of(job.adapter)
        if any(quarantine.blocks(example) for example in (*allowed.examples, *replayed.values())):
            raise ConflictError(f"an example that {job.job_id} learned or replayed is now to be forgotten")

    def _recheck_dependencies(self, job: UpdateRequested, manifest: Manifest) -> None:
        """Raise ConflictError if a version that this one depends on first was revoked meanwhile.

        A later forgetting finds what is published before it. This one may be late: a process that was paused, and whose job
        was given to another one since.
        """
        founders = manifest.start.founders if manifest.start is not None and manifest.seq == 1 else []
        others = founders if manifest.over is None else [*founders, manifest.over]
        for other in others:
            if self._registry.is_revoked(other.adapter, other.seq):
                raise ConflictError(
                    f"{other.version} of {other.adapter}, which {job.job_id} depends on, is now revoked"
                )

    def _publish(self, job: UpdateRequested, alias: str, manifest: Manifest, trained: _Trained) -> Publication:
        """Record the blobs for deletion, publish the version, then delete the recorded blobs that no version needs."""
        blobs = trained.blobs
        earlier = load_pending_deletes(self._store, job.adapter, job.job_id)
        record_pending_deletes(self._store, job.adapter, job.job_id, blobs)
        publication = self._registry.publish(manifest, blobs.values(), self._writer.verifier(blobs), alias)
        index_version(self._registry, publication.version, publication.manifest)
        self._writer.failpoint("learner.publish")
        left_behind = trained.batch.new_body is not None or earlier is not None
        if left_behind or publication.manifest != manifest or not publication.was_new:
            self._clean_up(job)
        else:  # the new version needs every blob that is recorded there
            clear_pending_deletes(self._store, job.adapter, job.job_id)
        return publication

    def _event(
        self, job: UpdateRequested, publication: Publication, received: datetime, trained_at: datetime
    ) -> AdapterUpdate | None:
        if publication.alias_state is None or publication.manifest.outcome != "promoted":
            return None
        stage_at = {
            "published": datetime.fromtimestamp(job.oldest_ms / 1000, UTC), "cut": job.cut_at,
            "received": received, "trained": trained_at, "promoted": publication.alias_state.published_at,
        }  # fmt: skip
        return alias_event(self._registry, publication.alias_state, stage_at)

    def _clean_up(self, job: UpdateRequested, *, redelivered: bool = False) -> None:
        """Delete what an update recorded for deletion, once its version is published.

        Where the job was refused and is redelivered, its micro-batch is left to a later forgetting.
        """
        pending = load_pending_deletes(self._store, job.adapter, job.job_id)
        if pending is not None and not (redelivered and pending.refused):
            self._writer.drop_cached(delete_unreferenced(self._registry, job.adapter, job.job_id))
            clear_pending_deletes(self._store, job.adapter, job.job_id)


def _high_water_marks(head: Head | None) -> HighWaterMarks:
    return HighWaterMarks(head.manifest.marks, head.manifest.epochs) if head else HighWaterMarks()


def _is_covered(job: UpdateRequested, head: Head) -> bool:
    """Return whether the job's cut comes before the next one and the high-water marks cover its micro-batch."""
    if head.manifest.next_cut is not None and job.cut >= head.manifest.next_cut:
        return False
    return _high_water_marks(head).covers_all(HighWaterMarks(job.marks, job.epochs))


def _advanced(high_water_marks: HighWaterMarks, job: UpdateRequested, batch: Batch) -> HighWaterMarks:
    """Return the high-water marks after the job: raised to the job's own and to every origin in its micro-batch."""
    return high_water_marks.merged(HighWaterMarks(job.marks, job.epochs)).raised(batch_origins(batch))
