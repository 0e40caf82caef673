"""Count what became of the examples of an adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.registry.history.example_ids import ExampleIds
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry

COUNTED_VERSIONS = 300
"""Newest versions whose manifests are read; each takes a call to the store."""

_LEARNED, _MERGED = "", " merged"
"""What became of examples that are learned; no reason to leave one out is empty or begins with a blank."""


@dataclass(frozen=True)
class ExampleCounts:
    """What became of the examples in some versions of an adapter; an example counts by its newest version.

    The verdicts of updates that were rebuilt are not counted, and what a rollback undid counts as learned.

    Attributes:
        learned: Number of examples that a version learned.
        forgotten: Number of examples that requests removed again, learned or not.
        skipped: Number of the others by reason: `duplicate`, `signal`, `no-text`, `quarantined`, `expired`, or why the
            gate refused the last update with them.
        versions: Number of versions counted.
        earlier_versions: Number of versions before these.
        merged: Number of the learned ones that were trained only on what they do not share with another.
    """

    learned: int
    forgotten: int
    skipped: dict[str, int]
    versions: int
    earlier_versions: int = 0
    merged: int = 0

    def __str__(self) -> str:
        """Return the counts for people."""
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        merged = f", {self.merged} of them merged" if self.merged else ""
        parts = [f"{self.learned} learned{merged}"]
        if self.forgotten:
            parts.append(f"{self.forgotten} forgotten")
        parts.append(f"not learned: {skipped}" if skipped else "none left out")
        within = f" (newest {self.versions} versions)" if self.earlier_versions else ""
        return "; ".join(parts) + within


def count_examples(manifests: Iterable[Manifest], ids: ExampleIds) -> ExampleCounts:
    """Count what became of examples.

    Args:
        manifests: Versions of one adapter, newest first.
        ids: Compares the ids in them.
    """
    fate: dict[str, str] = {}
    forgotten = versions = 0
    for manifest in manifests:
        versions += 1
        forgotten += manifest.gate.forgotten_examples or 0
        for example in manifest.learned:
            fate.setdefault(ids.comparable(example.example_id), _LEARNED if example.merged_into is None else _MERGED)
        for skipped in manifest.skipped:
            # A redelivery or a second publication says nothing about what became of the first one.
            if skipped.reason != "duplicate":
                fate.setdefault(ids.comparable(skipped.example_id), skipped.reason)
    reasons = Counter(fate.values())
    merged = reasons.pop(_MERGED, 0)
    return ExampleCounts(reasons.pop(_LEARNED, 0) + merged, forgotten, dict(reasons), versions, merged=merged)


def counted_examples(registry: Registry, adapter: str) -> ExampleCounts:
    """Count what became of the examples in the newest `COUNTED_VERSIONS` versions of an adapter, unreadable ones left out."""
    newest = list(registry.versions(adapter, newest_first=True, limit=COUNTED_VERSIONS))

    def manifests() -> Iterable[Manifest]:
        for _, version in newest:
            try:
                yield registry.manifest(adapter, version)
            except (NotFoundError, IntegrityError):  # collected meanwhile, or damaged
                continue

    earlier = newest[-1][0] - 1 if newest else 0
    ids = ExampleIds.load(registry.store, adapter)
    return replace(count_examples(manifests(), ids), earlier_versions=earlier)
