"""Put a backup into a store, in a form that no role reads and no subscriber serves until it is reconciled with Kafka.

A restored store is older than Kafka's offsets, than the requests to forget that were carried out since, and than the
generations that subscribers have seen. So `restored/backup` says that the store was restored, and every role refuses to
start while the object is there. Aliases come back under `restored/`: what they point at may hold what was erased since,
and a subscriber that starts now must not serve it. `streams/recovery` moves them back, and deletes the record at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from pydantic import AwareDatetime

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.storage.recovery.backup_list import BackupEntry, BackupError, BackupHeader, entries_of
from perennial.storage.registry.records import MAX_RECORD_BYTES, AliasState, RegistryRecord, alias_key, parse_record
from perennial.storage.signing.trust import Trust

RECORD_KEY: Final = "restored/backup"
_ALIASES: Final = "restored/aliases/"
_MAX_RECORD_BYTES: Final = 32 << 20
_THREADS, _WINDOW = 4, 64


class RestoredBackup(RegistryRecord):
    """The object `restored/backup`: which backup the store was restored from.

    Attributes:
        backup_id: the backup.
        began_at: when it was made.
        copied: False while objects are still being copied.
        positions: where the consumer groups stood then; None where the backup does not say.
    """

    backup_id: str
    began_at: AwareDatetime
    copied: bool
    positions: dict[str, Any] | None = None


@dataclass(frozen=True)
class RestoreProgress:
    """How far a restore is.

    Attributes:
        objects: objects handled so far.
        of: all objects of the backup.
        written_bytes: bytes written so far.
    """

    objects: int
    of: int
    written_bytes: int


def load_restored(store: ObjectStore) -> RestoredBackup | None:
    """Return which backup a store was restored from; None where it is reconciled, or was never restored.

    Raises:
        IntegrityError: the object is not readable.
    """
    try:
        data = store.get(RECORD_KEY, _MAX_RECORD_BYTES).data
    except NotFoundError:
        return None
    return parse_record(RestoredBackup, RECORD_KEY, data)


def restore_backup(
    place: ObjectStore,
    header: BackupHeader,
    store: ObjectStore,
    *,
    replace: bool = False,
    on_progress: Callable[[RestoreProgress], None] = lambda _: None,
) -> RestoredBackup:
    """Copy a backup into a store. It may be interrupted, and called again with the same backup.

    Args:
        place: where backups are kept.
        header: the backup.
        store: the store; empty, or one into which the same backup was being restored.
        replace: delete what the store holds and the backup does not.
        on_progress: called after every few objects.

    Returns:
        The record that keeps roles from starting.

    Raises:
        BackupError: the store is not empty.
        IntegrityError: the backup is damaged; the store is then incomplete.
        StoreError: a store failed.
    """
    found = load_restored(store)
    resumed = found is not None and found.backup_id == header.backup_id and not found.copied
    if not (replace or resumed):
        _require_empty(store)
    record = RestoredBackup(
        backup_id=header.backup_id, began_at=header.began_at, copied=False, positions=header.positions
    )
    _put(store, RECORD_KEY, record.to_bytes())
    if replace:
        _delete_others(place, header, store)
    objects = written_bytes = 0
    rest = entries_of(place, header)
    with ThreadPoolExecutor(_THREADS) as threads:
        while page := list(islice(rest, _WINDOW)):
            written_bytes += sum(threads.map(lambda entry: _restore(place, store, entry), page))
            objects += len(page)
            on_progress(RestoreProgress(objects, header.objects, written_bytes))
    record = record.model_copy(update={"copied": True})
    _put(store, RECORD_KEY, record.to_bytes())
    return record


def restored_alias_keys(store: ObjectStore) -> Iterator[str]:
    """Yield the keys of the aliases of a restored store that are not back in their place yet."""
    yield from store.list(_ALIASES)


def load_restored_alias(store: ObjectStore, key: str, trust: Trust) -> AliasState:
    """Return an alias of a restored store that is not back in its place yet.

    Hazard: who puts it back signs it. So it has to be the alias of its key, and a trusted key has to have signed it.

    Args:
        store: the restored store.
        key: the alias's key, from `restored_alias_keys`.
        trust: the trusted keys.

    Raises:
        IntegrityError: the object is no alias, it is another one, or no trusted key signed it.
        KeyFileError: the trusted keys cannot be read.
        NotFoundError: it is not there any more.
    """
    state = parse_record(AliasState, key, store.get(key, MAX_RECORD_BYTES).data)
    if key != _restored_key(state.adapter, state.alias):
        raise IntegrityError(f"{key} is another alias", got=f"{state.adapter}#{state.alias}", allowed=key)
    state.check_signature(trust)
    return state


def drop_restored_alias(store: ObjectStore, adapter: str, alias: str) -> None:
    """Remove a restored alias, after it is back in its place."""
    store.delete(_restored_key(adapter, alias))


def end_restore(store: ObjectStore) -> None:
    """Let roles start: the store is reconciled."""
    store.delete(RECORD_KEY)


def _restored_key(adapter: str, alias: str) -> str:
    return f"restored/{alias_key(adapter, alias)}"


def _require_empty(store: ObjectStore) -> None:
    # `perennial init` and `perennial topics create` may have run on a new bucket; what they recorded is replaced.
    held = (key for key in store.list("") if not key.startswith(("installation/", "probe/")))
    some = list(islice(held, 3))
    if some:
        raise BackupError(
            "the store that is to be restored is not empty", got=f"{store.uri} holds {', '.join(some)}, …",
            allowed="an empty store, or one into which this backup was being restored",
            remedy="set PERENNIAL_STORE to an empty folder, bucket or prefix; or add --replace, which deletes what it holds",
        )  # fmt: skip


def _delete_others(place: ObjectStore, header: BackupHeader, store: ObjectStore) -> None:
    """Delete aliases, then everything that the backup does not hold: both lists are sorted by key."""
    for key in list(store.list("aliases/")):
        store.delete(key)
    wanted = (entry.key for entry in entries_of(place, header))
    next_wanted = next(wanted, None)
    others: list[str] = []
    for key in store.list(""):
        while next_wanted is not None and next_wanted < key:
            next_wanted = next(wanted, None)
        if key not in (next_wanted, RECORD_KEY):
            others.append(key)
        if len(others) >= 1024:
            _delete(store, others)
    _delete(store, others)


def _delete(store: ObjectStore, keys: list[str]) -> None:
    for key in keys:
        store.delete(key)
    keys.clear()


def _restore(place: ObjectStore, store: ObjectStore, entry: BackupEntry) -> int:
    """Write one object, unless the store has the same bytes; return how many bytes were written."""
    key = f"restored/{entry.key}" if entry.key.startswith("aliases/") else entry.key
    data = get_blob(place, entry.digest)
    if store.put_if_absent(key, data):
        return len(data)
    if digest_of(store.get(key).data) == entry.digest:
        return 0
    _put(store, key, data)
    return len(data)


def _put(store: ObjectStore, key: str, data: bytes) -> None:
    try:
        etag = store.get(key).etag
    except NotFoundError:
        etag = None
    try:
        store.compare_and_swap(key, data, etag)
    except ConflictError as error:
        raise BackupError(
            "another process writes to the store that is being restored", got=key,
            remedy="stop all roles and other commands, then run the same command again",
        ) from error  # fmt: skip
