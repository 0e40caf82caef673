"""Dead letters, the pure part: what each one is, which are meant, which may go back and as what, how far replays came.

Progress is kept letter by letter, as runs of offsets, so that replays with different filters never repeat each other's
work. streams/replay.py does the I/O.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, Self

import orjson

from perennial.storage.errors import PerennialError
from perennial.streams.events.cloudevents import MAX_VALUE_BYTES, REDRIVES_HEADER, WireError
from perennial.streams.events.dead_letter import DeadLetter, decode_dead_letter, redrive_count
from perennial.streams.events.models import DEFAULT_TYPES, PERMANENT, ExampleAccepted, Origin
from perennial.streams.settings import SettingsError

STATE_PREFIX = "state/replay/topic="
REPLAYABLE = tuple(DEFAULT_TYPES)
"""Topics that outside producers write. Inside ones are ordered by marks: what comes back late there is dropped."""

_MAX_KINDS = 200
_NOWHERE = DeadLetter(None, [], "not-a-dead-letter", "-", "", "", -1, -1, datetime.fromtimestamp(0, UTC))

State = Literal["waiting", "replayed", "quarantined", "erased", "inside", "cut", "unreadable"]
"""waiting: a replay would send it. quarantined: refused again after the most replays allowed. erased: what it holds was
to be forgotten since. inside: from a topic that Perennial itself writes. cut: too large to be kept whole. unreadable:
not written by Perennial."""


class DeadLetterError(PerennialError):
    """Dead letters cannot be replayed."""


class DeadLetterRecord(NamedTuple):
    """A dead letter at its place. source: the topic it came from, without prefix. replays: how often it was sent again."""

    partition: int
    offset: int
    key: bytes | None
    held: DeadLetter
    source: str
    replays: int
    readable: bool

    @property
    def place(self) -> str:
        """PARTITION:OFFSET, as `show` takes it."""
        return f"{self.partition}:{self.offset}"

    @property
    def adapter(self) -> str:
        """The adapter that the value names, else the key's text; empty where neither can be read."""
        found = self.fields().get("adapter")
        return found[:200] if isinstance(found, str) else (self.key or b"")[:200].decode("utf-8", "replace")

    def fields(self) -> dict[str, Any]:
        """The event's fields, whatever they hold; none where the value cannot be read."""
        if not self.held.value or len(self.held.value) > MAX_VALUE_BYTES:
            return {}
        try:
            found = orjson.loads(self.held.value)
        except orjson.JSONDecodeError:
            return {}
        if not isinstance(found, dict):
            return {}
        data = found.get("data")
        return data if isinstance(data, dict) and not isinstance(found.get("adapter"), str) else found


def read_dead_letter(
    partition: int, offset: int, key: bytes | None, value: bytes | None,
    headers: Sequence[tuple[str, bytes | None]] | None, prefix: str,
) -> DeadLetterRecord:  # fmt: skip
    """A record of the dead-letters topic, whatever it is. prefix: of topic names; some roles record it, some do not."""
    try:
        held = decode_dead_letter(value, headers)
    except WireError as error:
        held = _NOWHERE._replace(value=value, headers=list(headers or ()), detail=error.detail)
        return DeadLetterRecord(partition, offset, key, held, "", 0, readable=False)
    source = held.topic.removeprefix(prefix) if prefix and held.topic not in DEFAULT_TYPES else held.topic
    return DeadLetterRecord(partition, offset, key, held, source, redrive_count(held.headers), readable=True)


def example_of(letter: DeadLetterRecord) -> ExampleAccepted:
    """What an erasure would look at in a letter, as far as it can be read; its time is when it was refused."""
    fields = letter.fields()

    def text(name: str) -> str | None:
        found = fields.get(name)
        return found if isinstance(found, str) else None

    subjects = fields.get("subjects")
    at_ms = max(0, int(letter.held.at.timestamp() * 1000))
    return ExampleAccepted.model_construct(
        adapter=letter.adapter, example_id="", kind="document", learn=True,
        document_id=text("document_id") or text("interaction_id") or "", text=text("text"), prompt=text("prompt"),
        answer=text("correction") or text("response"), source=text("source"),
        subjects=[name for name in subjects if isinstance(name, str)] if isinstance(subjects, list) else [],
        retention_class=text("retention_class") or PERMANENT,
        origin=Origin(cluster_id="", topic=letter.source, topic_id="", partition=0, offset=0, timestamp_ms=at_ms),
    )  # fmt: skip


_CUT = re.compile(
    r"(\d+ headers of \d+ bytes were cut; )?the value of \d+ bytes was cut; |\d+ headers of \d+ bytes were cut; "
)


def state_of(letter: DeadLetterRecord, *, replayed: bool, max_replays: int) -> State:
    """What a replay would make of a letter."""
    if not letter.readable:
        return "unreadable"
    if letter.source not in REPLAYABLE:
        return "inside"
    if _CUT.match(letter.held.detail):
        return "cut"
    if replayed:
        return "replayed"
    return "quarantined" if letter.replays >= max_replays else "waiting"


class Resend(NamedTuple):
    """What goes back. partition: the origin's own, where the window that drops a repeat is kept."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


def resend(letter: DeadLetterRecord) -> Resend:
    """The original record with one more replay counted in its header. Raises DeadLetterError where none may go back."""
    if letter.source not in REPLAYABLE:
        raise DeadLetterError(
            f"letter {letter.place} may not go back", got=letter.source, allowed=", ".join(REPLAYABLE),
            remedy="publish its origin again",
        )  # fmt: skip
    headers = [(name, raw) for name, raw in letter.held.headers if name != REDRIVES_HEADER]
    headers.append((REDRIVES_HEADER, str(letter.replays + 1).encode()))
    return Resend(letter.source, letter.held.partition, letter.key, letter.held.value, headers)


@dataclass(frozen=True)
class Selection:
    """Which letters are meant. Empty: all. adapter: a name or a pattern with `*`. since: aware."""

    reason: str = ""
    stage: str = ""
    topic: str = ""
    adapter: str = ""
    since: datetime | None = None

    def matches(self, letter: DeadLetterRecord) -> bool:
        """Whether the letter is meant."""
        return (
            self.reason in {"", letter.held.reason}
            and self.stage in {"", letter.held.stage}
            and self.topic in {"", letter.source, letter.held.topic}
            and (self.since is None or letter.held.at >= self.since)
            and (not self.adapter or fnmatchcase(letter.adapter, self.adapter))
        )


_SPAN = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_since(text: str, now: datetime) -> datetime:
    """A moment from `90s`, `30m`, `12h`, `7d` (ago), or an ISO 8601 time, UTC where it names no zone."""
    span = _SPAN.fullmatch(text.strip())
    try:
        if span:
            return now - timedelta(**{_UNITS[span[2]]: int(span[1])})
        moment = datetime.fromisoformat(text.strip())
    except (ValueError, OverflowError):
        raise SettingsError(
            "--since is not usable", got=text, allowed="30m, 12h, 7d, or a time such as 2026-01-31T12:00:00Z",
            remedy="mend it",
        ) from None  # fmt: skip
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def parse_place(text: str) -> tuple[int, int]:
    """PARTITION:OFFSET. Raises SettingsError."""
    partition, _, offset = text.partition(":")
    if not (partition.isascii() and partition.isdigit() and offset.isascii() and offset.isdigit()) or len(text) > 30:
        raise SettingsError(
            "not the place of a letter", got=text, allowed="PARTITION:OFFSET", remedy="see `perennial dlq ls`"
        )
    return int(partition), int(offset)


class RedriveProgress:
    """Which offsets of a partition were replayed: all below `first`, and some runs above it."""

    def __init__(self, first: int = 0, runs: Sequence[tuple[int, int]] = ()) -> None:
        self.first = first
        self._runs = list(runs)  # ascending, apart, each [start, end) above first

    def __contains__(self, offset: int) -> bool:
        if offset < self.first:
            return True
        at = bisect_right(self._runs, (offset, sys.maxsize)) - 1
        return at >= 0 and offset < self._runs[at][1]

    def add(self, start: int, end: int) -> None:
        """Offsets from start to before end are done."""
        start = max(start, self.first)
        if start >= end:
            return
        low = bisect_left(self._runs, start, key=lambda run: run[1])
        high = bisect_right(self._runs, end, key=lambda run: run[0])
        if low < high:  # runs that it overlaps or touches
            start, end = min(start, self._runs[low][0]), max(end, self._runs[high - 1][1])
        self._runs[low:high] = [(start, end)]
        if self._runs[0][0] <= self.first:
            self.first = self._runs.pop(0)[1]

    def advance(self, first: int) -> None:
        """Offsets below `first` are gone from the log."""
        self.add(self.first, first)

    def copy(self) -> RedriveProgress:
        """Another of the same."""
        return RedriveProgress(self.first, self._runs)

    def numbers(self) -> list[int]:
        """`first`, then per run the gap before it and its length."""
        found, at = [self.first], self.first
        for start, end in self._runs:
            found += (start - at, end - start)
            at = end
        return found

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Self:
        """What `numbers` gave. Raises ValueError on anything else."""
        if len(numbers) % 2 != 1 or any(type(n) is not int for n in numbers) or min(numbers[1:], default=1) < 1:
            raise ValueError("not the numbers of a progress")
        runs, at = [], max(0, numbers[0])
        for gap, length in zip(numbers[1::2], numbers[2::2], strict=True):
            runs.append((at + gap, at + gap + length))
            at += gap + length
        return cls(max(0, numbers[0]), runs)


def dump_progress(topic_id: str, progress: Mapping[int, RedriveProgress]) -> bytes:
    """How far replays came, for the store. topic_id: a topic that was made again begins anew."""
    numbers = {str(partition): each.numbers() for partition, each in sorted(progress.items())}
    return orjson.dumps({"topic_id": topic_id, "partitions": numbers})


def load_progress(data: bytes, topic_id: str) -> dict[int, RedriveProgress]:
    """What dump_progress wrote; empty where it was for another topic of the name. Raises DeadLetterError on junk."""
    try:
        fields = orjson.loads(data)
        if fields["topic_id"] != topic_id:
            return {}
        return {int(partition): RedriveProgress.of(numbers) for partition, numbers in fields["partitions"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeadLetterError(
            "the progress of earlier replays cannot be read", got=f"{data[:80]!r} ({error})",
            remedy=f"delete {STATE_PREFIX}* from the store; what was replayed before is then sent again",
        ) from None  # fmt: skip


@dataclass
class RedriveReport:
    """What a replay did, or on a dry run would do. sent: by (reason, stage); left: by state."""

    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    stopped: bool = False

    def count(self, letter: DeadLetterRecord) -> None:
        """A letter was sent, or would be. Of forged reasons only so many are told apart."""
        kind = (letter.held.reason[:60], letter.held.stage[:60])
        self.sent[kind if kind in self.sent or len(self.sent) < _MAX_KINDS else ("(others)", "")] += 1


class Decided(NamedTuple):
    """send: these go back. never: these cannot, whatever changes, and are done with. left: what stays, by state."""

    send: list[DeadLetterRecord]
    never: list[DeadLetterRecord]
    left: Counter[str]


def is_done(letter: DeadLetterRecord, progress: Mapping[int, RedriveProgress]) -> bool:
    """Whether the letter was replayed, or is done with for good."""
    return letter.partition in progress and letter.offset in progress[letter.partition]


def decide(
    batch: Iterable[DeadLetterRecord], selection: Selection, progress: Mapping[int, RedriveProgress], *, max_replays: int, room: int,
    is_erased: Callable[[DeadLetterRecord], bool] = lambda _: False,
) -> Decided:  # fmt: skip
    """Sort out a batch. room: how many may be sent; what is above it is neither sent nor counted.

    is_erased: whether what a letter holds was to be forgotten since: sent again it would count as new, and be learned.
    """
    decided = Decided([], [], Counter())
    for letter in batch:
        if not selection.matches(letter):
            continue
        state = state_of(letter, replayed=is_done(letter, progress), max_replays=max_replays)
        if state == "waiting" and is_erased(letter):
            state = "erased"
        if state == "waiting":
            if len(decided.send) < room:
                decided.send.append(letter)
        elif state != "replayed":
            decided.left[state] += 1
            if state not in {"quarantined", "erased"}:
                decided.never.append(letter)
    return decided
