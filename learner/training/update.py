"""One update: from an adapter's state and a micro-batch to a candidate version.

The phases are: split the examples, measure before, schedule the rows, train on the new ones, judge the held-out ones,
train on those too, judge the result, and, where the recipe asks for it, judge the answers of a chat model. Where the gate
refuses the result, the update is tried again with a gentler mix. On a CPU the same state, examples and recipe give the
same bits; forgetting relies on this when it makes the recorded updates again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

import torch

from perennial.learner.bases.compute_dtype import DTYPES
from perennial.learner.model.general_text import GeneralText
from perennial.learner.model.lora import Lora, Tensors, is_finite, is_noop
from perennial.learner.model.loss import ignore_step
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, example_rows
from perennial.learner.training import gate
from perennial.learner.training.answers import AnswerCheck
from perennial.learner.training.averaging.slow_average import SlowAverage
from perennial.learner.training.compute import Compute, ComputeAlone
from perennial.learner.training.learned import is_learned
from perennial.learner.training.measuring import LossesBefore, Measurer, UpdateRows
from perennial.learner.training.personal.layered_lora import LayeredCompute, LayeredLora
from perennial.learner.training.probes import predicted_after
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.replay.places import BufferUpdate
from perennial.learner.training.replay_buffer import (
    BatchComposition,
    ReplayEntry,
    RowsOf,
    TrainingSchedule,
    build_schedule,
    seeded_random,
)
from perennial.learner.training.state import TrainingState
from perennial.learner.training.trainer import TrainConfig, TrainResult
from perennial.learner.training.update_rows import split_rows
from perennial.storage.registry.gate_figures import HELD_OUT, SEEN, GateFigures
from perennial.storage.registry.manifest import Probes
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.probe_texts import PROBE_TEXTS

CLOSING_STEPS = 1
"""Least number of steps that train on the held-out examples, after they were measured."""
GENERAL_SHARE_AT_FULL_PRESSURE = 0.5
PRESSURE_DECIMALS = 2
CHECK_STEPS = 8
"""Of an update of several passes, the general loss is measured after each pass, at most every so many steps."""
MAX_CORRECTION_STEPS = 128
"""Corrections that are not learned by then, as two that contradict each other, hold the adapter up no longer."""
GENTLER_RATE = 0.4
"""Learning rate of a further try, as a share of the rate of the try before it."""


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
        merged: Examples that were trained only on what they do not share with another, and that other one, by id; empty
            where the gate refused.
    """

    outcome: Literal["promoted", "refused"]
    reason: gate.GateReason
    state: TrainingState
    gate: GateFigures
    tokens: int
    probes: Probes = field(default_factory=dict)
    pass_adapters: int = 1
    merged: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Trial:
    """The result of the training so far, and the verdict of the last check.

    Attributes:
        trained: Weights and optimizer after the last training run. These weights are the fast ones.
        served: Weights that are judged, and served if the update is promoted: the slow average, or the trained ones.
        tokens: Number of tokens trained over all runs.
        steps: Number of optimizer steps over all runs.
        replayed: Number of replayed rows that were scheduled.
        missing: Number of replay draws that gave no row, because the example was erased or is quarantined.
        verdict: Verdict of the last check.
        figures: Figures measured after training, and what was trained.
    """

    trained: TrainResult
    served: Tensors
    tokens: int
    steps: int
    replayed: int
    missing: int
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
        lora = self.lora.computing_in(DTYPES.get(self.recipe.dtype))
        measurer = Measurer(
            lora, self.codec.pad, self.general, self.recipe, self.compute, self.answers, self.lock, on_step
        )
        rows = split_rows(examples, [self.rows(example) for example in examples], self.general, self.recipe, rng)
        average = SlowAverage.of(parent.weights, parent.optimizer, self.recipe.slow_average)
        buffer = BufferUpdate(parent.replay_index, examples, batch, self.recipe)
        run = _Run(self, measurer, parent, average, rows, measurer.before(parent.weights, rows), buffer, replayed)
        trial = run.attempt(_Try(rng, run.pressure(), 1.0))
        tries, tokens, missing, adapters = 1, trial.tokens, trial.missing, trial.trained.adapters
        while tries <= self.recipe.gentler_tries and trial.verdict.reason not in {"ok", "no-op"}:
            tries += 1
            rng = seeded_random("update", adapter, cut, self.recipe.seed, tries)
            trial = run.attempt(_Try(rng, 1.0, GENTLER_RATE ** (tries - 1)))
            tokens, missing = tokens + trial.tokens, missing + trial.missing
            adapters = max(adapters, trial.trained.adapters)

        # Hazard: `missing` is part of the update's identity, which tells it from one that was trained before an example
        # was forgotten. A draw that is not counted would let a version with that example be published.
        figures = trial.figures.merged(GateFigures(replay_missing=missing, reason=trial.verdict.reason))
        if tries > 1:
            figures = figures.merged(GateFigures(tries=tries))
        if not trial.passed:
            return UpdateResult("refused", trial.verdict.reason, parent, figures, tokens, pass_adapters=adapters)
        index = buffer.after({example.example_id for example in examples})
        optimizer = average.stored(trial.served, trial.trained.weights, trial.trained.optimizer)
        state = TrainingState(trial.served, optimizer, index, parent.adapter)
        layered = isinstance(self.lora, LayeredLora)  # which shared version will be served beneath is not known
        probes = {} if layered else predicted_after(PROBE_TEXTS, self.lora, self.codec, self.lock, on_step)
        return UpdateResult("promoted", "ok", state, figures, tokens, probes, adapters, rows.merged)

    @property
    def compute(self) -> Compute:
        """Return what trains and measures."""
        plain: Compute = ComputeAlone()
        if self.recipe.shared_passes:
            if self.shared is None:
                raise RuntimeError("the recipe has shared passes, and the updater has none")
            plain = self.shared
        return LayeredCompute(plain) if isinstance(self.lora, LayeredLora) else plain


@dataclass(frozen=True)
class _Try:
    """How an update is tried.

    Attributes:
        rng: Decides what is replayed and which general rows are mixed in.
        pressure: Pressure of the general loss, 0 to 1: the more of it, the more general text and the less replay.
        rate: Learning rate, as a share of the recipe's.
    """

    rng: Random
    pressure: float
    rate: float


@dataclass(frozen=True)
class _Run:
    """One update, whose rows are split and measured under the parent. It is tried once or, more gently, again.

    Attributes:
        updater: Recipe, slot, tokenizer and general text.
        measurer: Measures versions for the gate.
        parent: State to train from.
        average: Its slow average, and the weights that training begins with.
        rows: Rows of the update.
        before: Their losses under the parent.
        buffer: The replay buffer before and after it.
        replayed: Returns the rows of an earlier example, None where it must not be replayed.
    """

    updater: Updater
    measurer: Measurer
    parent: TrainingState
    average: SlowAverage
    rows: UpdateRows
    before: LossesBefore
    buffer: BufferUpdate
    replayed: RowsOf

    @property
    def _recipe(self) -> Recipe:
        return self.updater.recipe

    def attempt(self, how: _Try) -> _Trial:
        """Train and judge once."""
        rows, before = self.rows, self.before
        recipe, known = self._recipe, self.buffer.drawable
        composition = self._composition(recipe.steps, how.pressure)
        main = self._schedule(rows.new, known, replace(composition, saved=rows.saved), how.rng)
        # Several passes over the held-out rows alone would push out what was trained just before them.
        rehearsed = self.buffer.after(rows.new_ids) if recipe.epochs > 1 else known
        composition = replace(composition, steps=CLOSING_STEPS, saved=rows.closing_saved)
        closing = self._schedule(rows.closing, rehearsed, composition, how.rng)

        trial = replace(
            self._train_new(main, how.rate),
            replayed=main.replayed + closing.replayed,
            missing=main.missing + closing.missing,
        )
        # As many passes as over the other rows; with one pass this is all of them. So no example is lost.
        closing_steps = closing.steps[: -(-len(closing.steps) * trial.steps // max(1, len(main.steps)))]
        if trial.passed and rows.held_out_examples:
            trial = self.judge_held_out(trial)
        if trial.passed and closing_steps:
            trial = self._continued(trial, closing_steps, how.rate)
        if trial.passed:  # last, so that nothing pushes them out again
            trial = self._train_corrections(trial, how)
        if trial.passed:
            trial = self._judge_result(trial)
        if trial.passed and self.measurer.asks_answers:
            trial = self._judge_answers(trial)
        figures = GateFigures(
            basis=HELD_OUT if rows.held_out_examples else SEEN,
            held_out_examples=rows.held_out_examples,
            anchor_base=gate.rounded(before.anchors_base),
            anchor_before=gate.rounded(gate.mean(before.anchors)),
            replayed_rows=trial.replayed,
            strain=gate.rounded(how.pressure),
            steps=trial.steps,
        )
        return replace(trial, figures=figures.merged(trial.figures))

    # ---- before training

    def pressure(self) -> float:
        """Return the pressure of the general loss before training, 0 to 1."""
        if not self.rows.anchors:
            return 0.0
        before, limits = self.before, self.measurer.limits
        pressure = gate.general_loss_pressure(before.anchors_base, gate.mean(before.anchors), limits)
        # In passes, the base and the adapter are measured in different products: a rounding must not add a general row.
        return round(pressure, PRESSURE_DECIMALS) if self._recipe.shared_passes else pressure

    def _composition(self, steps: int, pressure: float) -> BatchComposition:
        """Return the composition of the steps: the higher the pressure, the more general text and the less replay.

        A stream that pulls the adapter away from general text thus meets a growing counterweight before the gate has
        to refuse.
        """
        recipe = self._recipe
        return BatchComposition(
            steps,
            recipe.rows,
            epochs=recipe.epochs,
            replay_share=recipe.replay_share * (1 - pressure / 2),
            general_share=recipe.general_share
            + pressure * max(0.0, GENERAL_SHARE_AT_FULL_PRESSURE - recipe.general_share),
            question_dropout=recipe.question_dropout,
        )

    def _schedule(
        self, new: Sequence[TokenRow], index: Sequence[ReplayEntry], composition: BatchComposition, rng: Random
    ) -> TrainingSchedule:
        return build_schedule(new, index, self.replayed, self._draw_general, composition, rng)

    def _draw_general(self, rng: Random) -> TokenRow | None:
        row = self.updater.general.draw(rng)
        return replace(row, like_base=True) if row is not None and self._recipe.general_kl_weight > 0 else row

    # ---- training and judging

    def _train_new(self, main: TrainingSchedule, rate: float) -> _Trial:
        """Train on the new rows, and take back the last pass if the general loss has risen too far.

        The gate would refuse the whole update otherwise, and nothing of it would be learned.
        """
        rows, before, measurer = self.rows, self.before, self.measurer
        several = self._recipe.epochs > 1 and bool(rows.anchors)
        size = max(CHECK_STEPS, -(-len(main.steps) // self._recipe.epochs)) if several else max(1, len(main.steps))
        trained = self._train(self.average.fast, self.parent.optimizer, main.steps[:size], rate)
        verdict = self._judge_training(trained)
        for start in range(size, len(main.steps), size):
            if not verdict.promote:
                break
            more = self._train(trained.weights, trained.optimizer, main.steps[start : start + size], rate)
            verdict = self._judge_training(more)
            if verdict.promote and measurer.has_general_rise(self._served(more), rows, before):
                self.updater.lora.load(trained.weights)
                trained = replace(trained, adapters=max(trained.adapters, more.adapters))
                break
            trained = more.after(trained)
        return _Trial(trained, self._served(trained), trained.tokens, len(trained.losses), 0, 0, verdict)

    def judge_held_out(self, trial: _Trial) -> _Trial:
        """Measure the held-out rows while they are still untrained."""
        after = self.measurer.losses(trial.served, self.rows.held_out)
        gain = gate.gain(self.before.held_out, *after)
        figures = GateFigures(
            held_out_before=gate.rounded(gain.before_nats),
            held_out_after=gate.rounded(gain.after_nats),
            held_out_error=gate.rounded(gain.error_nats),
        )
        return replace(trial, verdict=gate.judge_gain(gain, self.measurer.limits), figures=figures)

    def _continued(
        self, trial: _Trial, steps: Sequence[Sequence[TokenRow]], rate: float, *, averaged: bool = True
    ) -> _Trial:
        """Train on, and judge what the training alone shows; not `averaged`: the trained weights would be served."""
        trained = self._train(trial.trained.weights, trial.trained.optimizer, steps, rate)
        verdict = self._judge_training(trained)
        served = self._served(trained) if averaged else trained.weights
        trained = replace(trained, adapters=max(trained.adapters, trial.trained.adapters))
        tokens, count = trial.tokens + trained.tokens, trial.steps + len(steps)
        return replace(trial, trained=trained, served=served, tokens=tokens, steps=count, verdict=verdict)

    def _train_corrections(self, trial: _Trial, how: _Try) -> _Trial:
        """Train on what people corrected until it is learned, or until `MAX_CORRECTION_STEPS`.

        Where the average does not show the corrections, the trained weights are served in its place, so that they are
        seen at once. What was trained since the last check is taken back if it raised the general loss too far.

        Args:
            trial: What is trained so far.
            how: Decides what is mixed in, and the learning rate.
        """
        measurer, steps = self.measurer, 0
        composition = replace(self._composition(1, how.pressure), epochs=1)
        # What is learned already would be pushed out by what is not.
        known = self.buffer.after(self.rows.new_ids) if self._recipe.rehearse_update else self.buffer.drawable
        distinct = list(
            dict.fromkeys(row for row in (*self.rows.new, *self.rows.held_out) if row in self.rows.corrected)
        )

        def unlearned() -> list[TokenRow]:
            losses = measurer.row_losses(trial.served, distinct)
            return [row for row, nats in zip(distinct, losses, strict=True) if not is_learned(nats)]

        rises = None
        passes = self._recipe.correction_passes if distinct else 0
        if not passes:
            return trial
        if trial.served is not trial.trained.weights and unlearned():
            self.updater.lora.load(trial.trained.weights)
            rises = measurer.rises(trial.trained.weights, self.rows, self.before)
            if measurer.refused(rises):  # the gate would refuse the whole update, and the documents in it
                passes = 0
            else:
                trial = replace(trial, served=trial.trained.weights)
        while (left := unlearned()) and passes and steps < MAX_CORRECTION_STEPS:
            if rises is None:
                rises = measurer.rises(trial.served, self.rows, self.before)
            further: list[Sequence[TokenRow]] = []
            while passes and len(further) < self._recipe.correction_check_steps:
                drawn = self._schedule(left, known, composition, how.rng)
                further += drawn.steps
                trial = replace(trial, replayed=trial.replayed + drawn.replayed, missing=trial.missing + drawn.missing)
                passes -= 1
            steps += len(further)
            more = self._continued(trial, further, how.rate, averaged=False)
            if not more.passed:
                return more
            risen = measurer.rises(more.served, self.rows, self.before)
            if measurer.too_far(risen, rises):
                trial = replace(trial, trained=replace(trial.trained, adapters=more.trained.adapters))
                break
            trial, rises = more, risen
        self.updater.lora.load(trial.served)
        figures = GateFigures(corrections=len(distinct), corrections_not_learned=len(left))
        return replace(trial, figures=trial.figures.merged(figures))

    def _judge_result(self, trial: _Trial) -> _Trial:
        """Measure the final weights: the gain where nothing was held out, then the general loss."""
        measurer, rows, before, weights = self.measurer, self.rows, self.before, trial.served
        probe, anchors = measurer.losses(weights, rows.probe, rows.anchors)
        verdict = trial.verdict
        figures = trial.figures.merged(GateFigures(anchor_after=gate.rounded(gate.mean(anchors))))
        if not rows.held_out_examples:
            gain = gate.gain(before.probe, probe)
            verdict = gate.judge_gain(gain, measurer.limits)
            figures = figures.merged(
                GateFigures(
                    new_before=gate.rounded(gain.before_nats),
                    new_after=gate.rounded(gain.after_nats),
                    new_error=gate.rounded(gain.error_nats),
                )
            )
        if verdict.promote and rows.anchors:
            verdict = gate.judge_general(before.anchors_base, gate.gain(before.anchors, anchors), measurer.limits)
        return replace(trial, verdict=verdict, figures=figures)

    def _judge_answers(self, trial: _Trial) -> _Trial:
        """Let the new version answer fixed questions, then measure how far it left the base's own answers."""
        verdict, figures = self.measurer.judge_answers(self.parent.weights, trial.served)
        return replace(trial, verdict=verdict, figures=trial.figures.merged(figures))

    def _train(
        self, weights: Tensors, optimizer: Tensors | None, steps: Sequence[Sequence[TokenRow]], rate: float
    ) -> TrainResult:
        recipe, measurer = self._recipe, self.measurer
        config = TrainConfig(
            recipe.learning_rate * rate, recipe.clip_norm, measurer.pad, recipe.warmup_steps,
            packed_tokens=recipe.packed_tokens, like_base_weight=recipe.general_kl_weight,
        )  # fmt: skip
        return measurer.compute.train(measurer.lora, weights, optimizer, steps, config, measurer.lock, measurer.on_step)

    def _served(self, trained: TrainResult) -> Tensors:
        """Return what would be served after this training, and put it into the slot."""
        served = self.average.with_update(trained.weights)
        if served is not trained.weights:
            self.updater.lora.load(served)
        return served

    def _judge_training(self, trained: TrainResult) -> gate.GateVerdict:
        before = self.average.fast
        unchanged = all(torch.equal(tensor, before[name]) for name, tensor in trained.weights.items())
        noop = unchanged or is_noop(trained.weights)
        finite = is_finite(trained.weights) and is_finite(trained.optimizer)
        return gate.judge_training(trained.norms, trained.losses, finite=finite, noop=noop)
