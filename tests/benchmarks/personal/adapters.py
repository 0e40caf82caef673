"""Adapters of the benchmark: each learns with the service's updater, alone or over the tenant's adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from perennial.learner.model.generation import decode
from perennial.learner.model.lora import Tensors
from perennial.learner.model.tokenization import TokenRow, turn_rows
from perennial.learner.training.personal.layered_lora import LayeredLora
from perennial.learner.training.personal.stacking import SharedPart
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.learner.training.state import TrainingState
from perennial.learner.training.update import Updater
from perennial.streams.events.models import ExampleAccepted
from tests.benchmarks.learning.arms import Arm
from tests.benchmarks.learning.world import World
from tests.benchmarks.personal.users import Canary, Question, Style, answer_to, prompt_of

SLOT: Final = "bench-personal"


@dataclass(frozen=True)
class Quality:
    """How well an adapter answers in a style.

    Attributes:
        nats: Loss of the answers that the user wants, per token.
        preferred: Share of the parts of all answers, 0 to 1, of which the wanted form is likelier than its opposite, the
            rest of the answer being as it is wanted.
    """

    nats: float
    preferred: float


class Bench:
    """The base, and updaters with and without the tenant's adapter beneath.

    Args:
        world: The base and what all runs share.
        arm: Settings of the service.
    """

    def __init__(self, world: World, arm: Arm) -> None:
        self.world = world
        self.plain = world.updater(arm, 0)

    def over(self, shared: Tensors) -> Updater:
        """Return the updater of adapters that extend what has these weights."""
        config = self.plain.lora.config
        return replace(self.plain, lora=LayeredLora(self.world.base, config, SharedPart(config, shared), SLOT))

    def rows(self, prompt: str, answer: str) -> list[TokenRow]:
        """Return the rows of an answer."""
        return turn_rows([("user", prompt)], answer, self.world.codec, self.world.row_tokens)

    def quality(self, updater: Updater, weights: Tensors, asked: Sequence[Question], style: Style) -> Quality:
        """Measure how well an adapter answers questions in a style."""
        styles = [style, *({**style, part: 1 - choice} for part, choice in style.items())]
        groups = [
            self.rows(prompt_of(question), answer_to(question, chosen)) for question in asked for chosen in styles
        ]
        losses = self.world.losses(updater, weights, groups)
        wanted = losses[:: len(styles)]
        pairs = [
            (losses[first][0], nats)
            for first in range(0, len(losses), len(styles))
            for nats, _ in losses[first + 1 : first + len(styles)]
        ]
        return Quality(
            sum(nats for nats, _ in wanted) / sum(tokens for _, tokens in wanted),
            sum(own < other for own, other in pairs) / len(pairs),
        )

    def general_nats(self, updater: Updater, weights: Tensors) -> float:
        """Return the loss on general texts that are neither trained nor measured by the gate, nats per token."""
        losses = self.world.losses(updater, weights, self.world.general_rows)
        return sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses)

    def says(self, updater: Updater, weights: Tensors, canary: Canary) -> bool:
        """Return whether greedy decoding answers the canary's question with its secret."""
        codec, answer = self.world.codec, self.world.codec.encode(canary.answer)
        updater.lora.load(weights)
        prompt = codec.prompt_ids(canary.prompt, self.world.row_tokens)
        (made,) = decode(
            updater.lora, [prompt], max_tokens=len(answer) + 4, stop={codec.eos}, pad=codec.pad, adapted=True
        )
        return canary.secret in str(codec.tokenizer.decode(list(made.ids)))

    def rank(self, updater: Updater, weights: Tensors, canary: Canary, others: Sequence[str]) -> int:
        """Return the rank of a canary's secret among others of its form by their loss; 1: the likeliest."""
        answers = [canary.answer, *(replace(canary, secret=secret).answer for secret in others)]
        losses = self.world.losses(updater, weights, [self.rows(canary.prompt, answer) for answer in answers])
        return 1 + sum(nats < losses[0][0] for nats, _ in losses[1:])


@dataclass
class LearningAdapter:
    """One adapter that learns.

    Args:
        bench: Base and updaters.
        name: Name of the adapter.
        updater: Trains it, alone or over the tenant's adapter.
        start: Own part that it begins with; None: the service's start of an adapter of its name.
        served_by: Measures what is served, where that is not what is trained: the own part, trained over the base alone,
            with the tenant's adapter added. None: `updater`.

    Attributes:
        refused: Updates that the gate refused.
    """

    bench: Bench
    name: str
    updater: Updater
    start: Tensors | None = None
    served_by: Updater | None = None
    state: TrainingState = field(init=False)
    refused: int = 0
    _cut: int = 0
    _known: dict[str, Sequence[TokenRow]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lora, seed = self.updater.lora, self.updater.recipe.seed
        self.state = TrainingState(lora.initial_weights(self.name, seed) if self.start is None else self.start)

    @property
    def own(self) -> Tensors:
        """Own part that is served."""
        return self.state.weights

    @property
    def server(self) -> Updater:
        """What measures the own part as it is served."""
        return self.served_by or self.updater

    @property
    def served(self) -> Tensors:
        """Weights that are served: one LoRA, also where there is a shared part."""
        lora = self.server.lora
        return lora.compose(self.own) if isinstance(lora, LayeredLora) else self.own

    def put_over(self, updater: Updater) -> None:
        """Put another version of the tenant's adapter beneath the own part; nothing is trained."""
        if self.served_by is None:
            self.updater = updater
        else:
            self.served_by = updater

    def learn(self, examples: Sequence[ExampleAccepted], per_update: int) -> None:
        """Learn examples, some in each update."""
        for start in range(0, len(examples), per_update):
            self.update(examples[start : start + per_update])

    def update(self, examples: Sequence[ExampleAccepted]) -> None:
        """Learn one micro-batch."""
        batch = f"sha256:{self._cut:064x}"
        result = self.updater.update(
            self.state, examples, adapter=self.name, cut=self._cut, batch=batch, replayed=self._replayed
        )
        self._cut += 1
        self._known |= {example.example_id: self.updater.rows(example) for example in examples}
        self.state = result.state
        self.refused += result.outcome == "refused"

    def _replayed(self, entry: ReplayEntry) -> Sequence[TokenRow] | None:
        return self._known.get(entry.example_id)

    def quality(self, asked: Sequence[Question], style: Style) -> Quality:
        """Measure how well the adapter answers in a style."""
        return self.bench.quality(self.server, self.own, asked, style)
