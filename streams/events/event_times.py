"""Read times and ends of lives that come from outside, over the whole range that the standards allow. Pure.

Imports nothing else of the project.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

MAX_MS = 253_402_300_799_999
"""The last millisecond of the year 9999, in milliseconds since 1970: the latest time that Python can write as a date."""

_LEAP_SECOND = re.compile(r"(:\d\d):60(?:[.,]\d+)?(?=[Zz+-]|$)")


def without_leap_second(text: str) -> str:
    """Replace the second 60 of a time by the last microsecond of second 59, and return other texts unchanged.

    RFC 3339 allows `23:59:60` for a leap second, which Python's datetime and pydantic do not. The time stays in its
    minute and its day.
    """
    return _LEAP_SECOND.sub(r"\1:59.999999", text) if ":60" in text else text


def parse_rfc3339(text: str) -> datetime | None:
    """Return a time with a zone in UTC.

    Args:
        text: A time as in RFC 3339, section 5.6: also with lower-case `t` and `z`, a blank instead of the `T`, a leap
            second, any number of decimals and the offset `-00:00`. Other forms of ISO 8601 that have a zone are read
            too.

    Returns:
        The time, or None where it is valid and lies outside the years 1 to 9999 in UTC.

    Raises:
        ValueError: The text is not a time, or has no zone.
    """
    time = datetime.fromisoformat(without_leap_second(text.upper()))
    if time.tzinfo is None:
        raise ValueError("the time has no zone")
    try:
        return time.astimezone(UTC)
    except OverflowError:
        return None


def bounded_end_ms(at_ms: float) -> int | None:
    """Return when a life ends, in milliseconds since 1970; None for an end after the year 9999, which means for ever.

    "Keep for ever" is often written as a huge duration or as the last second of the year 9999 with an offset. Such an
    end cannot be written as a date.
    """
    return int(at_ms) if at_ms <= MAX_MS else None
