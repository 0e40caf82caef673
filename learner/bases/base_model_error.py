"""The exception of everything that is wrong with a base."""

from __future__ import annotations

from perennial.storage.errors import PerennialError


class BaseModelError(PerennialError):
    """The base model cannot be used."""
