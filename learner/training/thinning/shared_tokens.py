"""Find documents of an update that share most of their text, and the tokens that they share.

Pure functions of the rows, without draws: what is merged depends on the documents of the update alone, in their order. So
an update that is made again without one of them decides as if it had never been there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from perennial.learner.model.tokenization import TokenRow

SHINGLE_TOKENS: Final = 3
"""Tokens of a shingle. A token is shared if it is in a shingle that the other document has, too."""

_Shingle = tuple[int, ...]


@dataclass(frozen=True)
class ThinnedRows:
    """The rows of a document, and the document that it was merged into.

    Attributes:
        rows: Rows to train; none where all of the text is shared.
        into: Id of the document that is trained in full; None: this one is.
    """

    rows: list[TokenRow]
    into: str | None = None


class FullDocuments:
    """The documents that an update trains in full, by their shingles.

    Args:
        min_shared: Share of the trained tokens of a document, above 0 to 1, from which it is merged.
    """

    def __init__(self, min_shared: float) -> None:
        self._min_shared = min_shared
        self._documents: defaultdict[_Shingle, list[str]] = defaultdict(list)
        self._shingles: dict[str, frozenset[_Shingle]] = {}

    def thin(self, name: str, rows: Sequence[TokenRow]) -> ThinnedRows:
        """Merge a document into the one that has most of its shingles, or add it as one that is trained in full.

        Args:
            name: Id of the document.
            rows: Its rows, all of them trained from their second token on.

        Returns:
            The rows to train: of a merged document only the tokens that it does not share are trained.
        """
        ids = _whole(rows)
        shingles = frozenset(_shingles(ids))
        hits = Counter(other for shingle in shingles for other in self._documents.get(shingle, ()))
        nearest = min(hits, key=lambda other: (-hits[other], other), default=None)
        if nearest is not None:
            shared = _shared_places(ids, self._shingles[nearest])
            if len(shared) >= self._min_shared * (len(ids) - 1):
                return ThinnedRows(_without(rows, shared), nearest)
        self._shingles[name] = shingles
        for shingle in shingles:
            self._documents[shingle].append(name)
        return ThinnedRows(list(rows))


def _whole(rows: Sequence[TokenRow]) -> list[int]:
    """Return the tokens of a document; each further row begins with the last token of the row before it."""
    first, *further = rows
    return [*first.ids, *(token for row in further for token in row.ids[1:])]


def _shingles(ids: Sequence[int]) -> Iterator[_Shingle]:
    return (tuple(ids[start : start + SHINGLE_TOKENS]) for start in range(len(ids) - SHINGLE_TOKENS + 1))


def _shared_places(ids: Sequence[int], shingles: frozenset[_Shingle]) -> set[int]:
    """Return the positions of the trained tokens that are in one of the shingles."""
    starts = [start for start, shingle in enumerate(_shingles(ids)) if shingle in shingles]
    return {place for start in starts for place in range(start, start + SHINGLE_TOKENS)} - {0}


def _without(rows: Sequence[TokenRow], shared: set[int]) -> list[TokenRow]:
    """Return the rows in which shared tokens are not trained, without rows in which nothing else is."""
    thinned, start = [], 0
    for row in rows:
        skipped = tuple(place for place in range(row.train_from, len(row.ids)) if start + place in shared)
        start += len(row.ids) - 1
        thinned.append(replace(row, skipped=skipped))
    return [row for row in thinned if row.tokens]
