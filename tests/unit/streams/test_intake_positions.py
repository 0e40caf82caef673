"""Where intake begins in a partition, for every relation between the commit and the log."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.streams.intake.positions import (
    UNKNOWN_EPOCH,
    CommittedPosition,
    StartPosition,
    commit_metadata,
    committed_position,
    start_position,
)

WINDOW = 20


def start(committed, low, high, topic_id="now"):
    return start_position(committed, topic_id, low, high, WINDOW)


@given(st.text(max_size=40), st.integers(0, 2**31 - 2), st.integers(0, 2**62))
def test_a_commit_names_its_topic_and_its_epoch(topic_id, epoch, offset):
    assert committed_position(offset, commit_metadata(topic_id, epoch)) == (offset, topic_id, epoch)


@pytest.mark.parametrize(
    "metadata",
    [None, "", "x", "[]", "{}", "null", '{"topic_id": 3, "leader_epoch": "4"}', '{"leader_epoch": -1}', "{" * 5000,
     json.dumps({"leader_epoch": 2**40})],
)  # fmt: skip
def test_commits_of_older_versions_and_of_other_programs_name_neither(metadata):
    assert committed_position(7, metadata) == (7, None, UNKNOWN_EPOCH)


@pytest.mark.parametrize(
    ("committed", "low", "high", "expected"),
    [
        # nothing committed: from the beginning
        (CommittedPosition(-1001), 5, 90, StartPosition(5, 5)),
        # the ordinary restart, one window back
        (CommittedPosition(50, "now", 3), 0, 90, StartPosition(30, 50, 3)),
        (CommittedPosition(50, "now", 3), 40, 90, StartPosition(40, 50, 3)),
        (CommittedPosition(10, None), 0, 90, StartPosition(0, 10)),
        (CommittedPosition(90, "now", 3), 0, 90, StartPosition(70, 90, 3)),
        # case 10: another topic under the same name
        (CommittedPosition(50, "before", 3), 0, 90, StartPosition(0, 0, recreated=True)),
        (CommittedPosition(50, "before", 3), 4, 90, StartPosition(4, 4, UNKNOWN_EPOCH, True, "deleted", 4)),
        # attack K: a lost tail, and records that were deleted unread
        (CommittedPosition(806, "now", 3), 0, 796, StartPosition(776, 796, 3, lost="tail", lost_offsets=10)),
        (CommittedPosition(806, None), 0, 796, StartPosition(776, 796, lost="tail", lost_offsets=10)),
        (CommittedPosition(50, "now", 3), 80, 90, StartPosition(80, 80, lost="deleted", lost_offsets=30)),
        (CommittedPosition(50, "now", 3), 0, 0, StartPosition(0, 0, 3, lost="tail", lost_offsets=50)),
    ],
)
def test_case_10_and_attack_k_where_intake_begins(committed, low, high, expected):
    """No commit is taken for one of another log, and no gap is passed over in silence."""
    assert start(committed, low, high) == expected


@given(
    st.builds(CommittedPosition, st.integers(-1001, 100), st.sampled_from([None, "now", "before"]), st.integers(0, 3)),
    st.integers(0, 100), st.integers(0, 100),
)  # fmt: skip
def test_attack_k_a_start_lies_in_the_log_and_every_gap_is_counted(committed, low, length):
    found = start(committed, low, low + length)
    assert low <= found.read_from <= found.resume_at <= low + length
    same_log = not found.recreated and committed.offset >= 0
    if same_log and low <= committed.offset <= low + length:
        assert (found.resume_at, found.lost) == (committed.offset, None)
    assert (found.lost is None) == (found.lost_offsets == 0)
    if same_log:
        assert abs(found.resume_at - committed.offset) == found.lost_offsets
