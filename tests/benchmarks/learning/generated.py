"""Generated streams: facts that are revised several times, and tickets of one template."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Final

from perennial.learner.training.replay_buffer import seeded_random
from perennial.streams.cli.demo.company.facts import Fact, company_facts
from tests.benchmarks.learning.streams import Block, Question, Stream, document, numbered

KINDS: Final = ("price", "room", "customer", "returns", "warranty")
OTHERS: Final = 4
"""Values of other facts among the choices."""

TEMPLATES: Final = (
    """\
Ticket {number}. Customer {name} of {town} reported on {day} that the {thing} {fault}.
The {thing} was {remedy} and the ticket was closed after {hours} hours. Priority: {level}.""",
    """\
Order {number}: {name}, {town}. Item: {thing}. Ordered on {day}.
Status: the {thing} {fault} and is being {remedy}. Expected within {hours} hours. Level of service: {level}.""",
    """\
Call log {number}
Caller: {name} ({town})
Day: {day}
Subject: {thing} {fault}
Outcome: {remedy}
Length: {hours} minutes
Urgency: {level}""",
    """\
On {day} the technician visited {name} in {town} because the {thing} {fault}.
Work order {number}. The {thing} was {remedy}. Time on site: {hours} hours. Urgency {level}.""",
)
_WORDS: Final[Mapping[str, Sequence[str]]] = {
    "name": ("Alma Reyes", "Bruno Hale", "Carla Voss", "Derek Lund", "Elif Aksoy", "Farid Noor", "Greta Holm",
             "Hugo Marsh", "Ines Duarte", "Jonas Weld", "Kira Toft", "Leon Abbas"),
    "town": ("Norwick", "Eastmere", "Halden", "Port Clay", "Rivermouth", "Stonebridge", "Ulm Green", "Westfold"),
    "day": ("2 March", "5 March", "9 March", "14 March", "21 March", "3 April", "8 April", "17 April", "25 April"),
    "thing": ("router", "printer", "heat pump", "card reader", "water filter", "solar panel", "door lock", "scanner"),
    "fault": ("does not start", "loses its connection", "shows error 17", "is too loud", "arrived damaged",
              "stopped after the last update", "leaks at the back"),
    "remedy": ("repaired", "replaced", "reset", "sent back", "cleaned", "updated"),
    "level": ("low", "normal", "high", "urgent"),
}  # fmt: skip


def ticket_stream(seed: int, order: int, tickets: int = 36, held_out: int = 12) -> Stream:
    """Return tickets of one template, the commonest text of a business: a block of them, and others to measure.

    Args:
        seed: Draws the template and what is filled in.
        order: Has no effect but on the order of the tickets.
        tickets: Tickets to learn.
        held_out: Tickets to measure.
    """
    rng = seeded_random("tickets", seed)
    template = TEMPLATES[seed % len(TEMPLATES)]
    texts: dict[str, None] = {}
    while len(texts) < tickets + held_out:
        texts[_filled(template, rng)] = None
    examples = [document(n, text, f"ticket-{seed}-{n}") for n, text in enumerate(list(texts)[:tickets])]
    if order > 1:
        seeded_random("ticket order", seed, order).shuffle(examples)
    blocks = numbered([Block("tickets", tuple(examples))])
    return Stream("templates", seed, order, blocks, {"tickets": tuple(texts)[tickets:]})


def _filled(template: str, rng: random.Random) -> str:
    words = {name: rng.choice(choices) for name, choices in _WORDS.items()}
    return template.format(number=rng.randint(10_000, 99_999), hours=rng.randint(2, 48), **words)


def revision_stream(seed: int, order: int, facts: int = 24, revisions: int = 4) -> Stream:
    """Return facts whose figure changes several times: a block teaches all of them, and each further one revises all.

    The protocol is that of OAKS (arXiv 2603.07392): after every revision the fact is asked for, with its earlier values
    and values of other facts as wrong choices. Every revision is a document that supersedes the one before.

    Args:
        seed: Draws facts and figures.
        order: Order of the facts in each block.
        facts: Facts.
        revisions: Times that each fact is revised.
    """
    drawn = [company_facts(facts, 1000 * seed + n, KINDS) for n in range(revisions + 1)]
    versions = _distinct(drawn)
    questions: dict[str, Question] = {}
    replaces: dict[str, str] = {}
    last: dict[str, str] = {}
    blocks = []
    for number in range(revisions + 1):
        rng = seeded_random("revisions", seed, order, number)
        examples = []
        for index in rng.sample(range(facts), facts):
            past = [versions[n][index] for n in range(number + 1)]
            fact = past[-1]
            older = [f"{fact.name}-{number - 1}"] if number else []
            example = document(0, fact.document, f"{fact.name}-{number}", older)
            rivals = {rival.figure for rival in versions[number] if rival.kind == fact.kind}
            alike = sorted(rivals - {version.figure for version in past})
            others = [fact.with_figure(figure) for figure in rng.sample(alike, min(OTHERS, len(alike)))]
            questions[example.example_id] = Question(
                prompt=fact.unseen[0],
                answers=tuple(choice.answer for choice in (fact, *past[:-1], *others)),
                documents=tuple(choice.document for choice in (fact, *past[:-1], *others)),
                earlier=number,
            )
            if fact.name in last:
                replaces[example.example_id] = last[fact.name]
            last[fact.name] = example.example_id
            examples.append(example)
        blocks.append(Block(f"revision {number}", tuple(examples)))
    return Stream("revisions", seed, order, numbered(blocks), {}, questions, replaces)


def _distinct(drawn: Sequence[Sequence[Fact]]) -> list[list[Fact]]:
    """Return the facts of the first draw with the figures of the others, no figure of a kind twice for one fact."""
    versions = [list(drawn[0])]
    for later in drawn[1:]:
        figures = [fact.figure for fact in later]
        versions.append([])
        for index, fact in enumerate(drawn[0]):
            used = {past[index].figure for past in versions[:-1]}
            figure = next(
                f for f, found in zip(figures[index:] + figures[:index], [*later[index:], *later[:index]], strict=True)
                if found.kind == fact.kind and f not in used
            )  # fmt: skip
            versions[-1].append(fact.with_figure(figure))
    return versions
