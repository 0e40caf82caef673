"""Decide which examples an update may replay, and which have a place in the replay buffer after it. Pure functions.

Everything follows from the buffer before the update, the update's examples and its recipe. So where the recorded updates
are trained again without a forgotten example, the buffer is the one that would have been.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Final

import orjson

from perennial.learner.training.recipe import Recipe
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.streams.events.models import ExampleAccepted

DOCUMENTS: Final = "documents"
"""Value of `Recipe.replay_places` with which a document that supersedes others takes their place."""
_KEY_CHARS: Final = 16


@dataclass(frozen=True)
class BufferUpdate:
    """The replay buffer before and after one update.

    Attributes:
        index: Replay index of the state that the update trains from.
        examples: Examples of the update, in order of their publication.
        batch: Digest of the micro-batch blob.
        recipe: Size of the buffer, and who has a place in it.
    """

    index: Sequence[ReplayEntry]
    examples: Sequence[ExampleAccepted]
    batch: str
    recipe: Recipe

    @cached_property
    def drawable(self) -> tuple[ReplayEntry, ...]:
        """Return the entries that the update may replay: without those that its own examples supersede."""
        if self.recipe.replay_places != DOCUMENTS:
            return tuple(self.index)
        superseded = {key for example in self.examples for key in superseded_keys(example)}
        return tuple(entry for entry in self.index if entry.document not in superseded)

    def after(self, learned: Collection[str]) -> tuple[ReplayEntry, ...]:
        """Return the replay index with those of the examples that were learned.

        Args:
            learned: Their ids.
        """
        recipe = self.recipe
        new = [entry for entry in self._new if entry.example_id in learned]
        return keep_places((*self.drawable, *new), recipe.replay_size, recipe.replay_bytes, recipe.seed)

    @cached_property
    def _new(self) -> tuple[ReplayEntry, ...]:
        if self.recipe.replay_places == DOCUMENTS:
            return document_entries(self.index, self.examples, self.batch)
        counted = self.recipe.replay_bytes > 0
        return tuple(
            ReplayEntry(example.example_id, self.batch, text_bytes=text_bytes(example) if counted else 0)
            for example in self.examples
        )


def keep_places(entries: Iterable[ReplayEntry], size: int, max_bytes: int, seed: int) -> tuple[ReplayEntry, ...]:
    """Return the entries with the smallest hash of seed and place, sorted by example id.

    This is a bottom-k sample (Cohen 1997): uniform over all that was ever offered, and independent of its order. So is the
    limit of bytes: what was left out once stays left out, because what comes before it only grows.

    Args:
        entries: Entries so far, then the new ones; one of the same example replaces the entry so far.
        size: Most entries to keep.
        max_bytes: Bytes of text from which on no further entry is kept, so that the one that reaches them is whole; 0: any
            number. Entries that were made without a limit count as 0 bytes.
        seed: Seed of the recipe.
    """
    by_id = {entry.example_id: entry for entry in entries}

    def rank(entry: ReplayEntry) -> tuple[bytes, bytes]:
        place = entry.place or entry.document or entry.example_id
        return _hash(seed, place), _hash(seed, entry.example_id)

    kept: list[ReplayEntry] = []
    total_bytes = 0
    for entry in sorted(by_id.values(), key=rank)[:size]:
        if max_bytes and total_bytes >= max_bytes:
            break
        kept.append(entry)
        total_bytes += entry.text_bytes
    return tuple(sorted(kept))


def document_entries(
    index: Iterable[ReplayEntry], examples: Iterable[ExampleAccepted], batch: str
) -> tuple[ReplayEntry, ...]:
    """Return the entries of new examples, without those that a later one of them supersedes.

    The place of an example goes by the hash of its document id. One that supersedes others has the place of the first of
    them that is in the buffer, or the place that the first of them would have.

    Args:
        index: Entries so far.
        examples: The new examples, in order of their publication.
        batch: Digest of their micro-batch blob.
    """
    places = {entry.document: entry.place or entry.document for entry in index if entry.document}
    made: dict[str, ReplayEntry] = {}
    for example in examples:
        document, superseded = document_key(example.source, example.document_id), superseded_keys(example)
        place = next((places[key] for key in superseded if key in places), superseded[0] if superseded else document)
        made = {example_id: entry for example_id, entry in made.items() if entry.document not in superseded}
        made[example.example_id] = ReplayEntry(
            example.example_id, batch, document, "" if place == document else place, text_bytes(example)
        )
        places[document] = place
    return tuple(made.values())


def document_key(source: str | None, document_id: str) -> str:
    """Return a key of a document. Documents of different sources never supersede each other, so their keys differ."""
    return sha256(orjson.dumps([source, document_id])).hexdigest()[:_KEY_CHARS]


def superseded_keys(example: ExampleAccepted) -> tuple[str, ...]:
    """Return the keys of the documents that an example supersedes, in the order in which it names them."""
    return tuple(document_key(example.source, document_id) for document_id in example.supersedes)


def text_bytes(example: ExampleAccepted) -> int:
    """Return the number of bytes of an example's texts in UTF-8."""
    turns = [turn.content for turn in example.history or ()]
    return sum(len(text.encode()) for text in (example.text, example.prompt, example.answer, *turns) if text)


def _hash(seed: int, name: str) -> bytes:
    return sha256(f"{seed}:{name}".encode()).digest()
