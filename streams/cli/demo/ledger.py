"""What became of an adapter's examples, read from its manifests as they come."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry


@dataclass
class LearnedExamples:
    """Counts examples of one adapter by what became of them; each manifest is read once."""

    registry: Registry
    adapter: str
    counts: Counter[str] = field(default_factory=Counter)
    versions: list[tuple[str, Manifest]] = field(default_factory=list)
    _seq: int = 0

    def refresh(self) -> None:
        """Read the manifests that are new since the last call."""
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
        """Examples that a manifest tells of: learned, refused by the gate, or skipped."""
        return sum(self.counts.values())
