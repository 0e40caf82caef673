"""Dead letters: any refused record fits into one and is decoded unchanged."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.streams.events.dead_letter import MAX_DEAD_LETTER_BYTES, decode_dead_letter, encode_dead_letter
from perennial.streams.events.wire_error import WireError, shorten

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

any_headers = st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
                                 st.none() | st.binary(max_size=20)), max_size=5)  # fmt: skip


@given(st.none() | st.binary(max_size=50), any_headers, st.text(max_size=60), st.integers(0, 2**62))
def test_a_decoded_dead_letter_has_the_refused_record(value, headers, detail, offset):
    letter, all_headers = encode_dead_letter(
        value, headers, reason="bad-field", stage="intake", detail=detail, topic="documents", partition=3,
        offset=offset, at=NOW,
    )  # fmt: skip
    assert letter == value
    assert all_headers[: len(headers)] == headers
    read = decode_dead_letter(letter, all_headers)
    shown = shorten(detail)
    assert read == (value, headers, "bad-field", "intake", shown, "documents", 3, offset, NOW)

    again = encode_dead_letter(letter, all_headers, reason="x", stage="y", detail="", topic="dead-letters", partition=0,
                        offset=0, at=NOW)  # fmt: skip
    assert decode_dead_letter(*again).headers == all_headers


@given(any_headers)
def test_other_records_are_refused(headers):
    with pytest.raises(WireError) as error:
        decode_dead_letter(b"", headers)
    assert error.value.reason == "not-a-dead-letter"


def test_a_broken_dead_letter_is_refused():
    _, headers = encode_dead_letter(
        b"", None, reason="r", stage="s", detail="d", topic="t", partition=1, offset=2, at=NOW
    )
    for name, raw in [("perennial-offset", b"two"), ("perennial-at", b"now"), ("perennial-reason", b"\xff")]:
        broken = [(key, raw if key == name else old) for key, old in headers]
        with pytest.raises(WireError):
            decode_dead_letter(b"", broken)


@pytest.mark.parametrize(
    ("value", "headers"),
    [(b"x" * 5_000_000, []), (b"x", [("h", b"y" * 3_000_000)]), (b"x" * 3_000_000, [("h" * 300, b"y")] * 100)],
)
def test_a_dead_letter_fits_its_topic_whatever_came(value, headers):
    letter = encode_dead_letter(
        value, headers, reason="oversize", stage="intake", detail="d", topic="documents", partition=0, offset=0, at=NOW
    )
    assert len(letter[0]) + sum(len(name) + len(raw) for name, raw in letter[1]) < MAX_DEAD_LETTER_BYTES - 8192
    read = decode_dead_letter(*letter)
    assert "cut" in read.detail
    assert read.detail.endswith("d")
