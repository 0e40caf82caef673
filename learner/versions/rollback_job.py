"""Rollback jobs: publish an earlier state again, and revoke versions."""

from __future__ import annotations

from contextlib import suppress

from perennial.learner.versions.alias_events import alias_event
from perennial.learner.versions.conflict_retry import retry_on_conflict
from perennial.learner.versions.history import index_version
from perennial.learner.versions.job_result import JobError, JobResult
from perennial.learner.versions.version_writer import VersionWriter
from perennial.storage.errors import ConflictError, NotFoundError
from perennial.storage.recovery.rollback import (
    RollbackError,
    collected_error,
    descendants_to_revoke,
    finish_interrupted,
    servable,
    version_before,
)
from perennial.storage.registry.history.collected import pinned
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Head
from perennial.streams.events.models import RollbackRequested


class RollbackExecutor:
    """Runs rollback jobs."""

    def __init__(self, writer: VersionWriter) -> None:
        self._writer = writer
        self._registry = writer.registry

    def rollback(self, job: RollbackRequested) -> JobResult:
        """Publish a version with the state of the version that the job names, or of the one that was live before.

        High-water marks stay, so what was learned since is not learned again. With `revoke`, the named version is
        never served again; if it is live, the newest earlier promoted version that is not revoked takes its place, or
        the alias is retired.

        Raises:
            JobError: the job can never be done.
            StoreError: the store failed.
            ConflictError: other learners were faster at every attempt.
        """
        return retry_on_conflict(self._registry, job.adapter, lambda: self._attempt(job))

    def _attempt(self, job: RollbackRequested) -> JobResult:
        # A rollback moves no high-water mark, so only the versions say whether it was done already, perhaps by the
        # command line or by retain, which do not wait for the learner.
        if self._registry.head(job.adapter) and self._writer.version_of_job(job.adapter, job.job_id) is not None:
            self._retire_revoked(job)
            return JobResult("repeated", None, self._writer.current_alias_event(job.adapter, job.alias))
        take_back_interrupted(self._writer, job.adapter, job.alias)
        head = self._writer.head(job.adapter)
        if head is None:
            raise JobError("nothing-to-roll-back-to", "the adapter has no version", got=job.adapter)
        try:
            return self._revoke(job, head) if job.revoke else self._roll_back(job, head)
        except RollbackError as error:
            raise JobError(
                error.reason, error.message, got=error.got, allowed=error.allowed, remedy=error.remedy
            ) from error

    def _roll_back(self, job: RollbackRequested, head: Head) -> JobResult:
        version, target = servable(self._registry, job.adapter, job.version or self._live_before(job))
        self._writer.check_base(target)
        manifest = self._writer.carry_forward_manifest(
            head, target, version, "rollback", job.job_id, job.reason or "rollback"
        )
        with pinned(self._registry.store, job.adapter, version, job.job_id) as has_blobs:
            if not has_blobs:
                raise collected_error(version)
            publication = self._registry.publish(manifest, (), self._writer.verifier({}), job.alias)
        index_version(self._registry, publication.version, publication.manifest)
        event = alias_event(self._registry, publication.alias_state) if publication.alias_state else None
        return JobResult("promoted", publication.manifest, event)

    def _revoke(self, job: RollbackRequested, head: Head) -> JobResult:
        if job.version is None:
            raise JobError("unknown-version", "a revocation must name its version", got=None)
        try:
            self._registry.revoke(job.adapter, job.version, job.reason or "revoked")
        except NotFoundError as error:
            raise JobError("unknown-version", "the version does not exist", got=job.version) from error
        state = self._registry.alias(job.adapter, job.alias)
        live = descendants_to_revoke(self._registry, job.adapter, state.version if state else None, job.version)
        if not live:
            return JobResult("unchanged", None, self._writer.current_alias_event(job.adapter, job.alias))
        for version in live:
            self._registry.revoke(job.adapter, version, job.reason or "revoked")
        target: Manifest | None = None
        before: str | None = None
        with suppress(RollbackError):  # where no version is left: take over the state before anything was learned
            before = version_before(self._registry, job.adapter, job.version)
            target = self._registry.manifest(job.adapter, before)
        manifest = self._writer.carry_forward_manifest(
            head, target, before, "revoke", job.job_id, job.reason or "revoked"
        )
        blobs = {} if target else self._writer.blobs_of_nothing(manifest)
        with pinned(self._registry.store, job.adapter, before or job.version, job.job_id) as has_blobs:
            if before is not None and not has_blobs:
                raise ConflictError(f"{before} was collected meanwhile")
            publication = self._registry.publish(manifest, blobs.values(), self._writer.verifier(blobs), job.alias)
        index_version(self._registry, publication.version, publication.manifest)
        self._retire_revoked(job)
        event = self._writer.current_alias_event(job.adapter, job.alias)
        return JobResult(publication.manifest.outcome, publication.manifest, event)

    def _retire_revoked(self, job: RollbackRequested) -> None:
        """Retire the alias if a revoked version is still live because no other version could take its place."""
        state = self._registry.alias(job.adapter, job.alias) if job.revoke else None
        if state is not None and self._registry.is_revoked(job.adapter, state.seq):
            self._registry.retire(job.adapter, job.alias, job.reason or "revoked", state.version)

    def _live_before(self, job: RollbackRequested) -> str:
        """Return the version before the one that was live when the job was requested, or is live now."""
        live = job.live
        if live is None:
            state = self._registry.alias(job.adapter, job.alias)
            live = state.version if state else None
        return version_before(self._registry, job.adapter, live)


def take_back_interrupted(writer: VersionWriter, adapter: str, alias: str) -> None:
    """Take back the newest version where a rollback that was killed beside a forgetting left a revoked state in it.

    Call it before a job starts from the newest version. Where no earlier version may be served, the state from before
    anything was learned is carried forward, or the next update would train from the revoked one.

    Args:
        writer: reads and prepares versions.
        adapter: the adapter.
        alias: the alias to move.

    Raises:
        StoreError: the store failed.
        ConflictError: other writers were first.
    """
    finish_interrupted(writer.registry, adapter, alias)
    head = writer.head(adapter)
    if head is None or head.manifest.kind not in {"rollback", "revoke"}:
        return
    if head.manifest.outcome != "promoted" or not writer.registry.is_contaminated(head.manifest):
        return
    reason = "the state that it took over is revoked, and no earlier version may be served"
    manifest = writer.carry_forward_manifest(head, None, None, "revoke", f"{head.manifest.job_id} taken back", reason)
    blobs = writer.blobs_of_nothing(manifest)
    publication = writer.registry.publish(manifest, blobs.values(), writer.verifier(blobs), alias)
    index_version(writer.registry, publication.version, publication.manifest)
