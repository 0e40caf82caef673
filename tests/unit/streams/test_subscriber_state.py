"""The subscriber's state machine alone: every transition of its table, and when failed attempts are made again."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from perennial.streams.client.failure_kinds import FailureKind
from perennial.streams.client.subscriber_state import MAX_EXPECTING_LOOKS, Progress, State
from perennial.streams.events.adapter_events import AdapterActivated

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def ack(generation: int = 1) -> AdapterActivated:
    return AdapterActivated(
        adapter="acme/support", alias="live", replica="here", generation=generation,
        version="sha256:" + "a" * 64, stage_s={}, published_at=NOW, at=NOW,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("known", "found", "state"),
    [
        (Progress(), 0, State.FOLLOWING),
        (Progress(served=3), 3, State.FOLLOWING),
        (Progress(served=3), 2, State.FOLLOWING),  # a store restored from a backup
        (Progress(), 1, State.BEHIND),
        (Progress(served=3, failing=4, attempt_s=60.0), 5, State.BEHIND),
        (Progress(served=3, announced=9), 5, State.BEHIND),
        (Progress(served=3, announced=4), 3, State.EXPECTING),
        (Progress(announced=1), 0, State.EXPECTING),
        (Progress(served=3, announced=3), 2, State.FOLLOWING),  # an old event
        (Progress(served=3, failing=4, attempt_s=60.0), 4, State.WAITING),
        (Progress(served=3, failing=4, attempt_s=50.0), 4, State.BEHIND),  # the attempt is due
        (Progress(served=3, failing=4, attempt_s=60.0, announced=5), 4, State.EXPECTING),
    ],
)
def test_a_look_leads_to_one_state(known: Progress, found: int, state: State):
    assert known.saw(found, 50.0).state is state


def test_a_look_is_due_when_the_next_attempt_is():
    waiting = Progress(served=3, failing=4, attempt_s=60.0, due_s=70.0)
    assert waiting.saw(4, 50.0).due_s == 60.0
    assert waiting.saw(5, 50.0).due_s == 70.0
    assert waiting.saw(3, 50.0).due_s == 70.0


@pytest.mark.parametrize(("generation", "looks"), [(0, False), (3, False), (5, False), (6, True)])
def test_only_news_is_a_reason_to_look_at_once(generation: int, looks: bool):
    known = Progress(served=3, announced=5, due_s=70.0)
    heard = known.heard(generation)
    assert heard == (replace(known, announced=6, due_s=0.0) if looks else known)


def test_attempts_are_counted_for_one_generation_at_a_time():
    progress = Progress(state=State.BEHIND, due_s=9.0)
    for attempt in (1, 2, 3):
        progress = progress.failed(7)
        assert (progress.state, progress.failing, progress.attempts) == (State.WAITING, 7, attempt)
        assert progress.leftovers  # a part of the version may be held
    assert progress.failed(8).attempts == 1
    assert progress.failed(7).retry_at(1.5).due_s == 1.5
    assert progress.failed(7).retry_at(60.0).due_s == 9.0  # the alias is polled meanwhile


def test_an_event_whose_generation_the_alias_never_shows_is_ignored_at_last():
    progress = Progress(served=1, announced=9)
    for _ in range(MAX_EXPECTING_LOOKS):
        progress = progress.saw(1, 0.0)
        assert progress.state is State.EXPECTING
        progress = progress.missed()
    assert (progress.announced, progress.fruitless) == (0, 0)
    assert progress.saw(1, 0.0).state is State.FOLLOWING


def test_an_alias_that_cannot_be_read_is_read_again_without_an_end():
    progress = Progress(served=1, failing=2, attempts=3)
    for look in range(1, 100):
        progress = progress.unreadable()
        assert (progress.state, progress.fruitless, progress.attempts) == (State.UNREADABLE, look, 3)
    assert progress.saw(1, 0.0).fruitless == 0


def test_a_failure_is_reported_once_until_it_is_another_one():
    known = Progress()
    full = known.reporting(2, FailureKind.SPACE, OSError(28, "full"))
    assert full != known
    assert full.reporting(2, FailureKind.SPACE, OSError(28, "still full")) is full
    assert full.reporting(2, FailureKind.IO, OSError(5, "broken")).reported != full.reported
    assert full.reporting(3, FailureKind.SPACE, OSError(28, "full")).reported != full.reported
    assert full.applied(2, ack(2)).reported is None


def test_what_is_applied_ends_all_attempts_and_owes_an_acknowledgement():
    progress = Progress(state=State.BEHIND, owed=ack(), owed_reported=True, leftovers=False).failed(2).retry_at(5.0)
    done = progress.looking(1.0).applied(2, ack(2))
    assert done == Progress(state=State.FOLLOWING, served=2, owed=ack(2), due_s=1.0)
    assert done.leftovers
    assert done.unloaded().acknowledged() == Progress(served=2, leftovers=False, due_s=1.0)


def test_a_version_that_was_revoked_owes_no_acknowledgement():
    assert Progress(served=1, owed=ack(), leftovers=False).dropped() == Progress(served=1)
    waiting = Progress(served=1, failing=2, attempts=6, attempt_s=60.0, due_s=5.0).dropped()
    assert (waiting.failing, waiting.attempt_s, waiting.due_s) == (2, 0.0, 0.0), "what waits is tried at once"


def test_what_is_still_held_is_reported_once_while_an_acknowledgement_is_owed():
    owing = Progress(served=1, due_s=10.0, owed=ack())
    assert not owing.owed_reported
    assert owing.still_held(5.0) == replace(owing, due_s=5.0, owed_reported=True)
    assert owing.still_held(20.0).due_s == 10.0
    assert not Progress(served=1).still_held(5.0).owed_reported
