"""Which failures of a subscriber pass, and when it tries again."""

from __future__ import annotations

import errno

import pytest

from perennial.storage.errors import (
    ConflictError,
    IntegrityError,
    NoSpaceError,
    NotFoundError,
    StoreError,
    StoreUnavailableError,
)
from perennial.streams.client.backend import BackendError, UnfitVersionError
from perennial.streams.client.failure_kinds import FailureKind, RetryPolicy, failure_kind


class OutOfMemoryError(RuntimeError):
    """Named as torch.OutOfMemoryError is."""


class ReadTimeout(Exception):  # noqa: N818 - named as in httpx
    """Named as in httpx."""


def because(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "no space left on device"), FailureKind.SPACE),
        (OSError(errno.EDQUOT, "quota"), FailureKind.SPACE),
        (NoSpaceError("full"), FailureKind.SPACE),
        (PermissionError(errno.EACCES, "denied"), FailureKind.PERMISSION),
        (PermissionError(errno.EPERM, "denied"), FailureKind.PERMISSION),
        (OSError(errno.EROFS, "read-only"), FailureKind.PERMISSION),
        (OSError(errno.EIO, "input/output"), FailureKind.IO),
        (OSError(errno.EMFILE, "too many open files"), FailureKind.IO),
        (FileNotFoundError(errno.ENOENT, "deleted by somebody"), FailureKind.IO),
        (OSError(errno.ENOMEM, "no memory"), FailureKind.MEMORY),
        (MemoryError(), FailureKind.MEMORY),
        (OutOfMemoryError("CUDA"), FailureKind.MEMORY),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), FailureKind.MEMORY),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), FailureKind.CONNECTION),
        (TimeoutError("slow"), FailureKind.CONNECTION),
        (ReadTimeout("slow"), FailureKind.CONNECTION),
        (StoreUnavailableError("down"), FailureKind.STORE),
        (NotFoundError("not replicated yet"), FailureKind.STORE),
        (ConflictError("busy"), FailureKind.STORE),
        (StoreError("odd"), FailureKind.STORE),
        (IntegrityError("damaged"), FailureKind.VERSION),
        (UnfitVersionError("another rank"), FailureKind.VERSION),
        (BackendError("no slot is free"), FailureKind.OTHER),
        (ValueError("mine"), FailureKind.OTHER),
        (because(BackendError("not written"), OSError(errno.ENOSPC, "full")), FailureKind.SPACE),
        (because(RuntimeError("not sent"), because(BackendError("x"), TimeoutError())), FailureKind.CONNECTION),
        (because(BackendError("x"), IntegrityError("malformed")), FailureKind.VERSION),
    ],
)
def test_case_15_only_what_is_wrong_with_the_version_itself_does_not_pass(error: Exception, kind: FailureKind):
    """A full disk for a minute made a subscriber stale until the next version."""
    assert failure_kind(error) is kind
    assert kind.passes == (kind is not FailureKind.VERSION)


def test_causes_that_name_each_other_end():
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert failure_kind(first) is FailureKind.OTHER


def test_pauses_double_up_to_a_bound_and_differ_between_subscribers():
    policy = RetryPolicy(first_s=0.5, max_s=30.0)
    assert [policy.delay_s(attempt, FailureKind.SPACE) for attempt in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert policy.delay_s(10_000, FailureKind.STORE) == 30.0
    assert [policy.delay_s(10, FailureKind.IO, share) for share in (0.0, 0.5, 1.0)] == [15.0, 22.5, 30.0]


def test_what_is_wrong_with_a_version_is_tried_thrice_and_then_rarely():
    policy = RetryPolicy(first_s=0.5, quick_attempts=3, recheck_s=60.0)
    assert [policy.delay_s(attempt, FailureKind.VERSION) for attempt in range(1, 6)] == [0.5, 1.0, 2.0, 60.0, 60.0]
