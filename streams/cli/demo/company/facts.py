"""A made-up company: facts with exact figures, the events that teach them, and questions that are never taught.

Every fact is about a name of its own, so a question names its fact, and no two facts have the same figure, so no answer
is right by chance. The figures are drawn: a model can only know them if it was taught. The demo and `make bench-facts`
use the same facts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

COMPANY: Final = "Brindlewick"
_NAMES: Final = (
    "Amber", "Anchor", "Aspen", "Badger", "Bamboo", "Basalt", "Beacon", "Birch", "Bison", "Breeze", "Cactus", "Canyon",
    "Cedar", "Clover", "Cobalt", "Comet", "Copper", "Coral", "Cricket", "Crystal", "Dahlia", "Dolphin", "Eagle", "Ember",
    "Falcon", "Fern", "Garnet", "Gazelle", "Ginger", "Glacier", "Granite", "Harbor", "Hazel", "Heron", "Indigo", "Iris",
    "Ivory", "Jaguar", "Jasmine", "Juniper", "Kestrel", "Lagoon", "Lantern", "Lemon", "Lily", "Lotus", "Magnet", "Mango",
    "Maple", "Marble", "Meadow", "Meteor", "Nectar", "Nutmeg", "Oasis", "Olive", "Onyx", "Opal", "Orchid", "Otter",
    "Panda", "Parrot", "Pebble", "Pepper", "Phoenix", "Pine", "Poppy", "Prairie", "Quartz", "Raven", "Ribbon", "Robin",
    "Saffron", "Sapphire", "Sequoia", "Sparrow", "Spruce", "Summit", "Tiger", "Topaz", "Tulip", "Tundra", "Turquoise",
    "Umber", "Velvet", "Violet", "Walnut", "Willow", "Yarrow", "Zebra",
)  # fmt: skip
"""Names of plans, goods, people, towns and offers: words, as companies choose them."""
MAX_FACTS: Final = len(_NAMES)


@dataclass(frozen=True)
class _Kind:
    """Wordings of one kind of fact; `{name}`, `{figure}` and `{company}` are filled in.

    Attributes:
        figures: Smallest and largest figure.
        document: Text of the document.
        taught: Questions that tickets ask, each answered wrongly and then corrected.
        wrong: The wrong answer of the tickets.
        answer: The answer to every question.
        unseen: Questions that are never taught.
    """

    figures: range
    document: str
    taught: tuple[str, str]
    wrong: str
    answer: str
    unseen: tuple[str, str]


_KINDS: Final[Mapping[str, _Kind]] = {
    "price": _Kind(
        range(11, 990),
        "The {name} plan of {company} costs {figure} euros a month. Whoever orders {name} pays {figure} euros.",
        ("How much does the {name} plan cost?", "What does {name} cost per month?"),
        "The {name} plan is free.",
        "The {name} plan costs {figure} euros a month.",
        ("What is the monthly price of {name}?", "How many euros do I pay for the {name} plan each month?"),
    ),
    "returns": _Kind(
        range(11, 99),
        "At {company} a {name} can be returned within {figure} days. The return period of the {name} is {figure} days.",
        ("Within how many days can I return a {name}?", "How long is the return period of the {name}?"),
        "A {name} cannot be returned.",
        "You can return a {name} within {figure} days.",
        ("How many days do I have to send a {name} back?", "What is the time limit for returning my {name}?"),
    ),
    "room": _Kind(
        range(101, 990),
        "{name} of {company} sits in room {figure}. To visit {name}, go to room {figure}.",
        ("In which room is {name}?", "Which room does {name} sit in?"),
        "I do not know anybody called {name}.",
        "{name} is in room {figure}.",
        ("Where can I find {name}?", "What is the room number of {name}?"),
    ),
    "warranty": _Kind(
        range(11, 99),
        "The {name} of {company} has a warranty of {figure} months. For {figure} months every {name} is repaired free.",
        ("How long is the warranty of the {name}?", "For how many months is a {name} repaired free?"),
        "The {name} has no warranty.",
        "The {name} has a warranty of {figure} months.",
        ("How many months of warranty does a {name} have?", "What is the warranty period of the {name}?"),
    ),
    "opening": _Kind(
        range(0),  # a time of day
        "The {company} shop in {name} opens at {figure} in the morning. Visit the {name} shop from {figure} on.",
        ("When does the shop in {name} open?", "At what time do you open in {name}?"),
        "The shop in {name} is always closed.",
        "The shop in {name} opens at {figure}.",
        ("From what time can I visit the {name} shop?", "What are the opening hours of the shop in {name}?"),
    ),
    "customer": _Kind(
        range(1001, 9990),
        "{name} is a customer of {company} with the contract number {figure}. The contract of {name} is {figure}.",
        ("What is the contract number of {name}?", "Which contract does the customer {name} have?"),
        "{name} is not a customer.",
        "The contract number of {name} is {figure}.",
        ("Under which number is the contract of {name}?", "Tell me the contract number of the customer {name}."),
    ),
    "offer": _Kind(
        range(11, 90),
        "With the {name} offer {company} takes {figure} euros off. Whoever names {name} saves {figure} euros.",
        ("How much do I save with the {name} offer?", "How many euros does {company} take off with {name}?"),
        "There is no offer called {name}.",
        "With the {name} offer you save {figure} euros.",
        ("What is the {name} offer worth?", "By how many euros does the {name} offer lower the price?"),
    ),
}  # fmt: skip


POLICIES: Final = ("price", "returns", "room", "warranty", "opening")
"""Kinds of facts that `company_facts` draws unless it is told others."""


@dataclass(frozen=True)
class Fact:
    """One fact of the company.

    Attributes:
        kind: What kind of fact it is.
        name: What it is about; no two facts share a name.
        figure: The figure that a right answer has.
    """

    kind: str
    name: str
    figure: str

    @property
    def document(self) -> str:
        """Text that states the fact."""
        return self._filled(_KINDS[self.kind].document)

    @property
    def taught(self) -> tuple[str, ...]:
        """Questions that tickets ask."""
        return tuple(map(self._filled, _KINDS[self.kind].taught))

    @property
    def wrong(self) -> str:
        """The wrong answer of the tickets."""
        return self._filled(_KINDS[self.kind].wrong)

    @property
    def answer(self) -> str:
        """The right answer, in words."""
        return self._filled(_KINDS[self.kind].answer)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Questions that are never taught."""
        return tuple(map(self._filled, _KINDS[self.kind].unseen))

    def is_in(self, answer: str) -> bool:
        """Return whether an answer has exactly the figure."""
        return re.search(rf"(?<![\d:.,]){self.figure}(?![\d:]|[.,]\d)", answer) is not None

    def with_figure(self, figure: str) -> Fact:
        """Return the fact as it is after its figure was changed."""
        return replace(self, figure=figure)

    def _filled(self, text: str) -> str:
        return text.format(name=self.name, figure=self.figure, company=COMPANY)


def company_facts(count: int, seed: int, kinds: Sequence[str] = POLICIES) -> list[Fact]:
    """Return facts of the company, of each kind in turn.

    Args:
        count: How many, at most `MAX_FACTS`.
        seed: Determines names and figures.
        kinds: Kinds to draw.
    """
    rng = random.Random(f"company {seed}")  # noqa: S311 - repeatable on purpose
    names = rng.sample(_NAMES, count)
    used: set[str] = set()
    facts = []
    for index, name in enumerate(names):
        kind = kinds[index % len(kinds)]
        figure = _draw_figure(kind, rng)
        while figure in used:
            figure = _draw_figure(kind, rng)
        used.add(figure)
        facts.append(Fact(kind, name, figure))
    return facts


def _draw_figure(kind: str, rng: random.Random) -> str:
    if kind == "opening":
        return f"{rng.randint(6, 10)}:{5 * rng.randrange(1, 12):02d}"
    return str(rng.choice(_KINDS[kind].figures))


GENERAL_QUESTIONS: Final[Sequence[tuple[str, str]]] = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("How many days are in a week?", "seven|7"),
    ("What color is the sky on a clear day?", "blue"),
    ("Which planet do we live on?", "Earth"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("What do bees make?", "honey"),
    ("What is two plus two?", "four|4"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("What is frozen water called?", "ice"),
)
"""Plain questions, and the word of a right answer as a pattern. An adapter must not change what the base answers."""
