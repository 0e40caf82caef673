"""Encode events as CloudEvents 1.0 Kafka records, and decode records into events.

`decode` reads binary mode (`ce_*` headers, JSON value), structured mode (content type `application/cloudevents+json`,
with `data` or `data_base64`) and plain JSON without `ce_*` headers. The content type decides first: in structured mode,
`ce_*` headers are redundant and are not read. Batched mode is refused, because the Kafka binding has none. `encode`
writes binary mode. Sizes and nesting are checked before anything is parsed, and whatever the bytes are, `decode` raises
nothing but WireError.

Sources: CloudEvents 1.0.2, its Kafka protocol binding 1.0.2 (section 3) and JSON event format (sections 2.2, 3.1); RFC
3339; RFC 8259, section 8.1, for encodings and byte order marks; W3C Trace Context.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import orjson
from pydantic import ValidationError

from perennial.streams.events.event_times import parse_rfc3339
from perennial.streams.events.fields import Event, OutsideEvent
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.events.models import DEFAULT_TYPES, EVENTS
from perennial.streams.events.wire_error import HIDDEN_CHARACTER, WireError, from_pydantic, hidden_error, not_json

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

Headers: TypeAlias = Sequence[tuple[str, bytes | None]]


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
_BINARY_HEADERS = ("ce_specversion", "ce_type", "ce_id", "ce_source")
_READ_HEADERS = frozenset({*_BINARY_HEADERS, "ce_time", "content-type"})
_TRACE_HEADERS = frozenset({"ce_traceparent", "traceparent"})
_CONTENT_TYPE = "content-type"
_CLOUDEVENTS_CONTENT = "application/cloudevents"
_STRUCTURED_CONTENT = "application/cloudevents+json"
_JSON_CONTENT = re.compile(r"[^/\s]+/(?:[^/\s]+\+)?json")
_UTF8_MARK = b"\xef\xbb\xbf"
_PLAIN_VALIDATORS: dict[str, Callable[[bytes], Event]] = {
    model.topic: model.__pydantic_validator__.validate_json for model in (DocumentObserved, InteractionObserved)
}
"""What parses a plain event, by topic without the prefix."""


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
    try:
        envelope = decode_without_id(value, headers, topic)
    except (WireError, MemoryError):
        raise
    except Exception as error:  # whatever the bytes of one record break must not end a role
        raise WireError("internal-error", type(error).__name__, got=str(error)) from error
    return envelope if envelope.id else envelope._replace(id=sha256(value or b"").hexdigest())


def decode_without_id(value: bytes | None, headers: Headers | None, topic: str) -> Envelope:
    """Decode one Kafka record as `decode` does, but leave the id of a plain event empty.

    The id would be a hash of the value, and `decode` spends a tenth of its time on it.
    """
    value = check_size(value, topic)
    if not headers:
        return _decode_plain(value, topic)
    found, broken = _read_headers(headers)
    media = _media_type(found.get(_CONTENT_TYPE))
    if media.startswith(_CLOUDEVENTS_CONTENT):
        if media != _STRUCTURED_CONTENT:
            raise WireError(
                "bad-header", "content-type", got=media, allowed=f"{_STRUCTURED_CONTENT}, with one event per record"
            )
        return _decode_structured(value, topic)
    if broken is not None:
        raise broken
    if media and not _JSON_CONTENT.fullmatch(media):
        raise WireError("bad-header", "content-type", got=media, allowed=f"application/json or {_STRUCTURED_CONTENT}")
    if "ce_" in found:
        return _decode_binary(value, found, topic)
    return _decode_plain(value, topic, found.get("traceparent"))


def decode_event(value: bytes | None, headers: Headers | None, topic: str) -> tuple[Event, str | None]:
    """Return the event of one Kafka record and its trace context, as `decode_without_id` finds them.

    A plain document or interaction is given to its model at once. One that the model accepts passes the other checks
    too: it is no deeper than the model, which forbids unknown fields, and has no field that may hold hidden characters.
    So `decode_without_id` is asked only about records that are refused, or that have headers.
    """
    if not headers and value is not None and len(value) <= MAX_VALUE_BYTES and topic in _PLAIN_VALIDATORS:
        try:
            return _PLAIN_VALIDATORS[topic](value), None
        except ValidationError:
            pass  # decode_without_id says what is wrong, or removes a byte order mark
    envelope = decode_without_id(value, headers, topic)
    return envelope.event, envelope.traceparent


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
    if isinstance(event, OutsideEvent):
        _attribute("id", event_id, HIDDEN_CHARACTER)
        _attribute("source", source, HIDDEN_CHARACTER)
        _refuse_hidden(event)
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
    """Return the value unparsed, without a byte order mark of UTF-8, after checking its size and its nesting.

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
    return value[3:] if value.startswith(_UTF8_MARK) else value


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
        raise from_pydantic(error, value, model) from None
    if topic in _OUTSIDE_TOPICS and isinstance(event, OutsideEvent):
        _refuse_hidden(event)
    return event


def _refuse_hidden(event: OutsideEvent) -> None:
    for name in event.visible:
        text = getattr(event, name)
        if text is not None and (hidden := HIDDEN_CHARACTER.search(text)):
            raise hidden_error(name, text, hidden)


def _read_headers(headers: Headers) -> tuple[dict[str, bytes], WireError | None]:
    """Return the headers that decoding needs, and what is wrong with those of binary mode.

    Returns:
        The headers by name, with `ce_` where any header of binary mode is there; and the error that binary mode has to
        raise. Attributes that nothing reads may be null or repeated.

    Raises:
        WireError: There are too many headers, or the content type is null or repeated.
    """
    # A redrive adds one header to a record that may have been at the limit already.
    if len(headers) > MAX_HEADERS and len(headers) - any(name == REDRIVES_HEADER for name, _ in headers) > MAX_HEADERS:
        raise WireError("too-many-headers", "headers", got=len(headers), allowed=f"at most {MAX_HEADERS}")
    found: dict[str, bytes] = {}
    broken: WireError | None = None
    size = 0
    for name, raw in headers:
        size += len(name) + (len(raw) if raw else 0)
        if name in _READ_HEADERS:
            if raw is None or name in found:
                error = WireError("bad-header", f"header {name}", got="null" if raw is None else "twice")
                if name == _CONTENT_TYPE:
                    raise error
                broken = broken or error
            found[name] = raw or b""
        elif name in _TRACE_HEADERS and raw is not None:
            found.setdefault(name, raw)
        if name.startswith("ce_"):
            found["ce_"] = b""
    if size > MAX_HEADER_BYTES:
        raise WireError("too-many-headers", "bytes of headers", got=size, allowed=f"at most {MAX_HEADER_BYTES}")
    return found, broken


def _media_type(content_type: str | bytes | None) -> str:
    """Return the media type without parameters in lower case; empty where there is none."""
    if not content_type:
        return ""
    text = content_type.decode("latin-1") if isinstance(content_type, bytes) else content_type
    return text.split(";", 1)[0].strip().lower()


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
    control = _control_characters(topic)
    for name in _BINARY_HEADERS:
        raw = found.get(name)
        if raw is None:
            got = sorted(found.keys() - {"ce_"})
            raise WireError("missing-attribute", f"header {name}", got=got, allowed=_BINARY_HEADERS)
        attributes.append(_header_text(name, raw, control))
    version, event_type, event_id, source = attributes
    _check_version(version)
    raw_time = found.get("ce_time")
    time = None if raw_time is None else _time(_header_text("ce_time", raw_time, control))
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
        raise not_json(value, str(error)) from None
    if not isinstance(parsed, dict):
        raise WireError("not-object", "the value", got=type(parsed).__name__, allowed="a JSON object")
    attributes = []
    control = _control_characters(topic)
    for name in ("specversion", "type", "id", "source"):
        if parsed.get(name) is None:  # null means unset, JSON event format section 2.2
            raise WireError("missing-attribute", name, got=sorted(parsed), allowed="all of the required ones")
        attributes.append(_text_of(parsed, name, control))
    version, event_type, event_id, source = attributes
    _check_version(version)
    raw_time = parsed.get("time")
    time = None if raw_time is None else _time(_text_of(parsed, "time", control))
    event = parse_event(_structured_data(parsed, topic), event_type, topic)
    trace = parsed.get("traceparent")
    return Envelope(
        event_id, source, event_type, time, event, trace if isinstance(trace, str) and _is_traceparent(trace) else None
    )


def _structured_data(parsed: Mapping[str, object], topic: str) -> bytes:
    """Return the data of a structured event as JSON, from `data` or `data_base64`."""
    media = "application/json"
    if parsed.get("datacontenttype") is not None:
        media = _media_type(_text_of(parsed, "datacontenttype", _CONTROL))
    if not _JSON_CONTENT.fullmatch(media):
        raise WireError("bad-attribute", "datacontenttype", got=media, allowed="application/json")
    data, encoded = parsed.get("data"), parsed.get("data_base64")
    if encoded is None:
        if not isinstance(data, dict):
            raise WireError("bad-attribute", "data", got=type(data).__name__, allowed="a JSON object")
        return orjson.dumps(data)
    if data is not None:
        raise WireError("bad-attribute", "data", got="data and data_base64", allowed="one of the two")
    if not isinstance(encoded, str):
        raise WireError("bad-attribute", "data_base64", got=type(encoded).__name__, allowed="a string in base64")
    try:
        decoded = binascii.a2b_base64(encoded.encode(), strict_mode=True)
    except ValueError as error:
        raise WireError("bad-attribute", "data_base64", got=encoded, allowed=f"base64 ({error})") from None
    return check_size(decoded, topic)


def _control_characters(topic: str) -> re.Pattern[str]:
    """Return which characters attributes may not hold: stored events of Perennial may hold more than those of others."""
    return HIDDEN_CHARACTER if topic in _OUTSIDE_TOPICS else _CONTROL


def _text_of(parsed: Mapping[str, object], name: str, control: re.Pattern[str]) -> str:
    got = parsed.get(name)
    if not isinstance(got, str):
        raise WireError("bad-attribute", name, got=type(got).__name__, allowed="a string")
    return _attribute(name, got, control)


def _header_text(name: str, raw: bytes, control: re.Pattern[str]) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise WireError("bad-header", f"header {name}", got=raw[:80], allowed="UTF-8") from None
    return _attribute(name, text, control)


def _attribute(name: str, text: str, control: re.Pattern[str] = _CONTROL) -> str:
    if 0 < len(text) <= MAX_ATTRIBUTE_CHARS and text.isascii() and text.isprintable():
        return text
    if not 0 < len(text) <= MAX_ATTRIBUTE_CHARS or control.search(text) or not _encodable(text):
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


def _time(text: str) -> datetime | None:
    try:
        return parse_rfc3339(text)
    except ValueError:
        raise WireError(
            "bad-attribute", "time", got=text, allowed="RFC 3339 with a zone, for example 2026-01-31T12:00:00Z"
        ) from None


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
