"""Look for what an adapter of a snapshot needs to be served and to go on, and the snapshot does not hold."""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.storage.recovery.backup_list import BackupEntry
from perennial.storage.recovery.snapshot_index import SnapshotIndex
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.quarantine import Quarantine
from perennial.storage.registry.records import AliasState, Claim, manifest_key, parse_record


def unresolved_names(place: ObjectStore, index: SnapshotIndex) -> Iterator[str]:
    """Yield, as text, every object that is named and missing.

    Looked at are what aliases and the newest versions need to be served and trained from, the micro-batches of waiting
    jobs, and the pages and keys of suppressed texts. Older versions may lack blobs: they were collected or forgotten.

    Args:
        place: holds the snapshot's objects as blobs.
        index: the snapshot.

    Raises:
        IntegrityError: an object is damaged.
    """
    for entry in index.entries("aliases/"):
        state = parse_record(AliasState, entry.key, get_blob(place, entry.digest))
        if state.kind != "retired":
            yield from _missing_of_version(place, index, entry.key, state.adapter, state.version)
    for adapter, entry in _newest_versions(index):
        claim = parse_record(Claim, entry.key, get_blob(place, entry.digest))
        yield from _missing_of_version(place, index, entry.key, adapter, claim.version)
    for entry in index.entries("jobs/"):
        batch = orjson.loads(get_blob(place, entry.digest)).get("batch") or {}
        if batch.get("digest") and index.get(blob_key(batch["digest"])) is None:
            yield f"{entry.key} names the micro-batch {batch['digest']}"
    for entry in index.entries("quarantine/"):
        quarantine = parse_record(Quarantine, entry.key, get_blob(place, entry.digest))
        pages = [f"suppressed/{quarantine.adapter}/{page}" for page in quarantine.pages.values()]
        keys = [f"keys/{quarantine.adapter}"] if pages or quarantine.keyed else []
        yield from (f"{entry.key} names {key}" for key in (*pages, *keys) if index.get(key) is None)


def _newest_versions(index: SnapshotIndex) -> Iterator[tuple[str, BackupEntry]]:
    """Yield each adapter with the claim of its last sequence number; memory grows with the adapters."""
    newest: dict[str, BackupEntry] = {}  # adapters may lie below each other, so the keys of one are not always in a row
    for entry in index.entries("versions/"):
        newest[entry.key.removeprefix("versions/").rpartition("/")[0]] = entry
    yield from newest.items()


def _missing_of_version(
    place: ObjectStore, index: SnapshotIndex, named_by: str, adapter: str, version: str
) -> Iterator[str]:
    entry = index.get(manifest_key(adapter, version))
    if entry is None:
        yield f"{named_by} names version {version}"
        return
    manifest = Manifest.from_bytes(get_blob(place, entry.digest))
    for ref in manifest.blobs():
        if ref != manifest.batch and index.get(blob_key(ref.digest)) is None:
            yield f"{named_by} needs the blob {ref.digest}"
