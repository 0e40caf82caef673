"""Index of the examples that the store has of an adapter, read from the micro-batches of its versions.

Examples of refused updates are included, because their text is in the store too. Texts are not kept in memory. A
micro-batch that was erased is passed over. A damaged one is passed over and logged: one bad object must not stop the
calendar of every other adapter.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from pydantic import ValidationError

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry
from perennial.storage.registry.suppressed_texts import ensure_text_key
from perennial.streams.events.models import Batch
from perennial.streams.retain.ledger import StoredExample
from perennial.streams.retention.quarantine_filter import text_hash

log = logging.getLogger("perennial.retain")

MAX_BATCH_BYTES: Final = 512 * 1024 * 1024
DEFAULT_MAX_EXAMPLES: Final = 200_000


@dataclass
class _AdapterIndex:
    """The examples of one adapter, read up to its version with sequence number `seq`."""

    seq: int = 0
    version: str = ""
    examples: dict[str, StoredExample] = field(default_factory=dict)
    text_key: bytes = b""


class ExampleIndex:
    """The stored examples by adapter, with a cache of the adapters used last. Not thread-safe.

    An adapter that only got updates since the last read is read from there on; after any other change it is read
    again from the beginning.

    Args:
        registry: The registry to read.
        max_examples: About how many examples the cache holds, over all adapters.
    """

    def __init__(self, registry: Registry, max_examples: int = DEFAULT_MAX_EXAMPLES) -> None:
        self._registry = registry
        self._max_examples = max_examples
        self._cache: OrderedDict[str, _AdapterIndex] = OrderedDict()

    def of(self, adapter: str) -> list[StoredExample]:
        """Return the adapter's examples as of its newest version, oldest first.

        Raises:
            StoreError: The store cannot be read.
        """
        head = self._registry.head(adapter)
        if head is None:
            return []
        index = self._cache.get(adapter)
        if index is None or index.version != head.version:
            index = self._refresh(adapter, index or _AdapterIndex(), head.seq, head.version)
            self._cache[adapter] = index
        self._cache.move_to_end(adapter)
        total = sum(len(cached.examples) for cached in self._cache.values())
        while total > self._max_examples and len(self._cache) > 1:
            total -= len(self._cache.popitem(last=False)[1].examples)
        return list(index.examples.values())

    def _refresh(self, adapter: str, index: _AdapterIndex, seq: int, version: str) -> _AdapterIndex:
        index.text_key = index.text_key or ensure_text_key(self._registry.store, adapter)
        newer = list(self._registry.versions(adapter, limit=max(0, seq - index.seq)))[::-1]
        manifests = [self._registry.manifest(adapter, version_id) for _, version_id in newer]
        if index.seq and all(manifest.kind == "update" for manifest in manifests):
            for (_, version_id), manifest in zip(newer, manifests, strict=True):
                self._add(index, version_id, manifest, may_be_live=True)
        else:
            index = _AdapterIndex(text_key=index.text_key)
            revoked = {revocation.version for revocation in self._registry.revocations(adapter)}
            for version_id, manifest in self._history(adapter, version):
                self._add(index, version_id, manifest, may_be_live=version_id not in revoked)
        index.seq, index.version = seq, version
        return index

    def _history(self, adapter: str, head: str) -> Iterator[tuple[str, Manifest]]:
        """Yield every numbered version, then those that only the newest one's recorded schedule leads to.

        A forgetting rebuilds versions without giving them a number; the schedule names them.
        """
        seen = set()
        for _, version_id in self._registry.versions(adapter, newest_first=False):
            seen.add(version_id)
            yield version_id, self._registry.manifest(adapter, version_id)
        before = self._registry.manifest(adapter, head).schedule_parent
        while before is not None:
            manifest = self._registry.manifest(adapter, before)
            if before not in seen:
                yield before, manifest
            before = manifest.schedule_parent

    def _add(self, index: _AdapterIndex, version: str, manifest: Manifest, *, may_be_live: bool) -> None:
        if manifest.batch is None:
            return
        try:
            data = get_blob(self._registry.store, manifest.batch.digest, MAX_BATCH_BYTES)
            batch = Batch.model_validate_json(data)
        except NotFoundError:  # erased
            return
        except (IntegrityError, ValidationError):
            log.error(  # noqa: TRY400 - the traceback would show the damaged bytes, and they may be text
                "%s: micro-batch %s of version %s is damaged: restore it from a copy, or nothing in it can expire",
                manifest.adapter, manifest.batch.digest, version,
            )  # fmt: skip
            return
        promoted = may_be_live and manifest.outcome == "promoted"
        learned = {item.example_id for item in manifest.learned} if promoted else set()
        for example in batch.examples:
            example_id = example.example_id
            before = index.examples.get(example_id)
            if before is None:
                bare = example.model_copy(update={"text": None, "prompt": None, "answer": None})
                index.examples[example_id] = StoredExample(
                    bare, text_hash(example, index.text_key), manifest.seq, version, example_id in learned
                )
            elif example_id in learned and not before.learned:
                index.examples[example_id] = replace(before, seq=manifest.seq, version=version, learned=True)
