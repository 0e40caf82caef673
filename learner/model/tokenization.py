"""Conversion of examples to rows of token ids, each with the position from which it is trained.

Deterministic, and without tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perennial.learner.model.chat_frames import ChatFrame, ChatFrames, Turns
from perennial.learner.model.encoders import Encoder, Encoders
from perennial.storage.errors import PerennialError
from perennial.streams.events.models import ExampleAccepted

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
        like_base: True to train towards what the frozen base predicts at each token instead of towards the token.
        question: First position of the user's own words in a turn that is answered, and the position after their last;
            (0, 0) where there are none, or nobody asked for them.
        skipped: Positions from `train_from` on whose tokens are not trained, in rising order.
    """

    ids: tuple[int, ...]
    train_from: int = 1
    like_base: bool = False
    question: tuple[int, int] = (0, 0)
    skipped: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens that are trained."""
        return len(self.ids) - self.train_from - len(self.skipped)

    @property
    def trained_places(self) -> Sequence[int]:
        """Positions of the tokens that are trained."""
        places = range(self.train_from, len(self.ids))
        if not self.skipped:
            return places
        skipped = frozenset(self.skipped)
        return [place for place in places if place not in skipped]


class ExampleTokenizer:
    """A base's tokenizer, with the special tokens of a text and the frame of a chat turn worked out once.

    The frame is what the tokenizer's chat template puts around the turns of a conversation, so that the base is asked in
    the form that it was trained on: the ids are those that an engine's `/v1/chat/completions` makes of the same messages.
    Without a template the frame is plain text: `User: …`, `Assistant: …`.

    A turn is never put through the template: its token ids go between those of the frame, and hold no control token. A
    turn therefore cannot begin a turn of its own where the template marks turns with control tokens. Where the template
    marks them with plain text, as Llama 2's `[INST]`, text that imitates them has the same tokens.

    All encoding is done with copies of the tokenizer that never change (see `encoders`). Thread-safe.

    Args:
        tokenizer: Tokenizer of the base, as transformers loads it.

    Attributes:
        bos: Token id that starts a text: the start token, or the end token where the tokenizer has no start token.
        eos: Token id that ends a text.
        pad: Token id to pad rows with.
        turn_head: Token ids in front of a prompt that nothing precedes, the start token included.
        turn_tail: Token ids between a prompt and its answer.
        text_head: Token ids that the tokenizer itself puts in front of a text, none for many.
        text_tail: Token ids that it puts behind a text.
        has_template: True if the frame is that of the tokenizer's chat template, False if it is plain text.

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
        self._trusted = trusted = encoders.trusted()
        self._frames = ChatFrames(tokenizer, trusted, self.bos)
        frame = self._frames.framed([("user", "")])[1]
        self.has_template = frame.templated
        self.turn_head, self.turn_tail = frame.ids
        self.text_head, self.text_tail = self._around_text(trusted)
        frame_ids = self._frames.all_ids()
        self._untrusted = encoders.untrusted(frame_ids)
        self._control = encoders.control_ids(frame_ids)
        control = [entry for token, entry in tokenizer.added_tokens_decoder.items() if token in self._control]
        self._markers = tuple(str(entry.content) for entry in control)
        self._borders = tuple(str(entry.content) for entry in control if not (entry.lstrip or entry.rstrip))

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
        """Return the token ids that the model is given before it answers a prompt; see `chat_ids`."""
        return self.chat_ids([("user", prompt)], limit)

    def chat_ids(self, turns: Turns, limit: int) -> tuple[int, ...]:
        """Return the token ids that the model is given before it answers.

        Args:
            turns: A conversation of untrusted texts that ends with the user's turn.
            limit: Most token ids to return. A longer conversation loses its oldest turns but not the system turn, then
                the beginning of the prompt; a system turn that leaves no room for the prompt loses its end. The frame
                is never cut.
        """
        turns, frame = self._frames.framed(turns)
        texts = [text.strip() if frame.trimmed else text for _, text in turns]
        encoded = [self.encode(text) for text in texts]
        if frame.tokens + sum(map(len, encoded)) > limit:
            return self._cut_to(turns, encoded, frame, limit)
        return self._as_one_text(texts, frame) or _woven(frame, encoded)

    def question_in(self, turns: Turns, ids: Sequence[int]) -> tuple[int, int]:
        """Return where the words of the last turn are in what `chat_ids` returned, or in its end.

        Args:
            turns: The conversation.
            ids: Token ids of it.

        Returns:
            Their first position and the one after the last; (0, 0) where the frame and the words share a token.
        """
        turns, frame = self._frames.framed(turns)
        words = self.encode(turns[-1][1].strip() if frame.trimmed else turns[-1][1])
        end = len(ids) - len(frame.ids[-1])
        start = max(0, end - len(words))
        while start < end and list(ids[start:end]) != words[len(words) - (end - start) :]:
            start += 1  # the beginning of a long prompt was cut, and the frame stands there
        return (start, end) if start < end else (0, 0)

    def _cut_to(self, turns: Turns, encoded: list[list[int]], frame: ChatFrame, limit: int) -> tuple[int, ...]:
        first = 1 if turns[0][0] == "system" else 0
        if len(turns) - first > 1:  # without the oldest question and its answer
            return self.chat_ids([*turns[:first], *turns[first + 2 :]], limit)
        room = max(0, limit - frame.tokens)
        *before, prompt = encoded
        kept = [ids[: max(room // 2, room - len(prompt))] for ids in before]
        room -= sum(map(len, kept))
        return _woven(frame, [*kept, prompt[max(0, len(prompt) - room) :]])

    def _as_one_text(self, texts: Sequence[str], frame: ChatFrame) -> tuple[int, ...] | None:
        """Return the ids of frame and turns encoded as one text, as engines do.

        A tokenizer may join a line end of the frame with one that a turn begins with; it joins nothing across a control
        token.

        Returns:
            The ids; None where the parts give the same ids, where a turn has the text of a control token, and where no
            engine asks in this form.
        """
        if not frame.templated or any(marker in text for text in texts for marker in self._markers):
            return None
        heads, tails = frame.texts[:-1], frame.texts[1:]
        if all(
            head.endswith(self._borders) and tail.startswith(self._borders)
            for head, tail in zip(heads, tails, strict=True)
        ):
            return None
        ids = self._trusted("".join(part for pair in zip(heads, texts, strict=True) for part in pair) + tails[-1])
        wanted = [token for piece in frame.ids for token in piece if token in self._control]
        return tuple(ids) if [token for token in ids if token in self._control] == wanted else None


def _woven(frame: ChatFrame, encoded: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the token ids of frame and turns in turn."""
    ids = [token for piece, turn in zip(frame.ids, encoded, strict=False) for token in (*piece, *turn)]
    return (*ids, *frame.ids[-1])


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


def turn_rows(
    turns: Turns, answer: str, codec: ExampleTokenizer, row_tokens: int, *, find_question: bool = False
) -> list[TokenRow]:
    """Return the rows of the last answer in a conversation; only the answer and its end token are trained.

    A long conversation loses its oldest turns, a long prompt its beginning. The answer is kept whole: what does not fit
    the first row goes into further rows.

    Args:
        turns: Untrusted texts of the conversation up to the prompt that is answered.
        answer: Untrusted text to be learned as the answer.
        codec: Tokenizer of the base.
        row_tokens: Longest row, in tokens.
        find_question: Say where the words of the last turn are, which encodes them once more.

    Raises:
        ExampleError: row_tokens is too small to train anything.
    """
    _check_row_tokens(row_tokens)
    target = [*codec.encode(answer), codec.eos]
    room = max(row_tokens // _MIN_PROMPT_DIVISOR, row_tokens - len(target))
    # A chat template may be longer than a row. Its end must stay, because it says that an answer follows.
    asked = codec.chat_ids(turns, room)[-room:] or (codec.bos,)  # the first token of a row is never trained
    first = row_tokens - len(asked)
    question = codec.question_in(turns, asked) if find_question else (0, 0)
    rows = [TokenRow((*asked, *target[:first]), len(asked), question=question)]
    if len(target) > first:
        rows += _cut(target[first - 1 :], row_tokens)
    return rows


def conversation(example: ExampleAccepted, system_prompt: str | None = None) -> list[tuple[str, str]]:
    """Return the turns that an example's answer answers.

    Args:
        example: An example with a prompt.
        system_prompt: The adapter's system prompt, for a conversation that has no system turn of its own.
    """
    turns: list[tuple[str, str]] = [
        *((turn.role, turn.content) for turn in example.history or ()),
        ("user", example.prompt or ""),
    ]
    if system_prompt and turns[0][0] != "system":
        turns.insert(0, ("system", system_prompt))
    return turns


def example_rows(
    example: ExampleAccepted,
    codec: ExampleTokenizer,
    row_tokens: int,
    system_prompt: str | None = None,
    *,
    find_question: bool = False,
) -> list[TokenRow]:
    """Return the rows that train one example, each at most row_tokens long.

    Args:
        example: The example.
        codec: Tokenizer of the base.
        row_tokens: Longest row, in tokens.
        system_prompt: The adapter's system prompt, for a conversation that has no system turn of its own; None: the one
            that the example's micro-batch records, if any.
        find_question: Say where the words of the question are, which encodes them once more.

    Raises:
        ExampleError: The example has neither a text nor a prompt with an answer, or row_tokens is too small.
    """
    if example.kind == "document" and example.text:
        return text_rows(example.text, codec, row_tokens)
    if example.prompt and example.answer:
        return turn_rows(
            conversation(example, system_prompt or example.system_prompt),
            example.answer,
            codec,
            row_tokens,
            find_question=find_question,
        )
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
