"""Write both parts into the manifest of a composed version, and read them. Without numpy, so that any client can import it."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.manifest import Manifest

_OWN: Final = "own_version"
_SHARED: Final = "shared_version"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_REPLICA_CHARS: Final = 256


def naming_parts(manifest: Manifest, own: str, shared: str) -> Manifest:
    """Return the manifest of a composed version with the digests of both parts in its `config`.

    Args:
        manifest: Manifest of the composed LoRA.
        own: Version of the personal adapter, a digest.
        shared: Version of the shared adapter, a digest.
    """
    return manifest.model_copy(update={"config": {**manifest.config, _OWN: own, _SHARED: shared}})


def parts_of(manifest: Manifest) -> tuple[str, str] | None:
    """Return the own and the shared version of a composed version; None for a version that a learner made."""
    own, shared = manifest.config.get(_OWN), manifest.config.get(_SHARED)
    if manifest.extends is None or not (isinstance(own, str) and isinstance(shared, str)):
        return None
    return (own, shared) if _DIGEST.fullmatch(own) and _DIGEST.fullmatch(shared) else None


def version_of(stored: bytes, manifest: Manifest) -> str:
    """Return the digest that the name of a version ends with, `sha256:<64 hex>`.

    Args:
        stored: The manifest as a serving folder holds it.
        manifest: The same, parsed.
    """
    parts = parts_of(manifest)
    if parts is None:
        return digest_of(stored)
    from perennial.streams.client.personal.composition import composed_digest

    return composed_digest(*parts)


def follower_name(replica: str, adapter: str) -> str:
    """Return the replica's name of a follower in the shared adapter, unique among the personal adapters that extend it.

    Args:
        replica: Name of the personal adapter's replica.
        adapter: Name of the personal adapter.
    """
    name = f"{replica}:{adapter.rpartition('/')[2]}"
    if len(name) <= _MAX_REPLICA_CHARS:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[: _MAX_REPLICA_CHARS - 17]}~{digest}"
