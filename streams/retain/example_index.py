"""Which examples the store has of an adapter: read from the micro-batches of its line, their texts let go at once.

Also examples of refused updates count: their text is in the store. Batches that were erased are simply not there;
one that is damaged is left out and told, for one bad object must not stop the calendar of every other adapter.
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
from perennial.streams.events.models import Batch
from perennial.streams.retain.ledger import StoredExample
from perennial.streams.retention.quarantine_filter import text_hash

log = logging.getLogger("perennial.retain")

MAX_BATCH_BYTES: Final = 512 * 1024 * 1024
DEFAULT_MAX_EXAMPLES: Final = 200_000


@dataclass
class _Line:
    """What is known of one adapter up to its version at `seq`."""

    seq: int = 0
    version: str = ""
    examples: dict[str, StoredExample] = field(default_factory=dict)


class ExampleIndex:
    """The known examples by adapter. Keeps those of adapters used last, about `max_examples` in all.

    A line that only grew by updates is read from where it was left; anything else is read anew. Not thread-safe.
    """

    def __init__(self, registry: Registry, max_examples: int = DEFAULT_MAX_EXAMPLES) -> None:
        self._registry = registry
        self._max_examples = max_examples
        self._lines: OrderedDict[str, _Line] = OrderedDict()

    def of(self, adapter: str) -> list[StoredExample]:
        """The examples of the adapter as its line stands now, by seq. Raises StoreError."""
        head = self._registry.head(adapter)
        if head is None:
            return []
        line = self._lines.get(adapter)
        if line is None or line.version != head.version:
            line = self._refresh(adapter, line or _Line(), head.seq, head.version)
            self._lines[adapter] = line
        self._lines.move_to_end(adapter)
        total = sum(len(kept.examples) for kept in self._lines.values())
        while total > self._max_examples and len(self._lines) > 1:
            total -= len(self._lines.popitem(last=False)[1].examples)
        return list(line.examples.values())

    def _refresh(self, adapter: str, line: _Line, seq: int, version: str) -> _Line:
        newer = list(self._registry.versions(adapter, limit=max(0, seq - line.seq)))[::-1]
        manifests = [self._registry.manifest(adapter, name) for _, name in newer]
        if line.seq and all(manifest.kind == "update" for manifest in manifests):
            for (_, name), manifest in zip(newer, manifests, strict=True):
                self._add(line, name, manifest, stands=True)
        else:
            line = _Line()
            revoked = {revocation.version for revocation in self._registry.revocations(adapter)}
            for name, manifest in self._history(adapter, version):
                self._add(line, name, manifest, stands=name not in revoked)
        line.seq, line.version = seq, version
        return line

    def _history(self, adapter: str, head: str) -> Iterator[tuple[str, Manifest]]:
        """Every version of the line, and those off it that the newest stems from (made anew by a forgetting)."""
        seen = set()
        for _, name in self._registry.versions(adapter, newest_first=False):
            seen.add(name)
            yield name, self._registry.manifest(adapter, name)
        before = self._registry.manifest(adapter, head).schedule_parent
        while before is not None:
            manifest = self._registry.manifest(adapter, before)
            if before not in seen:
                yield before, manifest
            before = manifest.schedule_parent

    def _add(self, line: _Line, version: str, manifest: Manifest, *, stands: bool) -> None:
        if manifest.batch is None:
            return
        try:
            data = get_blob(self._registry.store, manifest.batch.digest, MAX_BATCH_BYTES)
            batch = Batch.model_validate_json(data)
        except NotFoundError:  # erased
            return
        except (IntegrityError, ValidationError):
            log.error(  # noqa: TRY400 - what is wrong is where, not what was found there: that may be a text
                "%s: micro-batch %s of version %s is damaged: restore it from a copy, or nothing in it can expire",
                manifest.adapter, manifest.batch.digest, version,
            )  # fmt: skip
            return
        learned = {item.example_id for item in manifest.learned} if stands and _was_promoted(manifest) else set()
        for example in batch.examples:
            name = example.example_id
            before = line.examples.get(name)
            if before is None:
                bare = example.model_copy(update={"text": None, "prompt": None, "answer": None})
                line.examples[name] = StoredExample(bare, text_hash(example), manifest.seq, version, name in learned)
            elif name in learned and not before.learned:
                line.examples[name] = replace(before, seq=manifest.seq, version=version, learned=True)


def _was_promoted(manifest: Manifest) -> bool:
    return manifest.outcome == "promoted"
