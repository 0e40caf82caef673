"""The interface through which intake reports its metrics."""

from __future__ import annotations

from typing import Protocol


class IntakeMetrics(Protocol):
    """Metrics that intake reports; `streams.observe.metrics.Metrics` implements them. Topics are without the prefix."""

    def events_in(self, topic: str, n: int) -> None:
        """Count records that were read and decided about."""

    def events_out(self, topic: str, n: int) -> None:
        """Count records that were written and acknowledged."""

    def refused(self, reason: str, n: int) -> None:
        """Count records that went to `dead-letters`."""

    def topic_recreated(self, topic: str) -> None:
        """Count an input topic that was deleted and created again."""

    def offsets_lost(self, topic: str, kind: str, n: int) -> None:
        """Count offsets of an input topic that were read and are gone, or that are gone and were never read."""

    def lag(self, topic: str, events: int) -> None:
        """Set the number of records that are published and not yet read."""

    def oldest_age_s(self, seconds: float) -> None:
        """Set the age of the oldest record that is not yet read."""

    def tick(self, loop: str) -> None:
        """Note that intake's loop turned."""

    def waiting(self, waits: bool) -> None:
        """Set whether a batch was read and is not yet committed."""

    def progress(self) -> None:
        """Note that a batch was committed."""
