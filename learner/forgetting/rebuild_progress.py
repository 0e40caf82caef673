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

from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Annotated

import orjson
from pydantic import AwareDatetime, Field

from perennial.learner.versions.history import History, RecordedVersion
from perennial.learner.versions.micro_batches import OriginOffset
from perennial.storage.errors import NotFoundError
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import AdapterName, Digest
from perennial.storage.registry.records import RegistryRecord, check_adapter, manifest_key, parse_record
from perennial.storage.registry.registry import Registry
from perennial.storage.signing.version_statements import signature_key

KEEP_PROGRESS = timedelta(days=7)
"""Progress that no job has used for so long is given up: its expiry was cancelled, or its job is lost."""
_MAX_STEP_BYTES = 64 << 10
_KEY_CHARS = 64


class RebuiltStep(RegistryRecord):
    """One update that a rebuild trained again.

    Attributes:
        adapter: the adapter.
        job_id: the job that trained it.
        recorded: the version of the recorded update.
        rebuilt: the version that the rebuild made of it; it has no sequence number.
        batch: the micro-batch that the step stored; None if the recorded one had nothing to leave out.
        blobs: every blob that the step stored.
        made_at: when it was made.
    """

    adapter: AdapterName
    job_id: Annotated[str, Field(min_length=1, max_length=1024)]
    recorded: Digest
    rebuilt: Digest
    batch: Digest | None = None
    blobs: list[Digest] = Field(default_factory=list)
    made_at: AwareDatetime


def step_key(
    adapter: str, before: RecordedVersion | None, seed: int, recorded: str, removed: Iterable[OriginOffset]
) -> str:
    """Return the key of an update that is trained again; equal keys mean equal results.

    Args:
        adapter: the adapter.
        before: the rebuilt or clean version before the update; None for the adapter's initial state.
        seed: the seed of the initial state.
        recorded: the version of the recorded update.
        removed: the offsets of the examples that are left out of its micro-batch.
    """
    start = before.version if before is not None else seed
    parts = [adapter, start, recorded, sorted(removed)]
    return f"{_folder(adapter)}{sha256(orjson.dumps(parts)).hexdigest()}"


def find_step(registry: Registry, key: str) -> RecordedVersion | None:
    """Return the rebuilt version of a step; None if it was not made, or not stored completely.

    Raises:
        IntegrityError: the object is not readable.
    """
    store = registry.store
    found, _ = _load(store, key)
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
    found, etag = _load(store, key)
    if found is not None:
        step = step.model_copy(update={"blobs": sorted({*found.blobs, *step.blobs})})
    store.compare_and_swap(key, step.to_bytes(), etag)


def list_steps(store: ObjectStore, adapter: str) -> Iterator[tuple[str, RebuiltStep]]:
    """Yield the key and the content of each step of the adapter.

    Raises:
        IntegrityError: an object is not readable.
    """
    folder = _folder(adapter)
    for key in store.list(folder):
        name = key[len(folder) :]
        if len(name) == _KEY_CHARS and "/" not in name:  # else it is of an adapter below this one
            found, _ = _load(store, key)
            if found is not None:
                yield key, found


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


def _folder(adapter: str) -> str:
    return f"rebuilds/{check_adapter(adapter)}/"


def _load(store: ObjectStore, key: str) -> tuple[RebuiltStep | None, str | None]:
    try:
        stored = store.get(key, _MAX_STEP_BYTES)
    except NotFoundError:
        return None, None
    return parse_record(RebuiltStep, key, stored.data), stored.etag
