"""Delete the weights of old versions that nothing can need, and blobs that crashed processes left behind.

Of a collected version the weights, the optimizer state and the replay index are deleted. Its manifest, its sequence
number and its micro-batch stay: the text can still be found and erased, and its update can be trained again. Every 64th
version of the schedule keeps its state, so that a rebuild starts at most 64 updates before the first one that it must
change. Training these updates again gives their very states, so forgetting stays exact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

from perennial.learner.forgetting.waiting_batches import waiting_digests
from perennial.learner.versions.history import History, load_history
from perennial.storage.errors import NotFoundError
from perennial.storage.failpoints import failpoint as default_failpoint
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.recovery.rollback import RollbackError, version_before
from perennial.storage.registry.history.collected import (
    load_collected,
    load_pins,
    mark_collected,
    settle_collected,
)
from perennial.storage.registry.history.rebuilt_steps import list_steps
from perennial.storage.registry.manifest import BlobRef, Manifest
from perennial.storage.registry.pending_deletes import list_pending_deletes
from perennial.storage.registry.quarantine import load_quarantine
from perennial.storage.registry.registry import Registry

CHECKPOINT_EVERY = 64
"""Every so many versions of the schedule one keeps its state."""


@dataclass(frozen=True)
class CollectionReport:
    """The outcome of a collection in one adapter.

    Attributes:
        adapter: the adapter.
        versions: versions that lost their blobs, or would lose them.
        blobs: blobs that were deleted, or would be.
        freed_bytes: their size.
        kept: versions that keep their state.
        skipped: why nothing was done; empty where it was.
    """

    adapter: str
    versions: int = 0
    blobs: int = 0
    freed_bytes: int = 0
    kept: int = 0
    skipped: str = ""


def collect_versions(
    registry: Registry,
    adapter: str,
    keep: int,
    *,
    dry_run: bool = False,
    failpoint: Callable[[str], None] = default_failpoint,
) -> CollectionReport:
    """Delete the state of an adapter's old versions. Safe while learners and rollbacks run; it may be repeated.

    It keeps the newest version, what aliases point at and what a rollback of them would return to, the newest `keep`
    versions that may be served, the newest `keep` of the schedule and every `CHECKPOINT_EVERY`th before them, and what
    rebuilds have made so far.

    Args:
        registry: the adapter's versions.
        adapter: the adapter.
        keep: how many of the newest versions keep their state, at least 1.
        dry_run: only report what would be deleted.
        failpoint: called with a name at each step where tests may stop or race the process.

    Raises:
        StoreError: the store failed, or a manifest is not readable.
    """
    history = load_history(registry, adapter)
    if history is None:
        return CollectionReport(adapter, skipped="no version")
    if _is_forgetting(registry.store, adapter):
        return CollectionReport(adapter, skipped="a forgetting is under way: collect when it has ended")
    needed = _needed(registry, adapter, history, keep)
    used = _used_blobs(registry, adapter, needed)
    collected = load_collected(registry.store, adapter)
    candidates = history.versions.keys() - needed - collected.all
    marked = {v for v in candidates if registry.manifest(adapter, v).weights.digest not in used}
    kept = len(history.versions) - len(collected.all) - len(marked)
    if dry_run:
        blobs = _state_blobs(registry, adapter, [*marked, *collected.deleting], used)
        present = [ref for ref in blobs if registry.store.exists(blob_key(ref.digest))]
        return _report(adapter, len({*marked, *collected.deleting}), present, kept)
    if not marked and not collected.deleting:
        return CollectionReport(adapter, kept=kept)
    failpoint("gc.plan")
    deleting = set(mark_collected(registry.store, adapter, marked).deleting)
    failpoint("gc.mark")

    # Read everything again: what began before the mark is seen now, and what begins later sees the mark.
    pins = load_pins(registry.store, adapter)
    history = load_history(registry, adapter)
    if history is None or _is_forgetting(registry.store, adapter):
        settle_collected(registry.store, adapter, (), marked)
        return CollectionReport(adapter, skipped="a forgetting has begun: collect when it has ended")
    needed = _needed(registry, adapter, history, keep) | pins
    used = _used_blobs(registry, adapter, needed)
    unmarked = marked & needed
    deleted: list[BlobRef] = []
    for ref in _state_blobs(registry, adapter, sorted(deleting - unmarked), used):
        if registry.store.delete(blob_key(ref.digest)):
            deleted.append(ref)
        failpoint("gc.delete")
    settle_collected(registry.store, adapter, deleting - unmarked, unmarked)
    return _report(adapter, len(deleting - unmarked), deleted, kept + len(unmarked))


def referenced_blobs(registry: Registry, adapter: str) -> set[str]:
    """Return the digests of all blobs that anything of an adapter names; no other blob is ever read for it.

    Raises:
        StoreError: the store failed, or an object is not readable.
    """
    store = registry.store
    digests = set(waiting_digests(store, adapter))
    for pending in list_pending_deletes(store, adapter):
        digests.update(pending.digests)
    digests |= _progress_blobs(registry, adapter)
    history = load_history(registry, adapter)  # last: a job names its blobs elsewhere before a version does
    return digests | (history.all_blobs() if history is not None else set())


def _needed(registry: Registry, adapter: str, history: History, keep: int) -> set[str]:
    """Return the versions whose state must stay."""
    published = history.index.published if history.index is not None else []
    revoked = {revocation.version for revocation in registry.revocations(adapter)}
    needed = {history.head}
    for state in registry.aliases(adapter):
        needed.add(state.version)
        with suppress(RollbackError):  # nothing was live before
            needed.add(version_before(registry, adapter, state.version))
    servable = [v for v in reversed(published) if history.versions[v].outcome == "promoted" and v not in revoked]
    schedule = history.scheduled()
    needed.update(servable[:keep], schedule[-keep:])
    needed.update(version for version in schedule if history.versions[version].seq % CHECKPOINT_EVERY == 0)
    return needed


def _is_forgetting(store: ObjectStore, adapter: str) -> bool:
    return any(entry.done is None for entry in load_quarantine(store, adapter).entries)


def _used_blobs(registry: Registry, adapter: str, needed: Iterable[str]) -> set[str]:
    """Return the blobs of versions that stay, by their manifests, and those of rebuilds under way."""
    used = {ref.digest for version in needed for ref in registry.manifest(adapter, version).blobs()}
    return used | _progress_blobs(registry, adapter)


def _progress_blobs(registry: Registry, adapter: str) -> set[str]:
    found: set[str] = set()
    for _, step in list_steps(registry.store, adapter):
        found.update(step.blobs)
        with suppress(NotFoundError):  # the step was not made to its end
            found.update(ref.digest for ref in registry.manifest(adapter, step.rebuilt).blobs())
    return found


def _state_blobs(registry: Registry, adapter: str, versions: Iterable[str], used: Collection[str]) -> list[BlobRef]:
    """Return the blobs of these versions that hold their state and that nothing else uses; never a micro-batch."""
    refs: dict[str, BlobRef] = {}
    for version in versions:
        manifest: Manifest = registry.manifest(adapter, version)
        for ref in (manifest.weights, manifest.optimizer, manifest.replay):
            if ref is not None and ref.digest not in used:
                refs[ref.digest] = ref
    return list(refs.values())


def _report(adapter: str, versions: int, blobs: Collection[BlobRef], kept: int) -> CollectionReport:
    return CollectionReport(adapter, versions, len(blobs), sum(ref.size_bytes for ref in blobs), kept)
