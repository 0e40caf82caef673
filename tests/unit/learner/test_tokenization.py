"""Rows: every token of a text trained once, the loss of a turn on its answer alone, and no forged markers."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.learner.model.tokenization import ExampleError, ExampleTokenizer, example_rows, text_rows, turn_rows
from tests import tiny

CODEC = ExampleTokenizer(tiny.tokenizer())
PLAIN = ExampleTokenizer(tiny.tokenizer(chat=False))
text = st.text(min_size=1, max_size=300)


@settings(max_examples=60, deadline=None)
@given(text, st.integers(min_value=8, max_value=64))
def test_a_document_is_trained_token_by_token_once(words: str, row_tokens: int) -> None:
    rows = text_rows(words, CODEC, row_tokens)
    assert max(len(row.ids) for row in rows) <= row_tokens
    trained = list(chain.from_iterable(row.ids[row.train_from :] for row in rows))
    assert trained == [*CODEC.encode(words), CODEC.eos]
    assert rows[0].ids[0] == CODEC.bos
    assert all(row.ids[0] == before.ids[-1] for before, row in pairwise(rows))


@settings(max_examples=60, deadline=None)
@given(text, text, st.integers(min_value=16, max_value=64))
def test_only_the_answer_of_a_turn_is_trained_and_all_of_it(prompt: str, answer: str, row_tokens: int) -> None:
    rows = turn_rows([("user", prompt)], answer, CODEC, row_tokens)
    assert max(len(row.ids) for row in rows) <= row_tokens
    trained = list(chain.from_iterable(row.ids[row.train_from :] for row in rows))
    assert trained == [*CODEC.encode(answer), CODEC.eos]


def test_a_correction_has_the_form_that_the_base_was_trained_on() -> None:
    (row,) = example_rows(tiny.correction(1, "What is it?", "A test."), CODEC, 64)
    assert CODEC.tokenizer.decode(row.ids) == "<|bos|><|user|>What is it?<|assistant|>A test.<|eos|>"
    assert CODEC.tokenizer.decode(row.ids[row.train_from :]) == "A test.<|eos|>"


@pytest.mark.parametrize("codec", [CODEC, PLAIN])
@settings(max_examples=60, deadline=None)
@given(text, st.integers(min_value=16, max_value=400))
def test_a_row_says_where_the_words_of_its_question_are(codec: ExampleTokenizer, prompt: str, row_tokens: int) -> None:
    turns = [("user", "Hello."), ("assistant", "Hi."), ("user", prompt)]
    (row, *_) = turn_rows(turns, "Yes.", codec, row_tokens, find_question=True)
    start, end = row.question
    words = codec.encode(prompt)
    assert end - start <= len(words)
    assert list(row.ids[start:end]) == words[len(words) - (end - start) :]
    if row_tokens == 400 and len(words) < 300:
        assert end - start == len(words)


def test_a_document_has_no_question() -> None:
    assert {row.question for row in text_rows("How much is it? It is free.", CODEC, 8)} == {(0, 0)}


def test_without_a_chat_template_a_turn_is_plain_text() -> None:
    (row,) = turn_rows([("user", "What?")], "That.", PLAIN, 64)
    assert PLAIN.tokenizer.decode(row.ids) == "<|bos|>User: What?\nAssistant: That.<|eos|>"


def test_a_long_prompt_loses_its_head_and_the_answer_nothing() -> None:
    (row,) = turn_rows([("user", "x" * 500 + "why?")], "because", CODEC, 64)
    shown = CODEC.tokenizer.decode(row.ids)
    assert shown.endswith("why?<|assistant|>because<|eos|>")
    assert shown.startswith("<|bos|><|user|>x")
    assert len(row.ids) == 64


def test_a_long_answer_leaves_a_quarter_of_the_row_to_the_prompt() -> None:
    first, *_ = turn_rows([("user", "p" * 100)], "a" * 100, CODEC, 64)
    assert first.train_from == 16


@pytest.mark.parametrize("words", ["<|eos|>", "a<|assistant|>b", "<|bos|><|user|>"])
def test_markers_in_foreign_text_stay_text(words: str) -> None:
    special = set(CODEC.tokenizer.all_special_ids)
    assert special.isdisjoint(CODEC.encode(words))
    (row,) = turn_rows([("user", words)], words, CODEC, 128)
    assert sum(token in special for token in row.ids) == 4


def test_rows_do_not_depend_on_what_was_encoded_before() -> None:
    example = tiny.document(1, "some words " * 30)
    before = example_rows(example, CODEC, 32)
    CODEC.encode("other words")
    assert example_rows(example, ExampleTokenizer(tiny.tokenizer()), 32) == before


def test_an_example_without_text_is_refused() -> None:
    empty = tiny.document(1, "x").model_copy(update={"text": None})
    with pytest.raises(ExampleError, match="without its text"):
        example_rows(empty, CODEC, 32)


def test_rows_too_short_to_train_are_refused() -> None:
    with pytest.raises(ExampleError, match="PERENNIAL_ROW_TOKENS"):
        text_rows("text", CODEC, 4)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    endless = tiny.tokenizer()
    endless.eos_token = None
    with pytest.raises(ExampleError, match="eos_token"):
        ExampleTokenizer(endless)
