"""Encode events as CloudEvents 1.0 Kafka records, and decode records into events.

`decode` reads binary mode (`ce_*` headers, JSON value), structured mode (content type `application/cloudevents+json`)
and plain JSON without `ce_*` headers. `encode` writes binary mode. Sizes and nesting are checked before anything is
parsed, and whatever the bytes are, `decode` raises nothing but WireError.

Sources: CloudEvents 1.0.2, its Kafka protocol binding 1.0.2 and JSON event format; W3C Trace Context.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from itertools import accumulate
from typing import Literal, NamedTuple, TypeAlias

import orjson
from pydantic import ValidationError

from perennial.storage.errors import PerennialError
from perennial.streams.events.fields import Event
from perennial.streams.events.models import DEFAULT_TYPES, EVENTS

MAX_VALUE_BYTES = 1024 * 1024
"""Largest value that a producer outside the project may write."""
MAX_INSIDE_VALUE_BYTES = MAX_VALUE_BYTES + 64 * 1024
"""Largest value that Perennial writes: the largest value from outside, and the fields that Perennial adds to it. Writing
a text as JSON again never makes it longer."""
MAX_DEPTH = 32
MAX_HEADERS = 64
MAX_HEADER_BYTES = 16 * 1024
MAX_ATTRIBUTE_CHARS = 1024
REDRIVES_HEADER = "perennial-replays"
"""Counts how often a record was redriven from the dead letters; kept when the record is refused again."""

Reason = Literal[
    "tombstone", "oversize", "too-deep", "not-utf8", "not-json", "not-object",
    "too-many-headers", "bad-header", "bad-attribute", "missing-attribute", "unknown-type", "wrong-topic",
    "missing-field", "unknown-field", "bad-field", "expired", "not-a-dead-letter",
    "out-of-order", "implausible-origin", "internal-error", "bad-signature",
]  # fmt: skip

Headers: TypeAlias = Sequence[tuple[str, bytes | None]]

_REMEDIES: dict[str, str] = {
    "oversize": "split the text into several documents",
    "wrong-topic": "publish it to the topic of its type",
    "unknown-type": "use a type that docs/asyncapi.json lists",
    "out-of-order": "find out who changed the partitions of the project's own topics, or who else writes to them; "
    "then publish the document again",
    "implausible-origin": "find out who else writes to the project's own topics; set PERENNIAL_INTERNAL_KEY",
    "internal-error": "report it with the dead letter: valid input must not cause it",
    "bad-signature": "find out who else writes to the project's own topics, and give all roles the same "
    "PERENNIAL_INTERNAL_KEY",
}


class WireError(PerennialError):
    """An event cannot be read or written.

    Args:
        reason: Slug of the cause, for metrics and dead letters.
        message: What is wrong: usually the name of the field, header or attribute.
        got: The offending value; texts are shortened.
        allowed: Which values would be accepted.
    """

    def __init__(self, reason: Reason, message: str, *, got: object = None, allowed: object = None) -> None:
        self.reason: Reason = reason
        shown = got if got is None or isinstance(got, int | float) else shorten(got)
        super().__init__(
            message, got=shown, allowed=allowed, remedy=_REMEDIES.get(reason, "correct the event and publish it again")
        )

    @property
    def detail(self) -> str:
        """Return what is wrong, what came in and what is allowed, for the header of a dead letter."""
        parts = [self.message]
        if self.got is not None:
            parts.append(f"got: {self.got}")
        if self.allowed is not None:
            parts.append(f"allowed: {self.allowed}")
        return "; ".join(parts)


class Envelope(NamedTuple):
    """An event with its CloudEvents attributes.

    Attributes:
        id: CloudEvents id; of a plain event the SHA-256 of its value.
        source: CloudEvents source; of a plain event the topic.
        type: Event type, a key of `EVENTS`.
        time: When the event occurred, in UTC, where the record says so.
        event: The parsed event.
        traceparent: W3C trace context, where the record has a valid one.
    """

    id: str
    source: str
    type: str
    time: datetime | None
    event: Event
    traceparent: str | None


class Encoded(NamedTuple):
    """A Kafka record in CloudEvents binary mode."""

    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_OUTSIDE_TOPICS = frozenset(DEFAULT_TYPES)
# Possessive quantifiers and an optional closing quote: the scan never goes back, so hostile input takes linear time.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")
_DEPTH_CHANGE = [1 if b in b"[{" else -1 for b in range(256)]
_PLAIN_CONTENT = frozenset({None, b"application/json"})
_BINARY_HEADERS = ("ce_specversion", "ce_type", "ce_id", "ce_source")
_CONTENT_TYPE = "content-type"
_STRUCTURED_CONTENT = "application/cloudevents+json"


def decode(value: bytes | None, headers: Headers | None, topic: str) -> Envelope:
    """Decode one Kafka record.

    Args:
        value: The record's value.
        headers: The record's headers as the Kafka client gave them.
        topic: Name of the topic without the prefix.

    Returns:
        The event with its CloudEvents attributes.

    Raises:
        WireError: The record is not a valid event of this topic; `reason` is a slug.
    """
    envelope = decode_without_id(value, headers, topic)
    return envelope if envelope.id else envelope._replace(id=sha256(value or b"").hexdigest())


def decode_without_id(value: bytes | None, headers: Headers | None, topic: str) -> Envelope:
    """Decode one Kafka record as `decode` does, but leave the id of a plain event empty.

    The id would be a hash of the value. Computing it takes a tenth of the time, and intake does not need it.
    """
    value = check_size(value, topic)
    if not headers:
        return _decode_plain(value, topic)
    found = _checked_headers(headers)
    content = found.get(_CONTENT_TYPE)
    media = None if content is None else content.split(b";", 1)[0].strip().lower()
    if "ce_specversion" in found or any(name.startswith("ce_") for name in found):
        if media not in _PLAIN_CONTENT:
            raise WireError("bad-header", "content-type", got=media, allowed="application/json")
        return _decode_binary(value, found, topic)
    if media in _PLAIN_CONTENT:
        return _decode_plain(value, topic, found.get("traceparent"))
    if media != _STRUCTURED_CONTENT.encode():
        raise WireError("bad-header", "content-type", got=media, allowed=f"application/json or {_STRUCTURED_CONTENT}")
    return _decode_structured(value, topic)


def encode(
    event: Event, *, event_id: str, source: str, occurred_at: datetime, traceparent: str | None = None
) -> Encoded:
    """Encode an event as a Kafka record in binary mode.

    Args:
        event: The event; it gives the record's key, value and type.
        event_id: CloudEvents `id`: 1 to 1,024 characters without control characters.
        source: CloudEvents `source`, with the same limits.
        occurred_at: CloudEvents `time`; it must have a time zone.
        traceparent: W3C trace context; left out where None.

    Raises:
        WireError: `decode` would refuse the record.
    """
    headers = binary_headers(
        event.type, event_id=event_id, source=source, occurred_at=occurred_at, traceparent=traceparent
    )
    value = check_size(event.model_dump_json(by_alias=True).encode(), event.topic)
    return Encoded(event.key().encode(), value, headers)


def binary_headers(
    event_type: str, *, event_id: str, source: str, occurred_at: datetime, traceparent: str | None = None
) -> list[tuple[str, bytes]]:
    """Return the headers of binary mode; the arguments are those of `encode`.

    Raises:
        WireError: `decode` would refuse one of the attributes.
    """
    if occurred_at.tzinfo is None:
        raise WireError("bad-attribute", "time", got=str(occurred_at), allowed="a time with its zone")
    headers = [
        ("content-type", b"application/json"),
        ("ce_specversion", b"1.0"),
        ("ce_type", event_type.encode()),
        ("ce_id", _attribute("id", event_id).encode()),
        ("ce_source", _attribute("source", source).encode()),
        ("ce_time", occurred_at.astimezone(UTC).isoformat().encode()),
    ]
    if traceparent is not None:
        if not _TRACEPARENT.fullmatch(traceparent):
            raise WireError("bad-attribute", "traceparent", got=traceparent, allowed="a W3C traceparent")
        headers.append(("ce_traceparent", traceparent.encode()))
    return headers


def check_size(value: bytes | None, topic: str) -> bytes:
    """Return the value unparsed after checking its size and its nesting.

    Args:
        value: A record's value.
        topic: Name of the topic without the prefix; outside topics have the smaller limit.

    Raises:
        WireError: The value is null, too large or nested too deeply.
    """
    if value is None:
        raise WireError("tombstone", "the value is null", allowed="a JSON object")
    limit = MAX_VALUE_BYTES if topic in _OUTSIDE_TOPICS else MAX_INSIDE_VALUE_BYTES
    if len(value) > limit:
        raise WireError("oversize", "size of the value in bytes", got=len(value), allowed=f"at most {limit}")
    if value.count(b"{") + value.count(b"[") > MAX_DEPTH:
        brackets = _STRINGS.sub(b"", value).translate(None, _NOT_BRACKETS)
        depth = max(accumulate(map(_DEPTH_CHANGE.__getitem__, brackets)), default=0)
        if depth > MAX_DEPTH:
            raise WireError("too-deep", "nesting of the value", got=depth, allowed=f"at most {MAX_DEPTH} levels")
    return value


def parse_event(value: bytes, event_type: str, topic: str) -> Event:
    """Parse a JSON value as an event of the given type.

    Raises:
        WireError: The type is unknown or of another topic, or the value does not fit the model.
    """
    model = EVENTS.get(event_type)
    if model is None:
        raise WireError("unknown-type", "type", got=event_type, allowed=_types_of(topic))
    if model.topic != topic:
        raise WireError("wrong-topic", f"type on topic {topic}", got=event_type, allowed=_types_of(topic))
    try:
        event: Event = model.__pydantic_validator__.validate_json(value)
    except ValidationError as error:
        raise _from_pydantic(error, value, model) from None
    return event


def _checked_headers(headers: Headers) -> dict[str, bytes]:
    # A redrive adds one header to a record that may have been at the limit already.
    if len(headers) > MAX_HEADERS and len(headers) - any(name == REDRIVES_HEADER for name, _ in headers) > MAX_HEADERS:
        raise WireError("too-many-headers", "headers", got=len(headers), allowed=f"at most {MAX_HEADERS}")
    found: dict[str, bytes] = {}
    size = 0
    for name, raw in headers:
        size += len(name) + (len(raw) if raw else 0)
        if name.startswith("ce_") or name == _CONTENT_TYPE:
            if raw is None or name in found:
                raise WireError("bad-header", f"header {shorten(name)}", got="null" if raw is None else "twice")
            found[name] = raw
        elif name == "traceparent" and raw is not None:
            found.setdefault(name, raw)
    if size > MAX_HEADER_BYTES:
        raise WireError("too-many-headers", "bytes of headers", got=size, allowed=f"at most {MAX_HEADER_BYTES}")
    return found


def _decode_plain(value: bytes, topic: str, trace: bytes | None = None) -> Envelope:
    event_type = DEFAULT_TYPES.get(topic)
    if event_type is None:
        raise WireError(
            "missing-attribute", f"an event without ce_ headers on topic {topic}", allowed=sorted(DEFAULT_TYPES)
        )
    event = parse_event(value, event_type, topic)
    return Envelope("", topic, event_type, None, event, _valid_traceparent(trace))


def _decode_binary(value: bytes, found: Mapping[str, bytes], topic: str) -> Envelope:
    attributes = []
    for name in _BINARY_HEADERS:
        raw = found.get(name)
        if raw is None:
            raise WireError("missing-attribute", f"header {name}", got=sorted(found), allowed=_BINARY_HEADERS)
        attributes.append(_header_text(name, raw))
    version, event_type, event_id, source = attributes
    _check_version(version)
    raw_time = found.get("ce_time")
    time = None if raw_time is None else _time(_header_text("ce_time", raw_time))
    event = parse_event(value, event_type, topic)
    return Envelope(
        event_id,
        source,
        event_type,
        time,
        event,
        _valid_traceparent(found.get("ce_traceparent") or found.get("traceparent")),
    )


def _decode_structured(value: bytes, topic: str) -> Envelope:
    try:
        parsed = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise _not_json(value, str(error)) from None
    if not isinstance(parsed, dict):
        raise WireError("not-object", "the value", got=type(parsed).__name__, allowed="a JSON object")
    attributes = []
    for name in ("specversion", "type", "id", "source"):
        if name not in parsed:
            raise WireError("missing-attribute", name, got=sorted(parsed), allowed="all of the required ones")
        attributes.append(_text_of(parsed, name))
    version, event_type, event_id, source = attributes
    _check_version(version)
    media = _text_of(parsed, "datacontenttype", "application/json").split(";", 1)[0].strip().lower()
    if media != "application/json" or not isinstance(parsed.get("data"), dict):
        raise WireError(
            "bad-attribute", "data", got=f"{media}, {type(parsed.get('data')).__name__}", allowed="a JSON object"
        )
    time = _time(_text_of(parsed, "time")) if parsed.get("time") is not None else None
    trace = parsed.get("traceparent")
    event = parse_event(orjson.dumps(parsed["data"]), event_type, topic)
    return Envelope(
        event_id, source, event_type, time, event, trace if isinstance(trace, str) and _is_traceparent(trace) else None
    )


def _text_of(parsed: Mapping[str, object], name: str, default: str | None = None) -> str:
    got = parsed.get(name, default)
    if not isinstance(got, str):
        raise WireError("bad-attribute", name, got=type(got).__name__, allowed="a string")
    return _attribute(name, got)


def _header_text(name: str, raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise WireError("bad-header", f"header {name}", got=raw[:80], allowed="UTF-8") from None
    return _attribute(name, text)


def _attribute(name: str, text: str) -> str:
    if 0 < len(text) <= MAX_ATTRIBUTE_CHARS and text.isascii() and text.isprintable():
        return text
    if not 0 < len(text) <= MAX_ATTRIBUTE_CHARS or _CONTROL.search(text) or not _encodable(text):
        raise WireError(
            "bad-attribute", name, got=text, allowed=f"1 to {MAX_ATTRIBUTE_CHARS} characters, none of them control"
        )
    return text


def _encodable(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _check_version(version: str) -> None:
    if version != "1.0":
        raise WireError("bad-attribute", "specversion", got=version, allowed="1.0")


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is not None:
            return time.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise WireError("bad-attribute", "time", got=text, allowed="RFC 3339 with a zone, for example 2026-01-31T12:00:00Z")


def _valid_traceparent(raw: bytes | None) -> str | None:
    """Return the traceparent, or None where it is invalid: W3C says to ignore an invalid one, not to fail."""
    if raw is None or len(raw) > 64:
        return None
    text = raw.decode("latin-1")
    return text if _is_traceparent(text) else None


def _is_traceparent(text: str) -> bool:
    return _TRACEPARENT.fullmatch(text) is not None


def _types_of(topic: str) -> list[str]:
    return sorted(name for name, model in EVENTS.items() if model.topic == topic)


def _not_json(value: bytes, message: str) -> WireError:
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return WireError("not-utf8", f"byte {error.start} of the value", got=value[error.start : error.start + 8].hex())
    return WireError("not-json", "the value", got=value[:120], allowed=f"a JSON object ({shorten(message)})")


def _from_pydantic(error: ValidationError, value: bytes, model: type[Event]) -> WireError:
    """Return pydantic's most useful complaint as a WireError: missing fields first, then unknown ones, then the rest."""
    found = error.errors(include_url=False, include_context=False)
    first = min(found, key=lambda e: _COMPLAINT_ORDER.get(e["type"], 2))
    field = shorten(".".join(str(part) for part in first["loc"]))
    match first["type"]:
        case "json_invalid":
            return _not_json(value, first["msg"])
        case "missing":
            return WireError("missing-field", field, got="nothing", allowed="a value: the field is required")
        case "extra_forbidden":
            return WireError("unknown-field", field, got=first["input"], allowed=_fields(model.model_fields))
        case "model_type" | "model_attributes_type" if not first["loc"]:
            return WireError("not-object", "the value", got=type(first["input"]).__name__, allowed="a JSON object")
        case _:
            return WireError("bad-field", field, got=first["input"], allowed=first["msg"])


_COMPLAINT_ORDER = {"json_invalid": 0, "missing": 0, "extra_forbidden": 1}


def _fields(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def shorten(value: object, limit: int = 120) -> str:
    """Return a value as text of at most `limit` characters; the text says where it was cut, and is valid UTF-8."""
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
    return cut.encode("utf-8", "replace").decode()
