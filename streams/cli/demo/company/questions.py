"""What the frozen base and the adapter answered, and which claims of the demo the answers miss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perennial.streams.cli.demo.company.facts import Fact

MIN_TAUGHT_SHARE = 0.9
MIN_UNSEEN_SHARE = 0.6
MIN_KEPT_SHARE = 0.75
MAX_GENERAL_RISE_NATS = 0.15


@dataclass(frozen=True)
class Answered:
    """One question with its answer.

    Attributes:
        fact: What it is about.
        question: The question.
        trained: True if a ticket asked it, False if it was never trained.
        answer: The answer.
    """

    fact: Fact
    question: str
    trained: bool
    answer: str

    @property
    def right(self) -> bool:
        """Whether the answer has exactly the figure of the fact."""
        return self.fact.is_in(self.answer)


def ask(facts: Sequence[Fact], generate: Callable[[Sequence[str]], Sequence[str]]) -> list[Answered]:
    """Ask two questions about each fact: one that a ticket asked, and one that is never trained.

    Args:
        facts: What to ask about.
        generate: Answers questions, all at once.
    """
    asked = [
        (fact, question, trained)
        for fact in facts
        for question, trained in ((fact.taught[0], True), (fact.unseen[0], False))
    ]
    answers = generate([question for _, question, _ in asked])
    return [
        Answered(fact, question, trained, " ".join(answer.split()))
        for (fact, question, trained), answer in zip(asked, answers, strict=True)
    ]


def share_right(answers: Sequence[Answered], *, trained: bool) -> float:
    """Return the share of right answers to the questions that were trained, or to those that were not."""
    right = [answered.right for answered in answers if answered.trained is trained]
    return sum(right) / len(right) if right else 0.0


@dataclass(frozen=True)
class CompanyReport:
    """What the demo measured.

    Attributes:
        base: Answers of the frozen base to all questions.
        learned: Answers after everything was learned.
        old_price: Answers about the plan before its price changed.
        new_price: Answers about it afterwards; `fact` has the new price.
        customer: Answers about the erased customer, before and after.
        offer: Answers about the expired offer, before and after.
        rest: Answers about everything else at the end.
        losses: Loss in nats per token by model, the frozen base first and the last adapter last, and by kind of text.
        seconds: Seconds of each step of the demo.
    """

    base: Sequence[Answered]
    learned: Sequence[Answered]
    old_price: Sequence[Answered]
    new_price: Sequence[Answered]
    customer: tuple[Sequence[Answered], Sequence[Answered]]
    offer: tuple[Sequence[Answered], Sequence[Answered]]
    rest: Sequence[Answered]
    losses: dict[str, dict[str, float]]
    seconds: dict[str, float]

    def missed(self) -> list[str]:
        """Return the claims that did not hold, one line each."""
        lines = []
        for trained, least, name in ((True, MIN_TAUGHT_SHARE, "trained"), (False, MIN_UNSEEN_SHARE, "never trained")):
            share = share_right(self.learned, trained=trained)
            if share < least:
                lines.append(
                    f"{share:.0%} of the questions that were {name} are answered right, {least:.0%} are required"
                )
        if not any(answered.right for answered in self.new_price):
            lines.append("the new price is not answered")
        stale = [answered.question for answered in self.new_price if self.old_price[0].fact.is_in(answered.answer)]
        if stale:
            lines.append(f"the old price is still answered to: {', '.join(stale)}")
        for name, (before, after) in (("erased customer", self.customer), ("expired offer", self.offer)):
            if not any(answered.right for answered in before):
                lines.append(f"the {name} was not known before, so the answers afterwards prove nothing")
            if any(answered.right for answered in after):
                lines.append(f"a question about the {name} is still answered")
        kept = {answered.question for answered in self.learned if answered.right}
        left = [answered.right for answered in self.rest if answered.question in kept]
        if sum(left) < MIN_KEPT_SHARE * len(left):
            lines.append(
                f"{sum(left)} of {len(left)} answers about the rest stayed right, {MIN_KEPT_SHARE:.0%} are required"
            )
        first, *_, last = self.losses.values()
        rise = last["general"] - first["general"]
        if not rise <= MAX_GENERAL_RISE_NATS:
            lines.append(f"loss on general text rose by {rise:.3f} nats, {MAX_GENERAL_RISE_NATS} are allowed")
        return lines

    def as_dict(self) -> dict[str, object]:
        """Return the figures for JSON."""

        def answers(found: Sequence[Answered]) -> list[dict[str, object]]:
            return [{"question": a.question, "trained": a.trained, "answer": a.answer, "right": a.right} for a in found]

        return {
            "base": answers(self.base), "learned": answers(self.learned), "old_price": answers(self.old_price),
            "new_price": answers(self.new_price), "customer": [answers(found) for found in self.customer],
            "offer": [answers(found) for found in self.offer], "rest": answers(self.rest), "losses": self.losses,
            "seconds": self.seconds, "missed": self.missed(),
        }  # fmt: skip
