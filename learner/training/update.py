"""One update: from an adapter's state and a micro-batch to a candidate version.

The phases are: split the examples, measure before, schedule the rows, train on the new ones, judge the held-out ones,
train on those too, judge the result, and, where the recipe asks for it, judge the answers of a chat model. On a CPU the
same state, examples and recipe give the same bits; forgetting relies on this when it makes the recorded updates again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

import torch

from perennial.learner.bases.compute_dtype import DTYPES
from perennial.learner.model.general_text import GeneralText
from perennial.learner.model.lora import Lora, Tensors, is_finite, is_noop
from perennial.learner.model.loss import ignore_step, mean_nats
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, example_rows
from perennial.learner.training import gate
from perennial.learner.training.answers import AnswerCheck
from perennial.learner.training.compute import Compute, ComputeAlone
from perennial.learner.training.probes import predicted_after
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.replay_buffer import (
    BatchComposition,
    ReplayEntry,
    RowsOf,
    TrainingSchedule,
    build_schedule,
    seeded_random,
    update_replay_index,
)
from perennial.learner.training.state import TrainingState
from perennial.learner.training.trainer import TrainConfig, TrainResult
from perennial.storage.registry.gate_figures import HELD_OUT, SEEN, GateFigures
from perennial.storage.registry.manifest import Probes
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.probe_texts import PROBE_TEXTS

CLOSING_STEPS = 1
"""Least number of steps that train on the held-out examples, after they were measured."""
MEASURED_ROWS = 8
"""Number of trained rows that are measured before and after, where nothing is held out."""
GENERAL_SHARE_AT_FULL_PRESSURE = 0.5
PRESSURE_DECIMALS = 2
CHECK_STEPS = 8
"""Of an update of several passes, the general loss is measured after each pass, at most every so many steps."""


@dataclass(frozen=True)
class UpdateResult:
    """The result of an update.

    Attributes:
        outcome: `promoted`, or `refused` by the gate.
        reason: `ok`, or why the gate refused.
        state: State to train the next update from; the parent's state where the gate refused.
        gate: What the gate measured.
        tokens: Number of trained tokens over all steps, also where the gate refused.
        probes: What the state predicts after the probe texts; empty where the gate refused.
        pass_adapters: Most adapters that shared a training pass of the update.
    """

    outcome: Literal["promoted", "refused"]
    reason: gate.GateReason
    state: TrainingState
    gate: GateFigures
    tokens: int
    probes: Probes = field(default_factory=dict)
    pass_adapters: int = 1


@dataclass(frozen=True)
class _UpdateRows:
    """The rows of one update by what they are used for.

    Attributes:
        new: Rows that are trained first.
        held_out: Rows that are measured after that, and trained last.
        probe: Rows out of `new` that are measured instead where nothing is held out.
        anchors: Rows of general text that are only measured.
        held_out_examples: Number of examples held out.
        new_ids: Ids of the examples that are trained first.
    """

    new: list[TokenRow]
    held_out: list[TokenRow]
    probe: list[TokenRow]
    anchors: list[TokenRow]
    held_out_examples: int
    new_ids: list[str]


@dataclass(frozen=True)
class _LossesBefore:
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
class _Trial:
    """The result of the training so far, and the verdict of the last check.

    Attributes:
        trained: Weights and optimizer after the last training run.
        tokens: Number of tokens trained over all runs.
        verdict: Verdict of the last check.
        figures: Figures measured after training.
    """

    trained: TrainResult
    tokens: int
    verdict: gate.GateVerdict
    figures: GateFigures = field(default_factory=GateFigures)

    @property
    def passed(self) -> bool:
        """True if no check has refused the update."""
        return self.verdict.promote


@dataclass(frozen=True)
class Updater:
    """Everything that the updates of a process share.

    Attributes:
        lora: Slot to train in.
        codec: Tokenizer of the base.
        general: General text, in rows of the recipe's length.
        recipe: How to train and what the gate asks.
        lock: Lock on the base, held for each training step and each forward pass; None where nobody shares the base.
        answers: Measures the answers of a version; None where the base has no chat template.
        shared: Trains and measures where the recipe says `shared_passes`; None where no recipe does.
    """

    lora: Lora
    codec: ExampleTokenizer
    general: GeneralText
    recipe: Recipe
    lock: AbstractContextManager[object] | None = None
    answers: AnswerCheck | None = None
    shared: Compute | None = None

    def rows(self, example: ExampleAccepted) -> list[TokenRow]:
        """Return the training rows of an example.

        Raises:
            ExampleError: The example has nothing to train.
        """
        return example_rows(example, self.codec, self.recipe.row_tokens, find_question=self.recipe.question_dropout > 0)

    def update(
        self,
        parent: TrainingState,
        examples: Sequence[ExampleAccepted],
        *,
        adapter: str,
        cut: int,
        batch: str,
        replayed: RowsOf,
        on_step: Callable[[], None] = ignore_step,
    ) -> UpdateResult:
        """Learn the examples of one cut and judge the result.

        Args:
            parent: State to train from.
            examples: Examples of the micro-batch, at least one.
            adapter: Name of the adapter; with the cut and the recipe's seed it decides every random draw.
            cut: Number of the cut.
            batch: Digest of the micro-batch blob.
            replayed: Returns the rows of an earlier example, None where it must not be replayed.
            on_step: Called after each optimizer step and each forward pass of a measurement, so that a caller can tell
                a long update from one that is stuck. Called without the lock; it has no effect on the result.

        Raises:
            ExampleError: An example has nothing to train.
            AdapterError: The parent's weights do not fit the slot.
            OutOfMemoryError: A single row does not fit the memory.
        """
        # The order of the draws from `rng` (probe, anchors, main schedule, closing schedule) decides the bits.
        rng = seeded_random("update", adapter, cut, self.recipe.seed)
        rows = self._split(examples, rng)
        before = self._measure_before(parent.weights, rows, on_step)
        pressure = self._pressure(rows, before)
        main = self._schedule(
            rows.new, parent.replay_index, replayed, self._composition(self.recipe.steps, pressure), rng
        )
        # Several passes over the held-out rows alone would push out what was trained just before them.
        rehearsed = self._index_after(parent, rows.new_ids, batch) if self.recipe.epochs > 1 else parent.replay_index
        closing = self._schedule(rows.held_out, rehearsed, replayed, self._composition(CLOSING_STEPS, pressure), rng)

        trial = self._train_new(parent, main, rows, before, on_step)
        main_steps = len(trial.trained.losses)
        # As many passes as over the other rows; with one pass this is all of them.
        closing_steps = closing.steps[: -(-len(closing.steps) * main_steps // max(1, len(main.steps)))]
        if trial.passed and rows.held_out_examples:
            trial = self._judge_held_out(trial, rows, before, on_step)
        if trial.passed and closing_steps:
            trial = self._train_held_out(trial, parent, closing_steps, on_step)
        if trial.passed:
            trial = self._judge_result(trial, rows, before, on_step)
        if trial.passed and self.answers is not None and self.recipe.max_answer_rise_nats > 0:
            trial = self._judge_answers(trial, parent, self.answers, on_step)

        figures = GateFigures(
            basis=HELD_OUT if rows.held_out_examples else SEEN,
            held_out_examples=rows.held_out_examples,
            anchor_base=gate.rounded(before.anchors_base),
            anchor_before=gate.rounded(gate.mean(before.anchors)),
            replayed_rows=main.replayed + closing.replayed,
            replay_missing=main.missing + closing.missing,
            strain=gate.rounded(pressure),
            steps=main_steps + len(closing_steps),
            reason=trial.verdict.reason,
        ).merged(trial.figures)
        if not trial.passed:
            return UpdateResult(
                "refused", trial.verdict.reason, parent, figures, trial.tokens, pass_adapters=trial.trained.adapters
            )
        index = self._index_after(parent, [example.example_id for example in examples], batch)
        state = TrainingState(trial.trained.weights, trial.trained.optimizer, index)
        probes = predicted_after(PROBE_TEXTS, self.lora, self.codec, self.lock, on_step)
        return UpdateResult("promoted", "ok", state, figures, trial.tokens, probes, trial.trained.adapters)

    @functools.cached_property
    def _computing(self) -> Lora:
        """Return the slot, computing in the recipe's number format."""
        return self.lora.computing_in(DTYPES.get(self.recipe.dtype))

    @property
    def compute(self) -> Compute:
        """Return what trains and measures."""
        if not self.recipe.shared_passes:
            return ComputeAlone()
        if self.shared is None:
            raise RuntimeError("the recipe has shared passes, and the updater has none")
        return self.shared

    # ---- before training

    def _split(self, examples: Sequence[ExampleAccepted], rng: Random) -> _UpdateRows:
        held_out = gate.hold_out([example.document_id for example in examples], self.recipe.held_out_share)
        rows = [self.rows(example) for example in examples]
        new = [row for index, group in enumerate(rows) if index not in held_out for row in group]
        return _UpdateRows(
            new=new,
            held_out=[row for index, group in enumerate(rows) if index in held_out for row in group],
            # A batch too small to hold anything out is judged on rows that it trains.
            probe=[] if held_out else rng.sample(new, min(MEASURED_ROWS, len(new))),
            anchors=self.general.anchors(rng, self.recipe.anchor_rows),
            held_out_examples=len(held_out),
            new_ids=[example.example_id for index, example in enumerate(examples) if index not in held_out],
        )

    def _measure_before(self, weights: Tensors, rows: _UpdateRows, on_step: Callable[[], None]) -> _LossesBefore:
        anchors_base = mean_nats(self.general.base_losses(self._computing, rows.anchors, self.lock, on_step))
        held_out, probe, anchors = self._measure(weights, rows.held_out, rows.probe, rows.anchors, on_step=on_step)
        return _LossesBefore(held_out, probe, anchors, anchors_base)

    def _pressure(self, rows: _UpdateRows, before: _LossesBefore) -> float:
        if not rows.anchors:
            return 0.0
        pressure = gate.general_loss_pressure(before.anchors_base, gate.mean(before.anchors), self._limits)
        # In passes, the base and the adapter are measured in different products: a rounding must not add a general row.
        return round(pressure, PRESSURE_DECIMALS) if self.recipe.shared_passes else pressure

    def _composition(self, steps: int, pressure: float) -> BatchComposition:
        """Return the composition of the steps: the higher the pressure, the more general text and the less replay.

        A stream that pulls the adapter away from general text thus meets a growing counterweight before the gate has
        to refuse.
        """
        general = self.recipe.general_share
        return BatchComposition(
            steps,
            self.recipe.rows,
            epochs=self.recipe.epochs,
            replay_share=self.recipe.replay_share * (1 - pressure / 2),
            general_share=general + pressure * max(0.0, GENERAL_SHARE_AT_FULL_PRESSURE - general),
            question_dropout=self.recipe.question_dropout,
        )

    def _schedule(
        self,
        new: Sequence[TokenRow],
        index: Sequence[ReplayEntry],
        replayed: RowsOf,
        composition: BatchComposition,
        rng: Random,
    ) -> TrainingSchedule:
        return build_schedule(new, index, replayed, self._draw_general, composition, rng)

    def _draw_general(self, rng: Random) -> TokenRow | None:
        row = self.general.draw(rng)
        return replace(row, like_base=True) if row is not None and self.recipe.general_kl_weight > 0 else row

    def _index_after(self, parent: TrainingState, learned: Sequence[str], batch: str) -> tuple[ReplayEntry, ...]:
        """Return the replay index with these examples of the micro-batch."""
        entries = (ReplayEntry(example_id, batch) for example_id in learned)
        return update_replay_index(parent.replay_index, entries, self.recipe.replay_size, self.recipe.seed)

    # ---- training and judging

    def _train_new(
        self,
        parent: TrainingState,
        main: TrainingSchedule,
        rows: _UpdateRows,
        before: _LossesBefore,
        on_step: Callable[[], None],
    ) -> _Trial:
        """Train on the new rows, and take back the last pass if the general loss has risen too far.

        The gate would refuse the whole update otherwise, and nothing of it would be learned.
        """
        several = self.recipe.epochs > 1 and bool(rows.anchors)
        size = max(CHECK_STEPS, -(-len(main.steps) // self.recipe.epochs)) if several else max(1, len(main.steps))
        trained = self._train(parent.weights, parent.optimizer, main.steps[:size], on_step)
        verdict = self._judge_training(trained, parent.weights)
        for start in range(size, len(main.steps), size):
            if not verdict.promote:
                break
            more = self._train(trained.weights, trained.optimizer, main.steps[start : start + size], on_step)
            verdict = self._judge_training(more, parent.weights)
            if verdict.promote and self._has_general_rise(more.weights, rows, before, on_step):
                self.lora.load(trained.weights)
                trained = replace(trained, adapters=max(trained.adapters, more.adapters))
                break
            trained = more.after(trained)
        return _Trial(trained, trained.tokens, verdict)

    def _has_general_rise(
        self, weights: Tensors, rows: _UpdateRows, before: _LossesBefore, on_step: Callable[[], None]
    ) -> bool:
        """Return True if the weights, which are in the slot, use up `FULL_PRESSURE_SHARE` of a rise that the gate allows.

        These are the rise of the general loss and, for a chat model, that of the loss on the base's own answers.
        """
        (anchors,) = self._measure(weights, rows.anchors, on_step=on_step)
        limits, share = self._limits, gate.FULL_PRESSURE_SHARE
        if not gate.mean(anchors) - before.anchors_base <= share * limits.max_general_rise_nats:
            return True
        if self.answers is None or limits.max_answer_rise_nats == 0:
            return False
        rise = self._answer_rise(weights, self.answers, on_step)
        return not rise <= share * limits.max_answer_rise_nats

    def _judge_held_out(
        self, trial: _Trial, rows: _UpdateRows, before: _LossesBefore, on_step: Callable[[], None]
    ) -> _Trial:
        """Measure the held-out rows while they are still untrained."""
        gain = gate.gain(before.held_out, *self._measure(trial.trained.weights, rows.held_out, on_step=on_step))
        figures = GateFigures(
            held_out_before=gate.rounded(gain.before_nats),
            held_out_after=gate.rounded(gain.after_nats),
            held_out_error=gate.rounded(gain.error_nats),
        )
        return replace(trial, verdict=gate.judge_gain(gain, self._limits), figures=figures)

    def _train_held_out(
        self,
        trial: _Trial,
        parent: TrainingState,
        closing: Sequence[Sequence[TokenRow]],
        on_step: Callable[[], None],
    ) -> _Trial:
        """Train on the held-out rows too, so that no example is lost."""
        trained = self._train(trial.trained.weights, trial.trained.optimizer, closing, on_step)
        verdict = self._judge_training(trained, parent.weights)
        trained = replace(trained, adapters=max(trained.adapters, trial.trained.adapters))
        return replace(trial, trained=trained, tokens=trial.tokens + trained.tokens, verdict=verdict)

    def _judge_result(
        self, trial: _Trial, rows: _UpdateRows, before: _LossesBefore, on_step: Callable[[], None]
    ) -> _Trial:
        """Measure the final weights: the gain where nothing was held out, then the general loss."""
        probe, anchors = self._measure(trial.trained.weights, rows.probe, rows.anchors, on_step=on_step)
        verdict = trial.verdict
        figures = trial.figures.merged(GateFigures(anchor_after=gate.rounded(gate.mean(anchors))))
        if not rows.held_out_examples:
            gain = gate.gain(before.probe, probe)
            verdict = gate.judge_gain(gain, self._limits)
            figures = figures.merged(
                GateFigures(
                    new_before=gate.rounded(gain.before_nats),
                    new_after=gate.rounded(gain.after_nats),
                    new_error=gate.rounded(gain.error_nats),
                )
            )
        if verdict.promote and rows.anchors:
            verdict = gate.judge_general(before.anchors_base, gate.gain(before.anchors, anchors), self._limits)
        return replace(trial, verdict=verdict, figures=figures)

    def _judge_answers(
        self, trial: _Trial, parent: TrainingState, answers: AnswerCheck, on_step: Callable[[], None]
    ) -> _Trial:
        """Let the new version answer fixed questions, then measure how far it left the base's own answers."""
        asked = answers.trial(self._computing, self.lock, on_step)
        verdict = gate.judge_trial(asked.asked, asked.degenerate, finite=asked.finite)
        figures = trial.figures.merged(GateFigures(degenerate_answers=asked.degenerate))
        if verdict.promote:
            rise = self._answer_rise(trial.trained.weights, answers, on_step)
            figures = figures.merged(GateFigures(answer_rise=gate.rounded(rise)))

            def rise_before() -> float:
                self.lora.load(parent.weights)
                try:
                    return self._answer_rise(parent.weights, answers, on_step)
                finally:
                    self.lora.load(trial.trained.weights)

            verdict = gate.judge_answers(rise, rise_before, self._limits)
        return replace(trial, verdict=verdict, figures=figures)

    def _answer_rise(self, weights: Tensors, answers: AnswerCheck, on_step: Callable[[], None]) -> float:
        """Return the mean rise of the loss on the base's own answers under the weights, which are in the slot."""

        def measure(rows: Sequence[TokenRow]) -> list[torch.Tensor]:
            return self.compute.token_losses(self._computing, weights, rows, self.codec.pad, self.lock, on_step)

        shared = measure if self.recipe.shared_passes else None  # as versions before it were measured
        return gate.mean(answers.rises(self._computing, self.lock, on_step, shared))

    @property
    def _limits(self) -> gate.GateLimits:
        recipe = self.recipe
        return gate.GateLimits(recipe.min_gain_nats, recipe.max_general_rise_nats, recipe.max_answer_rise_nats)

    def _train(
        self,
        weights: Tensors,
        optimizer: Tensors | None,
        steps: Sequence[Sequence[TokenRow]],
        on_step: Callable[[], None],
    ) -> TrainResult:
        recipe = self.recipe
        config = TrainConfig(
            recipe.learning_rate, recipe.clip_norm, self.codec.pad, recipe.warmup_steps,
            packed_tokens=recipe.packed_tokens, like_base_weight=recipe.general_kl_weight,
        )  # fmt: skip
        return self.compute.train(self._computing, weights, optimizer, steps, config, self.lock, on_step)

    def _judge_training(self, trained: TrainResult, before: Tensors) -> gate.GateVerdict:
        unchanged = all(torch.equal(tensor, before[name]) for name, tensor in trained.weights.items())
        noop = unchanged or is_noop(trained.weights)
        finite = is_finite(trained.weights) and is_finite(trained.optimizer)
        return gate.judge_training(trained.norms, trained.losses, finite=finite, noop=noop)

    def _measure(self, weights: Tensors, *groups: Sequence[TokenRow], on_step: Callable[[], None]) -> list[list[float]]:
        """Return the loss of each token of each group under the weights, measured in one call over all groups.

        What is measured together decides the batches, and so the last bits.
        """
        rows = [row for group in groups for row in group]
        losses = self.compute.token_losses(self._computing, weights, rows, self.codec.pad, self.lock, on_step)
        of_row = iter(losses)
        return [[nats for _ in group for nats in next(of_row).tolist()] for group in groups]
