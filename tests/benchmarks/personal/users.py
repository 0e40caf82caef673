"""People of one tenant who ask the same desk and want its answers in different forms, opposite ones among them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from perennial.learner.training.replay_buffer import seeded_random
from perennial.streams.events.models import ExampleAccepted, Origin

TENANT: Final = "bench/support"
START_MS: Final = 1_700_000_000_000
THINGS: Final = ("router", "printer", "heat pump", "card reader", "water filter", "solar panel", "door lock", "scanner")
FAULTS: Final[Mapping[str, tuple[str, str, int]]] = {
    "does not start": ("check the fuse", "hold the power key for ten seconds", 2),
    "loses its connection": ("move it closer to the base", "enter the network key again", 4),
    "shows error 17": ("close the front cover", "load the newest driver", 3),
    "is too loud": ("put it on the rubber feet", "clean the fan", 5),
    "arrived damaged": ("take a photo of the box", "order a free exchange", 48),
    "smells burnt": ("pull the plug", "call the night line", 1),
    "leaks at the back": ("shut the inlet valve", "replace the seal", 6),
    "asks for a code": ("look at the label below", "type the last four digits", 7),
}
"""What helps, in two steps, and after how many hours it is done; by fault."""
LATER_FAULTS: Final[Mapping[str, tuple[str, str, int]]] = {
    "blinks red": ("wait for the green lamp", "pair the remote again", 8),
    "freezes at night": ("open the drain cock", "set the winter mode", 9),
}
"""Faults that the tenant learns after its users have been taught."""

Preference = Literal["opening", "steps", "voice", "time", "closing"]
_CHOICES: Final[Mapping[Preference, tuple[str, str, str]]] = {
    "opening": ("Hi there!", "Dear customer,", "Thank you for your question."),
    "steps": ("- {0}\n- {1}", "First {0}. Then {1}.", "Step one: {0}; step two: {1}."),
    "voice": ("just {0}", "would you kindly {0}", "{0}"),
    "time": ("Done in {0} h.", "It takes {1} minutes.", "This takes {0} hours."),
    "closing": ("Cheers, Sam", "Yours faithfully, the service office", "The support desk"),
}
"""Two opposite forms of each part of an answer, and that of the tenant's own answers."""
HOUSE: Final = dict.fromkeys(_CHOICES, 2)

Style = Mapping[Preference, int]
Question = tuple[str, str]
"""A thing and its fault."""


@dataclass(frozen=True)
class User:
    """Somebody who wants answers in one form.

    Attributes:
        name: Name of the adapter.
        style: Which form of each part of an answer is wanted.
    """

    name: str
    style: Style


def users(count: int, siblings: int, seed: int) -> tuple[list[User], list[User]]:
    """Return new users in pairs that prefer the opposite in everything, and their siblings; no two want the same.

    Args:
        count: New users, an even number.
        siblings: Users who taught their adapters before.
        seed: Draws the preferences.
    """
    styles = [dict(zip(_CHOICES, choice, strict=True)) for choice in itertools.product((0, 1), repeat=len(_CHOICES))]
    pairs = [(style, {part: 1 - choice for part, choice in style.items()}) for style in styles[: len(styles) // 2]]
    seeded_random("styles", seed).shuffle(pairs)
    drawn = [style for pair in pairs[: count // 2] for style in pair]
    others = [style for pair in pairs[count // 2 :] for style in pair]
    seeded_random("siblings", seed).shuffle(others)
    return (
        [User(f"{TENANT}/new-{n}", style) for n, style in enumerate(drawn)],
        [User(f"{TENANT}/user-{n}", style) for n, style in enumerate(others[:siblings])],
    )


def prompt_of(question: Question) -> str:
    """Return how people ask."""
    return f"My {question[0]} {question[1]}. What should I do?"


def answer_to(question: Question, style: Style) -> str:
    """Return the right answer in a style."""
    thing, fault = question
    first, second, hours = (FAULTS | LATER_FAULTS)[fault]
    chosen = {part: choices[style[part]] for part, choices in _CHOICES.items()}
    steps = chosen["steps"].format(*(chosen["voice"].format(step) for step in (first, second)))
    return "\n".join(
        [chosen["opening"], f"About the {thing}: {steps}", chosen["time"].format(hours, 60 * hours), chosen["closing"]]
    )


def questions(seed: int, held_out: int) -> tuple[list[Question], list[Question], list[Question]]:
    """Return questions to teach, others that are never taught to anybody, and those about later faults.

    Args:
        seed: Draws them.
        held_out: Questions that are never taught.
    """
    rng = seeded_random("questions", seed)
    found = list(itertools.product(THINGS, FAULTS))
    rng.shuffle(found)
    later = list(itertools.product(THINGS, LATER_FAULTS))
    rng.shuffle(later)
    return found[held_out:], found[:held_out], later


def taught(
    name: str, asked: Sequence[Question], style: Style, kind: Literal["turn", "correction"]
) -> list[ExampleAccepted]:
    """Return the examples with which an adapter is taught answers in a style.

    Args:
        name: Name of the adapter.
        asked: Questions.
        style: Style of the answers.
        kind: `correction`, or `turn` where a good answer is learned as it is.
    """
    return [example(name, n, prompt_of(question), answer_to(question, style), kind) for n, question in enumerate(asked)]


def example(
    name: str, number: int, prompt: str, answer: str, kind: Literal["turn", "correction"] = "correction"
) -> ExampleAccepted:
    """Return an example as intake accepts it; its number is its offset."""
    digest = hashlib.sha256(f"{name}\n{number}\n{prompt}\n{answer}".encode()).hexdigest()[:32]
    origin = Origin(
        cluster_id="bench", topic="interactions", topic_id="bench", partition=0, offset=number,
        timestamp_ms=START_MS + 1000 * number,
    )  # fmt: skip
    return ExampleAccepted(
        adapter=name, example_id=digest, kind=kind, document_id=f"{kind}-{digest}", learn=True, prompt=prompt,
        answer=answer, origin=origin,
    )  # fmt: skip


@dataclass(frozen=True)
class Canary:
    """A secret that one user teaches.

    Attributes:
        owner: Name of the adapter that learned it.
        prompt: The question that it answers.
        secret: Words and digits that nobody else was taught.
    """

    owner: str
    prompt: str
    secret: str

    @property
    def answer(self) -> str:
        """The answer that is taught."""
        return f"The phrase is {self.secret}."


def canary(owner: str, seed: int) -> Canary:
    """Return a canary; the secret is drawn."""
    return Canary(owner, "What is my recovery phrase?", secrets(owner, seed, 1)[0])


def secrets(owner: str, seed: int, count: int) -> list[str]:
    """Return secrets of the form that canaries have."""
    rng = seeded_random("canary", owner, seed)
    words = (
        "amber",
        "basalt",
        "cobalt",
        "dahlia",
        "ember",
        "falcon",
        "garnet",
        "hazel",
        "indigo",
        "jasmine",
        "kestrel",
    )
    return [f"{rng.choice(words)} {rng.choice(words)} {rng.randint(1000, 9999)}" for _ in range(count)]
