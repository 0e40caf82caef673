"""Turn milliseconds since 1970 into text, whatever their size.

A number from outside may lie beyond the calendar: a document may be kept for 9,999 years, and a forged record may hold
any integer. Python's dates end with the year 9999, and a conversion past it raises. No display may end so.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

AFTER_CALENDAR: Final = "after 9999"
BEFORE_CALENDAR: Final = "before 0001"
_EPOCH = datetime.fromtimestamp(0, UTC)


def iso_time(at_ms: int) -> str:
    """Return a time as ISO 8601 in UTC with seconds, or `after 9999` or `before 0001` where no date can say it.

    Args:
        at_ms: Milliseconds since 1970.
    """
    try:
        return (_EPOCH + timedelta(milliseconds=at_ms)).isoformat(timespec="seconds")
    except OverflowError:
        return AFTER_CALENDAR if at_ms > 0 else BEFORE_CALENDAR


def spoken_time(at_ms: int) -> str:
    """Return a time for people, such as `2026-01-31 12:00:00Z`; past the calendar the same words as `iso_time`."""
    return iso_time(at_ms).replace("T", " ").replace("+00:00", "Z")
