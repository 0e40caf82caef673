"""One micro-batch to one candidate version: split, measure, train, measure, judge. Pure given state, seed, recipe.

The same call gives the same bytes on a CPU; forgetting replays an adapter's line by calling it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from random import Random
from typing import Literal

import torch

from perennial.learner.model.general_text import GeneralText
from perennial.learner.model.lora import Lora, Tensors, is_finite, is_noop
from perennial.learner.model.loss import mean_nats, row_token_losses
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, example_rows
from perennial.learner.training import gate
from perennial.learner.training.replay_buffer import (
    BatchComposition,
    ReplayEntry,
    TrainingSchedule,
    build_schedule,
    seeded_random,
    update_replay_index,
)
from perennial.learner.training.state import TrainingState
from perennial.learner.training.trainer import TrainConfig, TrainResult, train
from perennial.storage.registry.gate_figures import HELD_OUT, SEEN, GateFigures
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.settings import Settings

CLOSING_STEPS = 1
WARMUP_STEPS = 10
MEASURED_ROWS = 8
"""Where nothing is held out, so many of the rows that are trained are measured before and after."""
STRAINED_GENERAL_SHARE = 0.5


@dataclass(frozen=True)
class Recipe:
    """Everything about training that a version depends on besides its data; goes into every manifest."""

    rank: int
    alpha: int
    learning_rate: float
    clip_norm: float
    steps: int
    rows: int
    row_tokens: int
    replay_share: float
    general_share: float
    replay_size: int
    held_out_share: float
    anchor_rows: int
    min_gain_nats: float
    max_general_rise_nats: float
    seed: int
    warmup_steps: int = WARMUP_STEPS

    @classmethod
    def of(cls, settings: Settings) -> Recipe:
        """The recipe that the settings describe."""
        values = {**settings.training.model_dump(), **settings.gate.model_dump()}
        return cls(**values)

    def config(self) -> dict[str, float | int]:
        """The recipe as a manifest holds it."""
        return asdict(self)


@dataclass(frozen=True)
class UpdateResult:
    """The result of an update; a refused one carries its parent's state on."""

    outcome: Literal["promoted", "refused"]
    reason: gate.GateReason
    state: TrainingState
    gate: GateFigures
    tokens: int


@dataclass(frozen=True)
class Updater:
    """What all updates of a process share: the LoRA slot, the tokenizer, the general text, the recipe, the lock."""

    lora: Lora
    codec: ExampleTokenizer
    general: GeneralText
    recipe: Recipe
    lock: AbstractContextManager[object] | None = None

    def rows(self, example: ExampleAccepted) -> list[TokenRow]:
        """The training rows of an example. Raises ExampleError."""
        return example_rows(example, self.codec, self.recipe.row_tokens)

    def update(
        self,
        parent: TrainingState,
        examples: Sequence[ExampleAccepted],
        *,
        adapter: str,
        cut: int,
        batch: str,
        replayed: Callable[[ReplayEntry], Sequence[TokenRow] | None],
    ) -> UpdateResult:
        """Learn the examples of one cut, at least one of them.

        batch: digest of the micro-batch. replayed: rows of an earlier example, None where its text was erased.
        Raises ExampleError where an example has nothing to train.
        """
        recipe = self.recipe
        held = gate.hold_out([example.document_id for example in examples], recipe.held_out_share)
        rows = [self.rows(example) for example in examples]
        train_rows = [row for index, group in enumerate(rows) if index not in held for row in group]
        held_rows = [row for index, group in enumerate(rows) if index in held for row in group]
        rng = seeded_random("update", adapter, cut, recipe.seed)
        # A batch too small to hold anything out is judged on rows that it trains.
        new = [] if held else rng.sample(train_rows, min(MEASURED_ROWS, len(train_rows)))
        anchors = self.general.anchors(rng, recipe.anchor_rows)
        base = mean_nats(self.general.base_losses(self.lora, anchors, self.lock))
        self.lora.load(parent.weights)
        held_was, new_was, anchor_was = self._measure(held_rows, new, anchors)
        strain = gate.general_loss_pressure(base, _mean(anchor_was), self._limits) if anchors else 0.0
        main = self._schedule(train_rows, parent, replayed, recipe.steps, rng, strain)
        closing = self._schedule(held_rows, parent, replayed, CLOSING_STEPS, rng, strain)
        figures: dict[str, float | int | str | None] = {
            "basis": HELD_OUT if held else SEEN,
            "held_out_examples": len(held),
            "anchor_base": base,
            "anchor_before": _mean(anchor_was),
            "replayed_rows": main.replayed + closing.replayed,
            "replay_missing": main.missing + closing.missing,
            "strain": strain,
            "steps": len(main.steps) + len(closing.steps),
        }
        result = self._train(parent.weights, parent.optimizer, main)
        verdict = self._judge_training(result, parent.weights)
        if verdict.promote and held:
            measured = gate.gain(held_was, *self._measure(held_rows))
            figures |= _figures_of("held_out", measured)
            verdict = gate.judge_gain(measured, self._limits)
        tokens = result.tokens
        if verdict.promote and closing.steps:
            result = self._train(result.state, result.optimizer, closing)
            tokens += result.tokens
            verdict = self._judge_training(result, parent.weights)
        if verdict.promote:
            new_is, anchor_is = self._measure(new, anchors)
            figures["anchor_after"] = _mean(anchor_is)
            if not held:
                measured = gate.gain(new_was, new_is)
                figures |= _figures_of("new", measured)
                verdict = gate.judge_gain(measured, self._limits)
            if verdict.promote and anchors:
                verdict = gate.judge_general(base, gate.gain(anchor_was, anchor_is), self._limits)
        figures["reason"] = verdict.reason
        record = GateFigures.model_validate(gate.rounded(figures))
        if not verdict.promote:
            return UpdateResult("refused", verdict.reason, parent, record, tokens)
        learned = (ReplayEntry(example.example_id, batch) for example in examples)
        kept = update_replay_index(parent.replay_index, learned, recipe.replay_size, recipe.seed)
        return UpdateResult("promoted", "ok", TrainingState(result.state, result.optimizer, kept), record, tokens)

    @property
    def _limits(self) -> gate.GateLimits:
        return gate.GateLimits(self.recipe.min_gain_nats, self.recipe.max_general_rise_nats)

    def _schedule(
        self,
        new: Sequence[TokenRow],
        parent: TrainingState,
        replayed: Callable[[ReplayEntry], Sequence[TokenRow] | None],
        steps: int,
        rng: Random,
        strain: float,
    ) -> TrainingSchedule:
        general = self.recipe.general_share
        # What general text costs already decides how much of it is trained on: a stream that pulls the adapter away
        # meets a growing counterweight before the gate has to refuse.
        mix = BatchComposition(
            steps,
            self.recipe.rows,
            self.recipe.replay_share * (1 - strain / 2),
            general + strain * max(0.0, STRAINED_GENERAL_SHARE - general),
        )
        return build_schedule(new, parent.replay_index, replayed, self.general.draw, mix, rng)

    def _train(self, state: Tensors, optimizer: Tensors | None, rows: TrainingSchedule) -> TrainResult:
        recipe = self.recipe
        plan = TrainConfig(recipe.learning_rate, recipe.clip_norm, self.codec.pad, recipe.warmup_steps)
        return train(self.lora, state, optimizer, rows.steps, plan, self.lock)

    def _judge_training(self, result: TrainResult, before: Tensors) -> gate.GateVerdict:
        unchanged = all(torch.equal(tensor, before[name]) for name, tensor in result.state.items())
        noop = unchanged or is_noop(result.state)
        return gate.judge_training(result.norms, finite=is_finite(result.state), noop=noop)

    def _measure(self, *groups: Sequence[TokenRow]) -> list[list[float]]:
        """The loss of each token of each group under the slot's weights, in one pass over all of them."""
        rows = [row for group in groups for row in group]
        losses = iter(row_token_losses(self.lora, rows, pad=self.codec.pad, adapted=True, lock=self.lock))
        return [[nats for _ in group for nats in next(losses).tolist()] for group in groups]


def _mean(nats: Sequence[float]) -> float:
    return math.fsum(nats) / len(nats) if nats else 0.0


def _figures_of(name: str, measured: gate.Gain) -> dict[str, float | int | str | None]:
    return {
        f"{name}_before": measured.before_nats,
        f"{name}_after": measured.after_nats,
        f"{name}_error": measured.error_nats,
    }
