"""Intake's decisions, checked against a simple model of the window and against the event models."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.streams.events.cloudevents import MAX_INSIDE_VALUE_BYTES, MAX_VALUE_BYTES, decode, encode
from perennial.streams.events.event_times import MAX_MS
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.events.models import ExampleAccepted, Origin
from perennial.streams.intake.validation import (
    REFUSED_WRITE_MS,
    Accepted,
    Acceptor,
    Duplicate,
    OffsetOrderError,
    OriginPartition,
    Refused,
)
from tests.unit.streams.event_strategies import event_of

DOCUMENTS = OriginPartition("cluster", "p-documents", "topic-id", 2, "documents")
INTERACTIONS = OriginPartition("cluster", "p-interactions", "topic-id", 0, "interactions")
AT_MS = 1_700_000_000_123
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def acceptor(origin=DOCUMENTS, window=100, learn_turns=False):
    return Acceptor(origin, window, learn_turns)


def document(text="hello", document_id="d1", **fields: object):
    return json.dumps({"adapter": "acme", "document_id": document_id, "text": text, **fields}).encode()


def interaction(**fields: object):
    whole = {"adapter": "acme", "interaction_id": "i1", "prompt": "p", "response": "r", **fields}
    return json.dumps(whole).encode()


def example_of(decision):
    assert isinstance(decision, Accepted)
    return decode(decision.value, decision.headers, "examples").event


def accepted(value, origin=DOCUMENTS, **options: object):
    return example_of(acceptor(origin, **options).accept(value, None, 0, AT_MS))


@given(event_of(DocumentObserved), st.integers(0, 2**62), st.integers(-(2**63), 2**63))
def test_a_document_becomes_an_example(event, offset, timestamp_ms):
    written = encode(event, event_id="1", source="/s", occurred_at=datetime(2026, 1, 1, tzinfo=UTC), traceparent=TRACE)
    decision = acceptor().accept(written.value, written.headers, offset, timestamp_ms)
    at_ms = min(max(timestamp_ms, 0), MAX_MS)
    if isinstance(decision, Refused):
        blank = event.text.isspace()
        expired = event.expires_at is not None and event.expires_at.timestamp() * 1000 <= at_ms
        assert (decision.reason, blank or expired) in {("bad-field", True), ("expired", True)}
        return
    envelope = decode(decision.value, decision.headers, "examples")
    assert envelope.event == ExampleAccepted(
        adapter=event.adapter, example_id=decision.example_id, kind="document", document_id=event.document_id,
        learn=True, text=event.text, source=event.source, domain=event.domain, subjects=event.subjects,
        retention_class=event.retention_class, expires_at=event.expires_at, supersedes=event.supersedes,
        observed_at=event.observed_at,
        origin=Origin(cluster_id="cluster", topic="p-documents", topic_id="topic-id", partition=2, offset=offset,
                      timestamp_ms=at_ms),
    )  # fmt: skip
    assert decision.key == event.adapter.encode()
    assert (envelope.id, envelope.traceparent) == (decision.example_id, TRACE)
    assert abs(envelope.time.timestamp() * 1000 - at_ms) < 1


@given(event_of(InteractionObserved), st.booleans())
def test_an_interaction_becomes_an_example(event, learn_turns):
    written = encode(event, event_id="1", source="/s", occurred_at=datetime(2026, 1, 1, tzinfo=UTC))
    decision = acceptor(INTERACTIONS, learn_turns=learn_turns).accept(written.value, written.headers, 5, 0)
    pair = [("user", event.prompt), ("assistant", event.response)]
    turns = pair if event.messages is None else [(message.role, message.content) for message in event.messages]
    *history, (_, prompt), (_, response) = turns
    if isinstance(decision, Refused):
        assert decision.reason == "bad-field"
        assert prompt.isspace() or (event.correction or "x").isspace() or any(text.isspace() for _, text in history)
        return
    example = example_of(decision)
    if event.correction is not None:
        kind, learn, answer = "correction", True, event.correction
    elif learn_turns and not response.isspace():
        kind, learn, answer = "turn", True, response
    else:
        kind, learn, answer = "turn" if event.rating is None else "rating", False, response
    assert (example.kind, example.learn) == (kind, learn)
    assert (example.text, example.prompt, example.answer) == (None, prompt, answer)
    assert [(turn.role, turn.content) for turn in example.history or ()] == history
    assert example.rating == event.rating
    assert (example.subjects, example.source) == (event.subjects, event.source)


def test_the_origin_carries_the_leader_epoch_of_the_record():
    assert example_of(acceptor().accept(document(), None, 7, AT_MS, 3)).origin.leader_epoch == 3
    assert accepted(document()).origin.leader_epoch == 0


def test_an_example_of_an_older_writer_is_neither_returned_nor_of_a_later_epoch():
    older = json.loads(acceptor().accept(document(), None, 0, AT_MS).value)
    del older["origin"]["leader_epoch"]
    example = ExampleAccepted.model_validate_json(json.dumps(older))
    assert (example.origin.leader_epoch, example.returned) == (0, False)


def test_a_repeated_text_is_a_duplicate_and_a_changed_text_a_revision():
    window = acceptor()
    first = example_of(window.accept(document("one"), None, 0, AT_MS))
    assert window.accept(document("one"), None, 1, AT_MS) == Duplicate(first.example_id, 0)
    assert window.accept(document("one", source="elsewhere"), None, 2, AT_MS) == Duplicate(first.example_id, 1)
    second = example_of(window.accept(document("two"), None, 3, AT_MS))
    assert second.revises == first.example_id
    assert example_of(window.accept(document("one", document_id="d2"), None, 4, AT_MS)).revises is None
    assert first.revises is None


def test_adapters_do_not_share_a_window():
    window = acceptor()
    window.accept(document(), None, 0, AT_MS)
    other = json.dumps({"adapter": "acme/b", "document_id": "d1", "text": "hello"}).encode()
    assert isinstance(window.accept(other, None, 1, AT_MS), Accepted)


@pytest.mark.parametrize("gap", [99, 100, 101])
def test_the_window_is_counted_in_offsets(gap):
    window = acceptor()
    window.accept(document(), None, 50, AT_MS)
    again = window.accept(document(), None, 50 + gap, AT_MS)
    assert isinstance(again, Duplicate if gap <= 100 else Accepted)


def test_refused_records_are_not_in_the_window():
    window = acceptor()
    expired = document(expires_at="2001-01-01T00:00:00Z")
    assert isinstance(window.accept(expired, None, 0, AT_MS), Refused)
    assert isinstance(window.accept(document(), None, 1, AT_MS), Accepted)


records = st.lists(
    st.tuples(
        st.integers(1, 12),  # distance to the offset before
        st.one_of(
            st.builds(document, st.sampled_from("abc"), st.sampled_from(["d1", "d2"])),
            st.sampled_from([b"junk", None, document(" ")]),
        ),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(records, st.integers(0, 60))
def test_a_window_rebuilt_from_the_log_decides_like_the_original(steps, crash_at):
    offset, log = 0, []
    for distance, value in steps:
        offset += distance
        log.append((offset, value))
    original = acceptor(window=20)
    decisions = [original.accept(value, None, offset, AT_MS) for offset, value in log]

    at = log[min(crash_at, len(log) - 1)][0] if log else 0
    rebuilt = acceptor(window=20)
    for offset, value in log:
        if at - 20 <= offset < at:
            rebuilt.accept(value, None, offset, AT_MS)
    for (offset, value), decision in zip(log, decisions, strict=True):
        if offset >= at:
            assert rebuilt.accept(value, None, offset, AT_MS) == decision


@settings(max_examples=200)
@given(records)
def test_duplicates_are_what_a_linear_search_finds(steps):
    window, offset, before = acceptor(window=20), 0, []
    for distance, value in steps:
        offset += distance
        decision = window.accept(value, None, offset, AT_MS)
        if isinstance(decision, Refused):
            assert value in {b"junk", None, document(" ")}
            continue
        name = json.loads(value)["document_id"]
        texts = [other for old, key, other in before if key == name and offset - old <= 20]
        assert isinstance(decision, Duplicate) == (texts[-1:] == [value])
        if isinstance(decision, Accepted):
            assert example_of(decision).returned == bool(texts)
        before.append((offset, name, value))
        assert len(window) == len({key for old, key, _ in before if offset - old <= 20})


def test_case_20_a_document_that_goes_back_to_an_earlier_text_is_no_duplicate():
    """A, B, A of one document id: the third is learned again, or the model keeps B although the last word is A."""
    window = acceptor()
    first, second, third = (
        example_of(window.accept(document(text), None, n, AT_MS)) for n, text in enumerate(["A", "B", "A"])
    )
    assert first.example_id == third.example_id != second.example_id
    assert (first.returned, first.revises) == (False, None)
    assert (second.returned, second.revises) == (True, first.example_id)
    assert (third.returned, third.revises) == (True, second.example_id)
    assert window.accept(document("A"), None, 3, AT_MS) == Duplicate(third.example_id, 2)
    assert example_of(window.accept(document("B"), None, 4, AT_MS)).returned
    other = example_of(window.accept(document("A", document_id="d2"), None, 5, AT_MS))
    assert (other.returned, other.revises) == (False, None)


def test_case_20_an_earlier_text_may_lie_outside_the_window():
    """Curate and the learner remember more than the window: whatever revises a text is never their duplicate."""
    window = acceptor(window=10)
    window.accept(document("A"), None, 0, AT_MS)
    window.accept(document("B"), None, 8, AT_MS)
    assert example_of(window.accept(document("A"), None, 15, AT_MS)).returned


def test_case_20_a_rating_that_changes_and_changes_back_is_three_signals():
    """The same holds for signals; a signal in between does not make a repeated correction new."""
    window = acceptor(INTERACTIONS)
    for offset, rating in enumerate([0.5, -0.5, 0.5]):
        assert isinstance(window.accept(interaction(rating=rating), None, offset, AT_MS), Accepted)
    corrected = example_of(window.accept(interaction(correction="c"), None, 3, AT_MS))
    window.accept(interaction(rating=1), None, 4, AT_MS)
    again = window.accept(interaction(correction="c"), None, 5, AT_MS)
    assert again == Duplicate(corrected.example_id, 3)


def test_attack_j_what_was_refused_can_be_published_again_as_it_is():
    """A document that the gate refused, or whose job became a dead letter, is no duplicate of that attempt."""
    refused, asked = {}, []

    def refused_at(adapter, example_id, at_ms):
        asked.append((adapter, example_id, at_ms))
        return refused.get(example_id)

    window = Acceptor(DOCUMENTS, 100, False, refused_at)
    first = example_of(window.accept(document(), None, 0, AT_MS))
    assert asked == []  # only a duplicate is worth a look into the store
    assert isinstance(window.accept(document(), None, 1, AT_MS + 1), Duplicate)
    assert asked == [("acme", first.example_id, AT_MS + 1)]

    refused[first.example_id] = AT_MS + 5000
    assert isinstance(window.accept(document(), None, 2, AT_MS + 4999), Duplicate)
    again = example_of(window.accept(document(), None, 3, AT_MS + 5000 + REFUSED_WRITE_MS))
    assert (again.example_id, again.returned, again.revises) == (first.example_id, True, None)
    # That attempt is under way: only a refusal after it makes the next one worth while.
    late = AT_MS + 5000 + REFUSED_WRITE_MS + 1
    assert isinstance(window.accept(document(), None, 4, late), Duplicate)
    refused[first.example_id] = late + 1
    assert example_of(window.accept(document(), None, 5, late + 1)).returned


def test_case_20_a_document_that_was_just_forgotten_is_no_duplicate():
    """What expired or was superseded was dropped as a duplicate for another 30 seconds."""
    refused = {}
    window = Acceptor(DOCUMENTS, 100, False, lambda _, example_id, __: refused.get(example_id))
    first = example_of(window.accept(document(), None, 0, AT_MS))
    assert isinstance(window.accept(document(), None, 1, AT_MS + 50), Duplicate)  # the list does not show it yet
    refused[first.example_id] = AT_MS + 40
    assert example_of(window.accept(document(), None, 2, AT_MS + 60)).returned


def test_memory_is_bounded_by_the_window():
    window = acceptor(window=10)
    for offset in range(1000):
        window.accept(document(str(offset), document_id=str(offset)), None, offset, AT_MS)
    assert len(window) == 11


def test_a_rating_is_a_signal_and_a_changed_rating_a_new_signal():
    window = acceptor(INTERACTIONS)
    first = example_of(window.accept(interaction(rating=0.5), None, 0, AT_MS))
    assert (first.kind, first.learn, first.rating) == ("rating", False, 0.5)
    assert isinstance(window.accept(interaction(rating=0.5), None, 1, AT_MS), Duplicate)
    assert isinstance(window.accept(interaction(rating=-0.5), None, 2, AT_MS), Accepted)
    corrected = example_of(window.accept(interaction(rating=-0.5, correction="c"), None, 3, AT_MS))
    assert (corrected.kind, corrected.answer, corrected.rating) == ("correction", "c", -0.5)
    assert corrected.revises is None  # signals were never learned, so nothing is revised
    better = example_of(window.accept(interaction(correction="d"), None, 4, AT_MS))
    assert better.revises == corrected.example_id


def test_a_correction_revises_a_learned_turn():
    window = acceptor(INTERACTIONS, learn_turns=True)
    turn = example_of(window.accept(interaction(), None, 0, AT_MS))
    assert (turn.kind, turn.learn) == ("turn", True)
    assert example_of(window.accept(interaction(correction="c"), None, 1, AT_MS)).revises == turn.example_id


def test_the_boundary_between_prompt_and_answer_is_part_of_the_identity():
    one, other = (accepted(interaction(prompt=p, correction=a), INTERACTIONS) for p, a in (("ab", "c"), ("a", "bc")))
    assert one.example_id != other.example_id


@pytest.mark.parametrize(
    ("origin", "value", "reason"),
    [
        (DOCUMENTS, document(" \n\t\u3000"), "bad-field"),
        (INTERACTIONS, interaction(prompt=" "), "bad-field"),
        (INTERACTIONS, interaction(correction="\n"), "bad-field"),
        (DOCUMENTS, interaction(), "missing-field"),
        (DOCUMENTS, b"\xff", "not-utf8"),
        (DOCUMENTS, None, "tombstone"),
        (DOCUMENTS, b" " * (MAX_VALUE_BYTES + 1), "oversize"),
        (DOCUMENTS, document(expires_at="2023-11-14T22:13:20.123Z"), "expired"),
        (OriginPartition("c", "retention", "t", 0, "retention"),
         b'{"request_id":"1","kind":"erase","adapter":"a","requested_by":"me"}', "wrong-topic"),
    ],
)  # fmt: skip
def test_invalid_records_are_refused(origin, value, reason):
    decision = acceptor(origin).accept(value, None, 0, AT_MS)
    assert isinstance(decision, Refused)
    assert decision.reason == reason
    assert decision.detail


def test_expiry_is_measured_at_publication():
    value = document(expires_at="2023-11-14T22:13:20.124Z")
    assert isinstance(acceptor().accept(value, None, 0, AT_MS), Accepted)
    assert isinstance(acceptor().accept(value, None, 0, AT_MS + 1), Refused)


@pytest.mark.parametrize("text", ["\x01" * 174_000, "\x7f" * 262_144, "\\" * 262_144, "é" * 131_072, '"' * 262_144])
def test_an_example_always_fits_its_topic(text):
    fields = {"adapter": "acme", "document_id": "é" * 512, "text": text}
    if len(text) < 140_000:
        fields["subjects"] = ["é" * 256] * 64
    value = json.dumps(fields, ensure_ascii=False).encode()
    assert len(value) <= MAX_VALUE_BYTES
    decision = acceptor().accept(value, None, 0, AT_MS)
    assert len(decision.value) <= MAX_INSIDE_VALUE_BYTES
    assert example_of(decision).text == text


def test_offsets_must_increase():
    window = acceptor()
    window.accept(document(), None, 5, AT_MS)
    with pytest.raises(OffsetOrderError):
        window.accept(document(), None, 5, AT_MS)


def test_example_ids_do_not_change():
    # Manifests and forgetting refer to examples by these ids: with another formula they would find none.
    def example_id(kind: str, document_id: str, text: str) -> str:
        parts = ["acme", kind, document_id, sha256(text.encode()).hexdigest()]
        return sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()[:32]

    assert accepted(document()).example_id == example_id("document", "d1", "hello")
    corrected = accepted(interaction(correction="c", rating=1), INTERACTIONS)
    assert corrected.example_id == example_id("correction", "i1", '["p","c"]')
    assert accepted(interaction(rating=1), INTERACTIONS).example_id == example_id("rating", "i1", '["p","r",1.0]')
