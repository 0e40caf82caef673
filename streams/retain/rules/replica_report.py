"""Which replicas confirmed that they serve no affected version. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

MAX_NAMED: Final = 1_000
"""The most replicas that a list of a published state names."""


class ReplicaState(Protocol):
    """The part of a replica's status that the report needs; `AckReader.replicas` returns such statuses."""

    @property
    def replica(self) -> str:
        """The replica's name."""
        ...

    @property
    def generation(self) -> int:
        """The alias's generation that the replica acknowledged last."""
        ...

    @property
    def version(self) -> str | None:
        """The version that it serves."""
        ...

    @property
    def failed(self) -> bool:
        """Its last acknowledgement is a failure, so nobody knows which version it serves."""
        ...

    @property
    def lease_expires_ms(self) -> int | None:
        """When its lease ends, in milliseconds since 1970; None: it has no lease and counts as alive."""
        ...

    @property
    def left(self) -> bool:
        """It said that it has stopped."""
        ...


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What the replicas of one adapter say about a change.

    Attributes:
        acknowledged: Replicas that serve no affected version.
        behind: Replicas that may still serve one and whose lease has not ended.
        expired: Replicas that may still serve one and whose lease has ended.
        left: Replicas that said that they stopped, and had not confirmed the change before.
    """

    acknowledged: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """All replicas that did not confirm the change, sorted."""
        return sorted({*self.behind, *self.expired, *self.left})[:MAX_NAMED]


def report_of(
    statuses: Iterable[ReplicaState], generation: int, revoked: Collection[str], now_ms: int
) -> ReplicaReport:
    """Return which replicas confirmed that they serve no revoked version.

    A replica confirmed it where its last acknowledgement is no failure, and names this generation or a later one. That it
    names an earlier version that is not revoked says nothing: the replica may serve a revoked one by now, and its
    acknowledgement may be under way. A replica that left sent its last record. Nobody knows what a replica serves after a
    failure: it may still hold the previous version. Where nothing is revoked, no replica is behind.

    Args:
        statuses: The latest status of every replica of the adapter.
        generation: The alias's generation at which the revoked versions went out of service.
        revoked: Ids of the adapter's revoked versions.
        now_ms: The wall clock, in milliseconds since 1970.
    """
    found: dict[str, list[str]] = {"acknowledged": [], "behind": [], "expired": [], "left": []}
    for status in statuses:
        last_word = status.left and status.version not in revoked
        affected = status.failed or (status.generation < generation and not last_word)
        if not (revoked and affected):
            group = "acknowledged"
        elif status.left:
            group = "left"
        elif status.lease_expires_ms is not None and status.lease_expires_ms <= now_ms:
            group = "expired"
        else:
            group = "behind"
        found[group].append(status.replica)
    return ReplicaReport(**{name: tuple(sorted(names)[:MAX_NAMED]) for name, names in found.items()})
