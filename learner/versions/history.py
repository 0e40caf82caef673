"""The recorded versions of an adapter: which follow from which, and which blobs are still needed.

A version is traced back in two ways:

- By state, from a version to the one whose state it started from. An example is in the weights of the version that
  learned it and of every version that is traced back to that one; later updates may replay it, too.
- By schedule, along the updates that led to the newest version, refused ones included. A run that never saw an example
  would have made the same updates without the example, and the gate would have judged each of them anew.

Both need only a few fields of each manifest, which the history index has on a few pages. Manifests are read one by one,
where a job needs more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from perennial.storage.errors import PerennialError
from perennial.storage.registry.history.index import IndexedHistory
from perennial.storage.registry.history.pages import ExampleRow, IndexedVersion
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Head, Registry
from perennial.streams.retention.example_rows import history_index

_log = logging.getLogger("perennial.learner")


@dataclass(frozen=True)
class RecordedVersion:
    """A version with its manifest."""

    version: str
    manifest: Manifest


class Manifests(Mapping[str, Manifest]):
    """The manifests of an adapter by version; each is read when it is first asked for.

    Args:
        versions: the versions that there are.
        load: returns the manifest of one of them.
    """

    def __init__(self, versions: Collection[str], load: Callable[[str], Manifest]) -> None:
        self._versions = versions
        self._load = load
        self._loaded: dict[str, Manifest] = {}

    def __getitem__(self, version: str) -> Manifest:
        """Return the manifest of a version."""
        found = self._loaded.get(version)
        if found is None:
            if version not in self._versions:
                raise KeyError(version)
            found = self._loaded[version] = self._load(version)
        return found

    def __iter__(self) -> Iterator[str]:
        """Yield every version."""
        return iter(self._versions)

    def __len__(self) -> int:
        """Return the number of versions."""
        return len(self._versions)


class History:
    """All versions of an adapter.

    Args:
        manifests: every manifest by version, those of rebuilt updates included.
        published: the versions that have a sequence number; rebuilt updates have none.
        head: the newest published version.
        index: the history index, where it was read.

    Attributes:
        versions: the few fields of each manifest that say how versions follow from each other.
    """

    def __init__(
        self,
        manifests: Mapping[str, Manifest],
        published: Collection[str],
        head: str,
        index: IndexedHistory | None = None,
    ) -> None:
        self.manifests = manifests
        self.published = frozenset(published)
        self.head = head
        self.index = index
        self.versions: Mapping[str, IndexedVersion] = (
            index.versions
            if index is not None
            else {version: IndexedVersion.of(version, manifest) for version, manifest in manifests.items()}
        )

    def schedule(self) -> list[RecordedVersion]:
        """Return the versions that led to the newest one, oldest first. Reads every manifest of them."""
        return [self.recorded(version) for version in self.scheduled()]

    def scheduled(self) -> list[str]:
        """Return the ids of the versions that led to the newest one, oldest first."""
        return list(self._backwards(self.head, by_schedule=True))[::-1]

    def recorded(self, version: str) -> RecordedVersion:
        """Return a version with its manifest."""
        return RecordedVersion(version, self.manifests[version])

    def rows(self, digest: str, key_check: str | None = None) -> Collection[ExampleRow] | None:
        """Return the examples of a micro-batch without their texts; None where only its body says which they are."""
        return None if self.index is None else self.index.rows(digest, key_check)

    def _backwards(self, version: str | None, *, by_schedule: bool) -> Iterator[str]:
        while version is not None:
            yield version
            node = self.versions[version]
            version = node.schedule_parent if by_schedule else node.state_parent

    def descendants(self, ancestors: Collection[str]) -> frozenset[str]:
        """Return these versions and every version whose state started from one of theirs."""
        descends: dict[str, bool] = {}
        for start in self.versions:
            trail: list[str] = []
            version: str | None = start
            while version is not None and version not in descends and version not in ancestors:
                trail.append(version)
                version = self.versions[version].state_parent
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
        roots += [v for v in self.published if v not in revoked and self.versions[v].outcome == "promoted"]
        for root in roots:
            for version in self._backwards(root, by_schedule=root == self.head):
                if version in seen and root != self.head:
                    break
                seen.add(version)
        return {digest for version in seen for digest in self.versions[version].blobs}

    def all_blobs(self) -> set[str]:
        """Return the digests of all blobs that any version names."""
        return {digest for node in self.versions.values() for digest in node.blobs}


def load_history(registry: Registry, adapter: str, head: Head | None = None) -> History | None:
    """Return all versions that can be reached from the adapter's versions; None if it has no version.

    Args:
        registry: the adapter's versions.
        adapter: the adapter.
        head: the newest version, where it is known.

    Raises:
        StoreError: a manifest cannot be read.
    """
    head = head or registry.head(adapter)
    if head is None:
        return None
    index = history_index(registry, adapter).load(head)
    manifests = Manifests(index.versions, lambda version: registry.manifest(adapter, version))
    return History(manifests, index.published, index.head, index)


def index_version(registry: Registry, version: str, manifest: Manifest) -> None:
    """Add a version that was just published to the history index.

    The index is derived from the manifests: where it cannot be written, readers take the manifests.
    """
    try:
        history_index(registry, manifest.adapter).append(version, manifest)
    except PerennialError as error:
        _log.warning(
            "%s: version not added to the history index, readers use its manifest: %s", manifest.adapter, error
        )


def complete_index(registry: Registry, adapter: str, history: History) -> History:
    """Write the pages of the history index that were missing when the history was loaded; return what they say now."""
    if history.index is None or not history.index.unindexed:
        return history
    try:
        history_index(registry, adapter).complete(history.index)
    except PerennialError as error:
        _log.warning("%s: the history index is not completed, readers use the manifests: %s", adapter, error)
    head = Head(len(history.index.published), history.head, history.manifests[history.head])
    return load_history(registry, adapter, head) or history
