"""Turns the tokens of an answer into text while it is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_UNFINISHED = "\ufffd"


class AnswerStreamer:
    """A streamer for transformers' `generate` that passes on the text of new tokens at once.

    A character of several tokens is passed on once it is complete. Where decoding changes text that was passed on
    before, as some tokenizers do with blanks in front of punctuation, that change is lost.

    Args:
        tokenizer: Tokenizer of the base.
        on_text: Called with each further part of the answer.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []
        self._sent = 0  # characters
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the next token ids; `generate` gives the prompt first.

        Args:
            value: Token ids, (1, T) for the prompt and (1,) for each new token.
        """
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += [int(token) for token in value.flatten()]
        text = self._text()
        if not text.endswith(_UNFINISHED):
            self._send(text)

    def end(self) -> None:
        """Pass on what is left."""
        self._send(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self._on_text(text[self._sent :])
            self._sent = len(text)
