"""Dead letters: reading and selecting them, what is sent back, and the progress of redrives."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.streams.deadletters.model import (
    DeadLetterError,
    Selection,
    as_example,
    parse_position,
    parse_since,
    read_dead_letter,
)
from perennial.streams.deadletters.redrive_plan import (
    RedriveProgress,
    RedriveReport,
    dump_progress,
    load_progress,
    plan_redrive,
    redrive_state,
    redriven_record,
)
from perennial.streams.events.cloudevents import MAX_HEADERS, REDRIVES_HEADER, decode
from perennial.streams.events.dead_letter import encode_dead_letter
from perennial.streams.events.wire_error import WireError
from perennial.streams.intake.validation import Accepted, Acceptor, Duplicate, OriginPartition
from perennial.streams.settings import SettingsError

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
DOCUMENT = json.dumps({"adapter": "acme/support", "document_id": "1", "text": "hello"}).encode()


def dead_letter_record(
    value=DOCUMENT, headers=None, *, reason="unknown-field", stage="intake", topic="x-documents", offset=7, at=NOW,
    key=b"k", partition=1,
):  # fmt: skip
    value, headers = encode_dead_letter(
        value, headers, reason=reason, stage=stage, detail="d", topic=topic, partition=partition, offset=41, at=at
    )
    return read_dead_letter(0, offset, key, value, headers, "x-")


def test_the_original_record_is_sent_back_with_its_redrive_count():
    before = [("ce_id", b"1"), ("trace", b"\x00\xff"), ("none", None)]
    # A count that is not the last header was written by the producer, and is dropped.
    back = redriven_record(dead_letter_record(headers=[(REDRIVES_HEADER, b"7"), *before]))
    assert (back.topic, back.partition, back.key, back.value) == ("documents", 1, b"k", DOCUMENT)
    assert back.headers == [*before, (REDRIVES_HEADER, b"1")]


def test_case_02_and_07_an_erasure_finds_texts_in_every_form_that_intake_reads():
    """A dead letter in base64 or with a byte order mark names its document, or a redrive would bring an erased text back."""
    mark, encoded = b"\xef\xbb\xbf", base64.b64encode(DOCUMENT).decode()
    with_mark = base64.b64encode(mark + DOCUMENT).decode()
    values = [
        DOCUMENT, mark + DOCUMENT, json.dumps({"data": json.loads(DOCUMENT)}).encode(),
        json.dumps({"data_base64": encoded}).encode(), mark + json.dumps({"data_base64": with_mark}).encode(),
    ]  # fmt: skip
    for value in values:
        found = dead_letter_record(value)
        assert (found.adapter, as_example(found).document_id, as_example(found).text) == ("acme/support", "1", "hello")
    for value in ({"data_base64": "%"}, {"data_base64": 3}, {"data_base64": "AAAA"}, {"data_base64": "MQ=="}):
        assert as_example(dead_letter_record(json.dumps(value).encode())).document_id == ""


def test_the_turns_of_a_refused_conversation_are_found():
    """Or a redrive would bring an erased conversation back."""
    messages = [["system", "s"], ["user", "q"], ["assistant", "a"], ["user", "p"], ["assistant", "r"]]
    event = {
        "adapter": "acme/support", "interaction_id": "1",
        "messages": [{"role": role, "content": text} for role, text in messages],
    }  # fmt: skip
    found = as_example(dead_letter_record(json.dumps(event).encode()))
    assert [(turn.role, turn.content) for turn in found.history or ()] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
    ]
    assert (found.prompt, found.answer) == ("p", "r")
    corrected = as_example(dead_letter_record(json.dumps({**event, "correction": "c"}).encode()))
    assert (corrected.prompt, corrected.answer) == ("p", "c")
    for broken in ([], [3], [{"role": "user"}], {"role": "user"}, "text"):
        assert as_example(dead_letter_record(json.dumps({**event, "messages": broken}).encode())).prompt is None


def test_the_count_grows_with_every_refusal():
    value, headers = DOCUMENT, [("a", b"b")]
    for redrives in range(4):
        found = dead_letter_record(value, headers)
        assert found.redrives == redrives
        assert redrive_state(found, handled=False, max_redrives=3) == ("quarantined" if redrives == 3 else "waiting")
        _, _, _, value, headers = redriven_record(found)
    assert headers == [("a", b"b"), (REDRIVES_HEADER, b"4")]


def test_the_count_survives_headers_too_large_for_a_dead_letter():
    headers = [("h" * 100, b"x" * 1000)] * 500
    found = dead_letter_record(headers=[*headers, (REDRIVES_HEADER, b"2")])
    assert found.redrives == 2
    assert redrive_state(found, handled=False, max_redrives=3) == "cut"
    assert redrive_state(dead_letter_record(b"x" * 3_000_000), handled=False, max_redrives=3) == "cut"


def test_a_redriven_record_may_have_one_header_more_than_the_limit():
    full = [(f"h{n}", b"") for n in range(MAX_HEADERS)]
    assert decode(DOCUMENT, [*full, (REDRIVES_HEADER, b"1")], "documents").event.document_id == "1"
    for headers in ([*full, ("other", b"")], [*full, (REDRIVES_HEADER, b"1"), (REDRIVES_HEADER, b"1")]):
        with pytest.raises(WireError, match="headers"):
            decode(DOCUMENT, headers, "documents")


@pytest.mark.parametrize("forged", [b"", b"-1", b"x", b"\xff", b"9" * 400, None])
def test_an_invalid_count_counts_as_zero(forged):
    assert dead_letter_record(headers=[(REDRIVES_HEADER, forged)]).redrives == 0


def test_only_topics_of_outside_producers_take_dead_letters_back():
    for topic in ("scored-examples", "adapter-jobs", "x-examples", "elsewhere", "dead-letters"):
        found = dead_letter_record(topic=topic)
        assert redrive_state(found, handled=False, max_redrives=3) == "inside"
        with pytest.raises(DeadLetterError):
            redriven_record(found)
    for topic in ("documents", "x-interactions", "retention"):
        assert redrive_state(dead_letter_record(topic=topic), handled=False, max_redrives=3) == "waiting"


def test_a_foreign_record_is_unreadable():
    found = read_dead_letter(0, 3, None, b"\xff", [("a", None)], "")
    assert redrive_state(found, handled=False, max_redrives=3) == "unreadable"
    assert (found.position, found.adapter, found.dead_letter.headers) == ("0:3", "", [("a", None)])


def test_the_adapter_comes_from_the_value_then_from_the_key():
    assert dead_letter_record().adapter == "acme/support"
    assert dead_letter_record(json.dumps({"specversion": "1.0", "data": {"adapter": "b"}}).encode()).adapter == "b"
    assert dead_letter_record(b"\xff", key=b"by-key").adapter == "by-key"
    assert dead_letter_record(b"[" * 100_000, key=None).adapter == ""
    assert dead_letter_record(None, key=b"\xff").adapter == "\ufffd"


@pytest.mark.parametrize(
    ("selection", "selected"),
    [
        (Selection(), True),
        (Selection(reason="unknown-field", stage="intake", topic="documents", adapter="acme/*"), True),
        (Selection(topic="x-documents", adapter="acme/support", since=NOW), True),
        (Selection(reason="not-json"), False),
        (Selection(stage="curate"), False),
        (Selection(topic="interactions"), False),
        (Selection(adapter="acme"), False),
        (Selection(since=NOW + timedelta(seconds=1)), False),
    ],
)
def test_filters(selection, selected):
    assert selection.matches(dead_letter_record()) is selected


def test_since():
    assert parse_since("90s", NOW) == NOW - timedelta(seconds=90)
    assert parse_since("7d", NOW) == NOW - timedelta(days=7)
    assert parse_since("2026-01-31T12:00:00", NOW) == NOW
    assert parse_since("2026-01-31T13:00:00+01:00", NOW) == NOW
    assert parse_since("2026-01-31t12:00:00z", NOW) == NOW
    for text in ("", "yesterday", "5w", "-3h", "999999d999"):
        with pytest.raises(SettingsError):
            parse_since(text, NOW)
    with pytest.raises(SettingsError):
        parse_since("999999d", NOW)


def test_positions():
    assert parse_position("3:120") == (3, 120)
    for text in ("3", ":", "a:1", "1:-2", "1:2:3", "²:1"):
        with pytest.raises(SettingsError):
            parse_position(text)


def test_a_batch_is_planned():
    batch = [
        dead_letter_record(offset=0), dead_letter_record(offset=1, reason="not-json"), dead_letter_record(offset=2, topic="examples"), dead_letter_record(offset=3),
        dead_letter_record(offset=4, headers=[(REDRIVES_HEADER, b"3")]), dead_letter_record(offset=5), dead_letter_record(offset=6),
    ]  # fmt: skip
    progress = RedriveProgress()
    progress.add(3, 4)
    plan = plan_redrive(batch, Selection(reason="unknown-field"), {0: progress}, max_redrives=3, room=2)
    assert [each.offset for each in plan.send] == [0, 5]
    assert [each.offset for each in plan.unsendable] == [2]
    assert plan.left == {"inside": 1, "quarantined": 1}


@settings(deadline=None)
@given(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 120), st.integers(0, 12)), max_size=30))
def test_progress_is_a_set_of_offsets_and_survives_storing(first, ranges):
    progress, model = RedriveProgress(first), set(range(first))
    for start, length in ranges:
        progress.add(start, start + length)
        model |= set(range(start, start + length))
        model |= set(range(next(n for n in range(200) if n not in model)))
    again = load_progress(dump_progress("id", {3: progress}), "id")[3]
    for each in (progress, again):
        assert [n for n in range(150) if n in each] == [n for n in range(150) if n in model]
    assert progress.first == next(n for n in range(200) if n not in model)


def test_progress_advances_with_the_start_of_the_log():
    progress = RedriveProgress(2, [(5, 7), (20, 21)])
    progress.advance(6)
    assert progress.first == 7
    progress.advance(30)
    assert progress.to_numbers() == [30]
    progress.advance(3)
    assert progress.first == 30


def test_progress_of_a_deleted_topic_of_the_same_name_is_ignored():
    assert load_progress(dump_progress("old", {0: RedriveProgress(7)}), "new") == {}


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"topic_id":"id"}', b'{"topic_id":"id","partitions":{"x":[1]}}', b'{"topic_id":"id","partitions":[1]}',
     *(b'{"topic_id":"id","partitions":{"0":%s}}' % each for each in (b"[]", b"[1,2]", b"[1,0,1]", b"[1,2,-1]", b"[1.5]", b'"x"', b"[null]"))],
)  # fmt: skip
def test_invalid_progress_raises(data):
    with pytest.raises(DeadLetterError, match="cannot be read"):
        load_progress(data, "id")


def test_forged_reasons_do_not_fill_the_histogram():
    report = RedriveReport()
    for number in range(1000):
        report.add_sent(dead_letter_record(reason=f"r{number}" * 100))
    assert len(report.sent) <= 201
    assert report.sent.total() == 1000


def test_a_window_rebuilt_by_a_newer_version_accepts_a_redriven_record_once():
    """The older version refused the record at offset 0; the newer one counts it as accepted when it rebuilds."""
    rebuilt = Acceptor(OriginPartition("c", "documents", "t", 0, "documents"), window=100, learn_turns=False)
    decided = [
        type(rebuilt.accept(DOCUMENT, headers, offset, 1))
        for offset, headers in enumerate([
            None, [(REDRIVES_HEADER, b"1")], [(REDRIVES_HEADER, b"1")], [(REDRIVES_HEADER, b"2")], None, [(REDRIVES_HEADER, b"2")],
        ])
    ]  # fmt: skip
    assert decided == [Accepted, Accepted, Duplicate, Accepted, Duplicate, Duplicate]
