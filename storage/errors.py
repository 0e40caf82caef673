"""The base class of every error of the project, and the errors of the object store.

An error says what came in, what is allowed and what to do. `perennial` prints it without a traceback and ends with its
exit code.
"""

from __future__ import annotations


class PerennialError(Exception):
    """An error that a person can correct.

    Subclasses set `exit_code`, the exit code of `perennial` for this error: 1 something is wrong, 2 usage or settings,
    3 a service cannot be reached, 4 not found.

    Args:
        message: What is wrong; by default the first line of the class's docstring.
        got: What came in.
        allowed: What would have been accepted.
        remedy: What to do now. A command that it names must exist.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, got: object = None, allowed: object = None, remedy: str = "") -> None:
        self.message = message or (type(self).__doc__ or "error").strip().splitlines()[0].rstrip(".")
        self.got = got
        self.allowed = allowed
        self.remedy = remedy
        super().__init__(self.message)

    def __str__(self) -> str:
        parts = [self.message]
        if self.got is not None:
            parts.append(f"got: {_short(self.got)}")
        if self.allowed is not None:
            parts.append(f"allowed: {_short(self.allowed)}")
        if self.remedy:
            parts.append(f"remedy: {self.remedy}")
        return "; ".join(parts)


def _short(value: object, limit: int = 400) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


class StoreError(PerennialError):
    """The object store cannot do what was requested."""


class StoreUnavailableError(StoreError):
    """The object store did not answer; the same call may succeed later."""

    exit_code = 3


class NoSpaceError(StoreUnavailableError):
    """The object store has no room for an object; the same call may succeed once there is space."""


class NotFoundError(StoreError):
    """No object is stored under that key."""

    exit_code = 4


class ConflictError(StoreError):
    """Another writer wrote first."""


class IntegrityError(StoreError):
    """Stored bytes do not match their digest."""
