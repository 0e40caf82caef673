"""Check a backup byte by byte, and delete backups that are too old, so that erased texts leave them too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.storage.recovery.backup_list import (
    PREFIX,
    BackupEntry,
    BackupHeader,
    entries_of,
    header_key,
    list_backup_ids,
    load_header,
)
from perennial.storage.recovery.snapshot_check import unresolved_names
from perennial.storage.recovery.snapshot_index import SnapshotIndex

_PAGE = 1024


@dataclass(frozen=True)
class PruneReport:
    """What a pruning deleted, or would delete.

    Attributes:
        deleted: ids of backups.
        kept: ids of backups.
        blobs: blobs that no kept backup holds.
    """

    deleted: Sequence[str]
    kept: Sequence[str]
    blobs: int


def problems_of(
    place: ObjectStore, header: BackupHeader, on_object: Callable[[int], None] = lambda _: None
) -> Iterator[str]:
    """Read every object of a backup; yield what is missing, damaged, or named and not there.

    Args:
        place: where backups are kept.
        header: the backup.
        on_object: called after each object with its size in bytes.
    """
    broken = False
    with SnapshotIndex() as index:
        try:
            for entry in entries_of(place, header):
                index.add([entry])
                problem = _problem_of(place, entry)
                if problem:
                    broken = True
                    yield problem
                on_object(entry.size_bytes)
        except IntegrityError as error:
            yield f"{error.message}: {error.got}"
            return
        if not broken:
            yield from unresolved_names(place, index)


def _problem_of(place: ObjectStore, entry: BackupEntry) -> str:
    try:
        size_bytes = len(get_blob(place, entry.digest))
    except (NotFoundError, IntegrityError) as error:
        return f"{entry.key}: {error.message}"
    return "" if size_bytes == entry.size_bytes else f"{entry.key}: {size_bytes} bytes instead of {entry.size_bytes}"


def prune_backups(place: ObjectStore, made_before: datetime, *, keep: int = 1, dry_run: bool = False) -> PruneReport:
    """Delete backups that are too old, what is left of backups that were cut off, and the blobs that nothing else holds.

    Nothing may be backed up to the same place meanwhile. It may be interrupted and called again.

    Args:
        place: where backups are kept.
        made_before: delete the backups that began earlier.
        keep: keep at least so many of the newest.
        dry_run: only count.

    Raises:
        IntegrityError: a backup that is to be kept is damaged; nothing was deleted.
    """
    ids = list_backup_ids(place)
    headers = {backup_id: load_header(place, backup_id) for backup_id in ids}
    newest = set(ids[len(ids) - keep :] if keep else ())
    kept = [each for each in ids if each in newest or headers[each].began_at >= made_before]
    with SnapshotIndex() as index:
        for backup_id in kept:
            rest = entries_of(place, headers[backup_id])
            while page := list(islice(rest, _PAGE)):
                index.name(entry.digest.removeprefix("sha256:") for entry in page)
        deleted = [each for each in ids if each not in kept]
        if not dry_run:
            for backup_id in deleted:
                place.delete(header_key(backup_id))  # first: without it the rest is no backup
            for key in list(place.list(PREFIX)):
                if key.removeprefix(PREFIX).partition("/")[0] not in kept:
                    place.delete(key)
        blobs = 0
        keys = place.list("blobs/")
        while found := list(islice(keys, _PAGE)):
            for key in found:
                if not index.names(key.rpartition("/")[2]):
                    blobs += 1
                    if not dry_run:
                        place.delete(key)
    return PruneReport(deleted, kept, blobs)
