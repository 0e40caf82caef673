"""Dead letters as they are read from Kafka, and the filters of the command line. No I/O."""

from __future__ import annotations

import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import orjson

from perennial.storage.errors import PerennialError
from perennial.streams.events.cloudevents import MAX_VALUE_BYTES
from perennial.streams.events.dead_letter import DeadLetter, decode_dead_letter, redrive_count
from perennial.streams.events.event_times import without_leap_second
from perennial.streams.events.fields import PERMANENT
from perennial.streams.events.input_events import Turn
from perennial.streams.events.models import DEFAULT_TYPES, ExampleAccepted, Origin
from perennial.streams.events.tenants import base_topic
from perennial.streams.events.wire_error import WireError
from perennial.streams.settings import SettingsError

_UNREADABLE = DeadLetter(None, [], "not-a-dead-letter", "-", "", "", -1, -1, datetime.fromtimestamp(0, UTC))


class DeadLetterError(PerennialError):
    """Dead letters cannot be sent back."""


class DeadLetterRecord(NamedTuple):
    """A record of the topic `dead-letters`.

    Attributes:
        partition: Its partition in `dead-letters`.
        offset: Its offset in `dead-letters`.
        key: Its key, which is the key of the refused record.
        dead_letter: The refused record, and why and where it was refused.
        source_topic: The topic of the refused record, without the prefix.
        redrives: How many times the refused record had been sent back before.
        readable: Whether it was written by this project. If not, `dead_letter` holds its bytes and no further facts.
    """

    partition: int
    offset: int
    key: bytes | None
    dead_letter: DeadLetter
    source_topic: str
    redrives: int
    readable: bool

    @property
    def position(self) -> str:
        """PARTITION:OFFSET, as `perennial dlq show` takes it."""
        return f"{self.partition}:{self.offset}"

    @property
    def adapter(self) -> str:
        """The adapter that the value names, else the key as text; empty where neither can be read."""
        found = self.event_fields().get("adapter")
        return found[:200] if isinstance(found, str) else (self.key or b"")[:200].decode("utf-8", "replace")

    def event_fields(self) -> dict[str, Any]:
        """Return the event's fields without validating them; empty where the value cannot be parsed."""
        value = self.dead_letter.value
        if not value or len(value) > MAX_VALUE_BYTES:
            return {}
        try:
            found = orjson.loads(value.removeprefix(b"\xef\xbb\xbf"))
        except orjson.JSONDecodeError:
            return {}
        if not isinstance(found, dict):
            return {}
        if isinstance(found.get("adapter"), str):
            return found
        return _data_of(found) or found


def _data_of(structured: dict[str, Any]) -> dict[str, Any] | None:
    """Return the data of a structured CloudEvent, or None where it has none that can be read."""
    data, encoded = structured.get("data"), structured.get("data_base64")
    if data is None and isinstance(encoded, str):
        try:
            data = orjson.loads(binascii.a2b_base64(encoded).removeprefix(b"\xef\xbb\xbf"))
        except ValueError:
            return None
    return data if isinstance(data, dict) else None


def read_dead_letter(
    partition: int, offset: int, key: bytes | None, value: bytes | None,
    headers: Sequence[tuple[str, bytes | None]] | None, prefix: str,
) -> DeadLetterRecord:  # fmt: skip
    """Return a record of the topic `dead-letters`, whoever wrote it.

    Args:
        partition: The record's partition.
        offset: The record's offset.
        key: The record's key.
        value: The record's value.
        headers: The record's headers.
        prefix: The prefix of topic names. Some roles record the refused record's topic with it, some without it.

    Returns:
        The record; `readable` is false where it is not a dead letter of this project.
    """
    try:
        found = decode_dead_letter(value, headers)
    except WireError as error:
        found = _UNREADABLE._replace(value=value, headers=list(headers or ()), detail=error.detail)
        return DeadLetterRecord(partition, offset, key, found, "", 0, readable=False)
    short = found.topic.removeprefix(prefix)
    topic = short if base_topic(short) in DEFAULT_TYPES else found.topic
    return DeadLetterRecord(partition, offset, key, found, topic, redrive_count(found.headers), readable=True)


def as_example(record: DeadLetterRecord) -> ExampleAccepted:
    """Return the fields that a request to forget is matched against, as far as they can be read.

    Returns:
        An unvalidated example. Its time is the time at which the record was refused; its ids are empty.
    """
    fields = record.event_fields()

    def text(name: str) -> str | None:
        found = fields.get(name)
        return found if isinstance(found, str) else None

    subjects = fields.get("subjects")
    turns = _turns_of(fields.get("messages"))
    *history, prompt, response = turns if len(turns) > 1 else (None, None)
    at_ms = max(0, int(record.dead_letter.at.timestamp() * 1000))
    return ExampleAccepted.model_construct(
        adapter=record.adapter, example_id="", kind="document", learn=True,
        document_id=text("document_id") or text("interaction_id") or "", text=text("text"),
        history=history or None, prompt=prompt.content if prompt else text("prompt"),
        answer=text("correction") or (response.content if response else text("response")), source=text("source"),
        subjects=[name for name in subjects if isinstance(name, str)] if isinstance(subjects, list) else [],
        retention_class=text("retention_class") or PERMANENT,
        origin=Origin.model_construct(
            cluster_id="", topic=record.source_topic, topic_id="", partition=0, offset=0, timestamp_ms=at_ms
        ),
    )  # fmt: skip


def _turns_of(messages: object) -> list[Turn]:
    """Return the turns of an interaction that can be read, unvalidated."""
    found = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    return [
        Turn.model_construct(role=message["role"], content=message["content"])
        for message in found
        if isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    ]


@dataclass(frozen=True)
class Selection:
    """A filter of dead letters. An empty field selects all.

    Attributes:
        reason: Why the record was refused.
        stage: The role that refused it.
        topic: The topic that it came from, with or without the prefix.
        adapter: The adapter's name, or a pattern with `*`.
        since: The earliest time of refusal, with its zone.
    """

    reason: str = ""
    stage: str = ""
    topic: str = ""
    adapter: str = ""
    since: datetime | None = None

    def matches(self, record: DeadLetterRecord) -> bool:
        """Return whether the dead letter is selected."""
        found = record.dead_letter
        return (
            self.reason in {"", found.reason}
            and self.stage in {"", found.stage}
            and self.topic in {"", record.source_topic, found.topic}
            and (self.since is None or found.at >= self.since)
            and (not self.adapter or fnmatchcase(record.adapter, self.adapter))
        )


_DURATION = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_since(text: str, now: datetime) -> datetime:
    """Return the time that the option `--since` names.

    Args:
        text: A duration before now (`90s`, `30m`, `12h`, `7d`), or an ISO 8601 time, in UTC where it names no zone.
        now: The present time, with its zone.

    Returns:
        The time, with its zone.

    Raises:
        SettingsError: The text is neither.
    """
    duration = _DURATION.fullmatch(text.strip())
    try:
        if duration:
            return now - timedelta(**{_UNITS[duration[2]]: int(duration[1])})
        moment = datetime.fromisoformat(without_leap_second(text.strip().upper()))
    except (ValueError, OverflowError):
        raise SettingsError(
            "--since is not valid", got=text, allowed="30m, 12h, 7d, or a time such as 2026-01-31T12:00:00Z",
            remedy="correct it",
        ) from None  # fmt: skip
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def parse_position(text: str) -> tuple[int, int]:
    """Return partition and offset of a text `PARTITION:OFFSET`.

    Raises:
        SettingsError: The text is not of that form.
    """
    partition, _, offset = text.partition(":")
    if not (partition.isascii() and partition.isdigit() and offset.isascii() and offset.isdigit()) or len(text) > 30:
        raise SettingsError(
            "not the position of a dead letter", got=text, allowed="PARTITION:OFFSET", remedy="see `perennial dlq ls`"
        )
    return int(partition), int(offset)
