"""Jobs to versions: reads an adapter's head and a micro-batch from the store, trains, publishes; knows no Kafka."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch

from learner.adapter import State, from_safetensors, to_safetensors
from learner.announce import event_of
from learner.base import Base
from learner.batches import BatchRows, JobError, origins, read_batch, skip, sort_out
from learner.replay import index_from_bytes, index_to_bytes
from learner.train import optimizer_from_bytes
from learner.update import Candidate, Parent, Updater
from storage.blobs import digest_of, get_blob
from storage.errors import ConflictError, NotFoundError
from storage.manifest import BlobRef, LearnedExample, Manifest, Scalar, update_id
from storage.registry import Head, Registry
from streams.events import (
    AdapterUpdate,
    Batch,
    RollbackRequested,
    UpdateRequested,
)
from streams.settings import code_version

MAX_CONFLICTS = 8
MAX_LOOK_BACK = 256
STATES_KEPT = 16


@dataclass(frozen=True)
class Done:
    """What a job came to. event: to be sent, again where an earlier run may have been cut off before it."""

    outcome: Literal["promoted", "refused", "unchanged", "repeated"]
    manifest: Manifest | None
    event: AdapterUpdate | None
    stage_s: dict[str, float] = field(default_factory=dict)


class Lineage:
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
        self._threads = threads
        self._now = now
        self._failpoint = failpoint
        self._code = code_digest()
        self._rows = BatchRows(self._store, updater.rows)
        self._states: OrderedDict[str, Parent] = OrderedDict()

    # ---- jobs

    def update(self, job: UpdateRequested, alias: str) -> Done:
        """Learn what the job's micro-batch holds above the head's marks, and publish the next version.

        Raises JobError where the job is no good, StoreError where the store is, ConflictError where other learners
        were faster time and again.
        """
        received = self._now()
        began = time.perf_counter()
        for _ in range(MAX_CONFLICTS):
            head = self._head(job.adapter)
            marks = dict(head.manifest.marks) if head else {}
            if all(offset <= marks.get(partition, -1) for partition, offset in job.marks.items()):
                return Done("repeated", None, self.standing(job.adapter, alias))
            batch = read_batch(self._store, job)
            parent, parent_version = self._parent(head, job.adapter)
            self._failpoint("learner.load")
            loaded = time.perf_counter()
            manifest, blobs = self._next(job, batch, head, parent, parent_version)
            self._failpoint("learner.train")
            trained_at, trained = self._now(), time.perf_counter()
            try:
                publication = self.registry.publish(manifest, blobs.values(), self._verifier(blobs), alias)
            except ConflictError:
                continue
            self._failpoint("learner.publish")
            stage_s = {
                "load": loaded - began, "train": trained - loaded, "publish": time.perf_counter() - trained,
            }  # fmt: skip
            event = None
            if publication.alias_state is not None and publication.manifest.outcome == "promoted":
                stage_at = {
                    "published": datetime.fromtimestamp(job.oldest_ms / 1000, UTC), "cut": job.cut_at,
                    "received": received, "trained": trained_at, "promoted": publication.alias_state.published_at,
                }  # fmt: skip
                event = event_of(self.registry, publication.alias_state, stage_at)
            return Done(publication.manifest.outcome, publication.manifest, event, stage_s)
        raise _contended(job.adapter)

    def rollback(self, job: RollbackRequested) -> Done:
        """Publish a version with an earlier version's state: the one named, or the one live before this one.

        Marks stay: what was learned since is not learned again. Raises as `update` does.
        """
        for _ in range(MAX_CONFLICTS):
            head = self._head(job.adapter)
            if head is None:
                raise JobError("nothing-to-roll-back-to", "the adapter has no version", got=job.adapter)
            if self._is_done(job.adapter, job.job_id):
                return Done("repeated", None, self.standing(job.adapter, job.alias))
            target, version = self._target(job)
            config = {**target.config, "job_id": job.job_id}
            manifest = target.model_copy(
                update={
                    "seq": head.seq + 1, "kind": "rollback", "outcome": "promoted", "reason": job.reason or "rollback",
                    "parent": version, "head": head.version, "job_id": job.job_id, "code": self._code,
                    "update_id": update_id(job.adapter, version, head.manifest.marks, config),
                    "batch": None, "cut": None, "learned": [], "skipped": [], "dropped": 0, "tokens": 0,
                    "marks": head.manifest.marks, "threads": self._threads,
                    "published_from_ms": None, "published_to_ms": None,
                }
            )  # fmt: skip
            try:
                publication = self.registry.publish(manifest, (), self._verifier({}), job.alias)
            except ConflictError:
                continue
            event = event_of(self.registry, publication.alias_state) if publication.alias_state else None
            return Done("promoted", publication.manifest, event)
        raise _contended(job.adapter)

    def standing(self, adapter: str, alias: str) -> AdapterUpdate | None:
        """Finish a publish that was cut off, and give the event of where the alias stands; None without a version."""
        state = self.registry.converge(adapter, alias)
        return event_of(self.registry, state) if state else None

    # ---- parts

    def _head(self, adapter: str) -> Head | None:
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

    def _parent(self, head: Head | None, adapter: str) -> tuple[Parent, str | None]:
        """The state to train from, and the version that it is of. A refused head carries its parent's state."""
        if head is None:
            return Parent(self.updater.lora.init_state(adapter, self.updater.recipe.seed), None, ()), None
        manifest = head.manifest
        version = head.version if manifest.outcome == "promoted" else manifest.parent
        key = _state_key(manifest.weights, manifest.optimizer, manifest.replay)
        parent = self._states.get(key)
        if parent is None:
            shapes = self.updater.lora.shapes
            weights = from_safetensors(get_blob(self._store, manifest.weights.digest), shapes)
            optimizer: State | None = None
            if manifest.optimizer:
                optimizer = optimizer_from_bytes(get_blob(self._store, manifest.optimizer.digest), shapes)
            replay = index_from_bytes(get_blob(self._store, manifest.replay.digest)) if manifest.replay else ()
            parent = Parent(weights, optimizer, replay)
        self._remember(key, parent)
        return parent, version

    def _remember(self, key: str, state: Parent) -> None:
        self._states[key] = state
        self._states.move_to_end(key)
        while len(self._states) > STATES_KEPT:
            self._states.popitem(last=False)

    def _next(
        self, job: UpdateRequested, batch: Batch, head: Head | None, parent: Parent, parent_version: str | None
    ) -> tuple[Manifest, dict[str, bytes]]:
        marks = dict(head.manifest.marks) if head else {}
        fresh, skipped, dropped = sort_out(batch, marks, self.updater.rows)
        after = dict(marks)
        places = [(origin.partition_key(), origin.offset) for origin in origins(batch)]
        for partition, offset in (*job.marks.items(), *places):
            after[partition] = max(offset, after.get(partition, offset))
        candidate: Candidate | None = None
        if fresh:
            self._rows.put(job.batch.digest, batch.examples)
            candidate = self.updater.update(
                parent, fresh, adapter=job.adapter, cut=job.cut, batch=job.batch.digest, replayed=self._rows
            )
        promoted = candidate is not None and candidate.outcome == "promoted"
        state = parent
        if candidate is not None and promoted:
            state = Parent(candidate.state, candidate.optimizer, candidate.replay)
        blobs: dict[str, bytes] = {}
        if promoted or head is None:
            weights, optimizer, replay = _stored(state, blobs)
            self._remember(_state_key(weights, optimizer, replay), state)
        else:
            weights, optimizer, replay = head.manifest.weights, head.manifest.optimizer, head.manifest.replay
        recipe = self.updater.recipe
        config: dict[str, Scalar] = {**recipe.config()}
        learned = fresh if promoted else []
        refused = [] if promoted else [skip(example, candidate.reason) for example in fresh if candidate]
        times = [example.origin.timestamp_ms for example in learned]
        manifest = Manifest(
            adapter=job.adapter,
            seq=head.seq + 1 if head else 1,
            kind="update",
            outcome=candidate.outcome if candidate else "unchanged",
            reason=job.reason if promoted else candidate.reason if candidate else "nothing-to-learn",
            parent=parent_version,
            head=head.version if head else None,
            update_id=update_id(job.adapter, parent_version, after, config),
            job_id=job.job_id,
            base_model=self.base.name,
            base_sha256=self.base.digest,
            code=self._code,
            config=config,
            seed=recipe.seed,
            threads=self._threads,
            batch=BlobRef(digest=job.batch.digest, size_bytes=job.batch.size_bytes),
            cut=job.cut,
            learned=[
                LearnedExample(
                    example_id=example.example_id,
                    partition=example.origin.partition_key(),
                    offset=example.origin.offset,
                    tokens=sum(row.tokens for row in self.updater.rows(example)),
                )
                for example in learned
            ],
            skipped=[*skipped, *refused],
            dropped=dropped,
            marks=after,
            weights=weights,
            optimizer=optimizer,
            replay=replay,
            gate=candidate.gate if candidate else {},
            tokens=candidate.tokens if candidate else 0,
            rank=recipe.rank,
            published_from_ms=min(times, default=None),
            published_to_ms=max(times, default=None),
        )
        return manifest, blobs

    def _verifier(self, blobs: Mapping[str, bytes]) -> Callable[[Manifest], None]:
        """The trial load. Bytes in hand need no second read: the registry compared the stored ones by digest."""

        def verify(manifest: Manifest) -> None:
            def read(ref: BlobRef) -> bytes:
                return blobs.get(ref.digest) or get_blob(self._store, ref.digest)

            shapes = self.updater.lora.shapes
            from_safetensors(read(manifest.weights), shapes)
            if manifest.optimizer:
                optimizer_from_bytes(read(manifest.optimizer), shapes)
            if manifest.replay:
                index_from_bytes(read(manifest.replay))

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
        if target.outcome != "promoted":
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
            if manifest.outcome == "promoted" and not self.registry.is_revoked(job.adapter, manifest.seq):
                return version
            version = manifest.head
        raise JobError("nothing-to-roll-back-to", "no version was live before", got=f"{job.adapter}#{job.alias}")


def code_digest() -> str:
    """What computed a version: release, torch, and a digest of the files that decide its bytes."""
    folder = Path(__file__).parent
    total = sha256()
    for name in ("adapter", "examples", "gate", "replay", "score", "train", "update"):
        total.update((folder / f"{name}.py").read_bytes())
    return f"perennial {code_version()} {total.hexdigest()[:16]} torch {torch.__version__}"


def _stored(state: Parent, blobs: dict[str, bytes]) -> tuple[BlobRef, BlobRef | None, BlobRef | None]:
    def ref(data: bytes) -> BlobRef:
        digest = digest_of(data)
        blobs[digest] = data
        return BlobRef(digest=digest, size_bytes=len(data))

    optimizer = ref(to_safetensors(state.optimizer)) if state.optimizer else None
    replay = ref(index_to_bytes(state.replay)) if state.replay else None
    return ref(to_safetensors(state.state)), optimizer, replay


def _state_key(*refs: BlobRef | None) -> str:
    return " ".join(ref.digest if ref else "-" for ref in refs)


def _contended(adapter: str) -> ConflictError:
    return ConflictError(
        f"other learners were faster {MAX_CONFLICTS} times in a row on {adapter}",
        remedy="let one consumer group own the topic adapter-jobs",
    )
