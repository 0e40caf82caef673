"""Small adapter versions for tests that need several of them."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from uuid import uuid4

from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import Manifest, Probes
from perennial.storage.registry.registry import AliasState, Registry
from perennial.storage.signing.trust import Trust
from perennial.streams.client.testing import BASE_SHA256, next_manifest, small_weights

_serial = itertools.count()


class VersionPublisher:
    """Publishes versions of one adapter the way a learner does."""

    def __init__(
        self,
        store: ObjectStore,
        adapter: str = "acme/support",
        base_sha256: str = BASE_SHA256,
        trust: Trust | None = None,
        extends: str | None = None,
    ) -> None:
        self.extends = extends
        self.store = store
        self.adapter = adapter
        self.base_sha256 = base_sha256
        self.registry = Registry(store, nonce=lambda: uuid4().hex, now=lambda: datetime.now(UTC), trust=trust)

    def manifest(
        self, weights: bytes, kind: str = "update", rank: int = 2, alpha: int = 4, probes: Probes | None = None
    ) -> Manifest:
        """Return the manifest of the next version."""
        made = next_manifest(
            self.registry, self.adapter, weights, kind=kind, rank=rank, alpha=alpha, base_sha256=self.base_sha256
        )
        # What a forgetting publishes takes over no state of a version that it revokes.
        clean = {"parent": None} if kind == "forget" else {}
        return made.model_copy(update={"probes": probes or {}, "extends": self.extends, **clean})

    def publish(
        self,
        weights: bytes | None = None,
        kind: str = "update",
        rank: int = 2,
        alpha: int = 4,
        probes: Probes | None = None,
    ) -> AliasState:
        """Publish the next version and return the alias afterwards."""
        weights = small_weights(next(_serial)) if weights is None else weights
        manifest = self.manifest(weights, kind, rank, alpha, probes)
        state = self.registry.publish(manifest, [weights], lambda _: None).alias_state
        assert state is not None
        return state
