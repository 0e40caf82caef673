"""The pages of the history index: what they hold, their keys and their bytes.

A page covers the versions of one block of sequence numbers. Blocks have three sizes, so that few pages cover any number
of versions. The page of the newest block grows with each version; once a larger block is complete, one page takes the
place of its smaller ones. A version never changes once it has its sequence number, so neither does its entry.

A page holds no text. It holds the ids, subjects and sources of examples whose text the store has; they are taken out
when the text is erased.
"""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

import orjson
from cachetools import LRUCache

from perennial.storage.errors import IntegrityError
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.records import SEQ_DIGITS, check_adapter

BLOCK_SIZES: Final = (16, 256, 4096)
"""Versions per page by level; each size is a multiple of the one before."""
MAX_PAGE_BYTES: Final = 256 << 20
_MAGIC: Final = b"perennial-history-1\n"
_PREFIX: Final = "sha256:"
_CACHED_VERSIONS: Final = 16_384
ExampleRow = dict[str, Any]
"""A stored example as JSON without its text and without fields that have their default, with `text_hash`."""
OriginOffset = tuple[str, int, int]
"""Origin partition key, leader epoch and offset: identifies one published record."""


@dataclass(frozen=True, slots=True)
class IndexedVersion:
    """The fields of a manifest that say what a version follows from and what it needs.

    Attributes:
        version: the version's id.
        seq: its sequence number; see `Kind` for rebuilt updates.
        kind: what made it.
        outcome: `promoted`, `refused` or `unchanged`.
        parent: the version whose state it started from.
        head: the version before it.
        blobs: digests of the blobs that it names, the micro-batch included.
        batch: digest of its micro-batch.
        learned: origins of the examples that it learned, without those that were erased since.
        learned_count: how many examples it learned, the erased ones included.
    """

    version: str
    seq: int
    kind: str
    outcome: str
    parent: str | None
    head: str | None
    blobs: tuple[str, ...]
    batch: str | None
    learned: tuple[OriginOffset, ...]
    learned_count: int

    @property
    def state_parent(self) -> str | None:
        """See `Manifest.state_parent`."""
        return self.head if self.kind in {"update", "replayed"} else self.parent

    @property
    def schedule_parent(self) -> str | None:
        """See `Manifest.schedule_parent`."""
        return self.head if self.kind == "quarantine" else self.state_parent

    @classmethod
    def of(cls, version: str, manifest: Manifest) -> IndexedVersion:
        """Return the entry of a version.

        Args:
            version: the version's id.
            manifest: its manifest.
        """
        return cls(
            version, manifest.seq, manifest.kind, manifest.outcome, manifest.parent, manifest.head,
            tuple(ref.digest for ref in manifest.blobs()), manifest.batch.digest if manifest.batch else None,
            tuple(item.origin_offset for item in manifest.learned), len(manifest.learned),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DescribedBatch:
    """The examples of a micro-batch.

    Attributes:
        key_check: tells under which of the adapter's text keys the `text_hash` of the rows was computed.
        rows: one per example; none where the micro-batch was erased; None where it is not known.
    """

    key_check: str
    rows: Sequence[ExampleRow] | None


@dataclass(frozen=True)
class HistoryPage:
    """A page of the index.

    Attributes:
        adapter: the adapter.
        level: index into `BLOCK_SIZES`.
        first: the first sequence number of the block.
        before: the version before that one; None where the block is the first.
        versions: the versions of the block, oldest first; the newest block may be incomplete.
        rebuilt: rebuilt updates that these versions lead to. They have no sequence number of their own.
        batches: the micro-batches of both, by digest.
    """

    adapter: str
    level: int
    first: int
    before: str | None
    versions: tuple[IndexedVersion, ...] = ()
    rebuilt: tuple[IndexedVersion, ...] = ()
    batches: Mapping[str, DescribedBatch] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The last sequence number that the page has; `first - 1` where it has none."""
        return self.first + len(self.versions) - 1

    @property
    def complete(self) -> bool:
        """Whether the page has every version of its block."""
        return len(self.versions) == BLOCK_SIZES[self.level]

    @property
    def size(self) -> int:
        """The number of examples that the page describes."""
        return sum(len(found.rows or ()) for found in self.batches.values())

    @property
    def key(self) -> str:
        """The page's key."""
        return page_key(self.adapter, self.level, self.first)

    def to_bytes(self) -> bytes:
        """Return the page with its checksum."""
        batches = {
            _short(digest): [described.key_check, described.rows] for digest, described in self.batches.items()
        }  # fmt: skip
        content = {
            "adapter": self.adapter, "level": self.level, "first": self.first, "before": _short(self.before),
            "versions": [self._packed(node) for node in self.versions],
            "rebuilt": [[*self._packed(node), node.seq, _short(node.head)] for node in self.rebuilt],
            "batches": batches,
        }  # fmt: skip
        payload = zlib.compress(orjson.dumps(content, option=orjson.OPT_SORT_KEYS), 6)
        return _MAGIC + sha256(payload).digest() + payload

    def _packed(self, node: IndexedVersion) -> list[Any]:
        learned: list[int] = []
        described = self.batches.get(node.batch) if node.batch else None
        if described is not None and described.rows:
            origins = set(node.learned)
            learned = [i for i, row in enumerate(described.rows) if row_origin(row) in origins]
        return [
            _short(node.version), node.kind, node.outcome, _short(node.parent), [_short(blob) for blob in node.blobs],
            _short(node.batch), learned, node.learned_count,
        ]  # fmt: skip

    @classmethod
    def from_bytes(cls, key: str, data: bytes) -> HistoryPage:
        """Read a page.

        Args:
            key: the object's key, for the error.
            data: the object's bytes.

        Raises:
            IntegrityError: the bytes are not a complete page, or one of another format.
        """
        start = len(_MAGIC)
        digest, payload = data[start : start + 32], data[start + 32 :]
        if not data.startswith(_MAGIC) or sha256(payload).digest() != digest:
            raise IntegrityError(f"{key} is not a page of the history index", got=f"{len(data)} bytes")
        with _cache_lock:
            cached = _unpacked_pages.get((key, digest))
        if cached is not None:
            return cached
        page = cls._parse(key, payload)
        with _cache_lock, suppress(ValueError):  # it is larger than the whole cache
            _unpacked_pages[key, digest] = page
        return page

    @classmethod
    def _parse(cls, key: str, payload: bytes) -> HistoryPage:
        try:
            unpacked = zlib.decompressobj()
            content = orjson.loads(unpacked.decompress(payload, MAX_PAGE_BYTES))
            batches = {
                _long(digest): DescribedBatch(check, rows) for digest, (check, rows) in content["batches"].items()
            }  # fmt: skip
            before, versions, seq = _maybe(content["before"]), [], content["first"]
            head = before
            for packed in content["versions"]:
                versions.append(_unpacked(packed, seq, head, batches))
                head, seq = versions[-1].version, seq + 1
            rebuilt = [_unpacked(packed[:-2], packed[-2], _maybe(packed[-1]), batches) for packed in content["rebuilt"]]
            page = cls(
                content["adapter"], content["level"], content["first"], before, tuple(versions), tuple(rebuilt), batches
            )
        except (ValueError, KeyError, TypeError, IndexError, zlib.error) as error:
            raise IntegrityError(f"{key} is not a page of the history index", got=type(error).__name__) from error
        if page.key != key or len(page.versions) > BLOCK_SIZES[page.level]:
            raise IntegrityError(f"{key} is another page of the history index", got=page.key, allowed=key)
        return page


# A job reads the same pages several times. Bounded, so that memory stays bounded with any number of adapters.
_unpacked_pages: LRUCache[tuple[str, bytes], HistoryPage] = LRUCache(
    _CACHED_VERSIONS, lambda page: len(page.versions) + len(page.rebuilt) + 1
)
_cache_lock = threading.Lock()


def row_origin(row: ExampleRow) -> OriginOffset:
    """Return where an example was published, as manifests record it."""
    origin = row["origin"]
    partition = sys.intern(f"{origin['cluster_id']}/{origin['topic_id']}/{origin['topic']}/{origin['partition']}")
    return partition, origin.get("leader_epoch", 0), origin["offset"]


def page_key(adapter: str, level: int, first: int) -> str:
    """Return the key of a page.

    Args:
        adapter: the adapter.
        level: index into `BLOCK_SIZES`.
        first: the first sequence number of its block.
    """
    return f"history/{check_adapter(adapter)}/={BLOCK_SIZES[level]}-{first:0{SEQ_DIGITS}d}"


def first_of_block(level: int, seq: int) -> int:
    """Return the first sequence number of the block that holds `seq`."""
    return (seq - 1) // BLOCK_SIZES[level] * BLOCK_SIZES[level] + 1


def _unpacked(
    packed: Sequence[Any], seq: int, head: str | None, batches: Mapping[str, DescribedBatch]
) -> IndexedVersion:
    version, kind, outcome, parent, blobs, batch, learned, count = packed
    described = batches.get(_long(batch)) if batch else None
    rows = (described.rows if described else None) or ()
    origins = tuple(row_origin(rows[i]) for i in learned) if rows else ()
    return IndexedVersion(
        _long(version),
        seq,
        kind,
        outcome,
        _maybe(parent),
        head,
        tuple(map(_long, blobs)),
        _maybe(batch),
        origins,
        count,
    )


def _short(digest: str | None) -> str | None:
    return None if digest is None else digest.removeprefix(_PREFIX)


def _long(short: str) -> str:
    return _PREFIX + short


def _maybe(short: str | None) -> str | None:
    return None if short is None else _PREFIX + short
