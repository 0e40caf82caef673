"""What a dead letter is, which go back and as what, and the progress that a committed offset can hold."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.streams.deadletters.model import (
    DeadLetterError,
    RedriveProgress,
    RedriveReport,
    Selection,
    decide,
    dump_progress,
    load_progress,
    parse_place,
    parse_since,
    read_dead_letter,
    resend,
    state_of,
)
from perennial.streams.events.cloudevents import MAX_HEADERS, REDRIVES_HEADER, WireError, decode
from perennial.streams.events.dead_letter import encode_dead_letter
from perennial.streams.intake.validation import Accepted, Acceptor, Duplicate, OriginPartition
from perennial.streams.settings import SettingsError

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
DOCUMENT = json.dumps({"adapter": "acme/support", "document_id": "1", "text": "hello"}).encode()


def letter(
    value=DOCUMENT, headers=None, *, reason="unknown-field", stage="intake", topic="x-documents", offset=7, at=NOW,
    key=b"k", partition=1,
):  # fmt: skip
    value, headers = encode_dead_letter(
        value, headers, reason=reason, stage=stage, detail="d", topic=topic, partition=partition, offset=41, at=at
    )
    return read_dead_letter(0, offset, key, value, headers, "x-")


def test_what_goes_back_is_what_came_and_one_more_replay():
    before = [("ce_id", b"1"), ("trace", b"\x00\xff"), ("none", None)]
    back = resend(letter(headers=[(REDRIVES_HEADER, b"7"), *before]))  # not one of ours: ours is the last
    assert (back.topic, back.partition, back.key, back.value) == ("documents", 1, b"k", DOCUMENT)
    assert back.headers == [*before, (REDRIVES_HEADER, b"1")]


def test_the_count_grows_through_refusal_after_refusal():
    value, headers = DOCUMENT, [("a", b"b")]
    for replays in range(4):
        found = letter(value, headers)
        assert found.replays == replays
        assert state_of(found, replayed=False, max_replays=3) == ("quarantined" if replays == 3 else "waiting")
        _, _, _, value, headers = resend(found)
    assert headers == [("a", b"b"), (REDRIVES_HEADER, b"4")]


def test_the_count_survives_headers_that_no_letter_can_hold():
    headers = [("h" * 100, b"x" * 1000)] * 500
    found = letter(headers=[*headers, (REDRIVES_HEADER, b"2")])
    assert found.replays == 2
    assert state_of(found, replayed=False, max_replays=3) == "cut"
    assert state_of(letter(b"x" * 3_000_000), replayed=False, max_replays=3) == "cut"


def test_a_replay_may_have_one_header_more_than_the_limit():
    full = [(f"h{n}", b"") for n in range(MAX_HEADERS)]
    assert decode(DOCUMENT, [*full, (REDRIVES_HEADER, b"1")], "documents").event.document_id == "1"
    for headers in ([*full, ("other", b"")], [*full, (REDRIVES_HEADER, b"1"), (REDRIVES_HEADER, b"1")]):
        with pytest.raises(WireError, match="headers"):
            decode(DOCUMENT, headers, "documents")


@pytest.mark.parametrize("forged", [b"", b"-1", b"x", b"\xff", b"9" * 400, None])
def test_a_count_that_is_nonsense_is_none(forged):
    assert letter(headers=[(REDRIVES_HEADER, forged)]).replays == 0


def test_only_topics_of_outside_producers_take_letters_back():
    for topic in ("scored-examples", "adapter-jobs", "x-examples", "elsewhere", "dead-letters"):
        found = letter(topic=topic)
        assert state_of(found, replayed=False, max_replays=3) == "inside"
        with pytest.raises(DeadLetterError):
            resend(found)
    for topic in ("documents", "x-interactions", "retention"):
        assert state_of(letter(topic=topic), replayed=False, max_replays=3) == "waiting"


def test_a_foreign_record_is_listed_and_left():
    found = read_dead_letter(0, 3, None, b"\xff", [("a", None)], "")
    assert state_of(found, replayed=False, max_replays=3) == "unreadable"
    assert (found.place, found.adapter, found.held.headers) == ("0:3", "", [("a", None)])


def test_the_adapter_comes_from_the_value_then_from_the_key():
    assert letter().adapter == "acme/support"
    assert letter(json.dumps({"specversion": "1.0", "data": {"adapter": "b"}}).encode()).adapter == "b"
    assert letter(b"\xff", key=b"by-key").adapter == "by-key"
    assert letter(b"[" * 100_000, key=None).adapter == ""
    assert letter(None, key=b"\xff").adapter == "\ufffd"


@pytest.mark.parametrize(
    ("selection", "meant"),
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
def test_filters(selection, meant):
    assert selection.matches(letter()) is meant


def test_since():
    assert parse_since("90s", NOW) == NOW - timedelta(seconds=90)
    assert parse_since("7d", NOW) == NOW - timedelta(days=7)
    assert parse_since("2026-01-31T12:00:00", NOW) == NOW
    assert parse_since("2026-01-31T13:00:00+01:00", NOW) == NOW
    for text in ("", "yesterday", "5w", "-3h", "999999d999"):
        with pytest.raises(SettingsError):
            parse_since(text, NOW)
    with pytest.raises(SettingsError):
        parse_since("999999d", NOW)


def test_places():
    assert parse_place("3:120") == (3, 120)
    for text in ("3", ":", "a:1", "1:-2", "1:2:3", "²:1"):
        with pytest.raises(SettingsError):
            parse_place(text)


def test_a_batch_is_sorted_out():
    batch = [
        letter(offset=0), letter(offset=1, reason="not-json"), letter(offset=2, topic="examples"), letter(offset=3),
        letter(offset=4, headers=[(REDRIVES_HEADER, b"3")]), letter(offset=5), letter(offset=6),
    ]  # fmt: skip
    progress = RedriveProgress()
    progress.add(3, 4)
    found = decide(batch, Selection(reason="unknown-field"), {0: progress}, max_replays=3, room=2)
    assert [each.offset for each in found.send] == [0, 5]
    assert [each.offset for each in found.never] == [2]
    assert found.left == {"inside": 1, "quarantined": 1}


@settings(deadline=None)
@given(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 120), st.integers(0, 12)), max_size=30))
def test_progress_is_a_set_of_offsets_and_survives_its_commit(first, runs):
    progress, model = RedriveProgress(first), set(range(first))
    for start, length in runs:
        progress.add(start, start + length)
        model |= set(range(start, start + length))
        model |= set(range(next(n for n in range(200) if n not in model)))
    again = load_progress(dump_progress("id", {3: progress}), "id")[3]
    for each in (progress, again):
        assert [n for n in range(150) if n in each] == [n for n in range(150) if n in model]
    assert progress.first == next(n for n in range(200) if n not in model)


def test_the_log_moves_on_below_the_progress():
    progress = RedriveProgress(2, [(5, 7), (20, 21)])
    progress.advance(6)
    assert progress.first == 7
    progress.advance(30)
    assert progress.numbers() == [30]
    progress.advance(3)
    assert progress.first == 30


def test_progress_of_another_topic_of_the_name_begins_anew():
    assert load_progress(dump_progress("old", {0: RedriveProgress(7)}), "new") == {}


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"topic_id":"id"}', b'{"topic_id":"id","partitions":{"x":[1]}}', b'{"topic_id":"id","partitions":[1]}',
     *(b'{"topic_id":"id","partitions":{"0":%s}}' % each for each in (b"[]", b"[1,2]", b"[1,0,1]", b"[1,2,-1]", b"[1.5]", b'"x"', b"[null]"))],
)  # fmt: skip
def test_progress_that_is_junk_is_said(data):
    with pytest.raises(DeadLetterError, match="cannot be read"):
        load_progress(data, "id")


def test_forged_reasons_do_not_fill_the_histogram():
    report = RedriveReport()
    for number in range(1000):
        report.count(letter(reason=f"r{number}" * 100))
    assert len(report.sent) <= 201
    assert report.sent.total() == 1000


def test_a_window_rebuilt_by_a_newer_version_lets_a_replay_through_once():
    """The older version refused offset 0; the newer one, rebuilding, takes it for accepted."""
    rebuilt = Acceptor(OriginPartition("c", "documents", "t", 0, "documents"), window=100, learn_turns=False)
    decided = [
        type(rebuilt.accept(DOCUMENT, headers, offset, 1))
        for offset, headers in enumerate([
            None, [(REDRIVES_HEADER, b"1")], [(REDRIVES_HEADER, b"1")], [(REDRIVES_HEADER, b"2")], None, [(REDRIVES_HEADER, b"2")],
        ])
    ]  # fmt: skip
    assert decided == [Accepted, Accepted, Duplicate, Accepted, Duplicate, Duplicate]
