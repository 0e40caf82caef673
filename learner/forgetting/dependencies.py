"""Find the versions of an adapter that depend on what another adapter has forgotten.

A start is the mean of versions of siblings. When one of them forgets an example, its affected versions are revoked, and the
start is a function of the example. So is every version that began with it. The same holds for what was trained over a
version of the shared adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from perennial.learner.versions.history import History
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.manifest import OtherVersion
from perennial.storage.registry.registry import Registry
from perennial.streams.events.models import ForgetRequested


@dataclass(frozen=True)
class Dependencies:
    """Versions of an adapter that depend on revoked versions of others.

    Attributes:
        versions: the versions; what took over their states is not among them.
        drops_start: some of them began with a start that must not be used any more.
    """

    versions: frozenset[str] = frozenset()
    drops_start: bool = False


def names_no_example(job: ForgetRequested) -> bool:
    """Return whether a job only asks what the adapter depends on, as those that retain sends to dependants."""
    return job.selector is None and not job.example_ids


def revoked_dependencies(registry: Registry, job: ForgetRequested, history: History) -> Dependencies:
    """Return the versions that depend on a revoked version of another adapter, and were not dealt with yet.

    What the adapter began with is looked at by every job. What lay beneath its updates takes a read per version, so a job
    that names examples of the adapter itself does not look at it. Retain sends one that names none where another adapter
    has forgotten something.

    Args:
        registry: the versions of the adapter and of the others.
        job: the job.
        history: the adapter's versions.

    Raises:
        StoreError: the store failed.
    """
    names_none = names_no_example(job)
    if not names_none and history.manifests[history.head].start is None:
        return Dependencies()
    return _Look(registry, history).found(over=names_none)


class _Look:
    def __init__(self, registry: Registry, history: History) -> None:
        self._registry = registry
        self._history = history
        self._revoked: dict[tuple[str, int], bool] = {}
        self._scheduled = frozenset(history.scheduled())

    def found(self, *, over: bool) -> Dependencies:
        history = self._history
        roots = {version for version, node in history.versions.items() if node.state_parent is None}
        begun = {version for version in roots if self._begins_revoked(version)}
        begun = {version for version in begun if any(map(self._is_left, history.descendants({version})))}
        layered = {v for v in history.versions if over and self._lies_over_revoked(v) and self._is_left(v)}
        return Dependencies(frozenset(begun | layered), drops_start=bool(begun))

    def _is_left(self, version: str) -> bool:
        """Return whether a version is trained from, or its weights are stored: a rollback could bring it back.

        Hazard: whether it is revoked, published or on the schedule says nothing. An operator may have revoked it, it may be
        an update that a rebuild made, and a rollback or a rebase may have left it behind.
        """
        weights = self._history.manifests[version].weights
        return version in self._scheduled or self._registry.store.exists(blob_key(weights.digest))

    def _begins_revoked(self, version: str) -> bool:
        start = self._history.manifests[version].start
        return start is not None and any(map(self._is_revoked, start.founders))

    def _lies_over_revoked(self, version: str) -> bool:
        over = self._history.manifests[version].over
        return over is not None and self._is_revoked(over)

    def _is_revoked(self, other: OtherVersion) -> bool:
        key = other.adapter, other.seq
        if key not in self._revoked:
            self._revoked[key] = self._registry.is_revoked(*key)
        return self._revoked[key]
