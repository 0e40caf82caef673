"""The measurements of an update, on which the gate decides: of new rows, of general text, of a chat model's answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from perennial.learner.model.general_text import GeneralText
from perennial.learner.model.lora import Lora, Tensors
from perennial.learner.model.loss import mean_nats
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training import gate
from perennial.learner.training.answers import AnswerCheck, TrialAnswers
from perennial.learner.training.compute import Compute
from perennial.learner.training.recipe import Recipe
from perennial.storage.registry.gate_figures import GateFigures

MEASURED_ROWS = 8
"""Number of trained rows that are measured before and after, where nothing is held out."""


@dataclass(frozen=True)
class UpdateRows:
    """The rows of one update by what they are used for.

    Attributes:
        new: Rows that are trained first.
        held_out: Rows that are measured after that.
        probe: Rows of the new examples that are measured instead where nothing is held out.
        anchors: Rows of general text that are only measured.
        held_out_examples: Number of examples held out.
        corrected: Rows of corrections among the new and the held-out ones.
        new_ids: Ids of the examples that are trained first.
        closing: Rows of the held-out examples that are trained last.
        saved: Share of the tokens of the new examples that are not trained because documents share them, 0 to below 1.
        closing_saved: The same for the held-out examples.
        merged: Examples that are trained only on what they do not share with another, and that other one, by id.
    """

    new: list[TokenRow]
    held_out: list[TokenRow]
    probe: list[TokenRow]
    anchors: list[TokenRow]
    held_out_examples: int
    corrected: frozenset[TokenRow]
    new_ids: list[str]
    closing: list[TokenRow] = field(default_factory=list)
    saved: float = 0.0
    closing_saved: float = 0.0
    merged: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LossesBefore:
    """Losses before training, nats.

    Attributes:
        held_out: Loss of each token of the held-out rows under the parent.
        probe: Loss of each token of the probe rows under the parent.
        anchors: Loss of each token of the anchor rows under the parent.
        anchors_base: Mean loss of the anchor rows under the frozen base, per token.
    """

    held_out: list[float]
    probe: list[float]
    anchors: list[float]
    anchors_base: float


@dataclass(frozen=True)
class Measurer:
    """Measures versions for the gate.

    Attributes:
        lora: Slot that computes in the recipe's number format.
        pad: Token id to fill up with.
        general: General text.
        recipe: Limits of the gate.
        compute: Measures losses.
        answers: Measures the answers of a version; None where the base has no chat template.
        lock: Lock on the base.
        on_step: Called after each forward pass.
    """

    lora: Lora
    pad: int
    general: GeneralText
    recipe: Recipe
    compute: Compute
    answers: AnswerCheck | None
    lock: AbstractContextManager[object] | None
    on_step: Callable[[], None]

    @property
    def limits(self) -> gate.GateLimits:
        """Return the limits of the gate."""
        recipe = self.recipe
        return gate.GateLimits(
            recipe.min_gain_nats, recipe.max_general_rise_nats, recipe.max_answer_rise_nats, recipe.max_noise_nats
        )

    def losses(self, weights: Tensors, *groups: Sequence[TokenRow]) -> list[list[float]]:
        """Return the loss of each token of each group under the weights, measured in one call over all groups.

        What is measured together decides the batches, and so the last bits.
        """
        of_row = iter(self.row_losses(weights, [row for group in groups for row in group]))
        return [[nats for _ in group for nats in next(of_row).tolist()] for group in groups]

    def row_losses(self, weights: Tensors, rows: Sequence[TokenRow]) -> list[torch.Tensor]:
        """Return the loss of each trained token of each row under the weights, which are in the slot afterwards."""
        return self.compute.token_losses(self.lora, weights, rows, self.pad, self.lock, self.on_step)

    # ---- before training

    def before(self, weights: Tensors, rows: UpdateRows) -> LossesBefore:
        """Measure what an update starts from.

        Args:
            weights: The parent's.
            rows: Rows of the update.
        """
        base = mean_nats(self.general.base_losses(self.lora, rows.anchors, self.lock, self.on_step))
        held_out, probe, anchors = self.losses(weights, rows.held_out, rows.probe, rows.anchors)
        return LossesBefore(held_out, probe, anchors, base)

    # ---- after training

    def has_general_rise(self, weights: Tensors, rows: UpdateRows, before: LossesBefore) -> bool:
        """Return True if the weights, which are in the slot, use up `FULL_PRESSURE_SHARE` of a rise that the gate allows.

        These are the rise of the general loss and, for a chat model, that of the loss on the base's own answers.
        """
        nothing_before = (-math.inf, -math.inf)
        return self.too_far(self.rises(weights, rows, before), nothing_before)

    def rises(self, weights: Tensors, rows: UpdateRows, before: LossesBefore) -> tuple[float, float]:
        """Measure how far a version left the base.

        Args:
            weights: The version's, which are in the slot.
            rows: Rows of the update.
            before: What the frozen base loses on the anchors.

        Returns:
            The rise of the general loss and that of the loss on the base's own answers, nats per token; 0 for what is
            not looked at.
        """
        general = 0.0
        if rows.anchors:
            (anchors,) = self.losses(weights, rows.anchors)
            general = gate.mean(anchors) - before.anchors_base
        return general, self.answer_rise(weights) if self.asks_answers else 0.0

    def refused(self, rises: tuple[float, float]) -> bool:
        """Return True if the gate would refuse a version for these rises; see `rises`."""
        return not all(rise <= limit for rise, limit in zip(rises, self._allowed_rises, strict=True))

    def too_far(self, rises: tuple[float, float], earlier: tuple[float, float]) -> bool:
        """Return True if a pass raised a loss past `FULL_PRESSURE_SHARE` of what the gate allows; NaN is too far.

        A pass that lowers a loss which is past it already helps, and is not too far.

        Args:
            rises: As `rises` returns them, after the pass.
            earlier: The same before the pass.
        """
        return not all(
            now <= gate.FULL_PRESSURE_SHARE * limit or now <= was
            for now, was, limit in zip(rises, earlier, self._allowed_rises, strict=True)
        )

    @property
    def _allowed_rises(self) -> tuple[float, float]:
        return self.recipe.max_general_rise_nats, self.recipe.max_answer_rise_nats

    @property
    def asks_answers(self) -> bool:
        """True if the gate looks at the answers of a version."""
        return self.answers is not None and self.recipe.max_answer_rise_nats > 0

    def answer_rise(self, weights: Tensors) -> float:
        """Return the mean rise of the loss on the base's own answers under the weights, which are in the slot.

        Raises:
            RuntimeError: The base has no chat template.
        """

        def measure(rows: Sequence[TokenRow]) -> list[torch.Tensor]:
            return self.row_losses(weights, rows)

        shared = measure if self.recipe.shared_passes else None  # as versions before it were measured
        return gate.mean(self._check.rises(self.lora, self.lock, self.on_step, shared))

    def trial(self) -> TrialAnswers:
        """Let the version in the slot answer some questions.

        Raises:
            RuntimeError: The base has no chat template.
        """
        return self._check.trial(self.lora, self.lock, self.on_step)

    def judge_answers(self, before: Tensors, weights: Tensors) -> tuple[gate.GateVerdict, GateFigures]:
        """Let a version answer fixed questions, then measure how far it left the base's own answers.

        Args:
            before: The parent's weights.
            weights: The version's, which are in the slot before and after.

        Raises:
            RuntimeError: The base has no chat template.
        """
        asked = self.trial()
        verdict = gate.judge_trial(asked.asked, asked.degenerate, finite=asked.finite)
        figures = GateFigures(degenerate_answers=asked.degenerate)
        if not verdict.promote:
            return verdict, figures

        def rise_before() -> float:
            self.lora.load(before)
            try:
                return self.answer_rise(before)
            finally:
                self.lora.load(weights)

        rise = self.answer_rise(weights)
        figures = figures.merged(GateFigures(answer_rise=gate.rounded(rise)))
        return gate.judge_answers(rise, rise_before, self.limits), figures

    @property
    def _check(self) -> AnswerCheck:
        if self.answers is None:
            raise RuntimeError("the answers of a base without a chat template")
        return self.answers
