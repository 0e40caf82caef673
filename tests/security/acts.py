"""Count the acts that security tests try, and what became of them; `python -m tests.security` prints the sums.

A test that has the fixture `acts` (tests/conftest.py) calls `acts.add` for every act that it tries with a real client:
one that must be refused, or one that must work, so that a server that refuses everything is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

PROPERTY = "acts"


@dataclass
class Acts:
    """The acts of one test, or of several.

    Attributes:
        tried: How many forbidden acts were tried.
        refused: How many of them were refused.
        worked: How many acts that are allowed worked.
        wrong: In words, every forbidden act that was not refused.
        failed: In words, every allowed act that did not work.
    """

    tried: int = 0
    refused: int = 0
    worked: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, act: str, *, allowed: bool, done: bool) -> None:
        """Count one act.

        Args:
            act: Who tried what, such as `intake: Write to documents`.
            allowed: Whether it must work; otherwise it must be refused.
            done: Whether it worked.
        """
        if allowed:
            self.worked += done
            if not done:
                self.failed.append(act)
            return
        self.tried += 1
        self.refused += not done
        if done:
            self.wrong.append(act)

    def as_property(self) -> tuple[str, dict[str, object]]:
        """Return the counts as a property of a test's report."""
        return PROPERTY, asdict(self)

    def summary(self) -> str:
        """Return the sums as one line of JSON."""
        return json.dumps({
            "acts_tried": self.tried, "acts_refused": self.refused, "acts_allowed_wrongly": len(self.wrong),
            "allowed_acts_that_worked": self.worked, "allowed_acts_that_failed": len(self.failed),
        })  # fmt: skip


def merged(each: Iterable[Acts]) -> Acts:
    """Return the sums of several tests."""
    total = Acts()
    for acts in each:
        total.tried += acts.tried
        total.refused += acts.refused
        total.worked += acts.worked
        total.wrong += acts.wrong
        total.failed += acts.failed
    return total
