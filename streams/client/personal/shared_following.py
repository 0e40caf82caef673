"""Follow the shared adapter for as long as a personal adapter's versions extend it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from perennial.storage.errors import PerennialError
from perennial.storage.registry.manifest import Manifest
from perennial.streams.client.backend import Backend, BackendError
from perennial.streams.client.following_thread import SubscriberError
from perennial.streams.client.personal.composing_backend import ComposingBackend

_log = logging.getLogger("perennial.subscriber")

_FIRST_LOOK_S: Final = 10.0
"""Longest wait for the first look at the shared alias, so that no user is served without the tenant's part for a moment."""


class FollowsAlias(Protocol):
    """The methods of a `Subscriber` of the shared adapter that are used here."""

    @property
    def alive(self) -> bool:
        """True while its thread follows the alias."""

    def start(self) -> object:
        """Follow the alias in a thread."""

    def close(self, timeout_s: float = 60.0) -> None:
        """End the thread and announce that the replica leaves."""

    def has_looked(self, timeout_s: float) -> bool:
        """Wait until the alias was looked at once."""


class SharedFollowing:
    """Holds the follower of a shared adapter, and the backend that composes. Its methods are called from one thread.

    Args:
        inner: The backend that serves.
        own_prefix: What the names of the personal adapter's versions begin with.
        shared_prefix: The same of the shared adapter.
        make_follower: Returns a follower of the shared adapter that serves through the given backend.

    Attributes:
        composing: Puts both adapters' versions together.
    """

    def __init__(
        self, inner: Backend, own_prefix: str, shared_prefix: str, make_follower: Callable[[Backend], FollowsAlias]
    ) -> None:
        self.composing = ComposingBackend(inner, own_prefix, shared_prefix)
        self._make_follower = make_follower
        self._follower: FollowsAlias | None = None
        self._extending: Manifest | None = None

    def prepare(self, manifest: Manifest) -> None:
        """Follow the shared adapter if the version extends one.

        Args:
            manifest: Manifest of the own version that is about to be served.

        Raises:
            BackendError: The shared alias was not looked at in time, and what a process before this one left is served.
        """
        if manifest.extends is None:
            return
        self._extending = manifest
        side, composing = self.composing.shared, self.composing
        if side.base_sha256 is None or (composing.served is None and not composing.holds_left):
            # Without a digest of the servers' base, what is served, or else the own version, decides which base the shared one
            # must have. An own version that the servers refuse must not change it.
            side.base_sha256 = composing.inner.base_sha256 or manifest.base_sha256
        if self._follower is None:
            follower = self._make_follower(self.composing.shared)
            follower.start()
            self._follower = follower
        if not self._follower.has_looked(_FIRST_LOOK_S):
            if self.composing.holds_left:  # it may hold both parts
                raise BackendError(
                    f"{manifest.extends} was not looked at yet", got=f"{_FIRST_LOOK_S:g} s without an answer",
                    remedy="it is tried again; see whether the store answers",
                )  # fmt: skip
            _log.warning("%s was not looked at in %g s: it is not served yet", manifest.extends, _FIRST_LOOK_S)

    def tend(self) -> None:
        """Try again what failed, and end the follower where nothing of the shared adapter is served or held any more.

        Raises:
            SubscriberError: The follower was ended by an error. Nobody would hear of a revocation in the shared adapter.
        """
        if self._follower is None:
            if self._extending is not None and self.composing.needs_shared:  # `run` was called again
                try:
                    self.prepare(self._extending)
                except PerennialError as error:
                    _log.debug("%s cannot be followed, it is tried again: %s", self._extending.extends, error)
            return
        if not self._follower.alive:
            raise SubscriberError("the subscriber of the shared adapter ended", remedy="see the log")
        self.composing.tend()
        if not self.composing.needs_shared:
            self.close()
            self._extending = None
            self.composing.forget_shared()

    def close(self) -> None:
        """End the follower and announce that its replica leaves."""
        follower, self._follower = self._follower, None
        if follower is not None:
            with suppress(PerennialError):  # its thread has logged the error
                follower.close()
