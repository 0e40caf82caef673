"""The state machine of a subscriber, free of clocks, stores and brokers, so that every transition can be tested alone.

A look at the alias moves the machine to one state; what the subscriber then does moves it on:

| state | how it is reached | what follows |
|---|---|---|
| FOLLOWING | the alias names nothing newer than what is served | the next look after the poll time |
| BEHIND | the alias names a newer generation | serve it: FOLLOWING; if that fails: WAITING |
| WAITING | the next attempt on the generation is not due yet | the next look after the poll time, or when it is due |
| EXPECTING | an event announced a generation that the alias does not show yet | look soon, at last ignore the event |
| UNREADABLE | the alias cannot be read | look again soon, without an end |

No generation is ever given up: `failure_kinds` says how long the pauses between the attempts are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Self

from perennial.streams.client.failure_kinds import FailureKind
from perennial.streams.events.adapter_events import AdapterActivated

MAX_EXPECTING_LOOKS: Final = 5
"""Looks at the alias in succession that may miss an announced generation before the event is ignored."""


class State(Enum):
    """The outcome of the last look at the alias; the table above has the transitions."""

    FOLLOWING = "following"
    BEHIND = "behind"
    WAITING = "waiting"
    EXPECTING = "expecting"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Progress:
    """A subscriber's state, and what it remembers from one look to the next. Every method returns a new value.

    Attributes:
        state: What the last look led to.
        served: Generation that was applied last; 0: none yet.
        announced: Highest generation that an event named; 0: none, or the alias never showed it.
        due_s: Clock time of the next look, in seconds.
        failing: Generation that `attempts` counts; 0: none.
        attempts: Failed attempts on `failing` in succession.
        attempt_s: Clock time of the next attempt on `failing`, in seconds.
        fruitless: Looks in succession that could not read the alias or missed the announced generation.
        reported: Generation, kind and reason or class of the failure that `adapter.failed` reported last; None: none.
        owed: Acknowledgement that waits until the previous versions are unloaded.
        owed_reported: Whether `adapter.failed` has said that `owed` waits.
        leftovers: Whether the backend may hold versions that are not served any more.
    """

    state: State = State.FOLLOWING
    served: int = 0
    announced: int = 0
    due_s: float = 0.0
    failing: int = 0
    attempts: int = 0
    attempt_s: float = 0.0
    fruitless: int = 0
    reported: tuple[int, FailureKind, str] | None = None
    owed: AdapterActivated | None = None
    owed_reported: bool = False
    leftovers: bool = True  # a process before this one may have left some

    @property
    def newest(self) -> int:
        """The highest generation that was applied or announced."""
        return max(self.served, self.announced)

    def heard(self, generation: int) -> Self:
        """Note the generation that an event named, and look at once if it is newer than all that is known."""
        if generation <= max(self.served, self.announced):
            return self
        return replace(self, announced=generation, due_s=0.0)

    def looking(self, next_s: float) -> Self:
        """Begin a look; unless an attempt fails, the next look is at `next_s`."""
        return replace(self, due_s=next_s)

    def saw(self, generation: int, now_s: float) -> Self:
        """Note the generation that the alias names.

        Args:
            generation: The generation; 0: there is no alias.
            now_s: Clock time in seconds.
        """
        waits = generation == self.failing and now_s < self.attempt_s
        if generation > self.served and not waits:
            state = State.BEHIND
        elif generation < self.announced and self.announced > self.served:
            state = State.EXPECTING
        elif generation > self.served:
            state = State.WAITING
        else:
            state = State.FOLLOWING
        seen = replace(self, state=state, fruitless=self.fruitless if state is State.EXPECTING else 0)
        return replace(seen, due_s=min(self.due_s, self.attempt_s)) if generation > self.served and waits else seen

    def unreadable(self) -> Self:
        """Note that the alias could not be read."""
        return replace(self, state=State.UNREADABLE, fruitless=self.fruitless + 1)

    def missed(self) -> Self:
        """Note that the alias does not show the announced generation; at last ignore the event that named it."""
        if self.fruitless + 1 >= MAX_EXPECTING_LOOKS:
            return replace(self, fruitless=0, announced=0)
        return replace(self, fruitless=self.fruitless + 1)

    def look_again(self, time_s: float) -> Self:
        """Look again at that time, or earlier where a look is due earlier."""
        return replace(self, due_s=min(self.due_s, time_s))

    def applied(self, generation: int, owed: AdapterActivated) -> Self:
        """Note that a generation was applied, and the acknowledgement that is owed for it."""
        return replace(
            self, state=State.FOLLOWING, served=generation, failing=0, attempts=0, attempt_s=0.0, reported=None,
            owed=owed, owed_reported=False, leftovers=True,
        )  # fmt: skip

    def failed(self, generation: int) -> Self:
        """Count a failed attempt. Attempts on another generation than the last one count from 1."""
        attempts = self.attempts + 1 if generation == self.failing else 1
        # A backend that failed may hold a part of the version.
        return replace(self, state=State.WAITING, failing=generation, attempts=attempts, leftovers=True)

    def retry_at(self, time_s: float) -> Self:
        """Make the failed attempt again at that time."""
        return replace(self, attempt_s=time_s, due_s=min(self.due_s, time_s))

    def reporting(self, generation: int, kind: FailureKind, error: Exception) -> Self:
        """Note the failure that `adapter.failed` reports; unchanged where the same one was reported before."""
        reported = (generation, kind, getattr(error, "reason", type(error).__name__))
        return self if self.reported == reported else replace(self, reported=reported)

    def refusing(self) -> Self:
        """Note that the alias is not trusted: what is served stays, until a poll finds another alias."""
        return replace(self, state=State.WAITING)

    def recovered(self) -> Self:
        """Note that the alias names what is served, after `adapter.failed` had reported another generation."""
        return replace(self, reported=None, failing=0, attempts=0, attempt_s=0.0)

    def dropped(self) -> Self:
        """Note that the version in service was revoked: it is to be unloaded, and its generation is not owed any more.

        What waits for its next attempt is tried at once: nothing is served that could go on meanwhile.
        """
        return replace(self, owed=None, leftovers=True, attempt_s=0.0, due_s=0.0)

    def acknowledged(self) -> Self:
        """Note that the owed acknowledgement was handed over."""
        return replace(self, owed=None)

    def unloaded(self) -> Self:
        """Note that the backend holds no version but the one that is served."""
        return replace(self, leftovers=False)

    def still_held(self, retry_s: float) -> Self:
        """Note that the backend holds a version that is not served, and try to unload it again at that time."""
        return replace(self, leftovers=True, due_s=min(self.due_s, retry_s), owed_reported=self.owed is not None)
