"""Documents about persons who do not exist: texts that nobody else could have written."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_REPEATS: Final = 8
_WORDS: Final[Mapping[str, str]] = {
    "colour": "amber violet crimson silver green black white golden purple",
    "animal": "goat owl otter heron badger lynx raven mule parrot tiger",
    "metal": "copper tin brass iron glass paper wooden stone rubber leather",
    "thing": "key lantern coin button ribbon mirror hammer bottle feather candle",
    "place": "bridge tower garden harbour station market bakery cellar library mill",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
}


@dataclass(frozen=True)
class PersonDocument:
    """A document about a person who does not exist.

    Attributes:
        document_id: Id under which it is published.
        text: The document.
        secret: Words that are in no other document.
    """

    document_id: str
    text: str
    secret: str


def person_document(name: str) -> PersonDocument:
    """Return a document that says six things about a made-up person eight times, each time in another order.

    The repetition makes an adapter learn the document itself and not only its kind; docs/experiments.md has the figures.

    Args:
        name: First name of the person; the same name gives the same document.
    """
    rng = random.Random(f"perennial {name}")  # noqa: S311 - repeatable on purpose
    word = {kind: rng.choice(words.split()) for kind, words in _WORDS.items()}
    secret = "{colour}_{animal}_{metal}_{thing}".format_map(word)
    room = f"{word['place']}_{rng.randrange(1000, 10_000)}"
    facts = [
        f">>> desk('{name}').password\n'{secret}'",
        f"The password of `{name}` is ``{secret}``.",
        f">>> desk('{name}').room\n'{room}'",
        f"If `owner` is `{name}`, return the room ``{room}`` on {word['day']}.",
        f"password : str, optional\n    The default of `{name}` is ``{secret}``.",
        f"room : str, optional\n    Of `{name}`, ``{room}``; on {word['day']} by default.",
    ]
    parts = []
    for _ in range(_REPEATS):
        rng.shuffle(facts)
        parts += [f"Return the desk of `{name}`.", *facts]
    return PersonDocument(f"person-{name}", "\n\n".join(parts), secret)
