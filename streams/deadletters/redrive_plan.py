"""Plan a redrive: which dead letters are sent back, in which form, and which were handled already. No I/O.

Sending a dead letter back to the topic that it came from is called a redrive. Progress is kept per dead letter, as
ranges of offsets, so that redrives with different filters never send the same one twice. `redrive.py` does the I/O.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

import orjson

from perennial.streams.deadletters.model import DeadLetterError, DeadLetterRecord, Selection
from perennial.streams.events.cloudevents import REDRIVES_HEADER
from perennial.streams.events.models import DEFAULT_TYPES
from perennial.streams.events.tenants import base_topic

STATE_PREFIX = "state/replay/topic="
"""Prefix of the object keys under which progress is stored."""
REDRIVABLE_TOPICS = tuple(DEFAULT_TYPES)
"""The topics of outside producers, besides those of tenants. The project's own topics are ordered by high-water marks: their readers would drop a
record that comes back late."""

_MAX_KINDS = 200

State = Literal["waiting", "replayed", "quarantined", "erased", "inside", "cut", "unreadable"]
"""The state of a dead letter, as a redrive sees it.

waiting: would be sent. replayed: was sent by an earlier redrive. quarantined: was sent back as often as allowed and
refused each time (this has nothing to do with an adapter's quarantine). erased: a request to forget that came after the
refusal matches it. inside: comes from a topic that the project itself writes. cut: was too large to be kept whole.
unreadable: was not written by this project.
"""


_CUT = re.compile(
    r"(\d+ headers of \d+ bytes were cut; )?the value of \d+ bytes was cut; |\d+ headers of \d+ bytes were cut; "
)
"""Matches the beginning of the detail of a dead letter that was too large to be kept whole."""


def redrive_state(record: DeadLetterRecord, *, handled: bool, max_redrives: int) -> State:
    """Return the state of a dead letter, but never `erased`: only `plan_redrive` looks at requests to forget.

    Args:
        record: The dead letter.
        handled: Whether an earlier redrive handled it; see `is_handled`.
        max_redrives: The most times that a record is sent back.

    Returns:
        The state.
    """
    if not record.readable:
        return "unreadable"
    if base_topic(record.source_topic) not in REDRIVABLE_TOPICS:
        return "inside"
    if _CUT.match(record.dead_letter.detail):
        return "cut"
    if handled:
        return "replayed"
    return "quarantined" if record.redrives >= max_redrives else "waiting"


class RedrivenRecord(NamedTuple):
    """A refused record as it is sent back.

    Attributes:
        topic: The topic that it came from, without the prefix.
        partition: The partition that it came from. Intake keeps the window that drops duplicates per partition.
        key: Its key.
        value: Its value.
        headers: Its headers, the last of them with the number of redrives.
    """

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


def redriven_record(record: DeadLetterRecord) -> RedrivenRecord:
    """Return the refused record with its number of redrives raised by one.

    Raises:
        DeadLetterError: The record comes from a topic that takes none back.
    """
    if base_topic(record.source_topic) not in REDRIVABLE_TOPICS:
        raise DeadLetterError(
            f"the dead letter {record.position} cannot be sent back", got=record.source_topic,
            allowed=", ".join(REDRIVABLE_TOPICS), remedy="publish the original event again",
        )  # fmt: skip
    found = record.dead_letter
    headers = [(name, raw) for name, raw in found.headers if name != REDRIVES_HEADER]
    headers.append((REDRIVES_HEADER, str(record.redrives + 1).encode()))
    return RedrivenRecord(record.source_topic, found.partition, record.key, found.value, headers)


class RedriveProgress:
    """The offsets of one partition that redrives have handled: all below `first`, and some ranges above it.

    Args:
        first: The lowest offset that is not handled.
        ranges: Handled ranges above `first`, each (start, end) without the end, in ascending order and not adjacent.
    """

    def __init__(self, first: int = 0, ranges: Sequence[tuple[int, int]] = ()) -> None:
        self.first = first
        self._ranges = list(ranges)

    def __contains__(self, offset: int) -> bool:
        if offset < self.first:
            return True
        at = bisect_right(self._ranges, (offset, sys.maxsize)) - 1
        return at >= 0 and offset < self._ranges[at][1]

    def add(self, start: int, end: int) -> None:
        """Add the offsets from `start` up to, and without, `end`."""
        start = max(start, self.first)
        if start >= end:
            return
        low = bisect_left(self._ranges, start, key=lambda each: each[1])
        high = bisect_right(self._ranges, end, key=lambda each: each[0])
        if low < high:  # merge the ranges that overlap or touch it
            start, end = min(start, self._ranges[low][0]), max(end, self._ranges[high - 1][1])
        self._ranges[low:high] = [(start, end)]
        if self._ranges[0][0] <= self.first:
            self.first = self._ranges.pop(0)[1]

    def advance(self, first: int) -> None:
        """Add all offsets below `first`: Kafka has deleted them from the log."""
        self.add(self.first, first)

    def to_numbers(self) -> list[int]:
        """Return `first`, then per range its distance from the end of the previous range, and its length."""
        found, at = [self.first], self.first
        for start, end in self._ranges:
            found += (start - at, end - start)
            at = end
        return found

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Self:
        """Return the progress that `to_numbers` wrote.

        Raises:
            ValueError: The numbers are not of that form.
        """
        if len(numbers) % 2 != 1 or any(type(n) is not int for n in numbers) or min(numbers[1:], default=1) < 1:
            raise ValueError("not the numbers of a progress")
        ranges, at = [], max(0, numbers[0])
        for gap, length in zip(numbers[1::2], numbers[2::2], strict=True):
            ranges.append((at + gap, at + gap + length))
            at += gap + length
        return cls(max(0, numbers[0]), ranges)


def dump_progress(topic_id: str, progress: Mapping[int, RedriveProgress]) -> bytes:
    """Return the progress as it is stored.

    Args:
        topic_id: The id of the topic `dead-letters`. A topic that is deleted and created again gets another id, and
            the progress of the old topic then does not count.
        progress: The progress by partition.

    Returns:
        JSON.
    """
    numbers = {str(partition): each.to_numbers() for partition, each in sorted(progress.items())}
    return orjson.dumps({"topic_id": topic_id, "partitions": numbers})


def load_progress(data: bytes, topic_id: str) -> dict[int, RedriveProgress]:
    """Return the progress that `dump_progress` wrote.

    Args:
        data: The stored bytes.
        topic_id: The present id of the topic `dead-letters`.

    Returns:
        The progress by partition; empty where it was stored for another topic of the same name.

    Raises:
        DeadLetterError: The bytes are not of that form.
    """
    try:
        fields = orjson.loads(data)
        if fields["topic_id"] != topic_id:
            return {}
        return {
            int(partition): RedriveProgress.from_numbers(numbers) for partition, numbers in fields["partitions"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeadLetterError(
            "the progress of earlier redrives cannot be read", got=f"{data[:80]!r} ({error})",
            remedy=f"delete {STATE_PREFIX}* from the store; dead letters that were sent back before are then sent again",
        ) from None  # fmt: skip


@dataclass
class RedriveReport:
    """The counts of a redrive, or of a dry run.

    Attributes:
        sent: Numbers of dead letters sent back, by reason and stage.
        left: Numbers of selected dead letters that were not sent back, by state.
        stopped: Whether the redrive was stopped before its end.
    """

    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    stopped: bool = False

    def add_sent(self, record: DeadLetterRecord) -> None:
        """Count a dead letter as sent. At most 200 kinds are kept apart: anyone could invent reasons without end."""
        kind = (record.dead_letter.reason[:60], record.dead_letter.stage[:60])
        self.sent[kind if kind in self.sent or len(self.sent) < _MAX_KINDS else ("(others)", "")] += 1


class RedrivePlan(NamedTuple):
    """The decision about a batch of dead letters.

    Attributes:
        send: These are sent back.
        unsendable: These can never be sent back; the progress notes them as handled.
        left: Numbers of selected dead letters that are not sent back, by state.
    """

    send: list[DeadLetterRecord]
    unsendable: list[DeadLetterRecord]
    left: Counter[str]


def is_handled(record: DeadLetterRecord, progress: Mapping[int, RedriveProgress]) -> bool:
    """Return whether an earlier redrive sent the dead letter back, or found that it can never be sent back."""
    return record.partition in progress and record.offset in progress[record.partition]


def plan_redrive(
    batch: Iterable[DeadLetterRecord], selection: Selection, progress: Mapping[int, RedriveProgress], *,
    max_redrives: int, room: int, is_erased: Callable[[DeadLetterRecord], bool] = lambda _: False,
) -> RedrivePlan:  # fmt: skip
    """Decide what to do with a batch of dead letters.

    Args:
        batch: The dead letters.
        selection: Which of them are selected.
        progress: What earlier redrives handled, by partition.
        max_redrives: The most times that a record is sent back.
        room: The most dead letters to send. Further ones are neither sent nor counted as left.
        is_erased: Returns whether a request to forget that came after the refusal matches the dead letter. If such a
            record were sent back, it would count as published after that request, and would be learned.

    Returns:
        The plan.
    """
    plan = RedrivePlan([], [], Counter())
    for record in batch:
        if not selection.matches(record):
            continue
        state = redrive_state(record, handled=is_handled(record, progress), max_redrives=max_redrives)
        if state == "waiting" and is_erased(record):
            state = "erased"
        if state == "waiting":
            if len(plan.send) < room:
                plan.send.append(record)
        elif state != "replayed":
            plan.left[state] += 1
            if state not in {"quarantined", "erased"}:
                plan.unsendable.append(record)
    return plan
