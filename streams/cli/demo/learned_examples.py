"""Count what happened to an adapter's examples, from its manifests as they are written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry


@dataclass
class LearnedExamples:
    """Counts the examples of one adapter by outcome. Each manifest is read once.

    Attributes:
        registry: Registry of the adapter's versions.
        adapter: Name of the adapter.
        counts: Number of examples that were learned or skipped, the latter by reason.
        versions: Ids and manifests of all versions read so far, in order.
    """

    registry: Registry
    adapter: str
    counts: Counter[str] = field(default_factory=Counter)
    versions: list[tuple[str, Manifest]] = field(default_factory=list)
    _seq: int = 0

    def refresh(self) -> None:
        """Read the manifests that were written since the last call."""
        head = self.registry.head(self.adapter)
        if head is None or head.seq == self._seq:
            return
        fresh = []
        for seq, version in self.registry.versions(self.adapter, newest_first=True):
            if seq <= self._seq:
                break
            fresh.append((version, self.registry.manifest(self.adapter, version)))
        for version, manifest in reversed(fresh):
            self._seq = manifest.seq
            self.versions.append((version, manifest))
            self.counts["learned"] += len(manifest.learned)
            self.counts.update(skipped.reason for skipped in manifest.skipped)

    @property
    def accounted(self) -> int:
        """Number of examples with an outcome: learned, refused by the gate, or skipped."""
        return sum(self.counts.values())

    @property
    def promoted(self) -> list[Manifest]:
        """Manifests of the versions that passed the gate, in order."""
        return [manifest for _, manifest in self.versions if manifest.outcome == "promoted"]

    def promoted_within(self, examples: int) -> int:
        """Return how many versions were promoted from the first so many examples of the adapter."""
        taken = promoted = 0
        for _, manifest in self.versions:
            taken += len(manifest.learned) + len(manifest.skipped)
            if taken > examples:
                break
            promoted += manifest.outcome == "promoted"
        return promoted
