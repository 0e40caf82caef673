"""Forget jobs find their examples by the history index, and just as well where it is missing or damaged."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from tests import jobs, tiny
from tests.unit.learner.test_forgetting import documents, erase, forget, learn, never_saw, quarantined, readable
from tests.unit.learner.test_versions import ADAPTER, local_learner

HEADER_BYTES = 52
"""Name of the format and checksum; the rest of a page is compressed."""


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def pages(store: DirectoryStore) -> list[str]:
    return list(store.list(f"history/{ADAPTER}/"))


def page_text(store: DirectoryStore) -> str:
    return "".join(zlib.decompress(store.get(key).data[HEADER_BYTES:]).decode() for key in pages(store))


def damage(store: DirectoryStore, how: str) -> None:
    for key in pages(store):
        stored = store.get(key)
        if how == "missing":
            store.delete(key)
        elif how == "damaged":
            store.compare_and_swap(key, stored.data[:-1] + b"?", stored.etag)


@pytest.mark.parametrize("how", ["whole", "missing", "damaged"])
def test_case_scale_an_erasure_is_exact_whatever_the_index_is_like(
    store: DirectoryStore, tmp_path: Path, how: str
) -> None:
    learner, cuts = local_learner(store), documents(1, 40, per_cut=2)
    learn(learner, cuts)
    assert "doc-9" in page_text(store)
    damage(store, how)
    done, _ = forget(local_learner(store), quarantined(store, erase("r1", 9)))
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts, {9}).equals(done.manifest)
    assert readable(store.root, ["secret009"]) == []
    text = page_text(store)
    assert "doc-9" not in text, "no page keeps the id of an erased example"
    assert f"{9:032x}" not in text
    assert "doc-8" in text
    assert len(pages(store)) == 2, "the pages that were missing are written again"


def test_case_scale_an_erasure_that_matches_nothing_reads_no_micro_batch(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [result.manifest for result in learn(local_learner(store), documents(1, 40, per_cut=2))]
    bodies = [blob_key(manifest.batch.digest) for manifest in made if manifest is not None and manifest.batch]
    read: set[str] = set()
    get = DirectoryStore.get

    def counting(self: DirectoryStore, key: str, *args: int, **more: int):
        read.add(key)
        return get(self, key, *args, **more)

    monkeypatch.setattr(DirectoryStore, "get", counting)
    forget(local_learner(store), quarantined(store, erase("r1", 999)))
    assert read.isdisjoint(bodies)


def test_an_equal_text_under_another_id_is_found_in_a_micro_batch_that_matches_nothing_else(
    store: DirectoryStore,
) -> None:
    learner = local_learner(store)
    learn(learner, documents(1, 20, per_cut=2))
    texts = [
        "the very same secret words",
        "something else",
        "the very same\nsecret words",
        " the very same secret words\r\n",
    ]
    for cut, text in enumerate(texts, start=10):
        number = 10 + cut
        learner.update(jobs.update(store, cut, [tiny.document(number, text)]), "live")
    forget(local_learner(store), quarantined(store, erase("r1", 20)))
    assert readable(store.root, ["the very same secret words"]) == []
    assert len(readable(store.root, ["something else"])) == 1
    assert "doc-20" not in page_text(store)
    assert "doc-23" not in page_text(store)
    assert "doc-21" in page_text(store)
