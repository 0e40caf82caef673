"""Encode a refused Kafka record as a dead letter, and decode dead letters.

A dead letter has the bytes and headers of the refused record, followed by headers of Perennial (`perennial-reason`,
`perennial-stage`, ...) that say why, by which role and from which offset the record was refused.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

from perennial.streams.events.cloudevents import MAX_HEADER_BYTES, REDRIVES_HEADER, Headers
from perennial.streams.events.wire_error import WireError, shorten

MAX_DEAD_LETTER_BYTES = 2 * 1024 * 1024
"""Largest dead letter with its headers and key: a record above the limit for values still fits, with the reason."""
_MAX_DETAIL_CHARS = 2000
_FIELDS = ("reason", "stage", "detail", "topic", "partition", "offset", "at")
"""Headers of a dead letter without their prefix `perennial-`, in the order in which they are written."""


class DeadLetter(NamedTuple):
    """A refused record, and why and where it was refused.

    Attributes:
        value: The record's value as it came.
        headers: The record's headers as they came.
        reason: Slug of the cause.
        stage: Role that refused the record.
        detail: What is wrong, what came in and what is allowed.
        topic: Topic of the refused record.
        partition: Its partition.
        offset: Its offset.
        at: When it was refused, in UTC.
    """

    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    reason: str
    stage: str
    detail: str
    topic: str
    partition: int
    offset: int
    at: datetime


def encode_dead_letter(
    value: bytes | None, headers: Headers | None, *,
    reason: str, stage: str, detail: str, topic: str, partition: int, offset: int, at: datetime,
) -> tuple[bytes | None, list[tuple[str, bytes | None]]]:  # fmt: skip
    """Return the value and headers of the dead letter for a refused record.

    A value or headers too large for a dead letter are cut, and the detail says so: no record may stop the flow by its
    size.

    Args:
        value: The record's value; kept as it is where it fits.
        headers: The record's headers; kept as they are where they fit, those of Perennial follow them.
        reason: Slug of the cause.
        stage: Role that refuses the record.
        detail: What is wrong; at most 2,000 characters are kept.
        topic: Topic of the refused record.
        partition: Its partition.
        offset: Its offset.
        at: When it was refused; it must have a time zone.
    """
    value, headers, cut = _fitted(value, list(headers or ()))
    detail = shorten(cut + detail, _MAX_DETAIL_CHARS)
    texts = (reason, stage, detail, topic, str(partition), str(offset), at.astimezone(UTC).isoformat())
    added = [(f"perennial-{name}", text.encode("utf-8", "replace")) for name, text in zip(_FIELDS, texts, strict=True)]
    return value, [*headers, *added]


def decode_dead_letter(value: bytes | None, headers: Headers | None) -> DeadLetter:
    """Decode what `encode_dead_letter` wrote.

    Raises:
        WireError: The record was not written by `encode_dead_letter`; its reason is `not-a-dead-letter`.
    """
    last = list(headers or ())[-len(_FIELDS) :]
    if [name for name, _ in last] != [f"perennial-{name}" for name in _FIELDS]:
        names = ", ".join(name for name, _ in last)
        raise WireError("not-a-dead-letter", "last headers", got=names, allowed="the headers of a dead letter")
    try:
        reason, stage, detail, topic, partition, offset, at = ((raw or b"").decode() for _, raw in last)
        return DeadLetter(
            value, list(headers or ())[: -len(_FIELDS)], reason, stage, detail, topic,
            int(partition), int(offset), datetime.fromisoformat(at),
        )  # fmt: skip
    except ValueError as error:
        raise WireError("not-a-dead-letter", "headers of a dead letter", got=str(error)) from None


def redrive_count(headers: Headers | None) -> int:
    """Return how often a record was redriven; 0 where its last header is not a valid count of redrives.

    Only the last header counts, because a redrive writes it last; any other of that name came from outside.
    """
    if not headers or headers[-1][0] != REDRIVES_HEADER:
        return 0
    raw = headers[-1][1] or b""
    return int(raw) if len(raw) <= 9 and raw.isdigit() else 0


def _fitted(
    value: bytes | None, headers: list[tuple[str, bytes | None]]
) -> tuple[bytes | None, list[tuple[str, bytes | None]], str]:
    """Return value and headers cut to the size of a dead letter, and a text that says what was cut."""
    room = MAX_DEAD_LETTER_BYTES - 2 * MAX_HEADER_BYTES
    size = sum(4 * len(name) + len(raw or b"") + 10 for name, raw in headers)
    cut = ""
    # The wording is read again by streams/deadletters/model.py, which must not redrive a record that was cut.
    if size > room // 4:
        cut = f"{len(headers)} headers of {size} bytes were cut; "
        headers = [header for header in headers if header[0] == REDRIVES_HEADER and len(header[1] or b"") < 20][:1]
        size = 100
    if value is not None and len(value) > room - size:
        value, cut = value[: room - size], f"{cut}the value of {len(value)} bytes was cut; "
    return value, headers, cut
