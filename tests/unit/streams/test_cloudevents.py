"""CloudEvents: decode reverses encode, limits are checked before parsing, and hostile bytes raise only WireError."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perennial.streams.events.cloudevents import (
    MAX_DEPTH,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_INSIDE_VALUE_BYTES,
    MAX_VALUE_BYTES,
    decode,
    decode_event,
    encode,
)
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.events.models import DEFAULT_TYPES
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.topics import TOPICS
from tests.unit.streams.event_strategies import VISIBLE_CHARACTERS, any_event, event_of

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
DOCUMENT = {"adapter": "acme/support", "document_id": "d1", "text": "hello"}
BINARY = [
    ("content-type", b"application/json"), ("ce_specversion", b"1.0"), ("ce_type", b"document.observed"),
    ("ce_id", b"1"), ("ce_source", b"/test"),
]  # fmt: skip
STRUCTURED = [("content-type", b"application/cloudevents+json; charset=utf-8")]

attributes = st.text(VISIBLE_CHARACTERS, min_size=1, max_size=60)
aware = st.datetimes(
    datetime(1, 1, 3), datetime(9999, 12, 29),  # noqa: DTZ001
    timezones=st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)  # fmt: skip


def value_of(**changes: object):
    fields = {**DOCUMENT, **changes}
    return json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()


def reason_of(value, headers=None, topic="documents"):
    with pytest.raises(WireError) as error:
        decode(value, headers, topic)
    assert len(error.value.detail) < 2000
    assert str(error.value)
    return error.value.reason


@given(any_event, attributes, attributes, aware, st.none() | st.just(TRACE))
def test_decode_reverses_encode(event, event_id, source, time, trace):
    written = encode(event, event_id=event_id, source=source, occurred_at=time, traceparent=trace)
    read = decode(written.value, written.headers, event.topic)
    assert read == (event_id, source, event.type, time, event, trace)
    assert written.key == event.key().encode()


@given(event_of(DocumentObserved) | event_of(InteractionObserved), attributes, aware)
def test_structured_and_plain_events_decode_like_binary_ones(event, event_id, time):
    data = json.loads(event.model_dump_json(by_alias=True))
    whole = {"specversion": "1.0", "type": event.type, "id": event_id, "source": "/s", "time": time.isoformat(),
             "datacontenttype": "application/json", "traceparent": TRACE, "data": data}  # fmt: skip
    structured = decode(json.dumps(whole).encode(), STRUCTURED, event.topic)
    assert structured == (event_id, "/s", event.type, time, event, TRACE)

    plain = decode(json.dumps(data).encode(), None, event.topic)
    assert (plain.event, plain.type) == (event, event.type)
    assert plain.id == decode(json.dumps(data).encode(), [("content-type", b"application/json")], event.topic).id


def event_or_error(read):
    try:
        return read()
    except WireError as error:
        return str(error)


def assert_same_event(value, headers, topic):
    found = event_or_error(lambda: decode_event(value, headers, topic))
    whole = event_or_error(lambda: decode(value, headers, topic))
    assert found == (whole if isinstance(whole, str) else (whole.event, whole.traceparent))


@given(
    event_of(DocumentObserved) | event_of(InteractionObserved),
    st.booleans(),
    st.sampled_from([None, "x", 7, {"x": []}]),
)
def test_decode_event_finds_what_decode_finds(event, binary, unknown):
    """Its short way for plain events accepts the same records, and refuses others for the same reason."""
    data = json.loads(event.model_dump_json(by_alias=True))
    headers = encode(event, event_id="1", source="/s", occurred_at=NOW, traceparent=TRACE).headers if binary else None
    assert_same_event(json.dumps(data).encode(), headers, event.topic)
    assert_same_event(b"\xef\xbb\xbf" + json.dumps(data).encode(), headers, event.topic)
    assert_same_event(json.dumps({**data, "unknown": unknown}).encode(), headers, event.topic)
    assert_same_event(json.dumps({**data, "adapter": unknown}).encode(), headers, event.topic)
    assert_same_event(json.dumps(data).encode(), headers, "interactions" if event.topic == "documents" else "documents")


@pytest.mark.parametrize(
    "value",
    [
        None, b"", b"{}", b"[" * 40 + b"]" * 40, b"[" * 300, value_of(text=[[[]]] * 20), value_of(x=json.loads("[" * 40 + "]" * 40)),
        value_of(text="x" * (MAX_VALUE_BYTES + 1)), value_of() + b" " * MAX_VALUE_BYTES, value_of(text="{[" * 60),
        value_of(document_id="a\u202eb"), value_of(source="a\nb"), value_of(text="a\u202eb"),
    ],
    ids=range(13),
)  # fmt: skip
@pytest.mark.parametrize("topic", ["documents", "interactions", "retention", "examples"])
def test_decode_event_refuses_what_decode_refuses(value, topic):
    assert_same_event(value, None, topic)
    assert_same_event(value, [], topic)


def test_the_id_of_a_plain_event_depends_on_its_value():
    first, again, other = (decode(value_of(text=text), [], "documents") for text in ("a", "a", "b"))
    assert first.id == again.id != other.id


topics = st.sampled_from([*TOPICS, "elsewhere"])
raw_headers = st.lists(
    st.tuples(
        st.sampled_from([
            "content-type", "ce_specversion", "ce_type", "ce_id", "ce_source", "ce_time", "ce_traceparent",
            "traceparent", "ce_", "x",
        ]) | st.text(max_size=8),
        st.none() | st.binary(max_size=40) | st.sampled_from([
            b"1.0", b"application/json", b"application/cloudevents+json", b"document.observed", b"", b"\xff", b"\x00",
            b"2026-01-01T00:00:00Z", b"0001-01-01T00:00:00+23:59", b"99999-01-01", TRACE.encode(),
        ]),
    ),
    max_size=12,
)  # fmt: skip
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["specversion", "type", "id", "source", "data", "time", *DOCUMENT, "rating", "subjects"])
        | st.text(max_size=5), inner, max_size=8),
    max_leaves=20,
).map(lambda found: json.dumps(found).encode())  # fmt: skip


@settings(max_examples=400)
@given(st.none() | st.binary(max_size=300) | json_like, st.none() | raw_headers, topics)
def test_decode_event_and_decode_agree_about_arbitrary_bytes(value, headers, topic):
    assert_same_event(value, headers, topic)


@given(st.none() | st.binary(max_size=300) | json_like, st.none() | raw_headers, topics)
@example(b'{"adapter":"a","document_id":"1","text":"\\ud800"}', None, "documents")
@example(b'{"adapter":"a","document_id":"1","text":"x","observed_at":1e999}', None, "documents")
@example(b'{"adapter":"a","document_id":"1","text":"x","observed_at":' + b"9" * 5000 + b"}", None, "documents")
@example(b'{"adapter":"a","interaction_id":"1","prompt":"x","response":"x","rating":NaN}', None, "interactions")
@example(b"[" * 500_000, None, "documents")
@example(b'{"a":' * 100_000, None, "documents")
@example(b'"\\"' * 100_000, None, "documents")
@example(b"\xef\xbb\xbf{}", None, "documents")
@example(
    b'{"specversion":"1.0","type":"document.observed","id":"\\ud800","source":"s","data":{}}', STRUCTURED, "documents"
)
def test_no_bytes_raise_anything_but_wire_error(value, headers, topic):
    try:
        read = decode(value, headers, topic)
    except WireError as error:
        assert error.reason  # noqa: PT017  # most of what is drawn is refused, not all
        error.detail.encode()
    else:
        assert read.event.topic == topic


@settings(max_examples=300)
@given(st.data(), event_of(DocumentObserved))
def test_a_changed_byte_raises_only_wire_error(data, event):
    written = encode(event, event_id="1", source="/s", occurred_at=NOW)
    raw = bytearray(written.value)
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    headers = [list(header) for header in written.headers]
    headers[data.draw(st.integers(0, len(headers) - 1))][1] = data.draw(st.binary(max_size=30))
    try:
        decode(bytes(raw), [tuple(header) for header in headers], "documents")
    except WireError as error:
        assert error.detail  # noqa: PT017  # a change may also be harmless


def test_size_is_checked_before_parsing():
    assert reason_of(b"x" * (MAX_VALUE_BYTES + 1)) == "oversize"
    assert reason_of(b"x" * MAX_VALUE_BYTES) == "not-json"
    assert reason_of(b"x" * (MAX_INSIDE_VALUE_BYTES + 1), BINARY, "examples") == "oversize"
    assert reason_of(b"x" * (MAX_VALUE_BYTES + 1), [*BINARY[:2], ("ce_type", b"example.accepted"), *BINARY[3:]],
                     "examples") == "not-json"  # fmt: skip


def test_depth_counts_only_brackets_outside_strings():
    assert decode(value_of(text='[{"\\' * 300), None, "documents").event.text == '[{"\\' * 300
    deep = b'{"adapter":"a","document_id":"1","text":"x","subjects":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}"
    assert reason_of(deep) == "too-deep"
    flat = value_of(subjects=[[]] * (MAX_DEPTH + 5))
    assert reason_of(flat) == "bad-field"


@pytest.mark.parametrize("value", [b'"' + b'\\"' * 500_000, b'"\\' * 400_000, b'["\\"' * 250_000, b"[]{}" * 250_000])
def test_no_value_makes_the_depth_scan_slow(value):
    # Quadratic work on such a value would run for minutes, into the suite's timeout.
    assert reason_of(b"[" * MAX_DEPTH + value) in {"too-deep", "not-json"}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "tombstone"),
        (b"", "not-json"),
        (b"{", "not-json"),
        (b'{"a": "\xff"}', "not-utf8"),
        (b"[]", "not-object"),
        (b"1", "not-object"),
        (b"null", "not-object"),
        (value_of(text=...), "missing-field"),
        (value_of(txet="x"), "unknown-field"),
        (value_of(text=""), "bad-field"),
        (value_of(text=3), "bad-field"),
        (value_of(adapter="Acme"), "bad-field"),
        (value_of(retention_class="P0D"), "bad-field"),
        (value_of(expires_at="2026-01-01T00:00:00"), "bad-field"),
        (value_of(subjects=["x"] * 65), "bad-field"),
    ],
)
def test_reasons_of_values(value, reason):
    assert reason_of(value) == reason
    assert reason_of(value, BINARY) == reason


def without(name):
    return [header for header in BINARY if header[0] != name]


def put(name, raw):
    return [*without(name), (name, raw)]


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        (without("ce_specversion"), "missing-attribute"),
        (without("ce_type"), "missing-attribute"),
        (without("ce_id"), "missing-attribute"),
        (without("ce_source"), "missing-attribute"),
        ([("ce_time", b"2026-01-01T00:00:00Z")], "missing-attribute"),
        (put("ce_specversion", b"0.3"), "bad-attribute"),
        (put("ce_id", b""), "bad-attribute"),
        (put("ce_id", b"a\nb"), "bad-attribute"),
        (put("ce_id", b"x" * 1025), "bad-attribute"),
        (put("ce_id", b"\xff"), "bad-header"),
        (put("ce_id", None), "bad-header"),
        ([*BINARY, ("ce_id", b"2")], "bad-header"),
        (put("ce_time", b"yesterday"), "bad-attribute"),
        (put("ce_time", b"2026-01-01T00:00:00"), "bad-attribute"),
        (put("ce_type", b"document.burnt"), "unknown-type"),
        (put("ce_type", b"interaction.observed"), "wrong-topic"),
        (put("content-type", b"application/avro"), "bad-header"),
        ([("content-type", b"text/plain")], "bad-header"),
        ([("content-type", b"application/cloudevents-batch+json")], "bad-header"),
        ([("x", b"")] * (MAX_HEADERS + 1), "too-many-headers"),
        ([("x", b"y" * MAX_HEADER_BYTES)], "too-many-headers"),
    ],
)
def test_reasons_of_headers(headers, reason):
    assert reason_of(value_of(), headers) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"specversion": "0.3"}, "bad-attribute"),
        ({"specversion": ...}, "missing-attribute"),
        ({"id": 3}, "bad-attribute"),
        ({"type": "nothing"}, "unknown-type"),
        ({"data": ...}, "bad-attribute"),
        ({"data": "x"}, "bad-attribute"),
        ({"data": {}}, "missing-field"),
        ({"datacontenttype": "text/plain"}, "bad-attribute"),
        ({"time": "now"}, "bad-attribute"),
    ],
)
def test_reasons_of_structured_events(changes, reason):
    whole = {"specversion": "1.0", "type": "document.observed", "id": "1", "source": "/s", "data": DOCUMENT, **changes}
    value = json.dumps({key: value for key, value in whole.items() if value is not ...}).encode()
    assert reason_of(value, STRUCTURED) == reason
    assert reason_of(b"[]", STRUCTURED) == "not-object"
    assert reason_of(b"{", STRUCTURED) == "not-json"


def test_plain_events_need_a_topic_with_a_default_type():
    assert set(DEFAULT_TYPES) == {"documents", "interactions", "retention"}
    for topic in set(TOPICS) - set(DEFAULT_TYPES):
        assert reason_of(value_of(), None, topic) == "missing-attribute"


def test_an_error_names_field_value_and_what_is_allowed():
    with pytest.raises(WireError, match=r"subjects\.1"):
        decode(value_of(subjects=["ok", 5]), None, "documents")
    with pytest.raises(WireError, match=r"2097152.*1048576"):
        decode(b" " * 2**21, None, "documents")
    with pytest.raises(WireError, match=r"document\.observed"):
        decode(value_of(), put("ce_type", b"x"), "documents")


@pytest.mark.parametrize("trace", ["", "x", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", TRACE + "\n", "ff" + TRACE[2:]])
def test_an_invalid_traceparent_is_ignored_when_read_and_refused_when_written(trace):
    assert decode(value_of(), [*BINARY, ("traceparent", trace.encode())], "documents").traceparent is None
    with pytest.raises(WireError):
        encode(DocumentObserved(**DOCUMENT), event_id="1", source="/s", occurred_at=NOW, traceparent=trace)
    assert decode(value_of(), [*BINARY, ("traceparent", TRACE.encode())], "documents").traceparent == TRACE


@pytest.mark.parametrize(
    ("event_id", "source"), [("", "/s"), ("a\x00", "/s"), ("1", ""), ("x" * 1025, "/s"), ("\ud800", "/s")]
)
def test_attributes_that_decode_would_refuse_are_not_encoded(event_id, source):
    with pytest.raises(WireError):
        encode(DocumentObserved(**DOCUMENT), event_id=event_id, source=source, occurred_at=NOW)
    with pytest.raises(WireError):
        encode(DocumentObserved(**DOCUMENT), event_id="1", source="/s", occurred_at=NOW.replace(tzinfo=None))


def test_an_oversized_event_is_not_encoded():
    event = DocumentObserved(**{**DOCUMENT, "text": "\x01" * 200_000})  # six bytes each in JSON
    with pytest.raises(WireError, match="1048576"):
        encode(event, event_id="1", source="/s", occurred_at=NOW)
