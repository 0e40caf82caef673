"""Deleting what nothing needs any more: an adapter's whole history from the store, and the sweep of a tombstone."""

from __future__ import annotations

from perennial.learner.versions.history import History
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.pending_deletes import load_pending_deletes
from perennial.storage.registry.registry import Registry


def load_history(registry: Registry, adapter: str) -> History | None:
    """All manifests that can be reached from the adapter's line; None where it has no version. Raises StoreError."""
    line = [version for _, version in registry.versions(adapter)]
    if not line:
        return None
    manifests: dict[str, Manifest] = {}
    waiting = list(line)
    while waiting:
        version = waiting.pop()
        if version not in manifests:
            manifest = manifests[version] = registry.manifest(adapter, version)
            waiting += [name for name in (manifest.parent, manifest.head) if name is not None]
    return History(manifests, line, line[0])


def delete_unreferenced(registry: Registry, adapter: str, job_id: str, *, unpublished: bool = False) -> set[str]:
    """Delete the blobs that the job's tombstone names, with all object versions; the digests that are gone.

    What a version that stands needs is kept, so nothing is lost where a job was cut off before its end. The
    tombstone stays: who wrote it removes it. Only this job's: another's may name what it is about to publish.
    unpublished: only what no version names, half made by a job that goes no further.
    """
    tombstone = load_pending_deletes(registry.store, adapter, job_id)
    named = set(tombstone.digests) if tombstone else set()
    if not named:
        return set()
    history = load_history(registry, adapter)
    if history is not None and unpublished:
        named -= {ref.digest for manifest in history.manifests.values() for ref in manifest.blobs()}
    elif history is not None:
        named -= history.standing({revocation.version for revocation in registry.revocations(adapter)})
    for digest in sorted(named):
        registry.store.delete(blob_key(digest))
    return named
