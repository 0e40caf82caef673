"""Classify why a version could not be served, and say when it is tried again. Pure.

A subscriber never gives a version up. What is wrong with its host or with a service passes, so it tries again with
growing pauses of at most RETRY's `max_s`. What is wrong with the version itself changes only where somebody mends it,
for example by restoring a damaged object, so it looks again every `recheck_s`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from perennial.storage.errors import IntegrityError, NoSpaceError, PerennialError, StoreError
from perennial.streams.client.backend import UnfitVersionError
from perennial.streams.client.trust.untrusted import UntrustedVersionError


class FailureKind(Enum):
    """The kinds of failure; the values are label values of `perennial_subscriber_failures_total`."""

    SPACE = "space"
    """No space, or no quota, on a disk of this host or of the store."""
    PERMISSION = "permission"
    """A file may not be read or written, or the file system is read-only."""
    MEMORY = "memory"
    """No memory, on the host or on the device."""
    CONNECTION = "connection"
    """A server does not answer in time, or not at all."""
    STORE = "store"
    """The object store failed in another way, or lacks an object."""
    IO = "io"
    """Another error of the operating system."""
    VERSION = "version"
    """The version is damaged, revoked, or does not fit this backend."""
    UNTRUSTED = "untrusted"
    """No trusted key signed the version or the alias, or the version is not one that may be live. Counted by reason."""
    OTHER = "other"
    """Anything else that a backend raised."""

    @property
    def passes(self) -> bool:
        """Whether the failure may pass without a change of the version."""
        return self not in {FailureKind.VERSION, FailureKind.UNTRUSTED}


_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PERMISSION = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_MEMORY = frozenset({errno.ENOMEM})
_CONNECTION_WORDS = ("timeout", "timedout", "connect")
_OUT_OF_MEMORY = ("out of memory", "cublas_status_alloc_failed")
"""PyTorch raises `torch.OutOfMemoryError`, and RuntimeError with such a text from CUDA libraries."""


def failure_kind(error: BaseException) -> FailureKind:
    """Return the kind of a failure: of the error, or of the error that it names as its cause.

    Args:
        error: What reading the version or a call of the backend raised.
    """
    for each in _chain(error):
        kind = _kind_of(each)
        if kind is not None:
            return kind
    return FailureKind.OTHER


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__


def _kind_of(error: BaseException) -> FailureKind | None:
    name = type(error).__name__.lower()
    if isinstance(error, UntrustedVersionError):
        return FailureKind.UNTRUSTED
    if isinstance(error, IntegrityError | UnfitVersionError):
        return FailureKind.VERSION
    if isinstance(error, NoSpaceError):
        return FailureKind.SPACE
    if isinstance(error, StoreError):
        return FailureKind.STORE
    if isinstance(error, PerennialError):
        return None  # an error of a backend: its cause may say more
    if isinstance(error, MemoryError) or "outofmemory" in name or any(t in str(error).lower() for t in _OUT_OF_MEMORY):
        return FailureKind.MEMORY
    # Errors of HTTP clients are OSErrors in `requests` and plain exceptions in `httpx`, so their names decide.
    if isinstance(error, ConnectionError | TimeoutError) or any(word in name for word in _CONNECTION_WORDS):
        return FailureKind.CONNECTION
    if isinstance(error, OSError):
        if error.errno in _SPACE:
            return FailureKind.SPACE
        if error.errno in _PERMISSION:
            return FailureKind.PERMISSION
        return FailureKind.MEMORY if error.errno in _MEMORY else FailureKind.IO
    return None


@dataclass(frozen=True)
class RetryPolicy:
    """Says when a failed attempt is made again.

    Attributes:
        first_s: Longest delay after the first attempt, in seconds; it doubles with every attempt.
        max_s: Longest delay of all, in seconds.
        quick_attempts: Attempts on a version that is wrong itself before they become rare: the first may have read an
            object while it was written or restored.
        recheck_s: Seconds between the attempts on such a version after that.
    """

    first_s: float = 0.2
    max_s: float = 30.0
    quick_attempts: int = 3
    recheck_s: float = 60.0

    def delay_s(self, attempt: int, kind: FailureKind, share: float = 1.0) -> float:
        """Return the seconds to wait after a failed attempt.

        Args:
            attempt: Number of attempts that have failed in succession, from 1.
            kind: The kind of the last failure.
            share: A random number from 0 to 1; it takes up to half of the delay, so that subscribers of one store do
                not try at the same instant.
        """
        if not kind.passes and attempt > self.quick_attempts:
            return self.recheck_s
        longest_s = min(self.first_s * 2.0 ** min(attempt - 1, 20), self.max_s)
        return longest_s * (1 + share) / 2
