"""Read a version from the object store for a subscriber, and check it before any backend sees it."""

from __future__ import annotations

from typing import Final

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.keys import blob_key, digest_of
from perennial.storage.objects.safetensors_check import check_safetensors
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.records import AliasState
from perennial.storage.registry.registry import Registry
from perennial.streams.client.backend import UnfitVersionError
from perennial.streams.client.trust.version_guard import VersionGuard

MAX_WEIGHTS_BYTES: Final = 2 * 1024**3


class VersionSource:
    """Reads the versions of one adapter. Not thread-safe.

    Args:
        registry: The registry.
        adapter: Name of the adapter.
        guard: Checks who signed a version.
    """

    def __init__(self, registry: Registry, adapter: str, guard: VersionGuard) -> None:
        self._guard = guard
        self._registry = registry
        self._adapter = adapter

    def manifest(self, version: str, base_sha256: str | None, alias: AliasState | None = None) -> Manifest:
        """Return the manifest of a version that may be served.

        Args:
            version: Digest of the manifest.
            base_sha256: Digest of the base that is served; None: any.
            alias: The alias that names the version; None: somebody asked for the version itself.

        Raises:
            UntrustedVersionError: No trusted key signed the version, or it is not one that may be live.
            StoreError: The store does not answer, or the manifest is missing or damaged.
            UnfitVersionError: The version is revoked, or belongs to another base.
        """
        manifest = self._registry.manifest(self._adapter, version)
        self._guard.check_version(version, manifest, alias)
        if self._registry.is_revoked(self._adapter, manifest.seq):
            raise UnfitVersionError(
                f"{version} is revoked and still live",
                remedy=f"make another version live: `perennial adapters rollback {self._adapter}`",
            )
        if base_sha256 is not None and base_sha256 != manifest.base_sha256:
            raise UnfitVersionError(
                f"the version belongs to another base, {manifest.base_model}",
                got=manifest.base_sha256,
                allowed=base_sha256,
                remedy="serve it with the base that its manifest names; until then this server takes only versions of its own base",
            )
        return manifest

    def fetch(self, manifest: Manifest) -> bytes:
        """Return the weights as they are stored.

        Raises:
            StoreError: The store does not answer or lacks them.
            IntegrityError: They are larger than MAX_WEIGHTS_BYTES.
        """
        size_bytes = manifest.weights.size_bytes
        if size_bytes > MAX_WEIGHTS_BYTES:
            raise IntegrityError("the weights are too large", got=size_bytes, allowed=MAX_WEIGHTS_BYTES)
        return self._registry.store.get(blob_key(manifest.weights.digest), MAX_WEIGHTS_BYTES).data

    def verify(self, manifest: Manifest, weights: bytes) -> None:
        """Check the digest and the form of the weights.

        Raises:
            IntegrityError: They are not the ones that the manifest names, or no safetensors file.
        """
        found = digest_of(weights)
        if found != manifest.weights.digest or len(weights) != manifest.weights.size_bytes:
            raise IntegrityError(
                "the weights are not those that the manifest names",
                got=f"{found} ({len(weights)} bytes)",
                allowed=f"{manifest.weights.digest} ({manifest.weights.size_bytes} bytes)",
                remedy=f"restore the object from a copy, or roll back: `perennial adapters rollback {self._adapter}`",
            )
        check_safetensors(weights)

    def is_revoked(self, version: str) -> bool:
        """Return whether a version of the adapter was revoked.

        Args:
            version: Digest of its manifest.

        Raises:
            StoreError: The store does not answer, or lacks the manifest.
        """
        return self._registry.is_revoked(self._adapter, self._registry.manifest(self._adapter, version).seq)
