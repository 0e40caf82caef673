"""Base classes of events, and limits and types of their fields. Of the project it imports event_times.py alone."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from perennial.streams.events.event_times import MAX_MS, without_leap_second

MAX_TEXT_BYTES = 256 * 1024
MAX_ID_CHARS = 512
MAX_LIST_ITEMS = 64
PERMANENT = "permanent"

ADAPTER_PATTERN = r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*){0,3}$"
ADAPTERS_PATTERN = rf"{ADAPTER_PATTERN[:-1]}(/\*)?$|^\*$"
ALIAS_PATTERN = r"^[a-z0-9][a-z0-9._-]*$"
HIDDEN = r"\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069"
"""Characters that a terminal or an editor obeys instead of showing them, as part of a character class: control
characters (C0, DEL, C1), line and paragraph separators, and the overrides and isolates of the writing direction."""
VISIBLE_PATTERN = rf"^[^{HIDDEN}]*$"
_DURATION = re.compile(
    r"^P(?!$)(?:(\d{1,4})Y)?(?:(\d{1,4})M)?(?:(\d{1,4})W)?(?:(\d{1,6})D)?"
    r"(?:T(?=\d)(?:(\d{1,6})H)?(?:(\d{1,6})M)?(?:(\d{1,9})S)?)?$",
    re.ASCII,
)
_DURATION_UNITS_S = (365 * 86400, 30 * 86400, 7 * 86400, 86400, 3600, 60, 1)


def duration_s(value: str) -> int:
    """Return the seconds in an ISO 8601 duration; a year counts 365 days and a month 30.

    Raises:
        ValueError: The text is not a duration above zero.
    """
    match = _DURATION.fullmatch(value)
    total = sum(int(n) * unit for n, unit in zip(match.groups(), _DURATION_UNITS_S, strict=True) if n) if match else 0
    if total <= 0:
        raise ValueError(f"not an ISO 8601 duration above zero: {value!r} (for example P30D or PT12H)")
    return total


def _check_text(value: str) -> str:
    size = len(value) if value.isascii() else len(value.encode("utf-8"))
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"text has {size} bytes, at most {MAX_TEXT_BYTES} are allowed")
    return value


def _check_retention(value: str) -> str:
    if value != PERMANENT:
        duration_s(value)
    return value


def _read_leap_second(value: object) -> object:
    return without_leap_second(value) if type(value) is str else value


Adapter = Annotated[str, Field(pattern=ADAPTER_PATTERN, max_length=200)]
AdapterPattern = Annotated[str, Field(pattern=ADAPTERS_PATTERN, max_length=202)]
"""One adapter, all adapters below a prefix (`acme/*`), or all adapters (`*`)."""
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
OutsideId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS, pattern=VISIBLE_PATTERN)]
"""An id in an event that people write. `Id` is for events of Perennial: older ones may hold hidden characters."""
OutsideName = Annotated[str, Field(min_length=1, max_length=256, pattern=VISIBLE_PATTERN)]
"""A name in an event that people write; see `OutsideId`."""
Time = Annotated[AwareDatetime, BeforeValidator(_read_leap_second)]
"""A time with its zone, as in RFC 3339; the zone is required."""
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_BYTES), AfterValidator(_check_text)]
Subjects = Annotated[list[OutsideName], Field(max_length=MAX_LIST_ITEMS)]
Ids = Annotated[list[OutsideId], Field(max_length=MAX_LIST_ITEMS)]
RetentionClass = Annotated[str, Field(max_length=32), AfterValidator(_check_retention)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
SIGNATURE_PATTERN = r"^sha256:[0-9a-f]{64}:[A-Za-z0-9+/]{86}==$"
Signature = Annotated[str, Field(pattern=SIGNATURE_PATTERN)]
"""An Ed25519 signature: the id of the public key, and the signature in base64."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Loss = Annotated[float, Field(ge=-1, le=1e6, allow_inf_nan=False)]
"""A mean loss in nats per token. The bounds keep sums and squares of losses finite; rounding may give a value below 0."""
MAX_LOSS_NATS = 1e6
Rating = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
TokenCount = Annotated[int, Field(ge=0, le=2**24)]
"""Number of tokens of one example; more than a text of MAX_TEXT_BYTES can have."""
CLUSTER_ID_PATTERN = r"^[!-~]{1,128}$"
TOPIC_NAME_PATTERN = r"^[A-Za-z0-9._-]{1,249}$"
TOPIC_ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
ClusterId = Annotated[str, Field(pattern=CLUSTER_ID_PATTERN)]
TopicName = Annotated[str, Field(pattern=TOPIC_NAME_PATTERN)]
"""A topic's name, as Kafka allows it."""
TopicId = Annotated[str, Field(pattern=TOPIC_ID_PATTERN)]
Int32 = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""A partition's number or a leader epoch."""
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
CutNumber = Annotated[int, Field(ge=0, le=10**12 - 1)]
"""Keys of the store write a cut number with twelve digits."""
Millis = Annotated[int, Field(ge=0, le=MAX_MS)]
"""Milliseconds since 1970, up to the end of the year 9999, which is the latest date that Python can represent."""
Alias = Annotated[str, Field(pattern=ALIAS_PATTERN, max_length=64)]

FROZEN = ConfigDict(frozen=True, use_attribute_docstrings=True)
"""Configuration of every model: immutable, the text below a field is its description in the schema."""


class Event(BaseModel):
    """Base of all events: immutable, and tolerant of fields that a newer writer added.

    Attributes:
        type: CloudEvents type.
        topic: Topic without the prefix.
    """

    model_config = ConfigDict(**FROZEN, extra="ignore")
    type: ClassVar[str]
    topic: ClassVar[str]

    def key(self) -> str:
        """Return the Kafka key; records with the same key stay in order, because they share a partition."""
        raise TypeError(f"{type(self).__name__} has no key")


class OutsideEvent(Event):
    """An event that people write: an unknown field is an error, because it may be a misspelt one.

    Attributes:
        visible: Fields that may hold no hidden characters in a record from outside, beside those of type `OutsideId`
            and `OutsideName`. The model itself allows them there, because requests of older versions are stored.
    """

    model_config = ConfigDict(**FROZEN, extra="forbid")
    visible: ClassVar[tuple[str, ...]] = ()
