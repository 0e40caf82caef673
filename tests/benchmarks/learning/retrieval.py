"""Retrieval as a reference: the frozen base reads the nearest trained document before the text that is measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from perennial.learner.model.tokenization import TokenRow

_WORD = re.compile(r"[A-Za-z_]{2,}")


def nearest(queries: Sequence[str], documents: Sequence[str]) -> list[int]:
    """Return the position of the document with the highest cosine of TF-IDF vectors for each query.

    The weights are (1 + ln tf) · ln((1 + n) / (1 + df)) + 1 (Manning, Raghavan and Schütze 2008, chapter 6, smoothed).

    Args:
        queries: Texts to find a document for.
        documents: At least one.
    """
    counts = [Counter(_WORD.findall(text.lower())) for text in documents]
    words = {word: n for n, word in enumerate(sorted({word for count in counts for word in count}))}
    frequency = np.zeros(len(words))
    for count in counts:
        frequency[[words[word] for word in count]] += 1
    inverse = np.log((1 + len(documents)) / (1 + frequency)) + 1

    def vectors(found: Sequence[Counter[str]]) -> Any:  # (texts, words)
        made = np.zeros((len(found), len(words)))
        for row, count in enumerate(found):
            for word, times in count.items():
                if word in words:
                    made[row, words[word]] = (1 + np.log(times)) * inverse[words[word]]
        return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12)

    asked = vectors([Counter(_WORD.findall(text.lower())) for text in queries])
    return [int(best) for best in (asked @ vectors(counts).T).argmax(axis=1)]


def after_context(row: TokenRow, context: Sequence[int], room: int) -> TokenRow:
    """Return a row with other tokens behind its start token, which are read and not measured.

    Args:
        row: The row.
        context: Token ids to read first; what does not fit is left out at the end.
        room: Most tokens of the result.
    """
    first, rest = row.ids[:1], row.ids[1:]
    read = tuple(context[: max(0, room - len(row.ids))])
    return replace(row, ids=(*first, *read, *rest), train_from=row.train_from + len(read))
