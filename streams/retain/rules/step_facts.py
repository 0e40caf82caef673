"""The facts that steps of retention requests need. Pure.

streams/retain/store_facts.py gets them from the store and from the topic adapter-acks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from perennial.storage.registry.quarantine import Quarantine
from perennial.streams.retain.ledger import StoredExample
from perennial.streams.retain.rules.replica_report import ReplicaReport


@dataclass(frozen=True)
class AliasPosition:
    """The version that an alias points at.

    Attributes:
        version: The live version; None where nothing is live.
        generation: The alias's count of changes.
    """

    version: str | None
    generation: int


class Facts(Protocol):
    """The facts that a step needs from the store and from the acknowledgements of replicas."""

    def begin(self) -> None:
        """Forget what was read before; a tick reads each quarantine once."""
        ...

    def changed(self, quarantine: Quarantine) -> None:
        """Note that a quarantine was changed."""
        ...

    def adapters(self) -> Sequence[str]:
        """Return every adapter that has anything in the store, sorted."""
        ...

    def examples(self, adapter: str) -> Sequence[StoredExample]:
        """Return the adapter's examples whose text the store has."""
        ...

    def due_before(self, adapter: str, end_ms: int) -> Sequence[StoredExample]:
        """Return at least those stored examples whose own life ends by `end_ms`, in milliseconds since 1970."""
        ...

    def newest(self, adapter: str) -> str:
        """Return the adapter's newest version; empty where it has none. Its examples change with it."""
        ...

    def quarantine(self, adapter: str) -> Quarantine:
        """Return the adapter's quarantine."""
        ...

    def live(self, adapter: str) -> AliasPosition:
        """Return where the adapter's alias points."""
        ...

    def is_revoked(self, adapter: str, version: str) -> bool:
        """Return whether the version was revoked."""
        ...

    def dependants(self, adapter: str) -> Sequence[str]:
        """Return the adapters that may depend on a version of this one."""
        ...

    def replicas(self, adapter: str, generation: int) -> ReplicaReport:
        """Return which replicas may still serve a revoked version that this generation of the alias replaces."""
        ...
