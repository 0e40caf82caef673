"""Two encoders made once from a base's tokenizer: one for our own text, and one for text from outside.

In a transformers tokenizer, the argument `split_special_tokens` of a call sets a flag of the one Rust tokenizer that
all threads share (transformers 47085): a call in another thread may then read the markers of a document as control
tokens. The encoders here are copies of that Rust tokenizer. Nothing about a copy changes after it was made, so one copy
may be used from several threads at once.
"""

from __future__ import annotations

import secrets
import threading
import unicodedata
from collections.abc import Collection
from typing import Any, Protocol

import orjson
from tokenizers import Tokenizer

from perennial.storage.errors import PerennialError

_WORD_START = "\u2581"
"""SentencePiece's sign for a blank."""
_VISIBLE = frozenset("LMNPSZ")
"""First letters of the Unicode categories of letters, marks, numbers, punctuation, symbols and separators."""


class Encoder(Protocol):
    """Turns texts into token ids. Thread-safe."""

    def __call__(self, text: str, *, surrounded: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Text to encode.
            surrounded: Add the tokens that the tokenizer puts around every text, such as a start token. Only for our
                own text: an encoder for text from outside gives no control token, and so drops them again.
        """


class TokenizerError(PerennialError):
    """A tokenizer cannot be used for text from outside."""


class Encoders:
    """Makes the two encoders of a base.

    Args:
        tokenizer: Tokenizer of the base, as transformers loads it. It is copied, unless it is written in Python.

    Raises:
        TokenizerError: The tokenizer cannot be copied.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._state = _state(tokenizer.backend_tokenizer) if _is_rust(tokenizer) else None

    def trusted(self) -> Encoder:
        """Return an encoder for our own text, in which markers such as `<|user|>` are control tokens."""
        if self._state is None:
            return _PythonEncoder(self._tokenizer, split=False, forbidden=frozenset())
        return _RustEncoder(_copy(self._state), frozenset())

    def control_ids(self, frame: Collection[int] = ()) -> frozenset[int]:
        """Return the ids of the control tokens; see `untrusted`.

        Args:
            frame: Token ids of the frames of conversations.
        """
        added = self._tokenizer.added_tokens_decoder.items()
        found = {int(token) for token, entry in added if entry.special or _is_control(entry.content, token in frame)}
        return frozenset(found | {int(token) for token in self._tokenizer.all_special_ids})

    def untrusted(self, frame: Collection[int] = ()) -> Encoder:
        """Return an encoder for text from outside, which gives no control token whatever the text is.

        Control tokens are the tokens that the tokenizer marks as special, and each added token that is not plain text:
        Qwen3's `<tool_call>` and `<think>` and DeepSeek's marker of the user's turn are not marked as special. An added
        token is plain text if it is a word, blanks (GPT-NeoX and Gemma have tokens for runs of blanks), or one visible
        character; a word that the frame of a turn uses is a control token all the same. Gemma's `<table>` counts as a
        control token too: a tag of HTML and a tag that has a meaning for the model look alike.

        A control token in a text is encoded as the pieces that its characters give, so nothing of the text is lost.

        Args:
            frame: Token ids of the frames of conversations.
        """
        tokenizer = self._tokenizer
        control = self.control_ids(frame)
        # A character that the model does not know may give its token for that, unless the token has another use too.
        used = {tokenizer.bos_token_id, tokenizer.eos_token_id, *frame}
        if self._state is None:
            forbidden = frozenset(control - ({tokenizer.unk_token_id} - used))
            return _PythonEncoder(tokenizer, split=True, forbidden=forbidden)
        names = {name for name in map(tokenizer.backend_tokenizer.id_to_token, control) if name is not None}
        forbidden = frozenset(control - ({_unknown_id(self._state["model"])} - used))
        return _RustEncoder(_copy(_with_unreachable(self._state, names)), forbidden)


def _is_control(content: str, in_frame: bool) -> bool:
    """Return True if an added token that is not marked as special may have a meaning other than its text."""
    if all(char.isspace() or char == _WORD_START for char in content):
        return False
    if len(content) == 1:
        return unicodedata.category(content)[0] not in _VISIBLE
    # Only letters, marks, digits and blanks make a word: brackets, bars and underscores are what markers are made of.
    return in_frame or not all(
        char.isalnum() or char.isspace() or char == _WORD_START or unicodedata.category(char)[0] == "M"
        for char in content
    )


# ---- copies of a Rust tokenizer


def _is_rust(tokenizer: Any) -> bool:
    """Return True if the tokenizer is a Rust tokenizer inside, False if it is written in Python."""
    return isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer)


def _state(backend: Tokenizer) -> dict[str, Any]:
    try:
        state: dict[str, Any] = orjson.loads(backend.to_str())
    except Exception as error:  # the Rust library raises Exception itself
        raise TokenizerError(
            "the base's tokenizer cannot be copied",
            got=str(error),
            allowed="a tokenizer that tokenizer.json describes as a whole",
            remedy="choose a base whose tokenizer has no parts written in Python",
        ) from error
    return state


def _copy(state: dict[str, Any]) -> Tokenizer:
    copied = Tokenizer.from_str(orjson.dumps(state).decode())
    for entry in state["added_tokens"]:
        if copied.token_to_id(entry["content"]) != entry["id"]:
            raise TokenizerError(
                "a copy of the base's tokenizer gives its added tokens other ids",
                got=f"{copied.token_to_id(entry['content'])} for token {entry['id']}",
                allowed="added tokens numbered as the tokenizers library numbers them",
                remedy="save the tokenizer again with save_pretrained()",
            )
    copied.no_truncation()
    copied.no_padding()
    return copied


def _with_unreachable(state: dict[str, Any], tokens: Collection[str]) -> dict[str, Any]:
    """Return the state changed so that no text is encoded as one of the tokens.

    The tokens keep their ids but get a name that nobody can guess, in the added tokens as well as in the vocabulary: a
    model of type Unigram or WordLevel would find them in the vocabulary, and BPE where merges lead to them. Hazard: the
    library numbers added tokens by their order and by the size of the vocabulary, so neither may lose an entry.
    """
    prefix = secrets.token_hex(16)

    def renamed(token: str) -> str:
        return prefix + token if token in tokens else token

    added = [{**entry, "content": renamed(entry["content"])} for entry in state["added_tokens"]]
    model = dict(state["model"])
    if isinstance(model["vocab"], list):  # Unigram: [piece, score] in the order of the ids
        model["vocab"] = [[renamed(piece), score] for piece, score in model["vocab"]]
    elif not model["vocab"].keys().isdisjoint(tokens):
        model["vocab"] = {renamed(token): number for token, number in model["vocab"].items()}
        if model.get("unk_token") is not None:
            model["unk_token"] = renamed(model["unk_token"])
        skipped = len(model.get("continuing_subword_prefix") or "")
        if "merges" in model:
            model["merges"] = [
                [left, right]
                for left, right in model["merges"]
                if not (left in tokens or right in tokens or left + right[skipped:] in tokens)
            ]
    return {**state, "added_tokens": added, "model": model}


def _unknown_id(model: dict[str, Any]) -> int | None:
    """Return the id that the model gives to an unknown character; None if it has no such id."""
    if isinstance(model["vocab"], list):
        unknown: int | None = model.get("unk_id")
        return unknown
    found: int | None = model["vocab"].get(model.get("unk_token"))
    return found


class _RustEncoder:
    def __init__(self, tokenizer: Tokenizer, forbidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._forbidden = forbidden

    def __call__(self, text: str, *, surrounded: bool = False) -> list[int]:
        return _without(self._forbidden, self._tokenizer.encode(text, add_special_tokens=surrounded).ids)


class _PythonEncoder:
    """A tokenizer written in Python: it takes `split_special_tokens` per call, and may keep caches."""

    def __init__(self, tokenizer: Any, *, split: bool, forbidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._split = split
        self._forbidden = forbidden
        self._lock = threading.Lock()

    def __call__(self, text: str, *, surrounded: bool = False) -> list[int]:
        with self._lock:
            encoded = self._tokenizer(
                text, add_special_tokens=surrounded, split_special_tokens=self._split, verbose=False
            )
        return _without(self._forbidden, list(encoded["input_ids"]))


def _without(forbidden: frozenset[int], ids: list[int]) -> list[int]:
    """Return the ids without forbidden ones, which a model may still give for a character that it does not know."""
    return ids if forbidden.isdisjoint(ids) else [token for token in ids if token not in forbidden]
