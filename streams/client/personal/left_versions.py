"""Find the versions that a process before this one left in service, and unload those that were revoked."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from perennial.storage.errors import NotFoundError
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry
from perennial.streams.client.backend import Backend, Deactivates, KeepsManifests
from perennial.streams.client.personal.served_parts import parts_of
from perennial.streams.client.version_source import VersionSource

_log = logging.getLogger("perennial.subscriber")


def left_extending(backend: Backend, names: Iterable[str]) -> Manifest | None:
    """Return the manifest of the first held version that is known to be composed; None where none is.

    Args:
        backend: The backend that serves.
        names: Names of versions that it holds.
    """
    for name in names:
        manifest = backend.manifest_of(name) if isinstance(backend, KeepsManifests) else None
        if manifest is not None and parts_of(manifest) is not None:
            return manifest
    return None


def drop_if_revoked(source: VersionSource, registry: Registry, server: Backend, backend: Backend, name: str) -> None:
    """Unload a version that a process before this one left in service, if it or a part of it was revoked.

    Args:
        source: Reads the versions of the adapter.
        registry: The registry.
        server: The backend that serves.
        backend: The backend that the adapter's subscriber unloads versions from: the same, or a side of it.
        name: Name of the version.

    Raises:
        StoreError: The store does not answer.
    """
    try:
        is_revoked = source.is_revoked(f"sha256:{name[-64:]}")
    except NotFoundError:  # composed, or its manifest was deleted: then it is unloaded when there is a newer version
        is_revoked = has_revoked_part(registry, server, name)
    if is_revoked:
        _log.warning("%s was revoked and is taken out of service", name)
        if isinstance(backend, Deactivates):
            backend.deactivate(name)
        backend.unload(name)


def has_revoked_part(registry: Registry, backend: Backend, name: str) -> bool:
    """Return whether one of the two versions in a composed one was revoked, or is missing in the store.

    Args:
        registry: The registry.
        backend: The backend that serves.
        name: Name of the composed version.

    Raises:
        StoreError: The store does not answer.
    """
    manifest = left_extending(backend, [name])
    parts = None if manifest is None else parts_of(manifest)
    if manifest is None or manifest.extends is None or parts is None:
        return False
    try:
        return any(
            registry.is_revoked(adapter, registry.manifest(adapter, version).seq)
            for adapter, version in zip((manifest.adapter, manifest.extends), parts, strict=True)
        )
    except NotFoundError:
        return True
