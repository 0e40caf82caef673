"""Backups: what is copied in which order, what is left out, restored, checked and deleted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore, StoredObject, put_blob
from perennial.storage.recovery.backup_copy import EXCLUDED, create_backup
from perennial.storage.recovery.backup_list import (
    BackupError,
    BackupHeader,
    entries_of,
    folders,
    list_backup_ids,
    load_header,
    page_key,
)
from perennial.storage.recovery.backup_upkeep import problems_of, prune_backups
from perennial.storage.recovery.restored_store import (
    end_restore,
    load_restored,
    load_restored_alias,
    restore_backup,
    restored_alias_keys,
)
from perennial.storage.registry.history.dependants import dependants, record_dependant
from perennial.storage.registry.quarantine import ensure_text_key, update_quarantine
from perennial.storage.registry.registry import Registry
from perennial.storage.signing.trust import Trust
from tests import jobs, retention_world
from tests.keys import Keys
from tests.memory_store import MemoryStore
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
START = datetime(2026, 3, 1, tzinfo=UTC)


class Clock:
    """Each call is an hour later."""

    def __init__(self) -> None:
        self._hours = count()

    def __call__(self) -> datetime:
        return START + timedelta(hours=next(self._hours))


@pytest.fixture
def now() -> Clock:
    return Clock()


class Memory(MemoryStore):
    """A store with an address of its own."""

    numbers = count()

    def __init__(self) -> None:
        super().__init__()
        self.uri = f"memory:{next(self.numbers)}"


class Interrupting(Memory):
    """Calls a function once, when a key with a prefix is read or listed the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks: dict[str, Callable[[], object]] = {}
        self._busy = threading.Lock()

    def _call(self, key: str) -> None:
        prefix = next((prefix for prefix in self.hooks if key.startswith(prefix)), None)
        if prefix is not None and self._busy.acquire(blocking=False):  # a hook itself reads the store
            try:
                self.hooks.pop(prefix)()
            finally:
                self._busy.release()

    def list(self, prefix: str, start_after: str = ""):
        self._call(prefix)
        return super().list(prefix, start_after)

    def get(self, key: str, max_bytes: int = 1 << 30) -> StoredObject:
        self._call(key)
        return super().get(key, max_bytes)


def content(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key).data for key in store.list("")}


def keys_of(place: ObjectStore, header: BackupHeader) -> list[str]:
    return [entry.key for entry in entries_of(place, header)]


def add_versions(store: ObjectStore, adapter: str, versions: int) -> VersionPublisher:
    publisher = VersionPublisher(store, adapter)
    for _ in range(versions):
        publisher.publish()
    return publisher


def test_everything_comes_back_and_aliases_wait_for_the_reconciliation(now: Clock) -> None:
    store, place, restored = Memory(), Memory(), Memory()
    for adapter in ("acme", ADAPTER, "other"):
        add_versions(store, adapter, 3)
    store.put_if_absent("some-new-kind/of/object", b"that nobody has heard of")
    header = create_backup(store, place, now, {"cluster_id": "c"})
    record = restore_backup(place, load_header(place), restored)
    assert (record.copied, record.positions) == (True, {"cluster_id": "c"})
    assert list(restored_alias_keys(restored)) == [
        f"restored/aliases/{each}/live" for each in ("acme", ADAPTER, "other")
    ]
    assert list(restored.list("aliases/")) == []
    found = {key.removeprefix("restored/"): data for key, data in content(restored).items() if key != "restored/backup"}
    assert found == content(store)
    assert (header.objects, header.size_bytes) == (len(found), sum(map(len, found.values())))
    assert load_restored(restored) == record
    end_restore(restored)
    assert load_restored(restored) is None


def test_a_store_that_waits_for_its_reconciliation_is_not_backed_up(now: Clock) -> None:
    """Its aliases wait in a folder that no backup holds, so the newest backup would have none."""
    store, place, restored = Memory(), Memory(), Memory()
    add_versions(store, ADAPTER, 1)
    good = create_backup(store, place, now)
    restore_backup(place, good, restored)
    with pytest.raises(BackupError, match="not reconciled") as raised:
        create_backup(restored, place, now)
    assert "perennial backup reconcile" in raised.value.remedy
    assert list_backup_ids(place) == [good.backup_id]
    end_restore(restored)
    assert create_backup(restored, place, now).backup_id != good.backup_id


def test_a_second_backup_copies_what_changed_and_both_can_be_restored(now: Clock) -> None:
    store, place = Memory(), Memory()
    publisher = add_versions(store, ADAPTER, 5)
    first = create_backup(store, place, now)
    assert first.size_bytes / 2 < first.copied_bytes <= first.size_bytes
    publisher.publish()
    place.calls.clear()
    store.calls.clear()
    second = create_backup(store, place, now)
    newest = set(keys_of(place, second)) - set(keys_of(place, first))
    assert 0 < second.copied_bytes < second.size_bytes / 3
    assert sum(key.startswith("blobs/") for key in newest) == 1
    for header, versions in ((first, 5), (second, 6)):
        restored = Memory()
        restore_backup(place, header, restored)
        assert len(list(restored.list("versions/"))) == versions
    assert list_backup_ids(place) == [first.backup_id, second.backup_id]


def test_what_belongs_to_running_processes_or_is_named_by_nothing_is_left_out(now: Clock) -> None:
    store, place = Memory(), Memory()
    add_versions(store, ADAPTER, 1)
    unnamed = put_blob(store, b"the text of a cut that was never committed")
    for name in EXCLUDED:
        store.put_if_absent(f"{name}x" if name.endswith("/") else name, b"{}")
    store.put_if_absent("installation/topics", b"{}")
    keys = keys_of(place, create_backup(store, place, now))
    assert blob_key(unnamed) not in keys
    assert [key for key in keys if key.startswith(EXCLUDED)] == []
    assert "installation/topics" in keys


def test_the_kinds_of_keys_are_found_without_a_list_of_them() -> None:
    store = Memory()
    for key in ("a/b/c", "a/d", "a-b/c", "b", "c/x"):
        store.put_if_absent(key, b"")
    assert sorted(folders(store)) == ["a-b/", "a/", "b", "c/"]


def test_versions_that_are_published_meanwhile_leave_no_name_without_its_object(now: Clock) -> None:
    """Each hook publishes between two phases of the copy: aliases, jobs, versions, manifests and blobs."""
    store, place, restored = Interrupting(), Memory(), Memory()
    publisher = add_versions(store, ADAPTER, 2)
    for prefix in ("aliases/", "jobs/", "versions/", "manifests/", "blobs/"):
        store.hooks[prefix] = publisher.publish
    header = create_backup(store, place, now)
    assert store.hooks == {}
    assert list(problems_of(place, header)) == []
    restore_backup(place, header, restored)
    registry = Registry(restored, nonce=lambda: "n", now=now)
    head = registry.head(ADAPTER)
    (key,) = restored_alias_keys(restored)
    alias = load_restored_alias(restored, key, Trust())
    assert head is not None
    assert 2 <= alias.seq <= head.seq == len(list(restored.list("versions/")))
    assert all(restored.exists(blob_key(ref.digest)) for ref in head.manifest.blobs())
    assert len(list(restored.list("manifests/"))) == head.seq, "a manifest that no version claims names unfindable text"


def test_a_blob_that_is_deleted_meanwhile_makes_the_copy_begin_again(now: Clock) -> None:
    """A forgetting replaced the version that the copy had seen live, and deleted its weights."""
    store, place = Interrupting(), Memory()
    publisher = add_versions(store, ADAPTER, 1)
    before = publisher.registry.head(ADAPTER)
    assert before is not None

    def forget() -> None:
        publisher.publish(kind="forget")
        store.delete(blob_key(before.manifest.weights.digest))

    store.hooks["blobs/"] = forget
    header = create_backup(store, place, now)
    assert list(problems_of(place, header)) == []
    assert len([key for key in keys_of(place, header) if key.startswith("versions/")]) == 2


def test_a_store_that_lacks_what_it_serves_has_no_backup(now: Clock) -> None:
    store, place = Memory(), Memory()
    head = add_versions(store, ADAPTER, 1).registry.head(ADAPTER)
    assert head is not None
    store.delete(blob_key(head.manifest.weights.digest))
    with pytest.raises(BackupError, match="were deleted while they were copied"):
        create_backup(store, place, now)
    assert list_backup_ids(place) == []


def test_a_job_that_curate_has_not_committed_is_left_out_and_committed_ones_come_with_their_text(now: Clock) -> None:
    store, place = Memory(), Memory()
    for cut in range(4):
        jobs.waiting(store, jobs.update(store, cut, [retention_world.example(cut)]))
    store.delete("state/curate/acme/support")
    jobs.commit(store, ADAPTER, 2)  # cuts 0 to 2 are committed, 3 is not
    keys = keys_of(place, create_backup(store, place, now))
    assert [key[-1] for key in keys if key.startswith("jobs/")] == ["0", "1", "2"]


def test_an_adapter_that_is_cut_meanwhile_is_read_again(now: Clock) -> None:
    """Else the versions would be ahead of the cuts that curate's state counts."""
    store, place = Interrupting(), Memory()
    jobs.commit(store, ADAPTER, 0)
    publisher = add_versions(store, ADAPTER, 1)

    def cut_and_learn() -> None:
        store.delete("state/curate/acme/support")
        jobs.commit(store, ADAPTER, 5)
        publisher.publish()

    store.hooks["versions/"] = cut_and_learn
    header = create_backup(store, place, now)
    restored = Memory()
    restore_backup(place, header, restored)
    assert restored.get("state/curate/acme/support").data == store.get("state/curate/acme/support").data
    assert len(list(restored.list("versions/"))) == 2


def test_an_adapter_that_curate_cuts_for_the_first_time_meanwhile_comes_with_its_state(now: Clock) -> None:
    """Without the state curate would begin with cut 0 again, which the versions have behind them."""
    store, place = Interrupting(), Memory()

    def begin() -> None:
        jobs.commit(store, ADAPTER, 0)
        add_versions(store, ADAPTER, 1)

    store.hooks["jobs/"] = begin
    keys = keys_of(place, create_backup(store, place, now))
    assert {key for key in keys if key.startswith(("state/", "versions/"))} == {
        "state/curate/acme/support", "versions/acme/support/000000000001",
    }  # fmt: skip


def test_the_pages_of_suppressed_texts_and_their_key_are_looked_for(now: Clock) -> None:
    store, place = Memory(), Memory()
    add_versions(store, ADAPTER, 1)
    update_quarantine(store, ADAPTER, lambda found: found.suppressing(["0" * 32]))
    with pytest.raises(BackupError, match="deleted") as raised:
        create_backup(store, place, now)
    assert f"keys/{ADAPTER}" in str(raised.value.got)


@pytest.mark.parametrize("where", ["", "/below", "/.."], ids=["same", "below", "above"])
def test_a_place_inside_the_store_is_refused(tmp_path: Path, now: Clock, where: str) -> None:
    store = DirectoryStore(tmp_path / "a" / "store", fsync=False)
    place = DirectoryStore(Path(f"{tmp_path}/a/store{where}").resolve(), fsync=False)
    with pytest.raises(BackupError, match="outside the store"):
        create_backup(store, place, now)


def test_a_changed_or_missing_byte_is_found(now: Clock) -> None:
    store, place = Memory(), Memory()
    head = add_versions(store, ADAPTER, 2).registry.head(ADAPTER)
    assert head is not None
    header = create_backup(store, place, now)
    assert list(problems_of(place, header)) == []
    key = blob_key(head.manifest.weights.digest)
    data = place.get(key).data
    place.delete(key)
    assert [found.partition(":")[0] for found in problems_of(place, header)] == [key]
    place.put_if_absent(key, b"x" + data[1:])
    (problem,) = problems_of(place, header)
    assert "does not hold the bytes" in problem
    with pytest.raises(IntegrityError):
        restore_backup(place, header, Memory())
    page = page_key(header.backup_id, 0)
    lines = place.get(page).data
    place.delete(page)
    assert next(problems_of(place, header)).startswith(f"backup {header.backup_id} is damaged")
    place.put_if_absent(page, lines.replace(b"versions/", b"versionz/"))
    with pytest.raises(IntegrityError, match="damaged"):
        list(entries_of(place, header))


def test_restoring_needs_an_empty_store_goes_on_after_a_crash_and_replaces_only_if_asked(now: Clock) -> None:
    store, place = Memory(), Memory()
    publisher = add_versions(store, ADAPTER, 3)
    header = create_backup(store, place, now)
    publisher.publish()
    store.put_if_absent("later/thing", b"1")
    with pytest.raises(BackupError, match="not empty") as raised:
        restore_backup(place, header, store)
    assert "--replace" in raised.value.remedy
    restore_backup(place, header, store, replace=True)
    assert not store.exists("later/thing")
    assert len(list(store.list("versions/"))) == 3
    assert list(store.list("aliases/")) == []

    class Cut(Exception):  # noqa: N818 - a stop, not an error of the project
        pass

    def stop(_: object) -> None:
        raise Cut

    other = Memory()
    other.put_if_absent("installation/topics", b"what `perennial init` recorded")
    with pytest.raises(Cut):
        restore_backup(place, header, other, on_progress=stop)
    found = load_restored(other)
    assert found is not None
    assert not found.copied
    restore_backup(place, header, other)
    assert content(other) == {**content(store), "restored/backup": other.get("restored/backup").data} | {
        "installation/topics": b"what `perennial init` recorded"
    }


def test_pruning_deletes_old_backups_with_what_was_erased_since_and_nothing_that_another_one_holds(now: Clock) -> None:
    store, place = Memory(), Memory()
    publisher = add_versions(store, ADAPTER, 1)
    first = publisher.registry.head(ADAPTER)
    assert first is not None
    erased = blob_key(first.manifest.weights.digest)
    old = create_backup(store, place, now)
    publisher.publish(kind="forget")
    store.delete(erased)
    new = create_backup(store, place, now)
    place.put_if_absent("backups/20200101T000000Z-0000/pages/00000000", b"of a backup that was cut off")
    assert place.exists(erased)
    between = new.began_at - timedelta(minutes=1)
    planned = prune_backups(place, between, dry_run=True)
    assert (planned.deleted, planned.kept) == ([old.backup_id], [new.backup_id])
    assert planned.blobs >= 1
    assert place.exists(erased)
    assert prune_backups(place, between) == planned
    assert not place.exists(erased)
    assert list_backup_ids(place) == [new.backup_id]
    assert not [key for key in place.list("backups/") if new.backup_id not in key]
    assert list(problems_of(place, new)) == []
    assert prune_backups(place, new.began_at + timedelta(days=1)).deleted == [], "the newest is kept"
    assert prune_backups(place, new.began_at + timedelta(days=1), keep=0).deleted == [new.backup_id]
    assert list(place.list("")) == []


def test_a_place_without_a_backup_says_so() -> None:
    with pytest.raises(NotFoundError, match="no complete backup"):
        load_header(Memory())
    with pytest.raises(NotFoundError, match="no complete backup"):
        load_header(Memory(), "../../etc")


def test_a_version_that_is_published_meanwhile_is_copied_with_its_signature(now: Clock, tmp_path: Path) -> None:
    store, place, restored = Interrupting(), Memory(), Memory()
    keys = Keys(tmp_path / "keys")
    publisher = VersionPublisher(store, ADAPTER, trust=keys.owner)
    publisher.publish()
    store.hooks = {"aliases/": publisher.publish}  # what is in no folder of its own was read before
    header = create_backup(store, place, now)
    restore_backup(place, header, restored)
    registry = Registry(restored, nonce=lambda: "n", now=now, trust=keys.readers)
    head = registry.head(ADAPTER)
    assert head is not None
    assert head.seq == 2


def test_the_text_key_of_an_adapter_that_is_learned_meanwhile_comes_with_its_versions(now: Clock) -> None:
    """Its versions were copied and its key was not: after a restore nobody could tell which examples they name."""
    store, place = Interrupting(), Memory()
    add_versions(store, ADAPTER, 1)

    def begin() -> None:
        ensure_text_key(store, "acme/new")
        add_versions(store, "acme/new", 1)

    store.hooks["jobs/"] = begin
    kept = keys_of(place, create_backup(store, place, now))
    assert any(key.startswith("versions/acme/new/") for key in kept)
    assert "keys/acme/new" in kept


@pytest.mark.parametrize("phase", ["jobs/", "versions/", "manifests/"])
def test_who_begins_with_a_learned_start_meanwhile_comes_with_the_record_of_it(now: Clock, phase: str) -> None:
    """Its version was copied and the record was not: after a restore a forgetting at the founder would not reach it."""
    store, place, restored = Interrupting(), Memory(), Memory()
    founder, user = "acme/fay", "acme/uli"
    add_versions(store, founder, 1)

    def begin() -> None:
        record_dependant(store, founder, user)
        add_versions(store, user, 1)

    store.hooks[phase] = begin
    restore_backup(place, create_backup(store, place, now), restored)
    assert dependants(restored, founder) == [user]
