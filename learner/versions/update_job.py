"""Jobs to versions: reads an adapter's head and a micro-batch from the store, trains, publishes; knows no Kafka."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from perennial.learner.model.base import Base
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.learner.training.state import StateRefs, TrainingState, load_state, to_blobs
from perennial.learner.training.update import Updater, UpdateResult
from perennial.learner.versions.alias_events import alias_event
from perennial.learner.versions.conflict_retry import retry_on_conflict
from perennial.learner.versions.engine import code_digest
from perennial.learner.versions.garbage_collection import delete_unreferenced
from perennial.learner.versions.history import batch_to_bytes, origin_offset, without_examples
from perennial.learner.versions.micro_batches import (
    BatchRows,
    JobError,
    batch_origins,
    read_batch,
    select_new_examples,
    skipped_example,
)
from perennial.storage.errors import ConflictError, NotFoundError
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.manifest import BlobRef, Kind, LearnedExample, Manifest, update_id
from perennial.storage.registry.pending_deletes import (
    clear_pending_deletes,
    load_pending_deletes,
    record_pending_deletes,
)
from perennial.storage.registry.quarantine import load_quarantine, update_quarantine
from perennial.storage.registry.registry import Head, Registry
from perennial.storage.registry.scalars import Scalar
from perennial.streams.events.models import (
    AdapterUpdate,
    Batch,
    ExampleAccepted,
    RetentionProgressed,
    RollbackRequested,
    UpdateRequested,
)
from perennial.streams.retention.quarantine_filter import QuarantineFilter, text_hash

MAX_LOOK_BACK = 256
STATES_KEPT = 16


@dataclass(frozen=True)
class JobResult:
    """What a job came to. event: to be sent, again where an earlier run may have been cut off before it.

    statuses: of retention requests, to be sent after the event. close: to be called when all that was sent arrived.
    """

    outcome: Literal["promoted", "refused", "unchanged", "repeated", "held"]
    manifest: Manifest | None
    event: AdapterUpdate | None
    stage_s: dict[str, float] = field(default_factory=dict)
    statuses: tuple[RetentionProgressed, ...] = ()
    close: Callable[[], None] | None = None


class VersionWriter:
    """Adds versions to adapters' lines, one job at a time. now: wall clock, for events alone, never for a manifest."""

    def __init__(
        self,
        registry: Registry,
        updater: Updater,
        base: Base,
        *,
        threads: int,
        now: Callable[[], datetime],
        failpoint: Callable[[str], None],
    ) -> None:
        self.registry = registry
        self.updater = updater
        self.base = base
        self._store = registry.store
        self.threads = threads
        self._now = now
        self._failpoint = failpoint
        self.code = code_digest()
        self.rows = BatchRows(self._store, updater.rows)
        self._states: OrderedDict[StateRefs, TrainingState] = OrderedDict()

    # ---- jobs

    def update(self, job: UpdateRequested, alias: str) -> JobResult:
        """Learn what the job's micro-batch holds above the head's marks, and publish the next version.

        Raises JobError where the job is no good, StoreError where the store is, ConflictError where other learners
        were faster time and again.
        """
        received = self._now()
        began = time.perf_counter()
        return retry_on_conflict(self.registry, job.adapter, lambda: self._update(job, alias, received, began))

    def _update(self, job: UpdateRequested, alias: str, received: datetime, began: float) -> JobResult:
        head = self.head(job.adapter)
        marks = dict(head.manifest.marks) if head else {}
        if all(offset <= marks.get(partition, -1) for partition, offset in job.marks.items()):
            self._clean_up(job, again=True)
            return JobResult("repeated", None, self.standing(job.adapter, alias))
        batch = read_batch(self._store, job)
        screen = QuarantineFilter(load_quarantine(self._store, job.adapter))
        learnable, body = self._screened(job, batch, screen)
        parent, parent_version = self.state_at(head, job.adapter)
        self._failpoint("learner.load")
        loaded = time.perf_counter()
        drawn: dict[str, ExampleAccepted] = {}
        replayed = self.rows.allowed_by(screen, drawn)
        manifest, blobs = self._next(job, (batch, learnable, body), head, parent, parent_version, replayed)
        self._failpoint("learner.train")
        trained_at, trained = self._now(), time.perf_counter()
        screen = QuarantineFilter(load_quarantine(self._store, job.adapter))
        if any(screen.blocks(example) for example in (*learnable.examples, *drawn.values())):
            # It goes into no version that comes after its acceptance.
            raise ConflictError(f"what {job.job_id} learned or replayed is to be forgotten since")
        known = load_pending_deletes(self._store, job.adapter, job.job_id)
        record_pending_deletes(self._store, job.adapter, job.job_id, blobs)
        publication = self.registry.publish(manifest, blobs.values(), self.verifier(blobs), alias)
        self._failpoint("learner.publish")
        if body is not None or known is not None or publication.manifest != manifest or not publication.was_new:
            self._clean_up(job)
        else:  # all that is named there stands
            clear_pending_deletes(self._store, job.adapter, job.job_id)
        stage_s = {
            "load": loaded - began, "train": trained - loaded, "publish": time.perf_counter() - trained,
        }  # fmt: skip
        event = None
        if publication.alias_state is not None and publication.manifest.outcome == "promoted":
            stage_at = {
                "published": datetime.fromtimestamp(job.oldest_ms / 1000, UTC), "cut": job.cut_at,
                "received": received, "trained": trained_at, "promoted": publication.alias_state.published_at,
            }  # fmt: skip
            event = alias_event(self.registry, publication.alias_state, stage_at)
        return JobResult(publication.manifest.outcome, publication.manifest, event, stage_s)

    def rollback(self, job: RollbackRequested) -> JobResult:
        """Publish a version with an earlier version's state: the one named, or the one live before this one.

        Marks stay: what was learned since is not learned again. With `revoke` the version named is never served
        again; where it was live, the newest promoted one before it that stands takes its place, or the adapter is
        retired. Raises as `update` does.
        """
        return retry_on_conflict(self.registry, job.adapter, lambda: self._rollback(job))

    def _rollback(self, job: RollbackRequested) -> JobResult:
        head = self.head(job.adapter)
        if head is None:
            raise JobError("nothing-to-roll-back-to", "the adapter has no version", got=job.adapter)
        if self._is_done(job.adapter, job.job_id):
            self._retire_revoked(job)
            return JobResult("repeated", None, self.standing(job.adapter, job.alias))
        if job.revoke:
            return self._revoke(job, head)
        target, version = self._target(job)
        config = {**target.config, "job_id": job.job_id}
        manifest = self.passing(head, target, version, "rollback", job.job_id, job.reason or "rollback").model_copy(
            update={"update_id": update_id(job.adapter, version, head.manifest.marks, config)}
        )
        publication = self.registry.publish(manifest, (), self.verifier({}), job.alias)
        event = alias_event(self.registry, publication.alias_state) if publication.alias_state else None
        return JobResult("promoted", publication.manifest, event)

    def _revoke(self, job: RollbackRequested, head: Head) -> JobResult:
        if job.version is None:
            raise JobError("unknown-version", "a revocation names its version", got=None)
        try:
            self.registry.revoke(job.adapter, job.version, job.reason or "revoked")
        except NotFoundError as error:
            raise JobError("unknown-version", "the version does not exist", got=job.version) from error
        state = self.registry.alias(job.adapter, job.alias)
        if state is None or state.version != job.version:
            return JobResult("unchanged", None, self.standing(job.adapter, job.alias))
        target: Manifest | None = None
        version: str | None = None
        blobs: dict[str, bytes] = {}
        try:
            version = self._before(job)
            target = self.registry.manifest(job.adapter, version)
        except JobError:
            blobs = to_blobs(self.initial(job.adapter, head.manifest.seed))[1]
        manifest = self.passing(head, target, version, "revoke", job.job_id, job.reason or "revoked")
        publication = self.registry.publish(manifest, blobs.values(), self.verifier(blobs), job.alias)
        self._retire_revoked(job)
        return JobResult(publication.manifest.outcome, publication.manifest, self.standing(job.adapter, job.alias))

    def _retire_revoked(self, job: RollbackRequested) -> None:
        """Serve nothing where what is live was revoked and nothing took its place."""
        state = self.registry.alias(job.adapter, job.alias) if job.revoke else None
        if state is not None and state.version == job.version:
            self.registry.retire(job.adapter, job.alias, job.reason or "revoked", job.version)

    def passing(
        self, head: Head, target: Manifest | None, parent: str | None, kind: Kind, job_id: str, reason: str
    ) -> Manifest:
        """The manifest of a version that follows the head, trains nothing and takes up the target's state.

        No target: the state before anything was learned, which nothing is served of. parent: what it names.
        """
        like = target or head.manifest
        refs = StateRefs.of_manifest(target) if target else to_blobs(self.initial(like.adapter, like.seed))[0]
        # The head too: a job that is done again over a line that went on makes another version, not its first one.
        config = {**like.config, "job_id": job_id, "kind": kind, "head": head.version}
        return like.model_copy(
            update={
                "seq": head.seq + 1, "kind": kind, "outcome": "promoted" if target and target.optimizer else "unchanged",
                "reason": reason, "parent": parent, "head": head.version, "job_id": job_id, "code": self.code,
                "update_id": update_id(like.adapter, parent, head.manifest.marks, config),
                "batch": None, "cut": None, "learned": [], "skipped": [], "dropped": 0, "tokens": 0,
                "gate": target.gate if target else GateFigures(), "marks": head.manifest.marks, "threads": self.threads,
                **refs.manifest_fields(),
                "published_from_ms": None, "published_to_ms": None,
            }
        )  # fmt: skip

    def initial(self, adapter: str, seed: int) -> TrainingState:
        """The state before anything was learned."""
        return TrainingState(self.updater.lora.init_state(adapter, seed))

    def standing(self, adapter: str, alias: str) -> AdapterUpdate | None:
        """Finish a publish that was cut off, and give the event of where the alias stands; None without a version."""
        state = self.registry.converge(adapter, alias)
        return alias_event(self.registry, state) if state else None

    # ---- parts

    def head(self, adapter: str) -> Head | None:
        """The newest version, checked to be of this worker's base and rank. Raises JobError."""
        head = self.registry.head(adapter)
        if head is not None:
            self._check_base(head.manifest)
        return head

    def _check_base(self, manifest: Manifest) -> None:
        """An adapter never meets another base: its weights would be noise there."""
        if manifest.base_sha256 != self.base.digest:
            raise JobError(
                "base-mismatch",
                f"adapter {manifest.adapter} belongs to another base than this worker runs",
                got=f"{self.base.name} {self.base.digest}",
                allowed=f"{manifest.base_model} {manifest.base_sha256}",
            )
        if manifest.rank != self.updater.recipe.rank:
            raise JobError(
                "rank-mismatch",
                f"adapter {manifest.adapter} has another rank than this worker's setting",
                got=self.updater.recipe.rank,
                allowed=manifest.rank,
            )

    def state_at(self, head: Head | None, adapter: str) -> tuple[TrainingState, str | None]:
        """The state to train from, and the version that it is of. A refused head carries its parent's state."""
        if head is None:
            return self.initial(adapter, self.updater.recipe.seed), None
        manifest = head.manifest
        version = head.version if manifest.outcome == "promoted" else manifest.parent
        refs = StateRefs.of_manifest(manifest)
        parent = self._states.get(refs)
        if parent is None:
            parent = load_state(refs, lambda ref: get_blob(self._store, ref.digest), self.updater.lora.shapes)
        self._remember(refs, parent)
        return parent, version

    def _remember(self, refs: StateRefs, state: TrainingState) -> None:
        self._states[refs] = state
        self._states.move_to_end(refs)
        while len(self._states) > STATES_KEPT:
            self._states.popitem(last=False)

    def _next(
        self,
        job: UpdateRequested,
        cut: tuple[Batch, Batch, bytes | None],
        head: Head | None,
        parent: TrainingState,
        parent_version: str | None,
        replayed: Callable[[ReplayEntry], Sequence[TokenRow] | None],
    ) -> tuple[Manifest, dict[str, bytes]]:
        batch, learnable, body = cut
        marks = dict(head.manifest.marks) if head else {}
        fresh, skipped, dropped = select_new_examples(learnable, marks, self.updater.rows)
        stay = {origin_offset(example) for example in learnable.examples}
        skipped += [
            skipped_example(example, "quarantined") for example in batch.examples if origin_offset(example) not in stay
        ]
        ref = BlobRef(digest=job.batch.digest, size_bytes=job.batch.size_bytes)
        blobs: dict[str, bytes] = {}
        if body is not None:
            ref = BlobRef(digest=digest_of(body), size_bytes=len(body))
            blobs[ref.digest] = body
        after = dict(marks)
        places = [(origin.partition_key(), origin.offset) for origin in batch_origins(batch)]
        for partition, offset in (*job.marks.items(), *places):
            after[partition] = max(offset, after.get(partition, offset))
        candidate: UpdateResult | None = None
        if fresh:
            self.rows.put(ref.digest, learnable.examples)
            candidate = self.updater.update(
                parent, fresh, adapter=job.adapter, cut=job.cut, batch=ref.digest, replayed=replayed
            )
        promoted = candidate is not None and candidate.outcome == "promoted"
        if promoted or head is None:
            state = candidate.state if candidate else parent
            refs, made = to_blobs(state)
            blobs |= made
            self._remember(refs, state)
        else:
            refs = StateRefs.of_manifest(head.manifest)
        recipe = self.updater.recipe
        config: dict[str, Scalar] = {**recipe.config()}
        learned = fresh if promoted else []
        refused = [] if promoted else [skipped_example(example, candidate.reason) for example in fresh if candidate]
        times = [example.origin.timestamp_ms for example in learned]
        manifest = Manifest(
            adapter=job.adapter,
            seq=head.seq + 1 if head else 1,
            kind="update",
            outcome=candidate.outcome if candidate else "unchanged",
            reason=job.reason if promoted else candidate.reason if candidate else "nothing-to-learn",
            parent=parent_version,
            head=head.version if head else None,
            # Screened otherwise it is another update: one that was claimed before an acceptance must not win after it.
            update_id=update_id(
                job.adapter,
                parent_version,
                after,
                {**config, "batch": ref.digest, "missing": candidate.gate.replay_missing if candidate else 0},
            ),
            job_id=job.job_id,
            base_model=self.base.name,
            base_sha256=self.base.digest,
            code=self.code,
            config=config,
            seed=recipe.seed,
            threads=self.threads,
            batch=ref,
            cut=job.cut,
            learned=[self.learned(example) for example in learned],
            skipped=[*skipped, *refused],
            dropped=dropped,
            marks=after,
            weights=refs.weights,
            optimizer=refs.optimizer,
            replay=refs.replay_index,
            gate=candidate.gate if candidate else GateFigures(),
            tokens=candidate.tokens if candidate else 0,
            rank=recipe.rank,
            published_from_ms=min(times, default=None),
            published_to_ms=max(times, default=None),
        )
        return manifest, blobs

    def learned(self, example: ExampleAccepted, updater: Updater | None = None) -> LearnedExample:
        """The record of an example that is learned, by this learner's updater or another."""
        partition, offset = origin_offset(example)
        tokens = sum(row.tokens for row in (updater or self.updater).rows(example))
        return LearnedExample(example_id=example.example_id, partition=partition, offset=offset, tokens=tokens)

    def _screened(self, job: UpdateRequested, batch: Batch, screen: QuarantineFilter) -> tuple[Batch, bytes | None]:
        """The micro-batch without what must not be learned, and its new body; None where nothing is left out.

        The old body still has the text, so it is put down to be deleted before anything names the new one.
        """
        blocked = {origin_offset(example) for example in batch.examples if screen.blocks(example)}
        if not blocked:
            return batch, None
        learnable = without_examples(batch, blocked)
        erased = {text for e in batch.examples if screen.erases(e) and (text := text_hash(e))}
        update_quarantine(self._store, job.adapter, lambda found: found.suppressing(erased))
        record_pending_deletes(self._store, job.adapter, job.job_id, [job.batch.digest])
        return learnable, batch_to_bytes(learnable)

    def refused(self, job: UpdateRequested) -> None:
        """Put down what a job named that never will be done: its text must be found by whoever is to forget it."""
        record_pending_deletes(self._store, job.adapter, job.job_id, [job.batch.digest], refused=True)

    def _clean_up(self, job: UpdateRequested, *, again: bool = False) -> None:
        """Delete what an update put down to be deleted, once its version is on the line.

        again: of a job that came again; was it refused, then its body is nobody's but a forgetting's.
        """
        tombstone = load_pending_deletes(self._store, job.adapter, job.job_id)
        if tombstone is not None and not (again and tombstone.refused):
            self.drop(delete_unreferenced(self.registry, job.adapter, job.job_id))
            clear_pending_deletes(self._store, job.adapter, job.job_id)

    def drop(self, digests: Collection[str]) -> None:
        """Let go of what this process still has in memory of blobs that were deleted."""
        self.rows.drop(digests)
        deleted = set(digests)
        for refs in [refs for refs in self._states if not deleted.isdisjoint(refs.digests())]:
            del self._states[refs]

    def verifier(self, blobs: Mapping[str, bytes]) -> Callable[[Manifest], None]:
        """The trial load. Bytes in hand need no second read: the registry compared the stored ones by digest."""

        def verify(manifest: Manifest) -> None:
            def read(ref: BlobRef) -> bytes:
                return blobs.get(ref.digest) or get_blob(self._store, ref.digest)

            load_state(StateRefs.of_manifest(manifest), read, self.updater.lora.shapes)

        return verify

    def _is_done(self, adapter: str, job_id: str) -> bool:
        """Whether a version of this job exists already: a rollback moves no mark by which it could be told."""
        line = self.registry.versions(adapter, newest_first=True, limit=MAX_LOOK_BACK)
        return any(self.registry.manifest(adapter, version).job_id == job_id for _, version in line)

    def _target(self, job: RollbackRequested) -> tuple[Manifest, str]:
        version = job.version or self._before(job)
        try:
            target = self.registry.manifest(job.adapter, version)
        except NotFoundError as error:
            raise JobError("unknown-version", "the version does not exist", got=version) from error
        if target.kind == "quarantine" and target.parent:
            version, target = target.parent, self.registry.manifest(job.adapter, target.parent)
        if target.outcome != "promoted" or target.kind == "replayed":
            raise JobError("not-promoted", "the version was never live", got=f"{version} {target.outcome}")
        if self.registry.is_revoked(job.adapter, target.seq):
            raise JobError("revoked-version", "the version was revoked", got=version)
        self._check_base(target)
        return target, version

    def _before(self, job: RollbackRequested) -> str:
        """The version that was live before; seen from a rolled-back one, the one before its target."""
        state = self.registry.alias(job.adapter, job.alias)
        live = self.registry.manifest(job.adapter, state.version) if state else None
        while live is not None and live.kind == "rollback" and live.parent:
            live = self.registry.manifest(job.adapter, live.parent)
        version = live.head if live else None
        while version is not None:
            manifest = self.registry.manifest(job.adapter, version)
            stands = not self.registry.is_revoked(job.adapter, manifest.seq)
            if manifest.outcome == "promoted" and manifest.kind != "quarantine" and stands:
                return version
            version = manifest.head
        raise JobError("nothing-to-roll-back-to", "no version was live before", got=f"{job.adapter}#{job.alias}")
