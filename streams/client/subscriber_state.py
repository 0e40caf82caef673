"""The state machine of a subscriber, free of clocks, stores and brokers, so that every transition can be tested alone.

A look at the alias moves the machine to one state; what the subscriber then does moves it on:

| state | how it is reached | what follows | |---|---|---| | FOLLOWING | the alias names nothing newer than what is
served | the next look after the poll time | | BEHIND | the alias names a newer generation | serve it: FOLLOWING; if
that fails: BEHIND again soon, at last GIVEN_UP | | EXPECTING | an event announced a generation that the alias does not
show yet | look again soon, at last ignore the event | | UNREADABLE | the alias cannot be read | look again soon,
without an end while the store does not answer | | GIVEN_UP | the alias names a generation that failed too often |
nothing, until the alias names another generation |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

from perennial.streams.events.adapter_events import AdapterActivated


class State(Enum):
    """The outcome of the last look at the alias; the table above has the transitions."""

    FOLLOWING = "following"
    BEHIND = "behind"
    EXPECTING = "expecting"
    UNREADABLE = "unreadable"
    GIVEN_UP = "given up"


@dataclass(frozen=True)
class RetryPolicy:
    """Says when a failed attempt is made again: the delay doubles with every attempt.

    Attributes:
        max_attempts: Attempts after which a generation is given up.
        first_s: Delay after the first attempt, in seconds.
    """

    max_attempts: int = 5
    first_s: float = 0.2

    def delay_s(self, attempt: int, *, endless: bool = False) -> float | None:
        """Return the seconds to wait after a failed attempt, or None to give up.

        Args:
            attempt: Number of attempts that have failed, from 1.
            endless: Never give up, because the cause is outside what is attempted: a store that does not answer.
        """
        if attempt >= self.max_attempts and not endless:
            return None
        return self.first_s * 2.0 ** min(attempt - 1, 20)


@dataclass(frozen=True)
class Progress:
    """A subscriber's state, and what it remembers from one look to the next. Every method returns a new value.

    Attributes:
        state: What the last look led to.
        served: Generation that was applied last; 0: none yet.
        announced: Highest generation that an event named; 0: none, or the alias never showed it.
        due_s: Clock time of the next look, in seconds.
        failing: Generation that `attempts` counts; 0: the alias itself.
        attempts: Failed attempts on `failing` in succession.
        given_up: Generation that is not tried again; 0: none.
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
    given_up: int = 0
    owed: AdapterActivated | None = None
    owed_reported: bool = False
    leftovers: bool = True  # a process before this one may have left some

    def heard(self, generation: int) -> Self:
        """Note the generation that an event named, and look at once if it is newer than all that is known."""
        if generation <= max(self.served, self.announced):
            return self
        return replace(self, announced=generation, due_s=0.0)

    def looking(self, next_s: float) -> Self:
        """Begin a look; unless an attempt fails, the next look is at `next_s`."""
        return replace(self, due_s=next_s)

    def saw(self, generation: int) -> Self:
        """Note the generation that the alias names; 0: there is no alias."""
        if generation > self.served and generation != self.given_up:
            state = State.BEHIND
        elif generation < self.announced and self.announced > self.served:
            state = State.EXPECTING
        elif generation <= self.served:
            state = State.FOLLOWING
        else:
            state = State.GIVEN_UP
        return replace(self, state=state)

    def unreadable(self) -> Self:
        """Note that the alias could not be read."""
        return replace(self, state=State.UNREADABLE)

    def applied(self, generation: int, owed: AdapterActivated) -> Self:
        """Note that a generation was applied, and the acknowledgement that is owed for it."""
        return replace(
            self, state=State.FOLLOWING, served=generation, failing=0, attempts=0, given_up=0,
            owed=owed, owed_reported=False, leftovers=True,
        )  # fmt: skip

    def failed(self, generation: int) -> Self:
        """Count a failed attempt. Attempts on another generation than the last one count from 1."""
        attempts = self.attempts + 1 if generation == self.failing else 1
        return replace(self, failing=generation, attempts=attempts)

    def retry_at(self, time_s: float) -> Self:
        """Make the failed attempt again at that time."""
        return replace(self, due_s=time_s)

    def gave_up(self) -> Self:
        """Stop the attempts: ignore the generation that failed, or the event whose generation the alias never showed."""
        if self.state is State.BEHIND:
            return replace(self, state=State.GIVEN_UP, given_up=self.failing)
        return replace(self, announced=0)

    def acknowledged(self) -> Self:
        """Note that the owed acknowledgement was handed over."""
        return replace(self, owed=None)

    def unloaded(self) -> Self:
        """Note that the backend holds no version but the one that is served."""
        return replace(self, leftovers=False)

    def still_held(self, retry_s: float) -> Self:
        """Note that the backend holds a version that is not served, and try to unload it again at that time."""
        return replace(self, leftovers=True, due_s=min(self.due_s, retry_s), owed_reported=self.owed is not None)
