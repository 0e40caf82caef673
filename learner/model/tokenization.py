"""Conversion of examples to rows of token ids, each with the position from which it is trained.

Deterministic, and without tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from perennial.learner.model.encoders import Encoder, Encoders
from perennial.storage.errors import PerennialError
from perennial.streams.events.models import ExampleAccepted

_SENTINEL = "\u2063PROMPT\u2063"
_TEMPLATE_DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""The date that chat templates get. Llama 3.2's and others put today's date into every turn: what an adapter is
trained on would depend on the day, and a rebuild on another day would not give the same bits. Llama's template falls
back to this date itself."""
_MIN_PROMPT_DIVISOR = 4
"""However long an answer is, its prompt may take 1/4 of a row."""
_MIN_ROW_TOKENS = 8


class ExampleError(PerennialError):
    """An example has nothing that can be trained."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One training row.

    Attributes:
        ids: Token ids, T of them.
        train_from: Position of the first token whose prediction is trained; at least 1, because the first token of a
            row has nothing to be predicted from.
    """

    ids: tuple[int, ...]
    train_from: int = 1

    @property
    def tokens(self) -> int:
        """Number of tokens that are trained."""
        return len(self.ids) - self.train_from


class ExampleTokenizer:
    """A base's tokenizer, with the special tokens of a text and the frame of a chat turn worked out once.

    The frame is what the tokenizer's chat template puts around a user's message, so that the base is asked in the form
    that it was trained on. Without a template the frame is plain text: `User: …`, `Assistant: …`.

    A prompt is never put through the template: its token ids go between those of head and tail, and hold no control
    token. A prompt therefore cannot begin a turn of its own where the template marks turns with control tokens. Where
    the template marks them with plain text, as Llama 2's `[INST]`, text that imitates them has the same tokens.

    All encoding is done with copies of the tokenizer that never change (see `encoders`). Thread-safe.

    Args:
        tokenizer: Tokenizer of the base, as transformers loads it.

    Attributes:
        bos: Token id that starts a text: the start token, or the end token where the tokenizer has no start token.
        eos: Token id that ends a text.
        pad: Token id to pad rows with.
        turn_head: Token ids in front of a prompt, the start token included.
        turn_tail: Token ids between a prompt and its answer.
        text_head: Token ids that the tokenizer itself puts in front of a text, none for many.
        text_tail: Token ids that it puts behind a text.

    Raises:
        ExampleError: The tokenizer has no end-of-text token.
        TokenizerError: The tokenizer cannot be copied.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        if eos is None:
            raise ExampleError(
                "the base's tokenizer has no end-of-text token",
                got=type(tokenizer).__name__,
                allowed="a tokenizer with eos_token",
                remedy="set eos_token in the base's tokenizer_config.json",
            )
        self.eos: int = int(eos)
        # Without a start token the first token of a text would have nothing to be predicted from.
        self.bos: int = int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos)
        pad = tokenizer.pad_token_id
        self.pad: int = int(pad if pad is not None else eos)
        encoders = Encoders(tokenizer)
        trusted = encoders.trusted()
        self.turn_head, self.turn_tail = self._frame(trusted)
        self.text_head, self.text_tail = self._around_text(trusted)
        self._untrusted = encoders.untrusted({*self.turn_head, *self.turn_tail})

    def _frame(self, trusted: Encoder) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return head and tail of a turn, by rendering the chat template around a sentinel."""
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": _SENTINEL}],
                tokenize=False,
                add_generation_prompt=True,
                strftime_now=_TEMPLATE_DATE.strftime,
            )
            head, found, tail = text.partition(_SENTINEL)
            if found and _SENTINEL not in tail:
                return tuple(trusted(head)), tuple(trusted(tail))
        return (self.bos, *trusted("User: ")), tuple(trusted("\nAssistant: "))

    def _around_text(self, trusted: Encoder) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the token ids that the tokenizer adds before and behind a text."""
        inner = tuple(trusted("a"))
        whole = tuple(trusted("a", surrounded=True))
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return (), ()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of untrusted text.

        Markers such as `<|eos|>` or `<tool_call>` in it stay plain text, so that a document cannot forge a chat turn.
        """
        return self._untrusted(text)

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of untrusted text, with those that the tokenizer puts around every text."""
        return [*self.text_head, *self.encode(text), *self.text_tail]

    def prompt_ids(self, prompt: str, limit: int) -> tuple[int, ...]:
        """Return the token ids that the model is given before it answers.

        Args:
            prompt: Untrusted text.
            limit: Most token ids to return; a longer prompt loses its beginning. The frame is never cut.
        """
        room = max(0, limit - len(self.turn_head) - len(self.turn_tail))
        ids = self.encode(prompt)
        return (*self.turn_head, *ids[max(0, len(ids) - room) :], *self.turn_tail)


def text_rows(text: str, codec: ExampleTokenizer, row_tokens: int) -> list[TokenRow]:
    """Return the rows of a document: start token, text and end token, cut every row_tokens - 1 tokens.

    A row begins with the last token of the row before it, so that every token of the text is trained once.

    Args:
        text: Untrusted text.
        codec: Tokenizer of the base.
        row_tokens: Longest row, in tokens.

    Raises:
        ExampleError: row_tokens is too small to train anything.
    """
    _check_row_tokens(row_tokens)
    return _cut([codec.bos, *codec.encode(text), codec.eos], row_tokens)


def turn_rows(prompt: str, answer: str, codec: ExampleTokenizer, row_tokens: int) -> list[TokenRow]:
    """Return the rows of a chat turn; only the answer and its end token are trained.

    A long prompt loses its beginning. The answer is kept whole: what does not fit the first row goes into further rows.

    Args:
        prompt: Untrusted text of the user.
        answer: Untrusted text to be learned as the answer.
        codec: Tokenizer of the base.
        row_tokens: Longest row, in tokens.

    Raises:
        ExampleError: row_tokens is too small to train anything.
    """
    _check_row_tokens(row_tokens)
    target = [*codec.encode(answer), codec.eos]
    room = max(row_tokens // _MIN_PROMPT_DIVISOR, row_tokens - len(target))
    # A chat template may be longer than a row. Its end must stay, because it says that an answer follows.
    asked = codec.prompt_ids(prompt, room)[-room:] or (codec.bos,)  # the first token of a row is never trained
    first = row_tokens - len(asked)
    rows = [TokenRow((*asked, *target[:first]), len(asked))]
    if len(target) > first:
        rows += _cut(target[first - 1 :], row_tokens)
    return rows


def example_rows(example: ExampleAccepted, codec: ExampleTokenizer, row_tokens: int) -> list[TokenRow]:
    """Return the rows that train one example, each at most row_tokens long.

    Raises:
        ExampleError: The example has neither a text nor a prompt with an answer, or row_tokens is too small.
    """
    if example.kind == "document" and example.text:
        return text_rows(example.text, codec, row_tokens)
    if example.prompt and example.answer:
        return turn_rows(example.prompt, example.answer, codec, row_tokens)
    raise ExampleError(
        got=f"{example.kind} {example.example_id} without its text",
        allowed="a document with text, or a correction or turn with prompt and answer",
        remedy="find the program that wrote this to the examples topic: intake never does",
    )


def _cut(ids: Sequence[int], row_tokens: int) -> list[TokenRow]:
    stride = row_tokens - 1
    return [TokenRow(tuple(ids[start : start + row_tokens])) for start in range(0, len(ids) - 1, stride)]


def _check_row_tokens(row_tokens: int) -> None:
    if row_tokens < _MIN_ROW_TOKENS:
        raise ExampleError(
            "rows are too short to train anything",
            got=row_tokens,
            allowed=f"at least {_MIN_ROW_TOKENS} tokens",
            remedy="raise PERENNIAL_ROW_TOKENS",
        )
