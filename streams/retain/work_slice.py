"""A bounded piece of the work on retention requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from perennial.streams.events.fields import Event
from perennial.streams.retain.rules.jobs import QuarantineChange

SLICE_ADAPTERS: Final = 64
"""The most adapters that one slice looks at or changes, so that the event loop and other deliveries get their turn."""


@dataclass(frozen=True)
class Slice:
    """A bounded piece of work.

    Attributes:
        changes: Changes of quarantines, to apply first.
        events: Events to send after that.
        saves: What to store after that.
        removals: Changes of quarantines to apply last: they take away what the steps before the saves look for.
    """

    changes: list[QuarantineChange] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    saves: list[Callable[[], None]] = field(default_factory=list)
    removals: list[QuarantineChange] = field(default_factory=list)
