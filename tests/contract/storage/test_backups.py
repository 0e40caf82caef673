"""Backups between stores of every kind: from it to a folder, from a folder to it, and back."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.recovery.backup_copy import create_backup
from perennial.storage.recovery.backup_list import list_backup_ids
from perennial.storage.recovery.backup_upkeep import problems_of, prune_backups
from perennial.storage.recovery.restored_store import restore_backup
from tests.versions import VersionPublisher


def now() -> datetime:
    return datetime.now(UTC)


def content(store: ObjectStore) -> dict[str, bytes]:
    found = {key.removeprefix("restored/"): store.get(key).data for key in store.list("")}
    found.pop("backup", None)
    return found


@pytest.mark.parametrize("it_is_the_place", [False, True], ids=["source", "place"])
def test_a_backup_goes_from_store_to_store_and_back(store: ObjectStore, tmp_path: Path, it_is_the_place: bool) -> None:
    folder = DirectoryStore(tmp_path / "folder", fsync=False)
    source, place = (folder, store) if it_is_the_place else (store, folder)
    publishers = [VersionPublisher(source, adapter) for adapter in ("acme", "acme/support")]
    for publisher in publishers:
        publisher.publish()
    first = create_backup(source, place, now)
    publishers[0].publish()
    second = create_backup(source, place, now)
    assert second.copied_bytes < second.size_bytes / 2
    assert list_backup_ids(place) == sorted({first.backup_id, second.backup_id})
    assert list(problems_of(place, second)) == []
    restored = DirectoryStore(tmp_path / "restored", fsync=False)
    restore_backup(place, second, restored)
    assert content(restored) == content(source)
    restore_backup(place, first, source, replace=True)
    assert len(list(source.list("versions/"))) == 2
    prune_backups(place, now(), keep=0)
    assert list(place.list("")) == []
