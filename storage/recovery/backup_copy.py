"""Copy a store while all roles run, so that the copy is a state that the store could have crashed in.

What refers to something is read before that something: an object that is read later may be newer than the one that names
it, which every reader copes with, because a process may end between the two writes. The other way round, a name would
lead nowhere. The order, and what would go wrong in another one:

1. positions of Kafka (the caller reads them): what was committed by then is in the objects that are read later;
2. `retention/`, then the quarantines and everything else of the adapters: a request that counts as carried out was so
   before the versions are read, so no copy says that a text is erased and still holds it;
3. for each adapter `aliases`, curate's state, the jobs and `versions`, without a cut in between: else the learner's
   versions would be ahead of the cuts that curate knows. An adapter that was cut meanwhile is read once more;
4. the manifests that these name, and those that manifests name; then once more the text keys and the records of who began
   with a learned start, and the signatures: all of them are stored before a version is;
5. the blobs that any of these objects name. A blob that nothing names is left out: no forgetting would find its text.

Forgetting and `perennial gc` delete blobs, perhaps between 3 and 5. So at the end everything that an adapter needs to be
served and to go on is looked for; where it is missing, the copy begins again, and takes what has changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any, Final

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.keys import blob_key, digest_of
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.storage.recovery.backup_list import (
    BackupEntry,
    BackupError,
    BackupHeader,
    entries_of,
    folders,
    list_backup_ids,
    load_header,
    new_backup_id,
    write_header,
    write_pages,
)
from perennial.storage.recovery.restored_store import load_restored
from perennial.storage.recovery.snapshot_check import unresolved_names
from perennial.storage.recovery.snapshot_index import SnapshotIndex
from perennial.storage.registry.history import dependants
from perennial.storage.registry.waiting_jobs import cuts_of_state

EXCLUDED: Final = ("installation/maintenance", "orphans", "pins/", "probe/", "rebuilds/", "restored/")
"""Belongs to processes that run now, or only saves time: rebuilds begin anew, orphans are looked for anew."""
_FIRST: Final = ("retention/", "quarantine/", "forgotten/")
_IN_STEP: Final = ("aliases/", "state/curate/", "jobs/", "versions/")
_BY_DIGEST: Final = ("manifests/", "blobs/")
_SIGNATURES: Final = "signatures/"
_AGAIN: Final = ("keys/", dependants.PREFIX)
_DIGEST = re.compile(rb"[0-9a-f]{64}")
_PASSES: Final = 3
_STEP_ATTEMPTS: Final = 32
_THREADS, _BLOB_THREADS, _WINDOW = 8, 2, 64
_SMALL_BYTES: Final = 64 << 10


@dataclass(frozen=True)
class CopyProgress:
    """How far a copy is.

    Attributes:
        phase: what is copied now.
        objects: objects read or found at the place so far.
        copied_bytes: bytes that were stored so far.
    """

    phase: str = ""
    objects: int = 0
    copied_bytes: int = 0


OnProgress = Callable[[CopyProgress], None]


def create_backup(
    store: ObjectStore,
    place: ObjectStore,
    now: Callable[[], datetime],
    positions: dict[str, Any] | None = None,
    on_progress: OnProgress = lambda _: None,
    began_at: datetime | None = None,
) -> BackupHeader:
    """Copy a store; roles may run meanwhile.

    Args:
        store: the store to copy.
        place: where backups are kept.
        now: wall clock.
        positions: where the consumer groups stood, read before this call; stored with the backup.
        on_progress: called after every few objects.
        began_at: when the positions were read; None: now.

    Returns:
        The header of the complete backup.

    Raises:
        BackupError: the place is the store itself, the store was restored and is not reconciled, or blobs were deleted
            during every attempt.
        StoreError: a store failed.
    """
    if place.uri == store.uri or place.uri.startswith(f"{store.uri}/") or store.uri.startswith(f"{place.uri}/"):
        raise BackupError(
            "a backup must lie outside the store that it is of", got=place.uri, allowed=f"not {store.uri}, and not in it",
            remedy="name another folder, bucket or prefix",
        )  # fmt: skip
    restored = load_restored(store)
    if restored is not None:  # its aliases wait in a folder that is left out
        raise BackupError(
            "the store was restored and is not reconciled with Kafka: a backup of it would have no aliases",
            got=f"{store.uri}, restored from backup {restored.backup_id}", allowed="a store that is reconciled",
            remedy="run `perennial backup reconcile`, then this command again",
        )  # fmt: skip
    began_at = began_at or now()
    backup_id = new_backup_id(began_at)
    with SnapshotIndex() as index:
        earlier = list_backup_ids(place)
        if earlier:
            index.add_known(entries_of(place, load_header(place, earlier[-1])))
        copier = _Copier(store, place, index, on_progress)
        missing: list[str] = []
        for _ in range(_PASSES):
            copier.run()
            missing = list(islice(unresolved_names(place, index), 5))
            if not missing:
                break
        if missing:
            raise BackupError(
                "objects were deleted while they were copied, in each of several attempts", got="; ".join(missing),
                allowed="a store in which everything that is served has its objects",
                remedy="run the command again when no forgetting and no `perennial gc` runs; if it says the same, the "
                "store itself lacks these objects: see `perennial adapters history`",
            )  # fmt: skip
        pages = write_pages(place, backup_id, index.entries())
        objects, size_bytes = index.totals()
        header = BackupHeader(
            backup_id=backup_id, store=store.uri, began_at=began_at, ended_at=now(), objects=objects,
            size_bytes=size_bytes, copied_bytes=copier.progress.copied_bytes, pages=pages, positions=positions,
        )  # fmt: skip
    write_header(place, header)
    return header


class _Copier:
    def __init__(self, store: ObjectStore, place: ObjectStore, index: SnapshotIndex, on_progress: OnProgress) -> None:
        self._store = store
        self._place = place
        self._index = index
        self._on_progress = on_progress
        self.progress = CopyProgress()

    def run(self) -> None:
        """Copy what the store holds now; what an earlier run copied is not copied again."""
        self._index.drop(self._index.keys_below(""))
        others = [top for top in folders(self._store) if top not in (*_FIRST, *_BY_DIGEST, _SIGNATURES, *EXCLUDED)]
        for prefix in (*_FIRST, *(top for top in others if not any(step.startswith(top) for step in _IN_STEP))):
            self._copy(prefix, self._store.list(prefix))
        self._copy("state/", (key for key in self._store.list("state/") if not key.startswith("state/curate/")))
        self._copy_in_step()
        self._copy_manifests()
        # Of versions that were made meanwhile: without its text key, nobody can tell which examples a version names; without
        # the record of what an adapter depends on, a forgetting would not reach it.
        for prefix in _AGAIN:
            self._copy(prefix, self._store.list(prefix))
        self._copy(_SIGNATURES, self._store.list(_SIGNATURES))
        self._copy_blobs()

    # ---- what belongs together of an adapter

    def _copy_in_step(self) -> None:
        """Copy aliases, curate's states, jobs and versions; an adapter that was cut meanwhile is copied again."""
        for prefix in _IN_STEP:
            self._copy(prefix, self._store.list(prefix))
        adapters = {key.removeprefix("state/curate/") for key in self._index.keys_below("state/curate/")}
        for prefix in ("jobs/", "versions/"):  # also of an adapter whose first state came after states were read
            adapters |= {key.removeprefix(prefix).rpartition("/")[0] for key in self._index.keys_below(prefix)}
        for adapter in sorted(adapters):
            state = f"state/curate/{adapter}"
            for _ in range(_STEP_ATTEMPTS):
                if self._is_current(state):
                    break
                self._copy_adapter(adapter)
            else:
                raise BackupError(
                    f"{adapter} was cut without a pause", got=f"{_STEP_ATTEMPTS} attempts",
                    remedy="run the command again at a time with fewer events, or stop the role streams meanwhile",
                )  # fmt: skip
        self._drop_uncommitted()

    def _is_current(self, key: str) -> bool:
        """Return whether an object is as it was copied, and no object where none was copied."""
        found = self._index.get(key)
        try:
            data = self._store.get(key).data
        except NotFoundError:
            return found is None
        return found is not None and digest_of(data) == found.digest

    def _copy_adapter(self, adapter: str) -> None:
        """Copy the aliases, the state, the jobs and the versions of one adapter again, in this order."""
        for prefix in _IN_STEP:
            key = f"{prefix}{adapter}"
            if prefix == "state/curate/":
                self._copy(prefix, [key])
                continue
            self._index.drop(each for each in self._index.keys_below(f"{key}/") if _is_direct(key, each))
            self._copy(prefix, (each for each in self._store.list(f"{key}/") if _is_direct(key, each)))

    def _drop_uncommitted(self) -> None:
        """Leave out jobs that curate had not committed in the state that was copied: it cuts their examples again."""
        for key in self._index.keys_below("jobs/"):
            adapter, _, cut = key.removeprefix("jobs/").rpartition("/")
            state = self._index.get(f"state/curate/{adapter}")
            committed = cuts_of_state(state.key, get_blob(self._place, state.digest)) if state else 0
            if cut.isdecimal() and int(cut) >= committed:
                self._index.drop([key])

    # ---- what is named by its digest

    def _copy_manifests(self) -> None:
        keys = iter(self._store.list("manifests/"))
        while page := list(islice(keys, 1024)):
            self._index.add_manifests((key.rpartition("/")[2].removesuffix(".json"), key) for key in page)
        for digests in self._index.unfollowed():
            self._copy("manifests/", self._index.manifest_keys(digests))

    def _copy_blobs(self) -> None:
        keys = iter(self._store.list("blobs/"))
        while page := list(islice(keys, 1024)):
            self._index.add_blobs(key.rpartition("/")[2] for key in page)
        self._progress("blobs/")
        with ThreadPoolExecutor(_BLOB_THREADS) as threads:
            for named in self._index.named_blobs():
                found = [each for each in threads.map(self._copied_blob, named) if each is not None]
                self._index.add(entry for entry, _ in found)
                self._count(len(found), sum(copied for _, copied in found))

    def _copied_blob(self, blob: tuple[str, int | None]) -> tuple[BackupEntry, int] | None:
        """Copy a blob that an earlier backup does not have; None where it was deleted meanwhile."""
        digits, known_bytes = blob
        digest = f"sha256:{digits}"
        key = blob_key(digest)
        if known_bytes is not None and self._place.exists(key) and self._store.exists(key):
            return BackupEntry(key, digest, known_bytes), 0
        try:
            data = get_blob(self._store, digest)
        except NotFoundError:
            return None
        return BackupEntry(key, digest, len(data)), len(data) if self._place.put_if_absent(key, data) else 0

    # ---- everything

    def _copy(self, phase: str, keys: Iterable[str]) -> None:
        """Copy objects, and note the digests that they name."""
        self._progress(phase)
        rest = (key for key in keys if key not in EXCLUDED)
        with ThreadPoolExecutor(_THREADS) as threads:
            while page := list(islice(rest, _WINDOW)):
                found = [each for each in threads.map(self._copied, page) if each is not None]
                self._index.add(entry for entry, _, _ in found)
                self._index.name(digits for _, named, _ in found for digits in named)
                self._count(len(found), sum(copied for _, _, copied in found))

    def _copied(self, key: str) -> tuple[BackupEntry, set[str], int] | None:
        try:
            data = self._store.get(key).data
        except NotFoundError:  # deleted since it was listed
            return None
        digest = digest_of(data)
        target = blob_key(digest)
        is_new = (len(data) <= _SMALL_BYTES or not self._place.exists(target)) and self._place.put_if_absent(
            target, data
        )
        named = {digits.decode() for digits in _DIGEST.findall(data)}
        return BackupEntry(key, digest, len(data)), named, len(data) if is_new else 0

    def _progress(self, phase: str) -> None:
        self.progress = replace(self.progress, phase=phase)
        self._on_progress(self.progress)

    def _count(self, objects: int, copied_bytes: int) -> None:
        self.progress = replace(
            self.progress, objects=self.progress.objects + objects,
            copied_bytes=self.progress.copied_bytes + copied_bytes,
        )  # fmt: skip
        self._on_progress(self.progress)


def _is_direct(folder: str, key: str) -> bool:
    """Return whether a key is directly in a folder: adapters may lie below each other."""
    return "/" not in key[len(folder) + 1 :]
