"""Decide where to begin in a partition: at the committed position, if the log is still the one that it was made for.

A committed offset alone does not say which log it counts in. The topic may have been deleted and created again, the
log's tail may have been lost with the broker's memory or by an unclean leader election, and retention may have deleted
what was never read. So each commit carries the topic's id and the leader epoch of the last record before it, as JSON in
the commit's metadata. No I/O.

Sources: KIP-101, KIP-279 and KIP-320 (leader epochs, log truncation), KIP-516 (topic ids).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import orjson

UNKNOWN_EPOCH = 2**31 - 1
"""Stands for the leader epoch of a commit that names none, and is above every epoch: no record counts as replaced."""

LossKind = Literal["tail", "deleted"]
"""tail: the log lost records that were read already. deleted: retention deleted records before intake read them."""


class CommittedPosition(NamedTuple):
    """What the group committed for a partition.

    Attributes:
        offset: The offset behind the last record that was handled; negative where nothing was committed.
        topic_id: Id of the topic that the offset belongs to; None where an older version committed.
        leader_epoch: Leader epoch of the last record before the offset, or UNKNOWN_EPOCH.
    """

    offset: int
    topic_id: str | None = None
    leader_epoch: int = UNKNOWN_EPOCH


class StartPosition(NamedTuple):
    """Where to begin in a partition.

    Attributes:
        read_from: The first offset to read, one window before `resume_at`: the window of duplicates is rebuilt.
        resume_at: Records below this offset were handled before, unless their leader epoch is above `resume_epoch`.
        resume_epoch: The leader epoch of the last record that was handled.
        recreated: True where the topic is another one than that of the commit.
        lost: What is missing from the log; None if nothing is.
        lost_offsets: How many offsets are missing.
    """

    read_from: int
    resume_at: int
    resume_epoch: int = UNKNOWN_EPOCH
    recreated: bool = False
    lost: LossKind | None = None
    lost_offsets: int = 0


def commit_metadata(topic_id: str, leader_epoch: int) -> str:
    """Return the metadata of a commit.

    Args:
        topic_id: The id of the topic that was read.
        leader_epoch: The leader epoch of the last record before the committed offset.
    """
    return orjson.dumps({"topic_id": topic_id, "leader_epoch": leader_epoch}).decode()


def committed_position(offset: int, metadata: str | None) -> CommittedPosition:
    """Return a commit as `commit_metadata` described it; whatever other metadata there is counts as none."""
    try:
        found = orjson.loads(metadata or "")
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        found = {}
    topic_id, epoch = found.get("topic_id"), found.get("leader_epoch")
    return CommittedPosition(
        offset,
        topic_id if isinstance(topic_id, str) else None,
        epoch if isinstance(epoch, int) and 0 <= epoch < UNKNOWN_EPOCH else UNKNOWN_EPOCH,
    )


def start_position(committed: CommittedPosition, topic_id: str, low: int, high: int, look_back: int) -> StartPosition:
    """Decide where to begin.

    Args:
        committed: What the group committed.
        topic_id: The topic's id now.
        low: The first offset of the log.
        high: The offset behind the last record of the log.
        look_back: How many offsets to read again before the position.
    """
    if committed.offset < 0:
        return StartPosition(low, low)
    recreated = committed.topic_id is not None and committed.topic_id != topic_id
    expected = 0 if recreated else committed.offset
    if expected < low:
        return StartPosition(low, low, UNKNOWN_EPOCH, recreated, "deleted", low - expected)
    if recreated:
        return StartPosition(low, low, UNKNOWN_EPOCH, recreated)
    resume_at = min(expected, high)
    lost = expected - resume_at
    read_from = max(low, resume_at - look_back)
    return StartPosition(read_from, resume_at, committed.leader_epoch, False, "tail" if lost else None, lost)
