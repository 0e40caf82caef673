"""The root of the one exception tree: every error says what came in, what is allowed and what to do."""

from __future__ import annotations


class PerennialError(Exception):
    """An error a person can act on.

    got: what came in. allowed: what would have been accepted. remedy: what to do now.
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
    """The object store could not do what was asked."""


class StoreUnavailableError(StoreError):
    """The object store did not answer; the same call may succeed later."""


class NotFoundError(StoreError):
    """No object is stored under that key."""


class ConflictError(StoreError):
    """Another writer was first."""


class IntegrityError(StoreError):
    """Stored bytes do not match their digest."""
