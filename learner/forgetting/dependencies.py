"""Find the versions of an adapter that depend on what another adapter has forgotten.

A start is the mean of versions of siblings. When one of them forgets an example, its affected versions are revoked, and the
start is a function of the example. So is every version that began with it. The same holds for what was trained over a
version of the shared adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from perennial.learner.versions.history import History
from perennial.storage.registry.history.dependants import drop_dependant, is_dependant
from perennial.storage.registry.manifest import OtherVersion, Start
from perennial.storage.registry.registry import Registry
from perennial.streams.events.models import ForgetRequested


def revoked_starts(registry: Registry, adapter: str, history: History) -> Mapping[str, Start]:
    """Return the first versions of lines that began with a revoked start, with it; none where all of it was dealt with.

    Args:
        registry: the versions of the adapter and of its siblings.
        adapter: the adapter.
        history: its versions.

    Raises:
        StoreError: the store failed.
    """
    head = history.manifests[history.head]
    if head.start is None:
        return {}
    roots = [version for version, node in history.versions.items() if node.state_parent is None]
    starts = {version: history.manifests[version].start for version in roots}
    revoked = {v: start for v, start in starts.items() if start is not None and _is_revoked(registry, start.founders)}
    # A record that is left tells that a job was interrupted before it had revoked and deleted everything.
    left = any(is_dependant(registry.store, each.adapter, adapter) for each in _founders(revoked))
    return revoked if left or head.start in revoked.values() else {}


def over_revoked(registry: Registry, job: ForgetRequested, history: History) -> frozenset[str]:
    """Return the versions that were trained over a revoked version of the shared adapter, where the job asks for them.

    Jobs that name examples of the adapter itself do not ask: looking takes a read per version. Retain sends one that names
    none where the shared adapter has forgotten something.

    Args:
        registry: the versions of the adapter and of the shared one.
        job: the job.
        history: the adapter's versions.

    Raises:
        StoreError: the store failed.
    """
    if job.selector is not None or job.example_ids:
        return frozenset()
    revoked = {revocation.version for revocation in registry.revocations(job.adapter)}
    scheduled = set(history.scheduled())
    # What is neither served nor trained from any more was dealt with: revoked, or rebuilt and not in the schedule.
    open_versions = (v for v in history.versions if v in scheduled or (v in history.published and v not in revoked))
    found: set[str] = set()
    known: dict[int, bool] = {}
    for version in open_versions:
        over = history.manifests[version].over
        if over is not None:
            if over.seq not in known:
                known[over.seq] = registry.is_revoked(over.adapter, over.seq)
            if known[over.seq]:
                found.add(version)
    return frozenset(found)


def settle_starts(registry: Registry, adapter: str, revoked: Mapping[str, Start]) -> None:
    """Delete the records that the adapter began with these starts, once nothing of it does any more.

    Raises:
        StoreError: the store failed.
    """
    for founder in _founders(revoked):
        drop_dependant(registry.store, founder.adapter, adapter)


def _founders(starts: Mapping[str, Start]) -> list[OtherVersion]:
    return [founder for start in starts.values() for founder in start.founders]


def _is_revoked(registry: Registry, founders: Iterable[OtherVersion]) -> bool:
    return any(registry.is_revoked(founder.adapter, founder.seq) for founder in founders)
