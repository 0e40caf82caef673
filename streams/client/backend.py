"""The protocol between a subscriber and whatever serves its adapter versions.

Implement `Backend` to serve versions in another way than the backends that come with the package. The module imports
neither Kafka nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from perennial.storage.errors import PerennialError
from perennial.storage.registry.manifest import Manifest


class BackendError(PerennialError):
    """A backend cannot do what a subscriber asks. The subscriber tries again: the cause may pass."""


class UnfitVersionError(BackendError):
    """A version can never be served by this backend: it has another base, rank or alpha, or it is malformed.

    A subscriber tries such a version again only once a minute.
    """


class Backend(Protocol):
    """Serves adapter versions: in a model of this process, through a server, or as files.

    A name stands for one immutable version and is never given to another version, so no version is ever reloaded in
    place. A subscriber makes all calls from one thread; that of a personal adapter makes them from two threads, one call at
    a time. When a call raises, the version that was active before the
    call stays in service.

    Attributes:
        base_sha256: Digest of the base model that is served, as `sha256:<64 hex>`. None if the backend does not know
            it; then the subscriber accepts the first version of any base, and after it only versions of that one, also
            when no version is served. A backend that outlives its subscriber must remember the base itself.
    """

    base_sha256: str | None

    def load(self, name: str, weights: bytes, manifest: Manifest) -> None:
        """Hold the version ready, but do not serve it yet. Loading the same version twice is not an error.

        Args:
            name: Name of the version, `<adapter>@<64 hex>` or `<adapter>#<alias>@<64 hex>`.
            weights: The LoRA weights as a safetensors file. The subscriber has checked their digest.
            manifest: The manifest of the version.
        """

    def warm(self, name: str) -> None:
        """Do what makes the first request on the version as fast as the second."""

    def activate(self, name: str) -> None:
        """Serve the version to every request that begins from now on.

        Requests that began before the call finish on the version that was active then.
        """

    def drain(self, name: str, timeout_s: float) -> bool:
        """Wait until no request uses the version.

        Args:
            name: Name of the version.
            timeout_s: Longest wait in seconds.

        Returns:
            False if requests still use the version after the wait.
        """

    def unload(self, name: str) -> None:
        """Remove the version, from memory too. If it is active, take it out of service first.

        Removing a name that is not held is not an error.

        Raises:
            PerennialError: Requests still use the version; nothing has changed then.
        """

    def list(self) -> list[str]:
        """Return the names of all versions held, read from the place that holds them and not from a list of calls."""


@runtime_checkable
class Deactivates(Protocol):
    """A backend that can end the service of a version while requests still use it.

    A backend whose `unload` raises for requests under way should have this too. Otherwise a retired adapter under
    constant load keeps its version: new requests begin before the last ones have ended.
    """

    def deactivate(self, name: str) -> None:
        """Serve no version to requests that begin from now on, if the version is the active one."""


@runtime_checkable
class HasRoom(Protocol):
    """A backend that can load a version while it still holds several earlier ones.

    A subscriber then serves a newer version first and unloads afterwards, one version at each look at the alias. Other
    backends are asked to unload first, because they may have no place for another version before.

    Attributes:
        has_room: Always True.
    """

    has_room: bool


@runtime_checkable
class KeepsManifests(Protocol):
    """A backend that outlives its subscriber and keeps the manifests of what it holds.

    From them a subscriber that starts knows which versions are in what a process before it left in service.
    """

    def manifest_of(self, name: str) -> Manifest | None:
        """Return the manifest of a version that is held; None where there is none that can be read."""


@dataclass(frozen=True)
class Current:
    """The version that a subscriber serves now.

    Attributes:
        version: Digest of the version's manifest, `sha256:<64 hex>`.
        generation: Generation of the alias that named the version.
        name: The backend's name of the version.
        manifest: The manifest of the version.
    """

    version: str
    generation: int
    name: str
    manifest: Manifest
