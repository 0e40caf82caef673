"""The subscriber's state machine alone: every transition of its table, and when failed attempts are made again."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from perennial.streams.client.subscriber_state import Progress, RetryPolicy, State
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
        (Progress(served=3, given_up=4), 5, State.BEHIND),
        (Progress(served=3, announced=9), 5, State.BEHIND),
        (Progress(served=3, announced=4), 3, State.EXPECTING),
        (Progress(announced=1), 0, State.EXPECTING),
        (Progress(served=3, announced=3), 2, State.FOLLOWING),  # an old event
        (Progress(served=3, given_up=4), 4, State.GIVEN_UP),
        (Progress(served=3, given_up=4, announced=5), 4, State.EXPECTING),
    ],
)
def test_a_look_leads_to_one_state(known: Progress, found: int, state: State):
    assert known.saw(found) == replace(known, state=state)


@pytest.mark.parametrize(("generation", "looks"), [(0, False), (3, False), (5, False), (6, True)])
def test_only_news_is_a_reason_to_look_at_once(generation: int, looks: bool):
    known = Progress(served=3, announced=5, due_s=70.0)
    heard = known.heard(generation)
    assert heard == (replace(known, announced=6, due_s=0.0) if looks else known)


def test_attempts_are_counted_for_one_generation_at_a_time():
    progress = Progress(state=State.BEHIND)
    for attempt in (1, 2, 3):
        progress = progress.failed(7)
        assert (progress.failing, progress.attempts) == (7, attempt)
    assert progress.failed(8).attempts == 1
    assert progress.failed(7).retry_at(1.5).due_s == 1.5


def test_giving_up_ignores_a_generation_or_the_event_that_named_it():
    behind = Progress(state=State.BEHIND, served=1, announced=9).failed(2).gave_up()
    assert (behind.state, behind.given_up, behind.announced) == (State.GIVEN_UP, 2, 9)
    expecting = Progress(state=State.EXPECTING, served=1, announced=9).failed(9).gave_up()
    assert (expecting.given_up, expecting.announced) == (0, 0)
    assert expecting.saw(1).state is State.FOLLOWING
    assert Progress(announced=2, given_up=1).unreadable().failed(2).gave_up().given_up == 1


def test_what_is_applied_ends_all_attempts_and_owes_an_acknowledgement():
    progress = Progress(state=State.BEHIND, given_up=1, owed=ack(), owed_reported=True, leftovers=False).failed(2)
    done = progress.applied(2, ack(2))
    assert done == Progress(state=State.FOLLOWING, served=2, owed=ack(2))
    assert done.leftovers
    assert done.unloaded().acknowledged() == Progress(served=2, leftovers=False)


def test_what_is_still_held_is_reported_once_while_an_acknowledgement_is_owed():
    owing = Progress(served=1, due_s=10.0, owed=ack())
    assert not owing.owed_reported
    assert owing.still_held(5.0) == replace(owing, due_s=5.0, owed_reported=True)
    assert owing.still_held(20.0).due_s == 10.0
    assert not Progress(served=1).still_held(5.0).owed_reported


def test_delays_double_and_end_unless_the_cause_is_outside():
    policy = RetryPolicy(max_attempts=4, first_s=0.5)
    assert [policy.delay_s(attempt) for attempt in range(1, 6)] == [0.5, 1.0, 2.0, None, None]
    assert policy.delay_s(5, endless=True) == 8.0
    assert policy.delay_s(10_000, endless=True) == 0.5 * 2.0**20
