"""The version that a model name stands for, and the version of the shared adapter that it is served with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from perennial.storage.registry.manifest import Manifest
from perennial.streams.client.backend import UnfitVersionError


@dataclass(frozen=True)
class FoundVersion:
    """A version that a name stands for, and that may be served.

    Attributes:
        version: Digest of its manifest, `sha256:<64 hex>`.
        manifest: Its manifest.
        alias: The alias that names it. None if the name has a version.
        published_s: When the alias was pointed at it, in seconds since 1970. None if the name has a version.
        shared: The version of the shared adapter that it is served with. None: it is served alone.
    """

    version: str
    manifest: Manifest
    alias: str | None
    published_s: float | None
    shared: FoundVersion | None = None

    @cached_property
    def digest(self) -> str:
        """Digest that names what is served, `sha256:<64 hex>`: the version's own, or the composed digest of both versions."""
        if self.shared is None:
            return self.version
        from perennial.streams.client.personal.composition import composed_digest  # it needs numpy

        return composed_digest(self.version, self.shared.version)

    @cached_property
    def name(self) -> str:
        """`<adapter>@<64 hex>`, the name of its folder. The digits are those of `digest`."""
        return f"{self.manifest.adapter}@{self.digest.removeprefix('sha256:')}"

    @property
    def served_name(self) -> str:
        """`<adapter>#<alias>@<64 hex>`, or without the alias; the name that replies show.

        The digits are those of the version. With a shared part, `+` and the digits of its version follow.
        """
        alias = f"#{self.alias}" if self.alias else ""
        shared = f"+{self.shared.version.removeprefix('sha256:')}" if self.shared else ""
        return f"{self.manifest.adapter}{alias}@{self.version.removeprefix('sha256:')}{shared}"

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights as they are stored, of both parts."""
        return self.manifest.weights.size_bytes + (self.shared.size_bytes if self.shared else 0)

    def changed_s(self, before: FoundVersion) -> float | None:
        """Return when the alias moved that made this differ from what was found before, in seconds since 1970.

        Args:
            before: What the same name stood for before.

        Returns:
            The later time, if both aliases moved. None if only a shared part was taken away: then nothing was published.
        """
        times = [self.published_s] if self.version != before.version else []
        if self.shared and (before.shared is None or self.shared.version != before.shared.version):
            times.append(self.shared.published_s)
        return max((time_s for time_s in times if time_s is not None), default=None)


class RevokedVersionError(UnfitVersionError):
    """A version is revoked and still live."""


class RevokedSharedError(UnfitVersionError):
    """The live version of the shared adapter is revoked.

    Attributes:
        alone: The personal adapter's version without it.
    """

    def __init__(self, error: RevokedVersionError, alone: FoundVersion) -> None:
        super().__init__(
            f"{alone.manifest.adapter} extends {alone.manifest.extends}: {error.message}",
            got=error.got, allowed=error.allowed, remedy=error.remedy,
        )  # fmt: skip
        self.alone = alone


class SharedVersions:
    """Live versions of shared adapters, each read from the store once; for the names of one poll. Thread-safe.

    It keeps each result of a reading: a version, None where there is no live one, or an error.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], FoundVersion | Exception | None] = {}
        self._lock = threading.Lock()

    def get(self, adapter: str, alias: str, read: Callable[[], FoundVersion | None]) -> FoundVersion | None:
        """Return what `read` returned, or raise what it raised, at the first call for this adapter and alias."""
        key = adapter, alias
        with self._lock:
            if key not in self._found:
                try:
                    self._found[key] = read()
                except Exception as error:  # noqa: BLE001 - it is raised below, for each name
                    self._found[key] = error
            found = self._found[key]
        if isinstance(found, Exception):
            raise found.with_traceback(None)
        return found
