"""The progress of rebuilds in the store, so that a rebuild goes on where an earlier one of the same updates ended.

For each update that a rebuild has trained again, an object `rebuilds/<adapter>/<key>` names the rebuilt version. The
key is a hash of everything that decides the result: the state that was trained from, the recorded update, and the
examples that were left out of its micro-batch. So any later rebuild that begins with the same updates and leaves out
the same examples finds them: after a crash, a stop or a conflict, or at the hour of an expiry that was prepared before.
The key of an update holds the version before it, so a plan that differs in one update finds nothing from there on.

The object is written before the blobs that it names, so no text of a rebuilt micro-batch is stored that a later
forgetting would not search. A step whose manifest or blobs are not all stored counts as not made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime, timedelta
from hashlib import sha256

import orjson

from perennial.learner.versions.history import History, RecordedVersion
from perennial.learner.versions.micro_batches import OriginOffset
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.history.rebuilt_steps import RebuiltStep, list_steps, load_step, rebuilds_folder
from perennial.storage.registry.records import manifest_key
from perennial.storage.registry.registry import Registry
from perennial.storage.signing.version_statements import signature_key

KEEP_PROGRESS = timedelta(days=7)
"""Progress that no job has used for so long is given up: its expiry was cancelled, or its job is lost."""


def step_key(
    adapter: str,
    before: RecordedVersion | None,
    seed: int,
    recorded: str,
    removed: Iterable[OriginOffset],
    anew: Sequence[object] = (),
) -> str:
    """Return the key of an update that is trained again; equal keys mean equal results.

    Args:
        adapter: the adapter.
        before: the rebuilt or clean version before the update; None for the adapter's initial state.
        seed: the seed of the initial state.
        recorded: the version of the recorded update.
        removed: the offsets of the examples that are left out of its micro-batch.
        anew: base, recipe and general text, where they are not those that the recorded update names.
    """
    start = before.version if before is not None else seed
    parts = [adapter, start, recorded, sorted(removed), *anew]
    return f"{rebuilds_folder(adapter)}{sha256(orjson.dumps(parts)).hexdigest()}"


def find_step(registry: Registry, key: str) -> RecordedVersion | None:
    """Return the rebuilt version of a step; None if it was not made, or not stored completely.

    Raises:
        IntegrityError: the object is not readable.
    """
    store = registry.store
    found, _ = load_step(store, key)
    if found is None:
        return None
    # The registry may have the manifest in memory although another process has removed it.
    if not store.exists(manifest_key(found.adapter, found.rebuilt)):
        return None
    manifest = registry.manifest(found.adapter, found.rebuilt)
    if not all(store.exists(blob_key(ref.digest)) for ref in manifest.blobs()):
        return None
    return RecordedVersion(found.rebuilt, manifest)


def record_step(store: ObjectStore, key: str, step: RebuiltStep) -> None:
    """Record a step before its blobs are stored. Blobs that an earlier, incomplete step may have left stay named.

    Raises:
        ConflictError: another learner records the same step.
    """
    found, etag = load_step(store, key)
    if found is not None:
        step = step.model_copy(update={"blobs": sorted({*found.blobs, *step.blobs})})
    store.compare_and_swap(key, step.to_bytes(), etag)


def sweep_steps(
    registry: Registry,
    adapter: str,
    history: Callable[[], History | None],
    now: datetime,
    *,
    drop: Callable[[RebuiltStep], bool] = lambda _: False,
    delete_blobs: Callable[[Collection[str]], None],
) -> set[str]:
    """Remove the steps that no rebuild can use any more, with their blobs and manifests.

    A step stays while its recorded update is in the schedule of the newest version, the step is not published itself,
    and it is younger than `KEEP_PROGRESS`.

    Args:
        registry: the adapter's versions.
        adapter: the adapter.
        history: returns all manifests of the adapter, None if it has no version; called only if there are steps.
        now: the time.
        drop: says of a step that it must go in any case.
        delete_blobs: called with the digests of blobs to delete.

    Returns:
        The digests of the blobs of the steps that stay: nobody may delete them.

    Raises:
        StoreError: the store failed.
    """
    steps = list(list_steps(registry.store, adapter))
    if not steps:
        return set()
    recorded = history()
    manifests = recorded.versions if recorded is not None else {}
    schedule = set(recorded.scheduled()) if recorded is not None else set()
    kept: set[str] = set()
    swept: list[tuple[str, RebuiltStep]] = []
    for key, step in steps:
        usable = step.recorded in schedule and step.rebuilt not in manifests and now - step.made_at < KEEP_PROGRESS
        if usable and not drop(step):
            kept.update(step.blobs)
        else:
            swept.append((key, step))
    if swept:
        needed = kept | (recorded.all_blobs() if recorded is not None else set())
        delete_blobs({digest for _, step in swept for digest in step.blobs} - needed)
        for key, step in swept:
            if step.rebuilt not in manifests:
                registry.store.delete(manifest_key(adapter, step.rebuilt))
                registry.store.delete(signature_key(adapter, step.rebuilt))
            registry.store.delete(key)
    return kept
