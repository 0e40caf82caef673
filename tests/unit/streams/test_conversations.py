"""Interactions of several turns, from the event to the example: which are taken, their ids, and how they are forgotten."""

from __future__ import annotations

import json
from unicodedata import normalize

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli import publish
from perennial.streams.client.base_publisher import PublishError
from perennial.streams.client.testing import MemoryPublisher
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.input_events import MAX_TURNS, InteractionObserved, Turn
from perennial.streams.events.models import Batch, ExampleAccepted
from perennial.streams.intake.validation import Accepted, Acceptor, OriginPartition, Refused
from perennial.streams.retention.example_rows import ExampleRows
from perennial.streams.retention.quarantine_filter import text_hash
from tests import tiny

INTERACTIONS = OriginPartition("cluster", "p-interactions", "topic-id", 0, "interactions")
KEY = bytes(32)
PAIR = [["user", "How long does a refund take?"], ["assistant", "Two weeks."]]
WHOLE = [["system", "Be brief."], ["user", "Hello"], ["assistant", "Hi."], *PAIR]


def messages_of(turns: list[list[str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def decide(learn_turns: bool = False, **fields: object):
    event = {"adapter": "acme", "interaction_id": "i1", **fields}
    return Acceptor(INTERACTIONS, 100, learn_turns).accept(json.dumps(event).encode(), None, 0, 1_700_000_000_000)


def example_of(**fields: object) -> ExampleAccepted:
    decision = decide(**fields)
    assert isinstance(decision, Accepted), decision
    return decode(decision.value, decision.headers, "examples").event


def test_a_conversation_becomes_an_example_with_all_its_turns():
    example = example_of(messages=messages_of(WHOLE), correction="Five days.", rating=-1)
    assert (example.kind, example.learn, example.rating) == ("correction", True, -1)
    assert [[turn.role, turn.content] for turn in example.history or ()] == WHOLE[:3]
    assert (example.prompt, example.answer) == (PAIR[0][1], "Five days.")
    assert example_of(messages=messages_of(WHOLE), rating=1).answer == "Two weeks."


def test_one_question_and_its_answer_are_the_same_example_in_either_form():
    pair = {"prompt": PAIR[0][1], "response": PAIR[1][1]}
    for more in ({}, {"rating": 0.5}, {"correction": "Five days."}, {"learn_turns": True}):
        assert example_of(messages=messages_of(PAIR), **more) == example_of(**pair, **more)


def test_the_id_covers_every_turn():
    changed = [[*WHOLE[:at], [WHOLE[at][0], "other"], *WHOLE[at + 1 :]] for at in range(len(WHOLE))]
    shorter = [WHOLE[1:], WHOLE[:1] + WHOLE[3:], PAIR]
    ids = {example_of(messages=messages_of(turns)).example_id for turns in (WHOLE, *changed, *shorter)}
    assert len(ids) == 1 + len(changed) + len(shorter)
    # A corrected answer replaces the last turn, so what was corrected does not count.
    corrected = {example_of(messages=messages_of(turns), correction="c").example_id for turns in (WHOLE, changed[-1])}
    assert len(corrected) == 1


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ([], "messages"),
        ([["user", "q"]], "messages"),
        ([["system", "s"], ["assistant", "a"]], "messages"),
        ([["assistant", "a"], ["user", "q"], ["assistant", "a"]], "messages"),
        ([["user", "q"], ["system", "s"], ["assistant", "a"]], "messages"),
        ([["user", "q"], ["user", "q"], ["assistant", "a"]], "messages"),
        ([["user", "q"], ["assistant", "a"], ["user", "q"]], "messages"),
        ([["user", "q"], ["tool", "a"]], "messages.1.role"),
        ([["user", "q"], ["assistant", ""]], "messages.1.content"),
        ([["user", " \n"], ["assistant", "a"]], "messages.0.content"),
        ([["user", "q" * 300_000], ["assistant", "a"]], "messages.0.content"),
        ([["user", "q" * 200_000], ["assistant", "a" * 200_000]] * 2, "messages"),
        ([["user", "q"], ["assistant", "a"]] * (MAX_TURNS // 2 + 1), "messages"),
    ],
)
def test_a_conversation_out_of_order_or_too_large_is_refused(turns, field):
    decision = decide(messages=messages_of(turns))
    assert isinstance(decision, Refused)
    assert decision.reason == "bad-field"
    assert decision.detail.startswith(f"{field};")
    if not any(text.isspace() for _, text in turns):
        with pytest.raises(PublishError, match="messages"):
            MemoryPublisher().interaction(adapter="acme", interaction_id="i1", messages=messages_of(turns))


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({}, "missing-field", "prompt"),
        ({"response": "r"}, "missing-field", "prompt"),
        ({"prompt": "p"}, "missing-field", "response"),
        ({"prompt": "p", "messages": messages_of(PAIR)}, "bad-field", "messages"),
        ({"prompt": "p", "response": "r", "messages": messages_of(PAIR)}, "bad-field", "messages"),
        (
            {"messages": [{**messages_of(PAIR)[0], "name": "x"}, messages_of(PAIR)[1]]},
            "unknown-field",
            "messages.0.name",
        ),
    ],
)
def test_an_interaction_has_one_form(fields, reason, field):
    decision = decide(**fields)
    assert isinstance(decision, Refused)
    assert (decision.reason, decision.detail.split(";")[0]) == (reason, field)


def test_the_publisher_and_json_lines_take_messages(tmp_path, monkeypatch):
    publisher = MemoryPublisher()
    publisher.interaction(adapter="acme", interaction_id="i1", messages=messages_of(WHOLE), correction="c")
    (event,) = publisher.events
    line = json.dumps({"adapter": "acme", "interaction_id": "i1", "messages": messages_of(WHOLE), "correction": "c"})
    assert decode(publish._value(line.encode(), None), (), "interactions").event == event
    assert "prompt" not in json.loads(event.model_dump_json())


def test_an_event_without_messages_keeps_its_bytes():
    event = InteractionObserved(adapter="acme", interaction_id="i1", prompt="p", response="r")
    assert event.model_dump_json().startswith(
        '{"adapter":"acme","interaction_id":"i1","prompt":"p","response":"r","correction":null,"rating":null,'
    )
    assert "history" not in example_of(prompt="p", response="r").model_dump_json()


def test_a_conversation_is_suppressed_by_all_its_turns_normalised():
    def hash_of(turns: list[list[str]]) -> str | None:
        return text_hash(example_of(messages=messages_of(turns)), KEY)

    accented = [["system", "Café"], *WHOLE[1:]]
    other_form = [["system", normalize("NFD", "Café") + "\r\n"], *([role, f" {text}\n"] for role, text in WHOLE[1:])]
    assert hash_of(accented) == hash_of(other_form)
    assert len({hash_of(turns) for turns in (accented, WHOLE, WHOLE[1:], PAIR)}) == 4
    assert hash_of(PAIR) == text_hash(example_of(prompt=PAIR[0][1], response=PAIR[1][1]), KEY)


def test_the_history_index_holds_no_text_of_a_conversation(tmp_path):
    """The index stays when texts are erased."""
    history = [Turn(role="user", content="secret question"), Turn(role="assistant", content="secret answer")]
    example = tiny.correction(0, "p", "a").model_copy(update={"history": history})
    body = Batch(adapter="acme/support", cut=0, examples=[example], skipped=[]).model_dump_json().encode()
    (row,) = ExampleRows(DirectoryStore(tmp_path, fsync=False), "acme/support").rows(body)
    assert "secret" not in json.dumps(row)
