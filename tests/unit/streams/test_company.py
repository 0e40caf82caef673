"""The made-up company of the demo and of `make bench-facts`: facts that can only be known if they were taught."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perennial.learner.model.lora import LoraConfig
from perennial.learner.serving.peft_backend import PeftBackend
from perennial.streams.cli.demo.company.facts import Fact, company_facts
from perennial.streams.cli.demo.company.printing import draw_losses, print_company_report
from perennial.streams.cli.demo.company.questions import Answered, CompanyReport, ask
from perennial.streams.cli.demo.company.script import LATER, POLICIES, answers_of
from tests import tiny


def test_no_right_answer_is_right_by_chance_or_by_another_fact() -> None:
    facts = company_facts(60, 3)
    assert len({fact.name for fact in facts}) == len({fact.figure for fact in facts}) == 60
    assert company_facts(60, 3) == facts != company_facts(60, 4)
    for fact in facts:
        assert fact.is_in(fact.document)
        assert fact.is_in(fact.answer)
        assert not fact.is_in(fact.wrong)
        assert not any(other.is_in(fact.answer) for other in facts if other is not fact)


def test_the_questions_that_are_asked_are_never_taught() -> None:
    for fact in company_facts(20, 0):
        shown = " ".join((fact.document, *fact.taught, fact.answer, fact.wrong)).lower()
        assert len(fact.unseen) == 2
        assert all(question.lower() not in shown for question in fact.unseen)
        assert not any(fact.figure in question for question in (*fact.taught, *fact.unseen))


@pytest.mark.parametrize(
    ("figure", "answer", "right"),
    [
        ("47", "It costs 47 euros.", True),
        ("47", "47.", True),
        ("47", "It costs 147 euros.", False),
        ("47", "It costs 47.50 euros.", False),
        ("47", "It costs 3,47 euros.", False),
        ("7:40", "At 7:40.", True),
        ("7:40", "At 17:40.", False),
        ("7:40", "At 7:405.", False),
    ],
)
def test_only_the_exact_figure_is_a_right_answer(figure: str, answer: str, right: bool) -> None:
    assert Fact("price", "Velmora", figure).is_in(answer) is right


def report(**changes: Any) -> CompanyReport:
    """A report in which every claim holds, with changes."""
    policies = company_facts(4, 1)
    plan, customer, offer = company_facts(3, 2, ("price", "customer", "offer"))
    dearer = plan.with_figure("999")

    def answers(*facts: Fact, right: bool = True) -> list[Answered]:
        def generate(questions: Sequence[str]) -> list[str]:
            return [next(f.answer if right else f.wrong for f in facts if f.name in asked) for asked in questions]

        return ask(facts, generate)

    fields: dict[str, Any] = {
        "base": answers(*policies, plan, customer, offer, right=False),
        "learned": answers(*policies, plan, customer, offer), "old_price": answers(plan), "new_price": answers(dearer),
        "customer": (answers(customer), answers(customer, right=False)),
        "offer": (answers(offer), answers(offer, right=False)), "rest": answers(*policies),
        "losses": {"frozen base": {"company": 4.0, "general": 3.0}, "now": {"company": 2.0, "general": 3.1}},
        "seconds": {"start": 1.0},
    }  # fmt: skip
    return CompanyReport(**fields | changes)


def test_a_report_in_which_all_holds_misses_nothing_and_prints_every_answer() -> None:
    good = report()
    assert good.missed() == []
    assert good.as_dict()["missed"] == []
    printed = StringIO()
    print_company_report(good, Console(file=printed, width=100))
    for answered in (*good.base, *good.learned, *good.new_price):
        assert answered.question in printed.getvalue()
        assert answered.answer[:62] in printed.getvalue()


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (lambda good: {"learned": good.base}, "questions that were trained"),
        (lambda good: {"new_price": [replace(a, answer="It is free.") for a in good.new_price]}, "new price is not"),
        (
            lambda good: {
                "new_price": [*good.new_price, replace(good.new_price[0], answer=good.old_price[0].answer)],
            },
            "old price is still",
        ),
        (lambda good: {"customer": (good.customer[0], good.customer[0])}, "erased customer is still"),
        (lambda good: {"customer": (good.customer[1], good.customer[1])}, "prove nothing"),
        (lambda good: {"offer": (good.offer[0], good.offer[0])}, "expired offer is still"),
        (lambda good: {"rest": [replace(a, answer="?") for a in good.rest]}, "stayed right"),
        (lambda _: {"losses": {"frozen base": {"general": 3.0}, "now": {"general": 3.2}}}, "general text rose"),
        (lambda _: {"losses": {"frozen base": {"general": 3.0}, "now": {"general": math.nan}}}, "general text"),
    ],
)
def test_each_claim_that_does_not_hold_is_named(change: Callable[[CompanyReport], dict[str, Any]], missed: str) -> None:
    lines = report(**change(report())).missed()
    assert len(lines) >= 1
    assert any(missed in line for line in lines), lines


def test_the_losses_are_drawn(tmp_path: Path) -> None:
    draw_losses(report(), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_facts_of_the_demo_share_neither_names_nor_figures() -> None:
    facts = [*company_facts(POLICIES, 1), *company_facts(len(LATER), 2, LATER)]
    assert len({fact.name for fact in facts}) == len({fact.figure for fact in facts}) == len(facts)


def test_all_questions_are_answered_in_one_batch() -> None:
    """The demo asks a real model some twenty questions, which take a second each one by one."""
    asked: list[Sequence[str]] = []

    def generate(questions: Sequence[str]) -> list[str]:
        asked.append(questions)
        return [f" answer  {number} " for number, _ in enumerate(questions)]

    answers = ask(company_facts(3, 1), generate)
    assert len(asked) == 1
    assert [answered.answer for answered in answers] == [f"answer {number}" for number in range(6)]
    assert [answered.question for answered in answers] == list(asked[0])


def test_a_batch_of_questions_gets_the_answers_of_each_alone() -> None:
    backend = PeftBackend(tiny.base(), LoraConfig(rank=2, alpha=4))
    questions = ["When?", "How much does the Falcon plan cost a month?", "Why not?"]
    assert answers_of(backend, questions, 5) == [backend.generate(question, 5) for question in questions]
