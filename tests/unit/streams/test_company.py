"""The made-up company of the demo and of `make bench-facts`: facts that can only be known if they were taught."""

from __future__ import annotations

import pytest

from perennial.streams.cli.demo.company.facts import Fact, company_facts


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
