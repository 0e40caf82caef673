"""Serve a personal adapter and the shared one that it extends as one version, over any backend.

Two subscribers follow the two aliases. Each is given a side of a `ComposingBackend`; a side implements `Backend`. It keeps in
memory the versions that its subscriber loads. The backend within, which serves, holds what both sides make together: one
composed version, or the own version alone where no shared one can be served.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from perennial.storage.objects.safetensors_check import check_safetensors
from perennial.storage.registry.manifest import Manifest
from perennial.streams.client.backend import Backend, BackendError, Deactivates, HasRoom, UnfitVersionError
from perennial.streams.client.personal.served_parts import naming_parts

if TYPE_CHECKING:
    from perennial.streams.client.personal.composition import Part

_log = logging.getLogger("perennial.subscriber")

_HEX_CHARS: Final = 64
_MOST_SKIPS: Final = 63


class ComposingBackend:
    """Composes the active versions of two sides, and serves the result through another backend.

    Names of the backend within are `<own prefix><64 hex>`: the digest of the own version where it is served alone, else
    `composed_digest` of both, so that no name stands for two contents. A version that holds a part is unloaded when the
    subscriber of that part unloads it. Until then that subscriber acknowledges no revocation.

    If the backend within holds something under the own prefix that this object did not load, it is from a process before this
    one. It may contain any shared version, so both sides list it, and the shared side unloads it only after the first version
    of this process is in service.

    Thread-safe: one lock is held for each call, also while the backend within works.

    Args:
        inner: The backend that serves.
        own_prefix: What the names of the personal adapter's versions begin with, such as `acme/support/user-42@`.
        shared_prefix: The same of the shared adapter, such as `acme/support@`.

    Attributes:
        own: The side of the personal adapter's subscriber.
        shared: The side of the shared adapter's subscriber.
    """

    def __init__(self, inner: Backend, own_prefix: str, shared_prefix: str) -> None:
        self.inner = inner
        self._own_prefix, self._shared_prefix = own_prefix, shared_prefix
        self._lock = threading.RLock()
        self._parts: dict[str, Part] = {}  # the prefixes keep the names of both sides apart
        self._pairs: dict[str, tuple[str, str | None]] = {}  # own and shared name of what this object loaded
        self._own: str | None = None
        self._shared: str | None = None
        self._serving: tuple[str, str | None] | None = None  # replaced as a whole, so that it is read without the lock
        self._skips, self._skipped = 0, 0
        deactivates = isinstance(inner, Deactivates)
        self.own: Backend = _DeactivatingOwnSide(self) if deactivates else _OwnSide(self)
        self.shared: Backend = _DeactivatingSharedSide(self) if deactivates else _SharedSide(self)

    @property
    def served(self) -> str | None:
        """Name under which the backend within serves the newest version of both; None where it serves none.

        It waits for no load: requests ask for it.
        """
        serving = self._serving
        return serving[0] if serving is not None else None

    @property
    def served_with(self) -> str | None:
        """Name of the shared version in what is served; None where the own version is served alone, or nothing is."""
        serving = self._serving
        return serving[1] if serving is not None else None

    @property
    def holds_left(self) -> bool:
        """True if the backend within holds what a process before this one left, and serves nothing of this process."""
        with self._lock:
            return self.served is None and bool(self._held_inside())

    def tend(self) -> None:
        """Serve the active parts where they are not served, because an attempt failed; errors are only logged.

        Each failure doubles the number of calls until the next attempt, to 64 at most.
        """
        with self._lock:
            if self._skipped < self._skips:
                self._skipped += 1
                return
            try:
                self._serve_active()
            except Exception as error:  # noqa: BLE001 - a backend may raise anything; a later look tries again
                _log.warning("%s is not served with %s, it is tried again: %s", self._own, self._shared, error)
                self._skips, self._skipped = min(_MOST_SKIPS, 2 * self._skips + 1), 0
            else:
                self._skips = self._skipped = 0

    @property
    def needs_shared(self) -> bool:
        """True if the shared adapter must be followed: the own version extends it, or something that is held contains it."""
        with self._lock:
            if self._own is None or self._parts[self._own].manifest.extends is not None:
                return True
            return any(shared is not None for _, shared in self._pairs.values()) or bool(self._strays())

    def forget_shared(self) -> None:
        """Drop the shared adapter's versions from memory; call it when nobody follows that adapter any more."""
        with self._lock:
            self._shared = None
            self._parts = {name: part for name, part in self._parts.items() if name.startswith(self._own_prefix)}

    # ---- calls of the sides

    def load(self, name: str, weights: bytes, manifest: Manifest) -> None:
        """Keep a version of one side in memory.

        Raises:
            IntegrityError: The weights are no safetensors.
        """
        from perennial.streams.client.personal.composition import Part

        check_safetensors(weights)
        with self._lock:
            self._parts[name] = Part(f"sha256:{name[-_HEX_CHARS:]}", manifest, weights)

    def require(self, name: str) -> None:
        """Raise BackendError unless a side holds the version."""
        with self._lock:
            if name not in self._parts:
                raise BackendError(f"{name} is not held", remedy="load it first")

    def activate_own(self, name: str) -> None:
        """Serve an own version, together with the shared one that is active.

        Where both cannot be served together and no pair is served that could go on, it is served alone: a shared version that
        fits no server must not keep users from their own.
        """
        with self._lock:
            self.require(name)
            beneath = self._beneath(name)
            try:
                self._serve(name, beneath)
            except Exception as error:
                passes = self.holds_left and not isinstance(error, UnfitVersionError)
                if beneath is None or self.served_with is not None or passes:
                    raise
                _log.warning("%s is served without %s, which is tried again: %s", name, beneath, error)
                self._serve(name, None)
            self._own = name
            self._skips = self._skipped = 0

    def activate_shared(self, name: str) -> None:
        """Serve a shared version together with the own one; without an active own version only remember it."""
        with self._lock:
            self.require(name)
            if self._own is not None and self._parts[self._own].manifest.extends is not None:
                self._serve(self._own, name)
            self._shared = name
            self._skips = self._skipped = 0

    def deactivate_own(self, name: str) -> None:
        """Serve nothing, if the own version is the active one, or a process before this one left it in service."""
        with self._lock:
            if self._own == name:
                self._own = None
                self._take_out()
            elif name not in self._parts and isinstance(self.inner, Deactivates):
                self.inner.deactivate(name)

    def deactivate_shared(self, name: str) -> None:
        """Serve the own version alone, if the shared version is the active one.

        Where the backend within cannot do so, for example because it has no room, what holds the shared version is taken out
        of service all the same, and the own version is tried again.
        """
        with self._lock:
            if self._shared != name:
                return
            self._shared = None
            try:
                self._serve_active()
            except Exception:
                self._take_out()
                raise

    def drain(self, name: str, timeout_s: float, *, shared: bool) -> bool:
        """Wait until no request uses what contains the version; see `Backend.drain`."""
        with self._lock:
            held = self._containing(name)
            if name not in self._parts:
                stray = self._own_prefix + name[-_HEX_CHARS:]
                if stray == self.served or (shared and self.served is None):
                    return False  # what a process before this one left in service is all that there is
                held = [stray]
            return all(self.inner.drain(found, timeout_s) for found in held if found != self.served)

    def unload_own(self, name: str) -> None:
        """Remove an own version, and whatever contains it."""
        with self._lock:
            if name not in self._parts:
                if name not in self._pairs:  # else it is what both sides are served as since the caller looked
                    self.inner.unload(name)
                return
            self._remove(self._containing(name))
            if self._own == name:
                self._own = None
            del self._parts[name]

    def unload_shared(self, name: str) -> None:
        """Remove a shared version, and whatever contains it. Before that, serve the own version alone if it was active."""
        with self._lock:
            if name not in self._parts:
                self._unload_stray(self._own_prefix + name[-_HEX_CHARS:])
                return
            if self._shared == name:
                self._shared = None
            with suppress(Exception):  # there may be no place for the own version before this one has gone
                self._serve_active()
            self._remove(self._containing(name))
            del self._parts[name]
            self.tend()

    def list_own(self) -> list[str]:
        """Return what the own side holds."""
        with self._lock:
            held = {name for name in self._parts if name.startswith(self._own_prefix)}
            return sorted(held | {name for name in self._held_inside() if name not in self._pairs})

    def list_shared(self) -> list[str]:
        """Return what the shared side holds, in names of the shared adapter."""
        with self._lock:
            held = {name for name in self._parts if name.startswith(self._shared_prefix)}
            return sorted(held | {self._shared_prefix + name[-_HEX_CHARS:] for name in self._strays()})

    # ---- parts of the calls

    def _held_inside(self) -> list[str]:
        return [name for name in self.inner.list() if name.startswith(self._own_prefix)]

    def _strays(self) -> list[str]:
        """Return what the shared side has to unload beside its versions.

        It is what a process before this one left, and an own version that is held alone while it is served composed: the own
        side does not unload it, because it is that side's active version.
        """
        known = {name for name, (_, shared) in self._pairs.items() if shared is not None}
        return [name for name in self._held_inside() if name not in known and name != self.served]

    def _unload_stray(self, name: str) -> None:
        if name == self.served:
            return  # it was a stray when the caller looked
        if self.served is None and name in self._held_inside():
            raise BackendError(
                f"{name} is kept", got="a version of a process before this one",
                allowed="to unload it once a version of this process is served",
            )  # fmt: skip
        self.inner.unload(name)
        self._pairs.pop(name, None)

    def _containing(self, name: str) -> list[str]:
        return [found for found, pair in self._pairs.items() if name in pair]

    def _beneath(self, own: str) -> str | None:
        """Return the shared version to serve an own one with."""
        return self._shared if self._parts[own].manifest.extends is not None else None

    def _serve_active(self) -> None:
        if self._own is not None:
            self._serve(self._own, self._beneath(self._own))

    def _serve(self, own: str, shared: str | None) -> None:
        """Let the backend within serve two versions together; when it raises, what was served before still is."""
        from perennial.streams.client.personal.composition import compose, composed_digest

        part = self._parts[own]
        name = own
        if shared is not None:
            name = self._own_prefix + composed_digest(part.version, self._parts[shared].version)[-_HEX_CHARS:]
        if name == self.served:
            return
        held = name in self.inner.list()
        try:
            # Also what is held is loaded: an engine may have begun to drop it.
            if shared is not None:
                beneath = self._parts[shared]
                composed = compose(part, beneath)
                manifest = naming_parts(composed.manifest, part.version, beneath.version)
                self.inner.load(name, composed.weights, manifest)
            else:
                self.inner.load(name, part.weights, part.manifest)
            self.inner.warm(name)
            self.inner.activate(name)
        except Exception:
            if not held:
                with suppress(Exception):  # the first error is reported; what is left is listed by both sides
                    self.inner.unload(name)
            raise
        self._pairs[name] = (own, shared)
        self._serving = (name, shared)

    def _take_out(self) -> None:
        """Serve nothing, where the backend within can; else unloading does it."""
        served, self._serving = self.served, None
        if served is not None and isinstance(self.inner, Deactivates):
            self.inner.deactivate(served)

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self.inner.unload(name)
            self._skips = self._skipped = 0  # there may be a place now
            del self._pairs[name]
            if self.served == name:
                self._serving = None


class _Side:
    """Methods of both sides. `has_room` is set where the backend within has it."""

    def __init__(self, composing: ComposingBackend) -> None:
        self._composing = composing
        self.base_sha256: str | None = composing.inner.base_sha256
        if isinstance(composing.inner, HasRoom):
            self.has_room = composing.inner.has_room

    def load(self, name: str, weights: bytes, manifest: Manifest) -> None:
        """Keep the version in memory; activating it composes it."""
        self._composing.load(name, weights, manifest)

    def warm(self, name: str) -> None:
        """Do nothing: activating a version warms the composed one."""
        self._composing.require(name)


class _OwnSide(_Side):
    """The side of the personal adapter's subscriber."""

    def activate(self, name: str) -> None:
        """Serve the version together with the shared one."""
        self._composing.activate_own(name)

    def drain(self, name: str, timeout_s: float) -> bool:
        """Wait until no request uses what contains the version."""
        return self._composing.drain(name, timeout_s, shared=False)

    def unload(self, name: str) -> None:
        """Remove the version and what contains it."""
        self._composing.unload_own(name)

    def list(self) -> list[str]:
        """Return what is held."""
        return self._composing.list_own()


class _SharedSide(_Side):
    """The side of the shared adapter's subscriber."""

    def activate(self, name: str) -> None:
        """Serve the version together with the own one."""
        self._composing.activate_shared(name)

    def drain(self, name: str, timeout_s: float) -> bool:
        """Wait until no request uses what contains the version."""
        return self._composing.drain(name, timeout_s, shared=True)

    def unload(self, name: str) -> None:
        """Remove the version and what contains it."""
        self._composing.unload_shared(name)

    def list(self) -> list[str]:
        """Return what is held."""
        return self._composing.list_shared()


class _DeactivatingOwnSide(_OwnSide):
    def deactivate(self, name: str) -> None:
        """Serve nothing, if the version is the active one."""
        self._composing.deactivate_own(name)


class _DeactivatingSharedSide(_SharedSide):
    def deactivate(self, name: str) -> None:
        """Serve the own version alone, if the version is the active one."""
        self._composing.deactivate_shared(name)
