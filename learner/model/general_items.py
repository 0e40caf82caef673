"""General texts that are kept as a blob: documents and chat turns, either sampled from the base or given by the user.

The blob is JSON lines: a line that says where the texts are from, then one line per text. A file of the user has the
same lines without the first one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, text_rows, turn_rows
from perennial.storage.errors import IntegrityError, PerennialError
from perennial.streams.paths import expand_path

Source = Literal["sample", "file"]

MAX_BYTES = 4 << 20
"""Largest blob: every publish reads it back."""
MAX_TEXT_CHARS = 20_000
MIN_TEXTS = 8
MEASURED_SHARE = 0.15
"""Share of the texts that are anchors, and the share that is held out."""
_FORMAT = 1
_MAX_LINES = 1_000_000


class GeneralTextError(PerennialError):
    """The general texts cannot be used."""

    exit_code = 2


@dataclass(frozen=True)
class GeneralItem:
    """One general text.

    Attributes:
        text: The text, or the answer of a chat turn.
        prompt: What the answer was given to; None for a document.
        ended: False if the text was cut, so that no end token is trained after it.
    """

    text: str
    prompt: str | None = None
    ended: bool = True

    def line(self) -> str:
        """Return the item as a line of JSON."""
        turn = {"prompt": self.prompt, "response": self.text}
        fields: dict[str, Any] = {"text": self.text} if self.prompt is None else turn
        return json.dumps(fields if self.ended else {**fields, "ended": False}, sort_keys=True)

    def digest(self) -> bytes:
        """Return a hash by which items are ordered."""
        return hashlib.sha256(self.line().encode()).digest()


@dataclass(frozen=True)
class GeneralItems:
    """All general texts of a blob.

    Attributes:
        source: `sample`: taken from the base. `file`: given by the user.
        base: Digest of the base that they were sampled from; empty for a file.
        items: The texts.
    """

    source: Source
    base: str
    items: tuple[GeneralItem, ...]

    def to_bytes(self) -> bytes:
        """Return the content of the blob; equal texts give equal bytes."""
        first = json.dumps({"base": self.base, "format": _FORMAT, "source": self.source}, sort_keys=True)
        return "".join(f"{line}\n" for line in (first, *(item.line() for item in self.items))).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> GeneralItems:
        """Read a blob.

        Raises:
            IntegrityError: It is none.
        """
        first, *lines = data.splitlines()[:_MAX_LINES] or [b""]
        try:
            head = json.loads(first)
            source: Source = "sample" if head["source"] == "sample" else "file"
            items = tuple(_item(json.loads(line)) for line in lines)
            got = f"format {head['format']}, source {head['source']}"
            known = head["format"] == _FORMAT and head["source"] == source
        except (ValueError, KeyError, TypeError) as error:
            known, got = False, f"{type(error).__name__}: {error}"
        if not known:
            raise IntegrityError(
                "a blob does not hold general texts",
                got=got[:300],
                allowed=f"JSON lines of format {_FORMAT}",
                remedy="restore the blob that the manifest names from a copy of the store",
            )
        return cls(source, str(head["base"]), items)

    def split(self) -> tuple[list[GeneralItem], list[GeneralItem], list[GeneralItem]]:
        """Return the texts to train on, the anchors and the held-out ones.

        `MEASURED_SHARE` of the texts are anchors and as many are held out, at least one each where there are three:
        those with the smallest hashes.
        """
        ordered = sorted(self.items, key=GeneralItem.digest)
        count = min(max(1, int(len(ordered) * MEASURED_SHARE)), len(ordered) // 3)
        return ordered[2 * count :], ordered[:count], ordered[count : 2 * count]


def items_of_file(name: str) -> GeneralItems:
    """Read the user's general texts from a file of JSON lines.

    Args:
        name: Path of the file. Each line is an object with `text`, or with `prompt` and `response`.

    Raises:
        GeneralTextError: The file cannot be read, is too large, or has a line of another form.
    """
    path: Path = expand_path(name)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise GeneralTextError(
            "The general texts cannot be read",
            got=f"{path}: {error.strerror}",
            allowed="a readable file of JSON lines",
            remedy="correct PERENNIAL_GENERAL_TEXTS, or unset it to use a sample of the base",
        ) from error
    if len(data) > MAX_BYTES - 1024:
        raise GeneralTextError(
            "The file of general texts is too large",
            got=f"{path}: {path.stat().st_size} bytes",
            allowed=f"{MAX_BYTES >> 20} MiB",
            remedy="keep a part of it: some hundred texts protect as well as many",
        )
    items = tuple(dict.fromkeys(_parse(data, str(path))))
    if len(items) < MIN_TEXTS:
        raise GeneralTextError(
            "There are too few general texts",
            got=f"{path}: {len(items)} different ones",
            allowed=f"{MIN_TEXTS} or more",
            remedy="add texts of the kind that the base must go on to know",
        )
    return GeneralItems("file", "", items)


def _parse(data: bytes, where: str) -> Iterable[GeneralItem]:
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield _item(json.loads(line))
        except ValueError as error:  # also what is no JSON and no UTF-8
            raise GeneralTextError(
                "A line of the general texts has another form",
                got=f"{where}, line {number}: {str(error)[:200]}",
                allowed=f'{{"text": …}} or {{"prompt": …, "response": …}}, up to {MAX_TEXT_CHARS} characters each',
                remedy="correct the line or take it out",
            ) from error


def _item(fields: Any) -> GeneralItem:
    if not isinstance(fields, dict):
        raise ValueError(f"a {type(fields).__name__}")  # noqa: TRY004 - a wrong line, not a wrong call
    ended = fields.pop("ended", True)
    texts = [fields[name] for name in sorted(fields)]
    if fields.keys() not in ({"text"}, {"prompt", "response"}) or not isinstance(ended, bool):
        raise ValueError(f"keys {', '.join(sorted(map(str, fields)))}")
    for text in texts:
        if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT_CHARS:
            raise ValueError(f"{str(text)[:80]!r}")
        text.encode()  # a lone surrogate is no text
    return GeneralItem(texts[0], None, ended) if len(texts) == 1 else GeneralItem(texts[1], texts[0], ended)


def item_rows(item: GeneralItem, codec: ExampleTokenizer, row_tokens: int) -> list[TokenRow]:
    """Return the rows of a general text; of a chat turn only the answer is trained.

    Args:
        item: The text.
        codec: Tokenizer of the base.
        row_tokens: Longest row, in tokens.

    Raises:
        ExampleError: row_tokens is too small to train anything.
    """
    if item.prompt is None:
        rows = text_rows(item.text, codec, row_tokens)
    else:
        rows = turn_rows([("user", item.prompt)], item.text, codec, row_tokens)
    return rows if item.ended else _without_end(rows)


def _without_end(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Leave out the end token, the last one of the last row, and that row if nothing else is trained in it."""
    last = rows[-1]
    cut = [TokenRow(last.ids[:-1], last.train_from)] if last.tokens > 1 else []
    return [*rows[:-1], *cut] or list(rows)
