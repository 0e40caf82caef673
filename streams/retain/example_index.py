"""Index of the examples that the store has of an adapter, from the history index of its versions.

Examples of refused updates are included, because their text is in the store too. Texts are not kept in memory. The
micro-batches themselves are read only where the history index does not have them. One that was erased is passed over. A
damaged one is passed over and logged: one bad object must not stop the calendar of every other adapter.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.history.index import IndexedHistory
from perennial.storage.registry.history.pages import ExampleRow, IndexedVersion, row_origin
from perennial.storage.registry.registry import Head, Registry
from perennial.streams.retain.ledger import StoredExample, expires_ms
from perennial.streams.retention.example_rows import ExampleRows, bare_example, history_index

log = logging.getLogger("perennial.retain")

MAX_BATCH_BYTES: Final = 512 * 1024 * 1024
DEFAULT_MAX_EXAMPLES: Final = 200_000
_MAX_NEWER: Final = 64


@dataclass
class _AdapterIndex:
    """The examples of one adapter, read up to its version with sequence number `seq`."""

    seq: int = 0
    version: str = ""
    examples: dict[str, StoredExample] = field(default_factory=dict)


class ExampleIndex:
    """The stored examples by adapter, with a cache of the adapters used last. Not thread-safe.

    An adapter that only got updates since the last read is read from there on; after any other change it is read
    again from the beginning, which takes a few pages of its history index.

    Args:
        registry: The registry to read.
        max_examples: About how many examples the cache holds, over all adapters.
    """

    def __init__(self, registry: Registry, max_examples: int = DEFAULT_MAX_EXAMPLES) -> None:
        self._registry = registry
        self._max_examples = max_examples
        self._cache: OrderedDict[str, _AdapterIndex] = OrderedDict()
        self._cached_examples = 0

    def of(self, adapter: str) -> list[StoredExample]:
        """Return the adapter's examples as of its newest version, oldest first.

        Raises:
            StoreError: The store cannot be read.
        """
        head = self._registry.head(adapter)
        if head is None:
            return []
        index = self._cache.pop(adapter, None)
        if index is not None:
            self._cached_examples -= len(index.examples)
        if index is None or index.version != head.version:
            index = self._refresh(adapter, index, head)
        self._cache[adapter] = index
        self._cached_examples += len(index.examples)
        while self._cached_examples > self._max_examples and len(self._cache) > 1:
            self._cached_examples -= len(self._cache.popitem(last=False)[1].examples)
        return list(index.examples.values())

    def due_before(self, adapter: str, end_ms: int) -> list[StoredExample]:
        """Return the examples whose own life ends by a time, policies left aside; keep nothing in memory.

        Args:
            adapter: The adapter.
            end_ms: The time, in milliseconds since 1970.

        Raises:
            StoreError: The store cannot be read.
        """
        head = self._registry.head(adapter)
        if head is None:
            return []
        cached = self._cache.get(adapter)
        if cached is not None and cached.version == head.version:
            stored: Collection[StoredExample] = cached.examples.values()
        else:
            history = history_index(self._registry, adapter).load(head)
            reader = _Reader(self._registry, adapter, history, _may_end)
            stored = reader.examples().values()
        return [item for item in stored if (end := expires_ms(item.example, ())) is not None and end <= end_ms]

    def _refresh(self, adapter: str, index: _AdapterIndex | None, head: Head) -> _AdapterIndex:
        newer = None if index is None else self._updates_since(adapter, index, head)
        history = history_index(self._registry, adapter).load(head) if newer is None else _of_newer(head, newer)
        reader = _Reader(self._registry, adapter, history)
        if index is None or newer is None:
            return _AdapterIndex(head.seq, head.version, reader.examples())
        for node in newer:
            reader.add(index.examples, node, may_be_live=True)
        index.seq, index.version = head.seq, head.version
        return index

    def _updates_since(self, adapter: str, index: _AdapterIndex, head: Head) -> list[IndexedVersion] | None:
        """Return the versions after the cached one, oldest first; None where they are many, or not only updates."""
        if not 0 < head.seq - index.seq <= _MAX_NEWER:
            return None
        nodes: list[IndexedVersion] = []
        version: str | None = head.version
        while version is not None and version != index.version:
            manifest = self._registry.manifest(adapter, version)
            if manifest.kind != "update" or manifest.seq <= index.seq:
                return None
            nodes.append(IndexedVersion.of(version, manifest))
            version = manifest.head
        return nodes[::-1]


def stored_examples(registry: Registry, adapter: str, history: IndexedHistory) -> list[StoredExample]:
    """Return the examples of an adapter whose text the store has, oldest first. Nothing is written.

    Their text hashes are of no use where the adapter has no text key yet.

    Args:
        registry: The registry to read.
        adapter: The adapter.
        history: The adapter's history index.

    Raises:
        StoreError: The store cannot be read.
    """
    return list(_Reader(registry, adapter, history, read_only=True).examples().values())


def learned_ids(
    registry: Registry, adapter: str, history: IndexedHistory, nodes: Iterable[IndexedVersion]
) -> dict[str, set[str]]:
    """Return the ids of the stored examples that each of these versions learned, by version. Nothing is written.

    Args:
        registry: The registry to read.
        adapter: The adapter.
        history: The adapter's history index.
        nodes: The versions.

    Raises:
        StoreError: The store cannot be read.
    """
    reader = _Reader(registry, adapter, history, read_only=True)
    return {node.version: reader.learned_ids(node) for node in nodes}


def _of_newer(head: Head, newer: Sequence[IndexedVersion]) -> IndexedHistory:
    return IndexedHistory(head.version, versions={node.version: node for node in newer})


def _may_end(row: ExampleRow) -> bool:
    return "retention_class" in row or row.get("expires_at") is not None


class _Reader:
    """Reads the stored examples of one adapter from its history index."""

    def __init__(
        self,
        registry: Registry,
        adapter: str,
        history: IndexedHistory,
        wanted: Callable[[ExampleRow], bool] | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        self._registry = registry
        self._adapter = adapter
        self._history = history
        self._wanted = wanted
        self._rows = ExampleRows(registry.store, adapter, read_only=read_only)

    def examples(self) -> dict[str, StoredExample]:
        """Return the stored examples by id."""
        revoked = {revocation.version for revocation in self._registry.revocations(self._adapter)}
        found: dict[str, StoredExample] = {}
        for node in self._nodes():
            self.add(found, node, may_be_live=node.version not in revoked)
        return found

    def _nodes(self) -> Iterator[IndexedVersion]:
        """Yield every numbered version, then those that only the newest one's recorded schedule leads to.

        A forgetting rebuilds versions without giving them a number; the schedule names them.
        """
        history = self._history
        for version in history.published:
            yield history.versions[version]
        numbered = set(history.published)
        before = history.versions[history.head].schedule_parent
        while before is not None:
            if before not in numbered:
                yield history.versions[before]
            before = history.versions[before].schedule_parent

    def add(self, examples: dict[str, StoredExample], node: IndexedVersion, *, may_be_live: bool) -> None:
        """Add the examples of a version's micro-batch."""
        rows = self._rows_of(node)
        if not rows:
            return
        promoted = may_be_live and node.outcome == "promoted"
        learned = self._learned_of(node, rows) if promoted else set()
        for row in rows:
            if self._wanted is not None and not self._wanted(row):
                continue
            example_id = row["example_id"]
            before = examples.get(example_id)
            if before is None:
                examples[example_id] = StoredExample(
                    bare_example(row), row["text_hash"], node.seq, node.version, example_id in learned
                )
            elif example_id in learned and not before.learned:
                examples[example_id] = replace(before, seq=node.seq, version=node.version, learned=True)

    def learned_ids(self, node: IndexedVersion) -> set[str]:
        """Return the ids of the stored examples that a version learned."""
        return self._learned_of(node, self._rows_of(node, any_key=True)) if node.learned_count else set()

    def _learned_of(self, node: IndexedVersion, rows: Sequence[ExampleRow]) -> set[str]:
        origins = set(node.learned)
        if rows and len(node.learned) < node.learned_count:
            # A page that does not know them: its rows are missing, or an older release wrote it, which compares plain ids.
            origins = {item.origin_offset for item in self._registry.manifest(self._adapter, node.version).learned}
        return {row["example_id"] for row in rows if row_origin(row) in origins}

    def _rows_of(self, node: IndexedVersion, *, any_key: bool = False) -> Sequence[ExampleRow]:
        if node.batch is None:
            return ()
        if node.batch in self._history.batches:
            # Where nobody looks at the hashes, as in a selection by lifetimes, the key of these is not read.
            check = None if any_key or self._wanted is not None else self._rows.key_check()
            rows = self._history.rows(node.batch, check)
            if rows is not None:
                return rows
        try:
            return self._rows.rows(get_blob(self._registry.store, node.batch, MAX_BATCH_BYTES))
        except NotFoundError:  # erased
            return ()
        except (IntegrityError, ValueError):
            log.error(  # noqa: TRY400 - the traceback would show the damaged bytes, and they may be text
                "%s: micro-batch %s of version %s is damaged: restore it from a copy, or nothing in it can expire",
                self._adapter, node.batch, node.version,
            )  # fmt: skip
            return ()
