"""Pending deletes: what a job will delete, in objects that stay small."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from perennial.storage.objects import hash_pages
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.hash_pages import MAX_PAGE_HASHES
from perennial.storage.objects.object_store import StoredObject
from perennial.storage.registry.pending_deletes import (
    clear_pending_deletes,
    list_pending_deletes,
    load_pending_deletes,
    record_pending_deletes,
)

ADAPTER = "acme/support"
LARGEST_OBJECT_BYTES = 512 << 10


class SizeWatcher(DirectoryStore):
    """A store that remembers the size of the largest object that was written."""

    largest_bytes = 0

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.largest_bytes = max(self.largest_bytes, len(data))
        return super().put_if_absent(key, data)

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        self.largest_bytes = max(self.largest_bytes, len(data))
        return super().compare_and_swap(key, data, expected)


@pytest.fixture
def store(tmp_path: Path) -> SizeWatcher:
    return SizeWatcher(tmp_path, fsync=False)


def digests(start: int, count: int) -> list[str]:
    return [f"sha256:{number * 7919:064x}" for number in range(start, start + count)]


def loaded(store: DirectoryStore, job_id: str = "job") -> list[str]:
    hash_pages._pages.clear()  # as in another process
    found = load_pending_deletes(store, ADAPTER, job_id)
    return [] if found is None else found.digests


def test_a_forgetting_of_very_many_blobs_writes_small_objects(store: SizeWatcher) -> None:
    """All digests were in one object of at most 64 MB, which was written again for every rebuilt update."""
    many = digests(0, 100_000)
    record_pending_deletes(store, ADAPTER, "job", many, {"r1": 5})
    record_pending_deletes(store, ADAPTER, "job", digests(100_000, 3))
    record_pending_deletes(store, ADAPTER, "job", many[:10], {"r1": 4})
    assert store.largest_bytes < LARGEST_OBJECT_BYTES
    assert loaded(store) == sorted(digests(0, 100_003))
    (found,) = list_pending_deletes(store, ADAPTER)
    assert (len(found.digests), found.requests, found.pages) == (100_003, {"r1": 5}, [])
    clear_pending_deletes(store, ADAPTER, "job")
    assert list(store.list("")) == []


def test_a_blob_that_is_in_a_page_is_not_recorded_again(store: SizeWatcher) -> None:
    record_pending_deletes(store, ADAPTER, "job", digests(0, MAX_PAGE_HASHES))
    before = list(store.list(""))
    for _ in range(3):
        record_pending_deletes(store, ADAPTER, "job", digests(0, MAX_PAGE_HASHES))
    assert list(store.list("")) == before
    assert len(before) == 2


def test_pages_of_one_job_are_no_other_jobs(store: SizeWatcher) -> None:
    record_pending_deletes(store, ADAPTER, "one", digests(0, MAX_PAGE_HASHES), refused=True)
    record_pending_deletes(store, ADAPTER, "two", digests(5, MAX_PAGE_HASHES + 1))
    assert sorted(found.job_id for found in list_pending_deletes(store, ADAPTER)) == ["one", "two"]
    clear_pending_deletes(store, ADAPTER, "one")
    assert loaded(store, "two") == sorted(digests(5, MAX_PAGE_HASHES + 1))


def test_writers_at_once_lose_no_page(store: SizeWatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perennial.storage.registry.pending_deletes.MAX_PAGE_HASHES", 4)

    def write(start: int) -> None:
        for number in range(start, start + 20):
            record_pending_deletes(store, ADAPTER, "job", digests(number, 1))

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded(store) == sorted([*digests(0, 20), *digests(100, 20), *digests(200, 20)])
    clear_pending_deletes(store, ADAPTER, "job")
    assert list(store.list("")) == []


def test_a_page_that_is_not_what_it_is_named_after_is_refused(store: SizeWatcher) -> None:
    record_pending_deletes(store, ADAPTER, "job", digests(0, MAX_PAGE_HASHES))
    (page,) = (key for key in store.list("forgotten/") if "=" in key)
    stored: StoredObject = store.get(page)
    store.compare_and_swap(page, stored.data + b"x", stored.etag)
    with pytest.raises(Exception, match="does not hold the bytes"):
        loaded(store)
