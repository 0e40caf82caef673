"""One run: one arm learns one stream with the service's own code, and is measured after every block."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch

from perennial.learner.costs.device_use import take_use
from perennial.learner.model.lora import Tensors
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.learned import KNOWN_NATS, is_learned
from perennial.learner.training.measuring import UpdateRows
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.replay_buffer import BatchComposition, ReplayEntry, build_schedule, seeded_random
from perennial.learner.training.state import TrainingState
from perennial.learner.training.thinning.shared_tokens import FullDocuments
from perennial.learner.training.update import Updater
from perennial.learner.training.update_rows import split_rows
from perennial.learner.versions.votes import vote
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.models import ExampleAccepted
from tests.benchmarks.learning.arms import Arm
from tests.benchmarks.learning.retrieval import after_context, nearest
from tests.benchmarks.learning.streams import Block, Question, Stream, micro_batches
from tests.benchmarks.learning.world import Losses, World

WATCHED: Final = 4
"""Held-out texts per domain whose first row is measured after every update, to find the worst dip."""
MOST_STEPS: Final = 1_024
DECIMALS: Final = 4
ALIKE: Final = 0.5
"""Share of its tokens from which a document counts as a copy of an earlier one in `own_after`."""


@dataclass(frozen=True)
class Budget:
    """The backward tokens that an arm may spend.

    Attributes:
        shares: Share of the stream's text that had arrived by each update of the reference, 0 to 1.
        spent: Backward tokens that the reference had spent by then.
    """

    shares: tuple[float, ...]
    spent: tuple[float, ...]

    @classmethod
    def of_run(cls, record: dict[str, Any]) -> Budget:
        """Return what a run has spent."""
        texts = np.cumsum([update["text_tokens"] for update in record["updates"]])
        spent = np.cumsum([update["tokens"] for update in record["updates"]])
        return cls((0.0, *(texts / texts[-1]).tolist()), (0.0, *map(float, spent)))

    def at(self, share: float) -> float:
        """Return the tokens to have spent once this share of the text has arrived."""
        return float(np.interp(share, self.shares, self.spent))

    @property
    def total(self) -> float:
        """Tokens of the whole stream."""
        return self.spent[-1]


@dataclass(frozen=True)
class _PastUpdate:
    """A promoted update, as a rebuild makes it again."""

    examples: tuple[ExampleAccepted, ...]
    cut: int
    batch: str
    recipe: Recipe


@dataclass
class Learner:
    """One adapter that learns.

    Args:
        world: Base and passes.
        arm: How it learns.
        updater: Trains its updates.
        seed: Decides the initial weights and all draws, the same for every arm.
        stream: What is asked of the examples, and which of them supersede others.
    """

    world: World
    arm: Arm
    updater: Updater
    seed: str
    stream: Stream
    state: TrainingState = field(init=False)
    updates: list[dict[str, Any]] = field(default_factory=list)
    spent: int = 0
    _rows: dict[str, list[TokenRow]] = field(default_factory=dict)
    _known: dict[str, ExampleAccepted] = field(default_factory=dict)
    _past: list[_PastUpdate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = TrainingState(self.updater.lora.initial_weights(self.seed, self.updater.recipe.seed))

    @property
    def served(self) -> Tensors:
        """Weights that the adapter serves."""
        return self.state.weights

    def begin_block(self, number: int) -> None:
        """Begin a new LoRA where the arm has one per block.

        Args:
            number: Number of the block, from 0; the first one trains the LoRA that is there.
        """
        if self.arm.orthogonality is not None and number:
            self.updater = self.world.over_frozen(self.updater, self.served)
            weights = self.updater.lora.initial_weights(f"{self.seed}/{number}", self.updater.recipe.seed)
            self.state = replace(self.state, weights=weights, optimizer=None)

    def learn(self, examples: Sequence[ExampleAccepted], wanted: float | None, watched: dict[str, Any]) -> None:
        """Learn one micro-batch and record what it did.

        Args:
            examples: The micro-batch.
            wanted: Backward tokens to have spent after it; None: as many as the recipe takes.
            watched: Groups of rows by domain that are measured afterwards.
        """
        cut = len(self.updates)
        heard = vote(
            self.updater.recipe, examples, self.state.replay_index, lambda entry: self._known.get(entry.example_id)
        )
        examples = heard.trained
        if not examples:
            return
        self._known |= {example.example_id: example for example in examples}
        groups = [self.updater.rows(example) for example in examples]
        before = self.world.losses(self.updater, self.served, groups)
        updater = self.updater if wanted is None else self._paced(examples, groups, wanted)
        batch = f"sha256:{cut:064x}"
        take_use()  # of what the benchmark measured
        result = updater.update(
            self.state, examples, adapter=self.seed, cut=cut, batch=batch, replayed=self._replayed,
        )  # fmt: skip
        used = take_use()
        self._rows |= {example.example_id: rows for example, rows in zip(examples, groups, strict=True)}
        if result.outcome == "promoted":
            self._past.append(_PastUpdate(tuple(examples), cut, batch, updater.recipe))
        self._take(result.state)
        self.spent += result.tokens
        self._drop_superseded(examples)
        questions = [self.stream.questions[e.example_id] for e in examples if e.example_id in self.stream.questions]
        choices = [self.world.choice_rows(question) for question in questions]
        after = self.world.token_losses(
            self.updater, self.served, [*groups, *watched.values(), *(rows for found in choices for rows in found)]
        )
        asked = iter(after[len(groups) + len(watched) :])
        learned = [is_learned(nats) for nats in after[: len(groups)]]
        own = _own_losses(groups, after)
        self.updates.append(
            {
                "examples": len(examples), "text_tokens": sum(tokens for _, tokens in before),
                "before": round(sum(nats for nats, _ in before), DECIMALS),
                "after": round(float(sum(nats.sum() for nats in after[: len(groups)])), DECIMALS),
                "own_tokens": len(own), "own_after": round(sum(own), DECIMALS),
                "learned": sum(learned),
                "learned_tokens": sum(int((nats < KNOWN_NATS).sum()) for nats in after[: len(groups)]),
                "outcome": result.outcome, "reason": result.reason, "tokens": result.tokens, "steps": result.gate.steps,
                "training_flops": used.training_flops, "measuring_flops": used.measuring_flops,
                "pressure": result.gate.strain,
                "watched": {
                    domain: round(float(nats.mean()), DECIMALS)
                    for domain, nats in zip(watched, after[len(groups) :], strict=False)
                },
                "asked": [
                    _asked(question, [(float(nats.sum()), len(nats)) for nats in itertools.islice(asked, len(rows))])
                    for question, rows in zip(questions, choices, strict=True)
                ],
            }
        )  # fmt: skip

    def _take(self, state: TrainingState) -> None:
        """Adopt the state after an update, with the arm's changes of the weights."""
        if state is not self.state and self.arm.reptile:
            state = replace(state, weights=_reptile_step(self.state.weights, state.weights, self.arm.reptile))
        self.state = state

    def rebuild(self) -> dict[str, float]:
        """Train all updates again without what was superseded since, as the service does after each `supersede`.

        Returns:
            Trained tokens and operations.
        """
        take_use()
        tokens = 0
        gone = {self.stream.replaces.get(example.example_id) for past in self._past for example in past.examples}
        self.state = TrainingState(self.updater.lora.initial_weights(self.seed, self.updater.recipe.seed))
        for past in self._past:
            left = [example for example in past.examples if example.example_id not in gone]
            if left:
                result = replace(self.updater, recipe=past.recipe).update(
                    self.state, left, adapter=self.seed, cut=past.cut, batch=past.batch, replayed=self._replayed,
                )  # fmt: skip
                self.state = result.state
                tokens += result.tokens
        used = take_use()
        return {
            "tokens": tokens, "training_flops": used.training_flops, "measuring_flops": used.measuring_flops,
        }  # fmt: skip

    def _drop_superseded(self, examples: Sequence[ExampleAccepted]) -> None:
        """Take superseded examples out of the replay index, as the forgetting that follows in the service does.

        That forgetting also trains the weights again without them, see `rebuild`.
        """
        gone = {self.stream.replaces.get(example.example_id) for example in examples} - {None}
        if self.arm.serviced and gone:
            index = tuple(entry for entry in self.state.replay_index if entry.example_id not in gone)
            self.state = replace(self.state, replay_index=index)

    def _replayed(self, entry: ReplayEntry) -> Sequence[TokenRow] | None:
        return self._rows.get(entry.example_id)

    def _paced(
        self, examples: Sequence[ExampleAccepted], groups: Sequence[Sequence[TokenRow]], wanted: float
    ) -> Updater:
        """Return the updater with as many steps as come nearest to the tokens that are wanted."""
        recipe, missing = self.updater.recipe, wanted - self.spent
        rows = split_rows(examples, groups, self.updater.general, recipe, seeded_random("split", len(self.updates)))
        best, nearest = 1, float("inf")
        for steps in range(1, MOST_STEPS + 1):
            tokens = self._planned_tokens(replace(recipe, steps=steps), rows)
            if abs(tokens - missing) < nearest:
                best, nearest = steps, abs(tokens - missing)
            if tokens > missing:
                break
        return replace(self.updater, recipe=replace(recipe, steps=best))

    def _planned_tokens(self, recipe: Recipe, rows: UpdateRows) -> int:
        """Return the tokens that an update of this recipe trains, without training it."""
        rng = seeded_random("planned", len(self.updates))
        parts = [(rows.new, recipe.steps, rows.saved), (rows.closing, 1, rows.closing_saved)]
        return sum(
            row.tokens
            for of_part, steps, saved in parts
            for step in build_schedule(
                of_part, self.state.replay_index, self._replayed, self.updater.general.draw,
                BatchComposition(
                    steps, recipe.rows, recipe.replay_share, recipe.general_share, recipe.epochs,
                    recipe.question_dropout, saved,
                ), rng,
            ).steps
            for row in step
        )  # fmt: skip


@dataclass
class Run:
    """One arm on one stream.

    Args:
        world: Base and passes.
        arm: The arm.
        stream: The stream.
        worker: Number of the thread, which has a slot of its own.
        budget: Tokens that the arm may spend; None: as many as its recipe takes.
    """

    world: World
    arm: Arm
    stream: Stream
    worker: int
    budget: Budget | None

    def run(self) -> dict[str, Any]:
        """Learn and measure, and return the record of it."""
        began = time.monotonic()
        updater = self.world.updater(self.arm, self.worker)
        self._updater = updater
        self._held_out = {
            domain: [self.world.text_rows(text) for text in texts] for domain, texts in self.stream.held_out.items()
        }
        self._watched = {
            domain: [row for group in groups[:WATCHED] for row in group[:1]]
            for domain, groups in self._held_out.items()
        }
        seed = f"bench/{self.stream.name}-{self.stream.seed}"
        with updater.compute.joining():
            learner = Learner(self.world, self.arm, updater, seed, self.stream)
            stages = {
                "nothing": self._nothing, "stream": self._in_blocks, "joint": self._joint,
                "cumulative": self._cumulative, "retrieval": self._retrieval,
            }[self.arm.learns](learner)  # fmt: skip
        return {
            "domains": [domain for domain in self.stream.domains if domain in self.stream.held_out], "stages": stages, "updates": learner.updates,
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip

    # ---- ways to learn

    def _nothing(self, learner: Learner) -> list[dict[str, Any]]:
        return [self._stage("frozen", learner)]

    def _in_blocks(self, learner: Learner) -> list[dict[str, Any]]:
        stages, batcher = [], self._batcher()
        total, arrived = self._text_tokens(self.stream.blocks), 0
        for number, block in enumerate(self.stream.blocks):
            learner.begin_block(number)
            for examples in micro_batches(batcher, block.examples, self.world.tokens_of):
                arrived += sum(map(self.world.tokens_of, examples))
                wanted = self.budget.at(arrived / total) if self.budget else None
                learner.learn(examples, wanted, self._watched)
                learner.updates[-1]["block"] = block.domain
            stages.append(self._stage(block.domain, learner))
            if self.arm.serviced and self.stream.replaces and len(stages) > 1:
                stages[-1]["rebuild"] = learner.rebuild()
                stages[-1]["asked_rebuilt"] = self._stage(block.domain, learner).get("asked", [])
        return stages

    def _joint(self, learner: Learner) -> list[dict[str, Any]]:
        self._learn_at_once(learner, self.stream.blocks)
        return [self._stage("joint", learner)]

    def _cumulative(self, learner: Learner) -> list[dict[str, Any]]:
        """Train from zero on all blocks so far, with the tokens that the reference spent on them."""
        stages = []
        for count in range(1, len(self.stream.blocks) + 1):
            fresh = Learner(self.world, self.arm, self._updater, learner.seed, self.stream)
            self._learn_at_once(fresh, self.stream.blocks[:count])
            learner.updates += fresh.updates
            stages.append(self._stage(self.stream.blocks[count - 1].domain, fresh))
        return stages

    def _learn_at_once(self, learner: Learner, blocks: Sequence[Block]) -> None:
        """Learn all examples of the blocks in one update: its steps are drawn from shuffled passes over all rows."""
        share = self._text_tokens(blocks) / self._text_tokens(self.stream.blocks)
        wanted = self.budget.at(share) if self.budget else None
        learner.learn([example for block in blocks for example in block.examples], wanted, {})

    def _retrieval(self, learner: Learner) -> list[dict[str, Any]]:
        """Put the nearest document of the whole stream in front of each held-out text, under the frozen base."""
        documents = [str(example.text) for block in self.stream.blocks for example in block.examples if example.text]
        room = self.world.base.max_positions
        for domain, texts in self.stream.held_out.items():
            contexts = [self.world.codec.encode(documents[found]) for found in nearest(texts, documents)]
            self._held_out[domain] = [
                [after_context(row, context, room) for row in rows]
                for rows, context in zip(self._held_out[domain], contexts, strict=True)
            ]
        return [self._stage("retrieval", learner)]

    # ---- measuring

    def _batcher(self) -> MicroBatcher[None]:
        return MicroBatcher(learner_name(self.stream), CutPolicy.of(self.arm.settings(self.world.base.name)))

    def _text_tokens(self, blocks: Sequence[Block]) -> int:
        return sum(self.world.tokens_of(example) for block in blocks for example in block.examples)

    def _stage(self, label: str, learner: Learner) -> dict[str, Any]:
        """Return the losses of all held-out texts under what is served now."""
        groups = [*self._held_out.values(), self.world.general_rows]
        flat = [group for texts in groups for group in texts]
        found = iter(self.world.losses(learner.updater, learner.served, flat))
        losses: list[Losses] = [[next(found) for _ in texts] for texts in groups]
        stage = {
            "after": label,
            "held_out": dict(zip(self._held_out, map(_rounded, losses), strict=False)),
            "general": _rounded(losses[-1]),
        }
        questions = self._current_questions(label)
        if questions:
            rows = [self.world.choice_rows(question) for question in questions]
            found = iter(self.world.losses(learner.updater, learner.served, [row for group in rows for row in group]))
            stage["asked"] = [
                _asked(question, list(itertools.islice(found, len(group))))
                for question, group in zip(questions, rows, strict=True)
            ]
        return stage

    def _current_questions(self, label: str) -> list[Question]:
        """Return what is asked of examples up to a block that none of them supersedes; of all where there is no such block."""
        labels = [block.domain for block in self.stream.blocks]
        count = labels.index(label) + 1 if label in labels else len(labels)
        ids = [example.example_id for block in self.stream.blocks[:count] for example in block.examples]
        gone = {self.stream.replaces.get(example_id) for example_id in ids}
        found = [self.stream.questions.get(example_id) for example_id in ids if example_id not in gone]
        return [question for question in found if question is not None]


def _own_losses(groups: Sequence[Sequence[TokenRow]], losses: Sequence[torch.Tensor]) -> list[float]:
    """Return the losses of what is particular to documents that share most of their tokens with an earlier one.

    Args:
        groups: Rows of each document.
        losses: Loss of each token of each document, (tokens,), and more behind them.
    """
    full = FullDocuments(ALIKE)
    found: list[float] = []
    for number, (rows, nats) in enumerate(zip(groups, losses, strict=False)):
        thinned = full.thin(str(number), rows)
        if thinned.into is None:
            continue
        start = 0
        kept = {row.ids: row for row in thinned.rows}
        for row in rows:
            if row.ids in kept:
                found += [float(nats[start + place - row.train_from]) for place in kept[row.ids].trained_places]
            start += row.tokens
    return found


def _rounded(losses: Losses) -> list[list[float]]:
    return [[round(nats, DECIMALS), tokens] for nats, tokens in losses]


def _asked(question: Question, losses: Losses) -> dict[str, Any]:
    """Return the loss of each choice of a question, in nats per choice, or per token where the question says so."""
    count = len(question.answers)
    found = [round(nats / tokens if question.per_token else nats, DECIMALS) for nats, tokens in losses]
    return {"earlier": question.earlier, "answers": found[:count], "documents": found[count:]}


def _reptile_step(start: Tensors, end: Tensors, share: float) -> Tensors:
    """Return θ0 + share · (θK - θ0), the outer step of Reptile (Nichol et al. 2018, arXiv 1803.02999).

    Args:
        start: Weights before the update.
        end: Weights after it.
        share: Size of the step, 0 to 1.
    """
    return {name: start[name] + share * (end[name] - start[name]) for name in start}


def learner_name(stream: Stream) -> str:
    """Return the adapter that the stream's examples are for."""
    return stream.blocks[0].examples[0].adapter
