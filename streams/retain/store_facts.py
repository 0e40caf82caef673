"""The facts that steps of retention requests need (see `Facts`), from the store and from the topic adapter-acks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.history.dependants import dependants
from perennial.storage.registry.quarantine import Quarantine, load_quarantine
from perennial.storage.registry.registry import Registry
from perennial.streams.retain.example_index import ExampleIndex
from perennial.streams.retain.ledger import StoredExample
from perennial.streams.retain.rules.replica_report import ReplicaReport, report_of
from perennial.streams.retain.rules.step_facts import AliasPosition
from perennial.streams.settings import Settings

ADAPTERS_EVERY_S: Final = 15.0


class StoreFacts:
    """Answers what steps ask (see `Facts`). Not thread-safe.

    Args:
        settings: The alias whose replicas count.
        store: The object store.
        acks: An `AckReader`, or an object with its methods.

    Attributes:
        store: The object store.
        registry: Reads versions and aliases, whoever signed them.
        signing_registry: Moves aliases; signs them, and reads nothing that no trusted key signed.
    """

    def __init__(self, settings: Settings, store: ObjectStore, acks: Any) -> None:
        self.store = store
        # Facts are read whoever signed them: one forged alias must not stop the requests of all other adapters. What is
        # written from them is a job for a learner, which asks for signatures.
        self.registry = Registry(store)
        self.signing_registry = Registry(store, trust=settings.signing.trust())
        self._index = ExampleIndex(self.registry)
        self._acks = acks
        self._alias = settings.serving.alias
        self._adapters: list[str] = []
        self._listed_s: float | None = None
        self._quarantines: dict[str, Quarantine] = {}
        self._examples: dict[str, Sequence[StoredExample]] = {}
        self._replicas: dict[str, list[Any]] | None = None

    def begin(self) -> None:
        """See `Facts`."""
        self._quarantines.clear()
        self._examples.clear()
        self._replicas = None

    def changed(self, quarantine: Quarantine) -> None:
        """See `Facts`."""
        self._quarantines[quarantine.adapter] = quarantine

    def adapters(self) -> Sequence[str]:
        """Return every adapter with a version or a cut micro-batch; listed at most every ADAPTERS_EVERY_S seconds."""
        if self._listed_s is None or time.monotonic() - self._listed_s >= ADAPTERS_EVERY_S:
            cut = (key.removeprefix("state/curate/") for key in self.store.list("state/curate/"))
            self._adapters = sorted({*self.registry.adapters(), *cut})
            self._listed_s = time.monotonic()
        return self._adapters

    def examples(self, adapter: str) -> Sequence[StoredExample]:
        """See `Facts`."""
        if adapter not in self._examples:
            if len(self._examples) >= 16:
                self._examples.clear()
            self._examples[adapter] = self._index.of(adapter)
        return self._examples[adapter]

    def due_before(self, adapter: str, end_ms: int) -> Sequence[StoredExample]:
        """See `Facts`."""
        return self._index.due_before(adapter, end_ms)

    def newest(self, adapter: str) -> str:
        """See `Facts`."""
        head = self.registry.head(adapter)
        return head.version if head else ""

    def quarantine(self, adapter: str) -> Quarantine:
        """See `Facts`."""
        if adapter not in self._quarantines:
            self._quarantines[adapter] = load_quarantine(self.store, adapter)
        return self._quarantines[adapter]

    def live(self, adapter: str) -> AliasPosition:
        """See `Facts`."""
        state = self.registry.alias(adapter, self._alias)
        if state is None:
            return AliasPosition(None, 0)
        return AliasPosition(None if state.kind == "retired" else state.version, state.generation)

    def is_revoked(self, adapter: str, version: str) -> bool:
        """See `Facts`."""
        return self.registry.is_revoked(adapter, self.registry.manifest(adapter, version).seq)

    def dependants(self, adapter: str) -> Sequence[str]:
        """See `Facts`."""
        if not any(True for _ in self.registry.revocations(adapter)):  # then nothing depends on a revoked version
            return []
        return dependants(self.store, adapter)

    def prune_replicas(self) -> None:
        """Delete the acknowledgements of replicas that ended long ago, so that their topic does not grow for ever.

        Raises:
            KafkaUnavailableError: The topic cannot be read or written.
        """
        self._acks.prune()

    def replicas(self, adapter: str, generation: int) -> ReplicaReport:
        """See `Facts`.

        Raises:
            KafkaUnavailableError: The acknowledgements cannot be read.
        """
        revoked = {revocation.version for revocation in self.registry.revocations(adapter)}
        if self._replicas is None:  # one reading per tick: a request over a pattern asks for each of its adapters
            self._replicas = {}
            for status in self._acks.replicas(None, self._alias):
                self._replicas.setdefault(status.adapter, []).append(status)
        return report_of(self._replicas.get(adapter, ()), generation, revoked, time.time_ns() // 1_000_000)
