"""What producers outside the project may write: standards in full, and clear reasons for everything else."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.streams.events.cloudevents import MAX_DEPTH, decode, encode
from perennial.streams.events.event_times import MAX_MS, bounded_end_ms, parse_rfc3339
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.events.models import ExampleAccepted, RetentionRequested, Selector
from perennial.streams.events.wire_error import WireError, shorten
from perennial.streams.intake.validation import Accepted, Acceptor, OriginPartition
from perennial.streams.retain.ledger import LifetimeLimit, expires_ms
from tests.unit.streams.event_strategies import event_of

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DOCUMENT = {"adapter": "acme/support", "document_id": "d1", "text": "hello"}
INTERACTION = {"adapter": "acme", "interaction_id": "i1", "prompt": "p", "response": "r"}
RETENTION = {
    "request_id": "r1",
    "kind": "erase",
    "adapter": "acme",
    "selector": {"subjects": ["s"]},
    "requested_by": "me",
}
STRUCTURED = [("content-type", b"application/cloudevents+json")]
BINARY = [("ce_specversion", b"1.0"), ("ce_type", b"document.observed"), ("ce_id", b"1"), ("ce_source", b"/s")]
HIDDEN = ["\0", "\n", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\u202a", "\u202e", "\u2066", "\u2069"]


def text_of(fields, **changes: object):
    return json.dumps({**fields, **changes}).encode()


def structured(**changes: object):
    whole = {"specversion": "1.0", "type": "document.observed", "id": "1", "source": "/s", "data": DOCUMENT, **changes}
    return json.dumps({key: value for key, value in whole.items() if value is not ...}).encode()


def encoded(data=DOCUMENT):
    return base64.b64encode(data if isinstance(data, bytes) else json.dumps(data).encode()).decode()


def refused(value, headers=None, topic="documents"):
    with pytest.raises(WireError) as error:
        decode(value, headers, topic)
    assert len(error.value.detail) < 2000
    return error.value


# --- CloudEvents in full ----------------------------------------------------------------------------------------------


@given(event_of(DocumentObserved) | event_of(InteractionObserved))
def test_case_02_structured_mode_with_data_base64(event):
    """The JSON event format says that `data_base64` must be decoded; it was refused as data of another type."""
    data = event.model_dump_json(by_alias=True).encode()
    value = structured(type=event.type, data=..., data_base64=base64.b64encode(data).decode())
    assert decode(value, STRUCTURED, event.topic).event == event


@pytest.mark.parametrize(
    ("changes", "reason", "says"),
    [
        ({"data_base64": encoded()}, "bad-attribute", "one of the two"),
        ({"data": ..., "data_base64": "e30"}, "bad-attribute", "base64"),
        ({"data": ..., "data_base64": "e30=\n"}, "bad-attribute", "base64"),
        ({"data": ..., "data_base64": "{}"}, "bad-attribute", "base64"),
        ({"data": ..., "data_base64": "\xe9"}, "bad-attribute", "base64"),
        ({"data": ..., "data_base64": {}}, "bad-attribute", "base64"),
        ({"data": ..., "data_base64": encoded(b"\xff\xfe")}, "not-utf8", "UTF-16"),
        ({"data": ..., "data_base64": encoded(b"[]")}, "not-object", "object"),
        ({"data": ..., "data_base64": encoded(b'"x"')}, "not-object", "object"),
        ({"data": ..., "data_base64": encoded(b"[" * (MAX_DEPTH + 1))}, "too-deep", str(MAX_DEPTH)),
        ({"data": ..., "data_base64": encoded(), "datacontenttype": "application/avro"}, "bad-attribute", "json"),
        ({"data": json.dumps(DOCUMENT)}, "bad-attribute", "object"),
        ({"data": None, "data_base64": None}, "bad-attribute", "object"),
    ],
)  # fmt: skip
def test_case_02_what_is_wrong_with_structured_data_is_said(changes, reason, says):
    """A refusal names the base64, and limits hold for what the base64 hides."""
    error = refused(structured(**changes), STRUCTURED)
    assert (error.reason, says in error.detail) == (reason, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"datacontenttype": None}, {"datacontenttype": "text/json"}, {"datacontenttype": "application/vnd.acme+JSON"},
        {"datacontenttype": "application/json;charset=utf-8"}, {"time": None}, {"subject": None, "extension": 5},
        {"data": None, "data_base64": encoded()}, {"data": ..., "data_base64": encoded(b"\xef\xbb\xbf" + text_of(DOCUMENT))},
        {"data_base64": None}, {"traceparent": None},
    ],
)  # fmt: skip
def test_case_02_unset_attributes_and_every_json_type_are_read(changes):
    """JSON event format: null is unset (2.2), every `*/json` and `*/*+json` is JSON (3.1.1)."""
    assert decode(structured(**changes), STRUCTURED, "documents").event == DocumentObserved(**DOCUMENT)


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/cloudevents+json", b"Application/CloudEvents+JSON", b"application/cloudevents+json; charset=UTF-8",
        b"application/cloudevents+json;charset=utf-8",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "extra", [BINARY, BINARY[:1], [("ce_id", None)], [("ce_id", b"1"), ("ce_id", b"\xff")], [("ce_time", b"yesterday")]]
)
def test_case_03_structured_mode_with_redundant_headers(content_type, extra):
    """Kafka binding, section 3: the content type decides; 3.3.3: the headers of binary mode may be there as well."""
    event = decode(structured(id="from the value"), [("content-type", content_type), *extra], "documents")
    assert (event.id, event.event) == ("from the value", DocumentObserved(**DOCUMENT))


@pytest.mark.parametrize("extra", [[], BINARY])
@pytest.mark.parametrize("format_", ["-batch+json", "+avro", "+protobuf", "-batch+avro", ""])
def test_case_03_batches_and_other_formats_are_refused_by_name(format_, extra):
    """The Kafka binding has no batched mode; the refusal says one event per record."""
    value = f"[{structured().decode()}]".encode()
    error = refused(value, [*extra, ("content-type", f"application/cloudevents{format_}".encode())])
    assert error.reason == "bad-header"
    assert f"application/cloudevents{format_}" in error.detail
    assert "one event per record" in error.detail


@pytest.mark.parametrize("media", [b"application/json", b"text/json; charset=utf-8", b"application/vnd.acme+json", b""])
def test_case_03_binary_and_plain_values_of_every_json_type_are_read(media):
    for headers in ([], BINARY, [*BINARY, ("ce_subject", None), ("ce_x", b"1"), ("ce_x", b"2")]):
        event = decode(text_of(DOCUMENT), [*headers, ("content-type", media)], "documents").event
        assert event == DocumentObserved(**DOCUMENT)


# --- Times ------------------------------------------------------------------------------------------------------------

TIMES = {
    "2026-01-31T12:00:00Z": datetime(2026, 1, 31, 12, tzinfo=UTC),
    "2026-01-31t12:00:00z": datetime(2026, 1, 31, 12, tzinfo=UTC),
    "2026-01-31 12:00:00Z": datetime(2026, 1, 31, 12, tzinfo=UTC),
    "2026-01-31T12:00:00.1234567899999Z": datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC),
    "2026-01-31T12:00:00.5-00:00": datetime(2026, 1, 31, 12, 0, 0, 500000, tzinfo=UTC),
    "2026-01-31T23:30:00-23:59": datetime(2026, 2, 1, 23, 29, tzinfo=UTC),
    "2016-12-31T23:59:60Z": datetime(2016, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    "2016-12-31t23:59:60.25z": datetime(2016, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    "1990-12-31T15:59:60-08:00": datetime(1990, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    "9999-12-31T23:59:60Z": datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
}


@pytest.mark.parametrize("text", TIMES)
def test_case_04_rfc_3339_in_full(text):
    """The attribute `time` and every time in a body take lower case, leap seconds, any decimals and -00:00."""
    assert decode(text_of(DOCUMENT), [*BINARY, ("ce_time", text.encode())], "documents").time == TIMES[text]
    assert decode(structured(time=text), STRUCTURED, "documents").time == TIMES[text]
    document = decode(text_of(DOCUMENT, observed_at=text, expires_at=text), None, "documents").event
    assert (document.observed_at, document.expires_at) == (TIMES[text], TIMES[text])
    interaction = decode(text_of(INTERACTION, observed_at=text, expires_at=text), None, "interactions").event
    assert (interaction.observed_at, interaction.expires_at) == (TIMES[text], TIMES[text])
    request = decode(text_of(RETENTION, due_at=text, selector={"before": text}), None, "retention").event
    assert (request.due_at, request.selector.before) == (TIMES[text], TIMES[text])


@pytest.mark.parametrize(
    "text",
    ["", "now", "2026-01-31", "2026-01-31T12:00:00", "2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "12:00:00Z",
     "2026-01-31T12:60:00Z", "2026-01-31T12:00:61Z", "\u0662026-01-31T12:00:00Z"],
)  # fmt: skip
def test_case_04_what_is_no_rfc_3339_is_refused(text):
    """A time that is none is an error of the producer's, and is said, although nothing depends on it."""
    assert refused(text_of(DOCUMENT), [*BINARY, ("ce_time", text.encode())]).reason == "bad-attribute"
    assert refused(text_of(DOCUMENT, observed_at=text)).reason == "bad-field"


def test_case_04_a_time_that_python_cannot_hold_in_utc_is_left_out():
    for text in ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:60-14:00"):
        assert decode(text_of(DOCUMENT), [*BINARY, ("ce_time", text.encode())], "documents").time is None


@given(
    st.text(max_size=40)
    | st.from_regex(
        r"[0-9]{4}-[01][0-9]-[0-3][0-9][Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,12})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
    )
)
def test_case_04_reading_a_time_raises_nothing_but_value_error(text):
    try:
        time = parse_rfc3339(text)
    except ValueError:
        return
    assert time is None or time.utcoffset().total_seconds() == 0


# --- Encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [None, BINARY])
def test_case_07_a_byte_order_mark_of_utf8_is_ignored(headers):
    """RFC 8259, section 8.1, allows parsers to ignore the mark that Notepad and PowerShell write."""
    assert decode(b"\xef\xbb\xbf" + text_of(DOCUMENT), headers, "documents").event == DocumentObserved(**DOCUMENT)
    assert decode(b"\xef\xbb\xbf" + structured(), STRUCTURED, "documents").event == DocumentObserved(**DOCUMENT)
    assert refused(b"\xef\xbb\xbf").reason == "not-json"


@pytest.mark.parametrize("headers", [None, BINARY, STRUCTURED])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_case_07_other_encodings_are_refused_by_name(encoding, headers):
    """A value in UTF-16 or UTF-32, with or without a mark, is refused with a reason that says so."""
    error = refused(text_of(DOCUMENT).decode().encode(encoding), headers)
    assert error.reason == "not-utf8"
    assert encoding[:6].upper() in error.detail
    assert "UTF-8" in str(error.remedy)


# --- Control characters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", HIDDEN, ids=ascii)
@pytest.mark.parametrize(
    ("topic", "field"),
    [("documents", field) for field in ("document_id", "source", "domain", "subjects", "supersedes", "adapter")]
    + [("interactions", field) for field in ("interaction_id", "subjects")]
    + [("retention", field) for field in ("request_id", "superseded_by", "requested_by")],
)
def test_attack_q_terminal_escapes_in_names(topic, field, character):
    """Ids and names of outside events reach terminals and logs; hidden characters in them are refused and escaped."""
    fields = {"documents": DOCUMENT, "interactions": INTERACTION, "retention": RETENTION}[topic]
    name = f"a{character}]0;PWNED"
    error = refused(text_of(fields, **{field: [name] if field in {"subjects", "supersedes"} else name}), None, topic)
    assert error.reason == "bad-field"
    assert field in error.message
    assert f"U+{ord(character):04X}" in error.detail
    assert "]0;PWNED" in error.detail
    assert character not in error.detail
    assert character not in str(error)


@pytest.mark.parametrize("character", HIDDEN, ids=ascii)
def test_attack_q_hidden_characters_in_attributes(character):
    """The attributes id and source of outside events hold none either, in both modes and when they are written."""
    raw = f"a{character}b".encode()
    for name in ("id", "source"):
        headers = [(key, raw if key == f"ce_{name}" else value) for key, value in BINARY]
        assert refused(text_of(DOCUMENT), headers).reason == "bad-attribute"
        assert refused(structured(**{name: raw.decode()}), STRUCTURED).reason == "bad-attribute"
        with pytest.raises(WireError):
            encode(DocumentObserved(**DOCUMENT), **{"event_id": "1", "source": "/s", "occurred_at": NOW,
                                                    "event_id" if name == "id" else name: raw.decode()})  # fmt: skip


def test_attack_q_texts_keep_their_characters():
    """Texts are data: they hold whatever JSON allows. Names keep letters, joiners and direction marks of all scripts."""
    text = "".join(HIDDEN)
    assert decode(text_of(DOCUMENT, text=text), None, "documents").event.text == text
    assert decode(text_of(INTERACTION, prompt=text), None, "interactions").event.prompt == text
    for name in ("Ren\u00e9 \u90f5 \U0001f469\u200d\U0001f52c", "\u05d0\u200f", "\u0646\u200c\u0627", "a\u00a0b"):
        assert decode(text_of(DOCUMENT, document_id=name), None, "documents").event.document_id == name


def test_attack_q_a_lone_surrogate_is_no_text():
    for field in ("document_id", "text", "source"):
        value = text_of({**DOCUMENT, field: "x"}).replace(b'"x"', b'"a\\ud800"')
        assert refused(value).reason == "not-json"


def test_attack_q_records_of_older_versions_stay_readable():
    """What older versions accepted is in internal topics and in the store, and has to be readable and forgettable."""
    name = "\x1b]0;PWNED\x07\u202e"
    origin = {"cluster_id": "c", "topic": "t", "topic_id": "i", "partition": 0, "offset": 1, "timestamp_ms": 5}
    example = {"adapter": "acme", "example_id": "0" * 32, "kind": "document", "document_id": name, "learn": True,
               "text": "x", "source": name, "subjects": [name], "supersedes": [name], "origin": origin}  # fmt: skip
    stored = ExampleAccepted.model_validate_json(json.dumps(example))
    assert stored.document_id == name
    request = RetentionRequested.model_validate_json(text_of(RETENTION, request_id=name, requested_by=name))
    assert request.request_id == name
    selector = {"document_ids": [name], "subjects": [name], "sources": [name]}
    read = decode(text_of(RETENTION, selector=selector), None, "retention").event
    assert read.selector == Selector(**selector)
    assert read.selector.matches(stored)


@given(st.text())
def test_attack_q_what_an_error_shows_can_be_printed(text):
    shown = shorten(text)
    assert not set(shown) & set(HIDDEN)
    shown.encode()


@settings(max_examples=300)
@given(st.integers() | st.integers(4000, 6000).map(lambda n: 10**n) | st.floats() | st.text() | st.binary())
def test_attack_q_every_value_can_be_shown(value):
    assert len(WireError("bad-field", "f", got=value).detail) < 1000


# --- Ends beyond the calendar -----------------------------------------------------------------------------------------


def test_case_01_an_end_after_the_year_9999_means_for_ever():
    """An end that cannot be written as a date is read as no end, at one place."""
    assert bounded_end_ms(0) == 0
    assert bounded_end_ms(MAX_MS) == MAX_MS
    assert bounded_end_ms(MAX_MS + 1) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"retention_class": "P9999Y"}, None),
        ({"retention_class": "P9999Y9999M9999W999999DT999999H"}, None),
        ({"expires_at": "9999-12-31T23:59:59-14:00"}, None),
        ({"expires_at": "9999-12-31T23:59:60-23:59"}, None),
        ({"expires_at": "9999-12-31T23:59:59Z"}, 253_402_300_799_000),
        ({"retention_class": "P9999Y", "expires_at": "2100-01-01T00:00:00Z"}, 4_102_444_800_000),
    ],
)
@pytest.mark.parametrize("published_ms", [0, 1_700_000_000_000, MAX_MS - 1])
def test_case_01_keep_for_ever_is_accepted_and_never_expires(fields, expected, published_ms):
    """One event whose life ends after the year 9999 is accepted, and every reader can reckon with its end."""
    acceptor = Acceptor(OriginPartition("c", "t", "i", 0, "documents"), 10, False)
    decision = acceptor.accept(text_of(DOCUMENT, **fields), None, 0, published_ms)
    if expected is not None and expected <= published_ms:
        assert decision.reason == "expired"
        return
    assert isinstance(decision, Accepted)
    example = decode(decision.value, decision.headers, "examples").event
    assert expires_ms(example, ()) == expected
    for_ever = LifetimeLimit(Selector(document_ids=["d1"]), 10**15)
    assert expires_ms(example, [for_ever]) == expected
