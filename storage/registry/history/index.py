"""Read and write the history index of an adapter.

The index is derived from the manifests and may be missing, behind or damaged at any time: the reader then takes the
manifests. A page counts only if its checksum is right and its newest version is the one that the next newer version
names as its head, up to the newest version's manifest, whose digest is its id. So no page of another history, such as
that of a store that was restored from a copy, is ever taken.

Only learners write pages. The ids in a page are taken out after the blobs of the examples were deleted. A writer
therefore looks after each write whether a blob that it described is still there, and a page that replaces smaller ones
is written before they are deleted, while those who erase go from the smaller pages to the larger ones.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.history.pages import (
    BLOCK_SIZES,
    MAX_PAGE_BYTES,
    DescribedBatch,
    ExampleRow,
    HistoryPage,
    IndexedVersion,
    first_of_block,
    page_key,
)
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Head, Registry

_log = logging.getLogger("perennial.storage")
_MAX_BATCH_BYTES = 512 << 20
_ATTEMPTS = 8
MAX_MERGED_EXAMPLES = 50_000
"""Pages are not merged to one of more examples: an erasure writes the page of the example anew."""


class BatchDescriber(Protocol):
    """Describes the examples of a micro-batch without their texts."""

    def key_check(self) -> str:
        """Return what tells the adapter's text key from any other."""
        ...

    def rows(self, body: bytes) -> list[ExampleRow]:
        """Return one row per example.

        Raises:
            ValueError: the bytes are not a micro-batch.
        """
        ...


@dataclass
class IndexedHistory:
    """Every version of an adapter, as the index and the newest manifests say.

    Attributes:
        head: the newest version.
        published: the versions with a sequence number, oldest first.
        versions: every version that can be reached from these, by id; rebuilt updates have no sequence number.
        batches: the micro-batches that the index describes, by digest.
        unindexed: sequence numbers that no page has, ascending.
        pages: the pages that were read, oldest first.
    """

    head: str
    published: list[str] = field(default_factory=list)
    versions: dict[str, IndexedVersion] = field(default_factory=dict)
    batches: dict[str, DescribedBatch] = field(default_factory=dict)
    unindexed: list[int] = field(default_factory=list)
    pages: list[HistoryPage] = field(default_factory=list)

    def rows(self, digest: str, key_check: str | None = None) -> Sequence[ExampleRow] | None:
        """Return the examples of a micro-batch; None where only its body says which they are.

        Args:
            digest: the micro-batch.
            key_check: accept only rows whose text hashes were computed under this key.
        """
        described = self.batches.get(digest)
        if described is None or described.rows is None:
            return None
        if described.rows and key_check is not None and described.key_check != key_check:
            return None
        return described.rows


class HistoryIndex:
    """The history index of one adapter.

    Args:
        registry: the adapter's versions.
        adapter: the adapter.
        describer: describes micro-batches where pages are written.
    """

    def __init__(self, registry: Registry, adapter: str, describer: BatchDescriber) -> None:
        self._registry = registry
        self._store = registry.store
        self._adapter = adapter
        self._describer = describer

    def load(self, head: Head) -> IndexedHistory:
        """Return the adapter's versions up to `head`. Nothing is written.

        Raises:
            StoreError: a manifest cannot be read.
        """
        history = IndexedHistory(head.version)
        seq, version = head.seq, head.version
        blocks: list[tuple[HistoryPage | None, list[IndexedVersion]]] = []
        while seq:
            page, newer, before = self._block_ending(seq, version)
            nodes = [*(page.versions if page else ()), *newer]
            history.unindexed.extend(node.seq for node in newer)
            blocks.append((page, nodes))
            seq = nodes[0].seq - 1
            if seq and before is None:
                raise IntegrityError(f"version {nodes[0].seq} of {self._adapter} names no version before it")
            version = before or ""
        history.unindexed.sort()
        for page, nodes in reversed(blocks):
            if page is not None:
                history.pages.append(page)
                history.versions |= {node.version: node for node in page.rebuilt}
                history.batches |= page.batches
            history.published.extend(node.version for node in nodes)
            history.versions |= {node.version: node for node in nodes}
        for node in self._missing(history.versions.values(), history.versions):
            history.versions[node.version] = node
        return history

    def _block_ending(self, seq: int, version: str) -> tuple[HistoryPage | None, list[IndexedVersion], str | None]:
        """Return the largest page whose newest version this is, the versions that it lacks, and the one before it."""
        for level in reversed(range(1, len(BLOCK_SIZES))):
            if seq % BLOCK_SIZES[level] == 0:
                page, _ = self._read(level, first_of_block(level, seq))
                if page is not None and page.complete and page.versions[-1].version == version:
                    return page, [], page.before
        first = first_of_block(0, seq)
        page, _ = self._read(0, first)
        if page is not None:
            page = replace(page, versions=page.versions[: seq - first + 1])
        newer, before = self._manifests(seq, version, page.last if page else first - 1)
        if page is None or not page.versions:
            return None, newer, before
        if page.versions[-1].version != (before if newer else version):
            newest, before = self._manifests(page.last, before or version, first - 1)
            return None, newest + newer, before
        return page, newer, page.before

    def _manifests(self, seq: int, version: str, last: int) -> tuple[list[IndexedVersion], str | None]:
        """Return the versions from `last + 1` to `seq`, whose id is `version`, and the version before them."""
        nodes: list[IndexedVersion] = []
        head: str | None = version
        while seq > last and head is not None:
            manifest = self._registry.manifest(self._adapter, head)
            if manifest.seq != seq:
                raise IntegrityError(f"{head} is not version {seq} of {self._adapter}", got=manifest.seq)
            nodes.append(IndexedVersion.of(head, manifest))
            seq, head = seq - 1, manifest.head
        return nodes[::-1], head

    def _missing(self, nodes: Iterable[IndexedVersion], known: Collection[str]) -> Iterator[IndexedVersion]:
        """Yield the versions that these lead to and that are not known: rebuilt updates."""
        found: set[str] = set()
        waiting = [name for node in nodes for name in (node.parent, node.head) if name is not None]
        while waiting:
            name = waiting.pop()
            if name in known or name in found:
                continue
            found.add(name)
            node = IndexedVersion.of(name, self._registry.manifest(self._adapter, name))
            waiting += [other for other in (node.parent, node.head) if other is not None]
            yield node

    # ---- writing

    def append(self, version: str, manifest: Manifest) -> None:
        """Add a version that was just published to the page of its block.

        Raises:
            StoreError: the store failed. The index is behind then, and the next writer makes up for it.
        """
        seq, first = manifest.seq, first_of_block(0, manifest.seq)
        if seq == first and manifest.head is not None:
            page, _ = self._read(0, first - BLOCK_SIZES[0])
            if page is not None and not page.complete:  # its last version was published by the command line
                self.append(manifest.head, self._registry.manifest(self._adapter, manifest.head))
        for _ in range(_ATTEMPTS):
            page, etag = self._read(0, first)
            if page is not None and page.last >= seq and page.versions[seq - first].version == version:
                return
            if page is None or page.last >= seq:
                page = HistoryPage(self._adapter, 0, first, None)
            nodes, before = self._manifests(seq, version, page.last)
            if page.versions and page.versions[-1].version != before:
                page = HistoryPage(self._adapter, 0, first, None)
                nodes, before = self._manifests(seq, version, first - 1)
            if not page.versions:
                page = replace(page, before=before)
            rebuilt = self._rebuilt(nodes, page)
            if self._write(self._extended(page, nodes, rebuilt), etag, (*nodes, *rebuilt)):
                break
        else:
            raise ConflictError(f"other writers changed the history index of {self._adapter}", remedy="do it again")
        if seq % BLOCK_SIZES[0] == 0:
            self._merge(seq)

    def complete(self, history: IndexedHistory) -> None:
        """Write every page that is missing; for a job that has read the versions anyway.

        Raises:
            StoreError: the store failed.
        """
        blocks = sorted({first_of_block(0, seq) for seq in history.unindexed})
        known = {*history.published, *(node.version for page in history.pages for node in page.rebuilt)}
        for first in blocks:
            nodes = [history.versions[v] for v in history.published[first - 1 : first - 1 + BLOCK_SIZES[0]]]
            rebuilt = list(self._missing(nodes, known))
            known.update(node.version for node in rebuilt)
            _, etag = self._read(0, first)
            page = HistoryPage(self._adapter, 0, first, nodes[0].head)
            self._write(self._extended(page, nodes, rebuilt), etag, (*nodes, *rebuilt))
        ends = {first + BLOCK_SIZES[0] - 1 for first in blocks}
        ends |= {page.last for page in history.pages if page.level + 1 < len(BLOCK_SIZES) and page.complete}
        for end in sorted(ends):
            if end <= len(history.published):
                self._merge(end)

    def erase(self, history: IndexedHistory, digests: Collection[str]) -> None:
        """Take the examples of deleted micro-batches out of the index.

        Args:
            history: the index as it was loaded.
            digests: blobs that were deleted.

        Raises:
            StoreError: the store failed.
        """
        wanted = set(digests)
        places = {
            (level, first_of_block(level, page.first))
            for page in history.pages
            if not wanted.isdisjoint(page.batches)
            for level in range(page.level, len(BLOCK_SIZES))
        }
        for seq in history.unindexed:  # a writer may have added them meanwhile
            node = history.versions[history.published[seq - 1]]
            if node.batch in wanted:
                places |= {(level, first_of_block(level, seq)) for level in range(len(BLOCK_SIZES))}
        for level, first in sorted(places):
            self._replace_in_page(level, first, dict.fromkeys(wanted, DescribedBatch("", [])))

    def _replace_in_page(self, level: int, first: int, described: Mapping[str, DescribedBatch]) -> None:
        """Replace what a page says of micro-batches whose examples are no longer stored."""
        for _ in range(_ATTEMPTS):
            page, etag = self._read(level, first)
            if page is None:
                return
            changed = {d: found for d, found in described.items() if d in page.batches and page.batches[d].rows}
            if not changed:
                return
            if self._write(replace(page, batches={**page.batches, **changed}), etag):
                return
        raise ConflictError(f"other writers changed the history index of {self._adapter}", remedy="do it again")

    def _rebuilt(self, nodes: Sequence[IndexedVersion], page: HistoryPage) -> list[IndexedVersion]:
        """Return the rebuilt updates that these versions lead to and that no page has."""
        known = {node.version for node in (*page.versions, *page.rebuilt, *nodes)}
        targets = [n for n in nodes if n.kind != "update" and n.parent is not None and n.parent not in known]
        if not any(self._registry.manifest(self._adapter, n.parent or "").kind == "replayed" for n in targets):
            return []
        head = self._registry.head(self._adapter)
        if head is None:
            return []
        indexed = {
            node.version for other in self.load(head).pages for node in (*other.versions, *other.rebuilt)
        } | known
        return [node for node in self._missing(targets, indexed) if node.kind == "replayed"]

    def _extended(
        self, page: HistoryPage, nodes: Sequence[IndexedVersion], rebuilt: Sequence[IndexedVersion]
    ) -> HistoryPage:
        batches = dict(page.batches)
        for node in (*nodes, *rebuilt):
            if node.batch is not None and node.batch not in batches:
                batches[node.batch] = self._described(node.batch)
        return replace(page, versions=(*page.versions, *nodes), rebuilt=(*page.rebuilt, *rebuilt), batches=batches)

    def _described(self, digest: str) -> DescribedBatch:
        try:
            rows = self._describer.rows(get_blob(self._store, digest, _MAX_BATCH_BYTES))
        except (NotFoundError, IntegrityError, ValueError):
            # It was erased, or it is lost or damaged and may be restored from a copy: readers look at the blob itself.
            return DescribedBatch("", None)
        return DescribedBatch(self._describer.key_check(), rows)

    def _write(self, page: HistoryPage, etag: str | None, added: Sequence[IndexedVersion] = ()) -> bool:
        """Write a page to which these versions were added; return False if another writer was first."""
        data = page.to_bytes()
        try:
            self._store.compare_and_swap(page.key, data, etag)
        except ConflictError:
            return False
        # What was erased since it was described must not stay in the page.
        batches = {node.batch for node in added if node.batch is not None}
        described = [digest for digest in batches if digest in page.batches and page.batches[digest].rows]
        gone = [digest for digest in described if not self._store.exists(blob_key(digest))]
        if gone:
            self._replace_in_page(page.level, page.first, dict.fromkeys(gone, DescribedBatch("", None)))
        return True

    def _merge(self, end: int) -> None:
        """Replace complete pages by one of the next level where that block ends at `end` and is complete."""
        for level in range(1, len(BLOCK_SIZES)):
            if end % BLOCK_SIZES[level]:
                return
            first, step = first_of_block(level, end), BLOCK_SIZES[level - 1]
            parts: list[HistoryPage] = []
            etags: dict[str, str | None] = {}
            for start in range(first, end + 1, step):
                page, etag = self._read(level - 1, start)
                if page is None or not page.complete or (parts and page.before != parts[-1].versions[-1].version):
                    return
                parts.append(page)
                etags[page.key] = etag
            if sum(part.size for part in parts) > MAX_MERGED_EXAMPLES:
                return  # pages of so many examples are better read and written one by one
            merged = HistoryPage(
                self._adapter, level, first, parts[0].before,
                tuple(node for part in parts for node in part.versions),
                tuple({node.version: node for part in parts for node in part.rebuilt}.values()),
                {digest: found for part in parts for digest, found in part.batches.items()},
            )  # fmt: skip
            _, etag = self._read(level, first)
            if not self._write(merged, etag):
                return
            for part in parts:  # an erasure that changed one of them meanwhile must reach the new page, too
                now, _ = self._read(level - 1, part.first)
                if now is not None:
                    gone = {digest: found for digest, found in now.batches.items() if not found.rows}
                    self._replace_in_page(level, first, gone)
            for part in parts:
                self._store.delete(part.key)

    def _read(self, level: int, first: int) -> tuple[HistoryPage | None, str | None]:
        """Return a page and its etag; no page where the object is missing or damaged."""
        key = page_key(self._adapter, level, first)
        try:
            stored = self._store.get(key, MAX_PAGE_BYTES)
        except NotFoundError:
            return None, None
        try:
            return HistoryPage.from_bytes(key, stored.data), stored.etag
        except IntegrityError as error:
            _log.warning("%s; it is made again from the manifests", error)
            return None, stored.etag
