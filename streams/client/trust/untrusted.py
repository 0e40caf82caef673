"""The error of a version that a client with trusted keys does not serve."""

from __future__ import annotations

from typing import Literal

from perennial.storage.registry.records import AliasState
from perennial.streams.client.backend import UnfitVersionError

Distrust = Literal["unsigned", "unknown-key", "forged", "replayed", "refused-by-gate", "off-the-line"]
"""Why: no signature; one by another key; one that does not fit; an alias older than one seen before, or another alias; the
gate refused the version; no sequence number of the adapter is the version's."""


class UntrustedVersionError(UnfitVersionError):
    """A version is not served, because it is not shown to be what the owner of a trusted key published.

    Args:
        reason: a short identifier, also the label of metrics.
        message: one sentence for people.
        got: what was found.
        allowed: what would have been accepted.
        remedy: what to do now.
        state: the alias that is not trusted. None: the alias is, and the version that it names is not.
    """

    def __init__(
        self, reason: Distrust, message: str, *, got: object = None, allowed: object = None, remedy: str = "",
        state: AliasState | None = None,
    ) -> None:  # fmt: skip
        self.reason: Distrust = reason
        self.state = state
        super().__init__(f"{reason}: {message}", got=got, allowed=allowed, remedy=remedy)
