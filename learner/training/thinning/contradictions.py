"""Corrections that answer the same question differently: one answer is trained, the others are not.

Training on both would teach neither: each pass takes back what the pass before it taught. And one source that repeats a
false answer often enough would win over many that are right. So every source has one vote, for the newest answer that it
gave, however often it gave it, and of answers with as many votes the newest is trained.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from perennial.streams.events.models import ExampleAccepted

OUTVOTED: Final = "outvoted"
"""Reason of an example that is not trained because another answer to its question has more votes."""

_Question = tuple[tuple[tuple[str, str], ...], str]


def outvoted(examples: Sequence[ExampleAccepted], earlier: Iterable[ExampleAccepted] = ()) -> set[str]:
    """Return the ids of the corrections whose answer is outvoted by another answer to their question.

    A pure function of the examples: without a forgotten one it is decided as if that one had never come. That holds for an
    outvoted one as well, for without it its source votes for the answer that it gave before. Sources that are not named have
    one vote together.

    Args:
        examples: Examples of a micro-batch, in order. Other kinds than corrections are left alone.
        earlier: Examples that were learned before and vote, too, oldest first.
    """
    asked = defaultdict(list)
    for example in _corrections(examples):
        asked[_question(example)].append(example)
    votes: dict[_Question, dict[str | None, str]] = {question: {} for question in asked}
    newest: dict[_Question, dict[str, tuple[int, int]]] = {question: {} for question in asked}
    for place, example in enumerate(_corrections((*earlier, *examples))):
        question, answer = _question(example), _normal(example.answer)
        if question not in asked:
            continue
        at = (example.origin.timestamp_ms, place)
        source = None if example.source is None else _normal(example.source)
        times = newest[question]
        known = votes[question].get(source)
        if known is None or times[known] <= at:
            votes[question][source] = answer
        times[answer] = max(times.get(answer, at), at)
    return {
        example.example_id
        for question, group in asked.items()
        for example in group
        if _normal(example.answer) != _winner(votes[question], newest[question])
    }


def _winner(votes: dict[str | None, str], newest: dict[str, tuple[int, int]]) -> str:
    counts = Counter(votes.values())
    return max(counts, key=lambda answer: (counts[answer], newest[answer]))


def _corrections(examples: Iterable[ExampleAccepted]) -> Iterator[ExampleAccepted]:
    return (example for example in examples if example.kind == "correction")


def _question(example: ExampleAccepted) -> _Question:
    history = tuple((turn.role, _normal(turn.content)) for turn in example.history or ())
    return history, _normal(example.prompt)


def _normal(text: str | None) -> str:
    return unicodedata.normalize("NFC", text or "").strip()
