"""No record from outside raises in intake, takes long, or becomes an example that a later role cannot read."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.streams.events.cloudevents import MAX_INSIDE_VALUE_BYTES, MAX_VALUE_BYTES, decode
from perennial.streams.events.dead_letter import MAX_DEAD_LETTER_BYTES, decode_dead_letter, encode_dead_letter
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.intake.validation import Accepted, Acceptor, Duplicate, OriginPartition, Refused
from perennial.streams.retain.ledger import expires_ms
from tests.unit.streams.event_strategies import event_of
from tests.unit.streams.test_cloudevents import NOW, json_like, raw_headers

FIELDS = {
    "documents": {"adapter": '"acme"', "document_id": '"d"', "text": '"t"', "source": '"s"', "domain": '"d"',
                  "subjects": '["p"]', "retention_class": '"P1D"', "expires_at": '"2999-01-01T00:00:00Z"',
                  "supersedes": '["e"]', "observed_at": '"2020-01-01T00:00:00Z"'},
    "interactions": {"adapter": '"acme"', "interaction_id": '"i"', "prompt": '"p"', "response": '"r"',
                     "correction": '"c"', "rating": "0.5", "subjects": '["p"]', "retention_class": '"P1D"',
                     "expires_at": '"2999-01-01T00:00:00Z"', "observed_at": '"2020-01-01T00:00:00Z"'},
}  # fmt: skip
HOSTILE = [
    "1e400", "-1e400", "1e-400", "-0", "-0.0", "0.1e99999999999", "1" + "0" * 4000, "1" + "0" * 5000, "9" * 100_000,
    "NaN", "Infinity", "-Infinity", "null", "true", "[]", "{}", '""', '" "', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"',
    '"\\uffff"', '"\\ud83d\\ude00"', '"' + "x" * 300_000 + '"', '"' + "\\u0001" * 60_000 + '"', "[" * 40 + "]" * 40,
    "[" * 31 + "]" * 31, '{"a":' * 30 + "1" + "}" * 30, "[" + "0," * 200_000 + "0]", '["x",' * 20 + "1" + "]" * 20,
    '"9999-12-31T23:59:60-23:59"', '"0001-01-01T00:00:00+23:59"', '"0000-00-00T00:00:00Z"', "253402300800", "-62135596801",
    "1e18", '"P9999Y9999M9999W999999DT999999H"', '"P' + "9" * 5000 + 'D"', '"*"', '"a/*"', '"../../etc"', '"a\\n"',
]  # fmt: skip
AT_MS = 1_700_000_000_000


def acceptor(topic):
    return Acceptor(OriginPartition("c", topic, "i", 0, topic), 100, True)


def check(value, headers, topic, offset=0, at_ms=AT_MS):
    """Decide about a record, and prove that whatever comes of it can be written and read again."""
    decision = acceptor(topic).accept(value, headers, offset, at_ms)
    if isinstance(decision, Accepted):
        assert len(decision.value) <= MAX_INSIDE_VALUE_BYTES
        example = decode(decision.value, decision.headers, "examples").event
        assert expires_ms(example, ()) is None or expires_ms(example, ()) <= 253_402_300_799_999
        assert example.model_dump_json()
        return decision
    assert isinstance(decision, Refused)
    assert decision.detail
    assert len(decision.detail) < 2000
    written = encode_dead_letter(
        value, headers, reason=decision.reason, stage="intake", detail=decision.detail, topic=topic, partition=0,
        offset=offset, at=NOW,
    )  # fmt: skip
    size = len(written[0] or b"") + sum(len(name.encode()) + len(raw or b"") for name, raw in written[1])
    assert size <= MAX_DEAD_LETTER_BYTES
    assert decode_dead_letter(*written).reason == decision.reason
    return decision


@settings(max_examples=500)
@given(st.none() | st.binary(max_size=400) | json_like, st.none() | raw_headers,
       st.sampled_from(["documents", "interactions"]), st.integers(0, 2**63 - 1), st.integers(-(2**63), 2**63 - 1))  # fmt: skip
def test_attack_b_arbitrary_bytes_and_headers_are_decided_about(value, headers, topic, offset, at_ms):
    """A record that breaks a function would end the role at every start; every one is accepted or refused."""
    check(value, headers, topic, offset, at_ms)


@pytest.mark.parametrize("topic", list(FIELDS))
@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: text[:20])
def test_attack_b_hostile_values_in_every_field(topic, hostile):
    """Huge numbers, deep and long values, times beyond the calendar, in each field, plain and structured, in bounded time."""
    started = time.process_time()
    for name in FIELDS[topic]:
        fields = {**FIELDS[topic], name: hostile}
        value = ("{" + ",".join(f'"{key}":{text}' for key, text in fields.items()) + "}").encode()
        check(value, None, topic)
        kind = DocumentObserved.type if topic == "documents" else InteractionObserved.type
        whole = b'{"specversion":"1.0","type":"%s","id":"1","source":"s","data":%s}' % (kind.encode(), value)
        check(whole, [("content-type", b"application/cloudevents+json")], topic)
    assert time.process_time() - started < 10


@given(st.data(), event_of(DocumentObserved) | event_of(InteractionObserved))
def test_attack_b_a_repeated_key_counts_once_and_the_same_in_every_mode(data, event):
    """JSON allows repeated names; the last one counts, whichever parser reads it."""
    fields = json.loads(event.model_dump_json(exclude_none=True))
    name = data.draw(st.sampled_from(sorted(fields)))
    whole = json.dumps(fields)
    value = f'{{"{name}": 5, {whole[1:]}'.encode()
    plain = check(value, None, event.topic)
    structured = b'{"specversion":"0.3","specversion":"1.0","type":"%s","id":"1","source":"s","data":%s}'
    other = check(
        structured % (event.type.encode(), value), [("content-type", b"application/cloudevents+json")], event.topic
    )
    assert type(plain) is type(other)
    if isinstance(plain, Accepted):
        assert plain.value == other.value
        assert plain.example_id == check(whole.encode(), None, event.topic).example_id


@pytest.mark.parametrize(
    "value",
    [
        b"{" + b",".join(b'"k%d":0' % n for n in range(90_000)) + b"}",
        b'{"subjects":[' + b"0," * 500_000 + b"0]}",
        b'{"adapter":"a","document_id":"d","text":"t","subjects":['
        + b",".join([b'"' + b"x" * 300 + b'"'] * 3000)
        + b"]}",
        b'{"text":"' + b"\\u0001" * 170_000 + b'"}',
        b'{"' + b"k" * 1_000_000 + b'":1}',
        b" " * MAX_VALUE_BYTES,
        b"\x00" * MAX_VALUE_BYTES,
        b"[" * MAX_VALUE_BYTES,
        b'{"a":' * 200_000,
        b'"' + b"\\" * (MAX_VALUE_BYTES - 1),
        b"1" * MAX_VALUE_BYTES,
        b"\xef\xbb\xbf" * 300_000,
    ],
    ids=range(12),
)
def test_attack_b_the_worst_record_takes_bounded_time(value):
    """No value of the largest size takes more than a few times what parsing it takes."""
    started = time.process_time()
    for headers in (None, [("content-type", b"application/cloudevents+json")]):
        for topic in FIELDS:
            assert isinstance(check(value, headers, topic), Refused)
    assert time.process_time() - started < 20


@given(st.lists(st.tuples(st.sampled_from(["ce_id", "ce_type", "content-type", "x", "ce_\u202e", "\x1b"]),
                          st.none() | st.binary(max_size=2000)), max_size=80))  # fmt: skip
def test_attack_b_any_headers_are_decided_about(headers):
    check(b'{"adapter":"a","document_id":"d","text":"t"}', headers, "documents")


def test_attack_b_decisions_stay_right_after_hostile_records():
    """A refused record changes nothing for the ones behind it."""
    window = acceptor("documents")
    good = b'{"adapter":"a","document_id":"d","text":"t"}'
    assert isinstance(window.accept(good, None, 0, AT_MS), Accepted)
    for offset, hostile in enumerate(HOSTILE, start=1):
        window.accept(f'{{"adapter":"a","document_id":"d","text":{hostile},"x":1}}'.encode(), None, offset, AT_MS)
    assert isinstance(window.accept(good, None, 90, AT_MS), Duplicate)
