"""The recorded versions of an adapter: which follow from which, and which blobs are still needed.

A version is traced back in two ways:

- By state, from a version to the one whose state it started from. An example is in the weights of the version that
  learned it and of every version that is traced back to that one; later updates may replay it, too.
- By schedule, along the updates that led to the newest version, refused ones included. A run that never saw an example
  would have made the same updates without the example, and the gate would have judged each of them anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry


@dataclass(frozen=True)
class RecordedVersion:
    """A version with its manifest."""

    version: str
    manifest: Manifest


class History:
    """All manifests of an adapter.

    Args:
        manifests: every manifest by version, those of rebuilt updates included.
        published: the versions that have a sequence number; rebuilt updates have none.
        head: the newest published version.
    """

    def __init__(self, manifests: Mapping[str, Manifest], published: Collection[str], head: str) -> None:
        self.manifests = manifests
        self.published = frozenset(published)
        self.head = head

    def schedule(self) -> list[RecordedVersion]:
        """Return the versions that led to the newest one, oldest first."""
        return list(self._backwards(self.head, by_schedule=True))[::-1]

    def _backwards(self, version: str | None, *, by_schedule: bool) -> Iterator[RecordedVersion]:
        while version is not None:
            manifest = self.manifests[version]
            yield RecordedVersion(version, manifest)
            version = manifest.schedule_parent if by_schedule else manifest.state_parent

    def descendants(self, ancestors: Collection[str]) -> frozenset[str]:
        """Return these versions and every version whose state started from one of theirs."""
        descends: dict[str, bool] = {}
        for start in self.manifests:
            trail: list[str] = []
            version: str | None = start
            while version is not None and version not in descends and version not in ancestors:
                trail.append(version)
                version = self.manifests[version].state_parent
            found = version is not None and (version in ancestors or descends[version])
            descends |= dict.fromkeys(trail, found)
        return frozenset(ancestors) | {version for version, found in descends.items() if found}

    def reachable_blobs(self, revoked: Collection[str]) -> set[str]:
        """Return the digests of all blobs that are needed to go on training, to rebuild, or to roll back.

        Args:
            revoked: the revoked versions; nothing is rolled back to them.
        """
        seen: set[str] = set()
        roots = [self.head]
        roots += [v for v in self.published if v not in revoked and self.manifests[v].outcome == "promoted"]
        for root in roots:
            for step in self._backwards(root, by_schedule=root == self.head):
                if step.version in seen and root != self.head:
                    break
                seen.add(step.version)
        return {ref.digest for version in seen for ref in self.manifests[version].blobs()}


def load_history(registry: Registry, adapter: str) -> History | None:
    """Return all manifests that can be reached from the adapter's versions; None if it has no version.

    Raises:
        StoreError: a manifest cannot be read.
    """
    published = [version for _, version in registry.versions(adapter)]
    if not published:
        return None
    manifests: dict[str, Manifest] = {}
    waiting = list(published)
    while waiting:
        version = waiting.pop()
        if version not in manifests:
            manifest = manifests[version] = registry.manifest(adapter, version)
            waiting += [name for name in (manifest.parent, manifest.head) if name is not None]
    return History(manifests, published, published[0])
