"""Trial answers: what a version answers to fixed questions, and how far it left the base's own answers.

Documents and corrections can push out what a chat model knew ("What is the capital of France?" is answered with a city
that was taught) while the loss on general text hardly rises. So the loss on the base's own greedy answers to fixed
questions is measured, and some of the questions are answered by the new version before anybody else asks it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final

import torch

from perennial.learner.model.generation import Decoded, decode
from perennial.learner.model.lora import Lora
from perennial.learner.model.loss import ignore_step, row_token_losses
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow
from perennial.learner.model.turns import ComputeTurns

QUESTIONS: Final = (
    "What is the capital of France?",
    "What is the opposite of hot?",
    "Who wrote Romeo and Juliet?",
    "What is a dog?",
    "Name three colours.",
    "What is water made of?",
    "How many days are in a week?",
    "What do plants need to grow?",
    "What is the largest ocean on Earth?",
    "Write a short greeting.",
    "What is two plus two?",
    "Why do people sleep?",
)
"""Questions to which any chat model has an answer, right or wrong: only a change of it counts."""
ANSWER_TOKENS: Final = 16
TRIAL_QUESTIONS: Final = 6
TRIAL_TOKENS: Final = 20
_PERIODS: Final = range(1, 7)
_REPEATED: Final = 10
"""An answer that ends in so many tokens that repeat the ones before them has run into a loop."""


def is_degenerate(answer: Decoded) -> bool:
    """Return True if an answer is not finite, empty, or ends in a loop."""
    ids = answer.ids
    if not answer.finite or not ids:
        return True
    for period in _PERIODS:
        run = 0
        while run + period < len(ids) and ids[-1 - run] == ids[-1 - run - period]:
            run += 1
        if run >= max(_REPEATED, 2 * period):
            return True
    return False


@dataclass(frozen=True)
class TrialAnswers:
    """The result of a trial.

    Attributes:
        asked: Questions that the frozen base answers properly.
        degenerate: Those of them that the version answers with nothing or with a loop.
        finite: False if a logit was NaN or infinite.
    """

    asked: int
    degenerate: int
    finite: bool


@dataclass(frozen=True)
class _BaseAnswers:
    """The frozen base's own answers.

    Attributes:
        rows: Each question with its answer, which alone is measured.
        nats: Loss of each row under the base, nats per token.
        trial: Positions of the questions to ask in a trial.
    """

    rows: list[TokenRow]
    nats: list[float]
    trial: list[int]


@dataclass
class AnswerCheck:
    """Measures versions by the base's own answers, which are generated once per thread count and process.

    Args:
        codec: Tokenizer of the base, which has a chat template.
        questions: What to ask.
    """

    codec: ExampleTokenizer
    questions: Sequence[str] = QUESTIONS
    _known: dict[tuple[int, torch.dtype | None], _BaseAnswers] = field(default_factory=dict)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def rises(
        self,
        lora: Lora,
        lock: AbstractContextManager[object] | None = None,
        on_step: Callable[[], None] = ignore_step,
        measure: Callable[[Sequence[TokenRow]], Sequence[torch.Tensor]] | None = None,
    ) -> list[float]:
        """Return by how much the loss on the base's answer to each question is above the base's, nats per token.

        A figure is NaN or infinite where the weights are broken. The questions to which the base has no answer are left
        out, so the list may be empty.

        Args:
            lora: Slot with the version's weights.
            lock: Lock on the base, held for each forward pass.
            on_step: Called after each forward pass, without the lock.
            measure: Returns the loss of each trained token of rows under the version; None: measured in the slot.
        """
        base = self._base(lora, lock, on_step)
        if measure is None:
            losses: Sequence[torch.Tensor] = row_token_losses(
                lora, base.rows, pad=self.codec.pad, adapted=True, lock=lock, on_step=on_step
            )
        else:
            losses = measure(base.rows)
        return [float(nats.mean()) - before for nats, before in zip(losses, base.nats, strict=True)]

    def trial(
        self,
        lora: Lora,
        lock: AbstractContextManager[object] | None = None,
        on_step: Callable[[], None] = ignore_step,
    ) -> TrialAnswers:
        """Let the version answer some of the questions that the base answers properly; arguments as for `rises`."""
        base = self._base(lora, lock, on_step)
        prompts = [base.rows[place].ids[: base.rows[place].train_from] for place in base.trial]
        answers = self._decode(lora, prompts, TRIAL_TOKENS, lock, on_step, adapted=True)
        return TrialAnswers(
            len(answers), sum(map(is_degenerate, answers)), finite=all(answer.finite for answer in answers)
        )

    def _base(
        self, lora: Lora, lock: AbstractContextManager[object] | None, on_step: Callable[[], None]
    ) -> _BaseAnswers:
        # Another thread may have set torch's count; the lock sets its own one for each forward pass.
        threads = lock.threads if isinstance(lock, ComputeTurns) else torch.get_num_threads()
        by = (threads, lora.compute_dtype)  # both decide the bits
        while not self._mutex.acquire(timeout=1):
            on_step()
        try:
            found = self._known.get(by)
            if found is None:
                found = self._known[by] = self._answer(lora, lock, on_step)
            return found
        finally:
            self._mutex.release()

    def _answer(
        self, lora: Lora, lock: AbstractContextManager[object] | None, on_step: Callable[[], None]
    ) -> _BaseAnswers:
        prompts = [self.codec.prompt_ids(question, lora.base.max_positions // 2) for question in self.questions]
        answers = self._decode(lora, prompts, TRIAL_TOKENS, lock, on_step, adapted=False)
        rows: list[TokenRow] = []
        trial: list[int] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if not answer.finite or not answer.ids:
                continue
            if not is_degenerate(answer) and len(trial) < TRIAL_QUESTIONS:
                trial.append(len(rows))
            ids = (*answer.ids, self.codec.eos) if answer.ended else answer.ids
            rows.append(TokenRow((*prompt, *ids[:ANSWER_TOKENS]), len(prompt)))
        losses = row_token_losses(lora, rows, pad=self.codec.pad, adapted=False, lock=lock, on_step=on_step)
        return _BaseAnswers(rows, [float(nats.mean()) for nats in losses], trial)

    def _decode(
        self,
        lora: Lora,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None],
        *,
        adapted: bool,
    ) -> list[Decoded]:
        room = lora.base.max_positions - max(map(len, prompts), default=0)
        return decode(
            lora, prompts, max_tokens=min(tokens, room), stop={self.codec.eos}, pad=self.codec.pad, adapted=adapted,
            lock=lock, on_step=on_step,
        )  # fmt: skip
