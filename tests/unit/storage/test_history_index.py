"""The history index says what the manifests say, whatever happens to its pages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import uuid4

import orjson
import pytest

from perennial.storage.objects.keys import blob_key, digest_of
from perennial.storage.objects.object_store import put_blob
from perennial.storage.registry.history import index as index_module
from perennial.storage.registry.history import pages as pages_module
from perennial.storage.registry.history.index import HistoryIndex, IndexedHistory
from perennial.storage.registry.history.pages import ExampleRow, HistoryPage, IndexedVersion
from perennial.storage.registry.manifest import BlobRef, LearnedExample, Manifest
from perennial.storage.registry.registry import Registry
from perennial.streams.client.testing import next_manifest
from tests.memory_store import MemoryStore

ADAPTER = "acme/support"
_ORIGIN = {"cluster_id": "c", "topic_id": "t", "topic": "documents", "partition": 0}


class _Rows:
    """Describes bodies that are lists of example ids, each of which ends in the offset."""

    def key_check(self) -> str:
        return "check"

    def rows(self, body: bytes) -> list[ExampleRow]:
        return [
            {"example_id": name, "text_hash": None, "origin": {**_ORIGIN, "offset": int(name.rpartition("-")[2])}}
            for name in orjson.loads(body)
        ]


class _World:
    def __init__(self) -> None:
        self.store = MemoryStore()
        self.registry = Registry(self.store, nonce=lambda: uuid4().hex, now=lambda: datetime.now(UTC))

    @property
    def index(self) -> HistoryIndex:
        return HistoryIndex(Registry(self.store, lambda: uuid4().hex, lambda: datetime.now(UTC)), ADAPTER, _Rows())

    def manifest(self, number: int, **changes: object) -> Manifest:
        weights = b"weights"
        body = orjson.dumps([f"example-{number}"])
        ref = BlobRef(digest=put_blob(self.store, body), size_bytes=len(body))
        learned = LearnedExample(example_id=f"example-{number}", partition="c/t/documents/0", offset=number, tokens=1)
        made = next_manifest(self.registry, ADAPTER, weights)
        put_blob(self.store, weights)
        return made.model_copy(update={"batch": ref, "learned": [learned], **changes})

    def publish(self, count: int, *, indexed: bool = True) -> None:
        for _ in range(count):
            head = self.registry.head(ADAPTER)
            manifest = self.manifest(head.seq + 1 if head else 1)
            self.claim(manifest, indexed=indexed)

    def claim(self, manifest: Manifest, *, indexed: bool = True) -> str:
        version = self.registry.record(manifest)
        self.registry._claim_seq(manifest, version)
        if indexed:
            self.index.append(version, manifest)
        return version

    def load(self) -> IndexedHistory:
        head = self.registry.head(ADAPTER)
        assert head is not None
        return self.index.load(head)

    def check(self) -> IndexedHistory:
        """Compare the index with a walk over all manifests."""
        loaded = self.load()
        walked = [version for _, version in self.registry.versions(ADAPTER, newest_first=False)]
        assert loaded.published == walked
        waiting, seen = list(walked), set()
        while waiting:
            version = waiting.pop()
            if version not in seen:
                seen.add(version)
                manifest = self.registry.manifest(ADAPTER, version)
                assert _facts(loaded.versions[version]) == _facts(IndexedVersion.of(version, manifest))
                waiting += [name for name in (manifest.parent, manifest.head) if name]
        assert seen == set(loaded.versions)
        return loaded

    def pages(self) -> list[str]:
        return [key.rpartition("/")[2] for key in self.store.list(f"history/{ADAPTER}/")]

    def stored_bytes(self) -> bytes:
        pages = (self.store.get(key).data for key in self.store.list(f"history/{ADAPTER}/"))
        return b"".join(pages_module.zlib.decompress(data[52:]) for data in pages)


def _facts(node: IndexedVersion) -> tuple[object, ...]:
    return (
        node.version, node.seq, node.kind, node.outcome, node.parent, node.head, node.blobs, node.batch,
        node.learned_count,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (index_module, pages_module):
        monkeypatch.setattr(module, "BLOCK_SIZES", (4, 16, 64))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 17, 63, 64, 70, 150])
def test_index_says_what_the_manifests_say(count: int) -> None:
    world = _World()
    world.publish(count)
    loaded = world.check()
    assert loaded.unindexed == []
    expected = count // 64 + count % 64 // 16 + count % 16 // 4 + (count % 4 > 0)
    assert len(world.pages()) == expected
    for number, version in enumerate(loaded.published, start=1):
        assert loaded.versions[version].learned == (("c/t/documents/0", 0, number),)
        rows = loaded.rows(loaded.versions[version].batch or "")
        assert rows is not None
        assert [row["example_id"] for row in rows] == [f"example-{number}"]


def test_load_reads_pages_and_neither_claims_nor_manifests() -> None:
    world = _World()
    world.publish(150)
    head = world.registry.head(ADAPTER)
    assert head is not None
    world.store.calls.clear()
    world.index.load(head)
    assert sum(world.store.calls.values()) <= 8


def test_missing_damaged_and_foreign_pages_are_never_trusted() -> None:
    world, other = _World(), _World()
    world.publish(75)
    other.publish(10)
    other.claim(other.manifest(11, reason="another history"))
    other.publish(70)
    for key in list(world.store.list(f"history/{ADAPTER}/")):
        stored = world.store.get(key)
        foreign = other.store.get(key).data if key in other.store.list(f"history/{ADAPTER}/") else b""
        for damage in (stored.data[:-1], stored.data[:60] + b"x" + stored.data[61:], b"", foreign):
            etag = world.store.compare_and_swap(key, damage, world.store.get(key).etag)
            world.check()
        world.store.compare_and_swap(key, stored.data, etag)
        world.store.delete(key)
        world.check()
        loaded = world.load()
        world.index.complete(loaded)
        assert world.check().unindexed == []


def test_versions_that_no_page_has_are_taken_from_manifests_and_made_up_for() -> None:
    world = _World()
    world.publish(10)
    world.publish(7, indexed=False)
    assert world.check().unindexed == [11, 12, 13, 14, 15, 16, 17]
    world.publish(1)  # writes the page of its own block only
    world.check()
    world.index.complete(world.load())
    assert world.check().unindexed == []
    assert world.pages() == ["=16-000000000001", "=4-000000000017"]


def test_last_version_of_a_block_that_the_command_line_published_is_added_by_the_next_writer() -> None:
    world = _World()
    world.publish(15)
    world.publish(1, indexed=False)
    world.publish(1)
    assert world.pages() == ["=16-000000000001", "=4-000000000017"]
    assert world.check().unindexed == []


def test_rebuilt_updates_are_found_through_the_version_that_takes_them_over() -> None:
    world = _World()
    world.publish(6)
    clean = world.load().published[2]
    steps: list[str] = []
    for number in range(3):
        before = steps[-1] if steps else clean
        rebuilt = world.manifest(100 + number, kind="replayed", seq=4 + number, head=before, parent=before)
        steps.append(world.registry.record(rebuilt))
    head = world.registry.head(ADAPTER)
    assert head is not None
    world.claim(world.manifest(7, kind="forget", parent=steps[-1], head=head.version, seq=7, batch=None, learned=[]))
    world.publish(12)
    loaded = world.check()
    assert loaded.unindexed == []
    assert set(steps) <= set(loaded.versions)
    again = world.manifest(200, kind="replayed", seq=7, head=steps[-1], parent=steps[-1])
    steps.append(world.registry.record(again))
    head = world.registry.head(ADAPTER)
    assert head is not None
    world.claim(
        world.manifest(20, kind="forget", parent=steps[-1], head=head.version, seq=head.seq + 1, batch=None, learned=[])
    )
    assert steps[-1] in world.check().versions
    rebuilt_in_pages = [
        node.version
        for key in world.store.list(f"history/{ADAPTER}/")
        for node in HistoryPage.from_bytes(key, world.store.get(key).data).rebuilt
    ]
    assert sorted(rebuilt_in_pages) == sorted(steps), "each rebuilt update is on one page"


def test_ids_of_erased_examples_leave_every_page() -> None:
    world = _World()
    world.publish(40)
    loaded = world.load()
    digests = [loaded.versions[loaded.published[n - 1]].batch or "" for n in (3, 18, 39)]
    for digest in digests:
        world.store.delete(blob_key(digest))
    world.index.erase(loaded, digests)
    for number in (3, 18, 39):
        assert f'"example-{number}"'.encode() not in world.stored_bytes()
    assert b'"example-4"' in world.stored_bytes()
    assert world.check().rows(digests[0]) == []
    world.publish(30)
    assert b'"example-3"' not in world.stored_bytes()
    assert world.check().rows(digests[0]) == []


def test_an_erasure_between_the_two_pages_of_a_merge_reaches_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world = _World()
    world.publish(15)
    loaded = world.load()
    digest = loaded.versions[loaded.published[2]].batch or ""
    index = world.index
    write = index._write

    def racing(page: HistoryPage, etag: str | None, added: Sequence[IndexedVersion] = ()) -> bool:
        if page.level == 1:  # the smaller pages have been read
            monkeypatch.undo()
            for module in (index_module, pages_module):
                monkeypatch.setattr(module, "BLOCK_SIZES", (4, 16, 64))
            world.store.delete(blob_key(digest))
            world.index.erase(loaded, [digest])
        return write(page, etag, added)

    monkeypatch.setattr(index, "_write", racing)
    manifest = world.manifest(16)
    version = world.claim(manifest, indexed=False)
    index.append(version, manifest)
    assert world.pages() == ["=16-000000000001"]
    assert b'"example-3"' not in world.stored_bytes()


def test_an_erasure_while_a_page_is_written_reaches_it() -> None:
    world = _World()
    world.publish(2)
    manifest = world.manifest(3)
    version = world.claim(manifest, indexed=False)
    index, store = world.index, world.store
    swap = store.compare_and_swap

    def racing(key: str, data: bytes, expected: str | None) -> str:
        assert manifest.batch is not None
        store.delete(blob_key(manifest.batch.digest))
        return swap(key, data, expected)

    store.compare_and_swap = racing  # type: ignore[method-assign]
    index.append(version, manifest)
    assert b'"example-3"' not in world.stored_bytes()
    assert manifest.batch is not None
    assert world.check().rows(manifest.batch.digest) is None, "the blob may be restored from a copy: look at it"


def test_pages_hold_what_is_compared_with_their_keys() -> None:
    assert digest_of(b"")[:7] == "sha256:"
    world = _World()
    world.publish(4)
    key = next(iter(world.store.list(f"history/{ADAPTER}/")))
    page = HistoryPage.from_bytes(key, world.store.get(key).data)
    assert page.to_bytes() == world.store.get(key).data
    assert (page.key, page.first, page.last, page.complete) == (key, 1, 4, True)


def test_pages_of_many_examples_are_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_MERGED_EXAMPLES", 20)
    world = _World()
    world.publish(70)
    assert world.pages() == [f"=16-{first:012d}" for first in (1, 17, 33, 49)] + [
        f"=4-{first:012d}" for first in (65, 69)
    ]
    assert world.check().unindexed == []
