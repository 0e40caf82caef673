"""An adapter that learns a stream while the service's batcher watches it: the live loss is that of the latest version."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perennial.learner.roles.adapter_cache import NO_ADAPTER, LiveAdapter
from perennial.learner.roles.scorer import Scorer
from perennial.streams.events.models import ExampleAccepted, ExampleScored
from perennial.streams.settings import load_settings
from tests.benchmarks.drift.real_text import service_marks
from tests.benchmarks.learning.arms import OURS
from tests.benchmarks.learning.runs import Learner
from tests.benchmarks.learning.streams import ADAPTER, Block, Stream, document, numbered
from tests.benchmarks.learning.world import World


@dataclass(frozen=True)
class Learned:
    """What was seen while an adapter learned a stream.

    Attributes:
        any: documents at which the service reported any drift, from 1.
        losses: those at which it reported drift of a loss.
        cuts: those at which drift cut a micro-batch.
        live: loss of each document under what was learned before it, in nats per token; before the first version, of the base.
        promoted: number of promoted updates.
    """

    any: list[int]
    losses: list[int]
    cuts: list[int]
    live: list[float]
    promoted: int


class LiveScorer:
    """Scores documents under the base and under what an adapter has learned so far.

    Args:
        world: the base.
        seed: of the adapter's initial weights and of all draws.

    Attributes:
        live_losses: loss of each scored document under the version that was live, or the base, in nats per token.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.updater = world.updater(OURS, 0)
        self._scorer = Scorer(world.base, load_settings(env_file=None, device="cpu", threads=1))
        self._learner = Learner(world, OURS, self.updater, f"bench/drift-{seed}", Stream("releases", seed, 1, (), {}))
        self._live = NO_ADAPTER
        self.live_losses: list[float] = []

    def scored(self, examples: Sequence[ExampleAccepted]) -> Iterator[ExampleScored]:
        """Yield the documents with their losses, each scored when it is asked for."""
        for example in examples:
            (found,) = self._scorer.score([example], {ADAPTER: self._live})
            loss = found.base_loss_nats if found.live_loss_nats is None else found.live_loss_nats
            self.live_losses.append(math.nan if loss is None else loss)
            yield found

    def learn(self, examples: list[ExampleAccepted]) -> None:
        """Learn a micro-batch; if it is promoted, later documents are scored under the new version."""
        self._learner.learn(examples, None, {})
        if self._learner.updates[-1]["outcome"] == "promoted":
            generation = self._live.generation + 1
            version = "sha256:" + hashlib.sha256(f"version {generation}".encode()).hexdigest()
            self._live = LiveAdapter(version, generation, self._learner.served)

    @property
    def promoted(self) -> int:
        """Number of promoted updates."""
        return self._live.generation


def learned_marks(texts: Sequence[str], seed: int) -> Learned:
    """Return what curate's batcher reports while an adapter learns the texts, on one thread.

    Each promoted version is live from the next document on; a service that is busy is later.

    Args:
        texts: in order of arrival.
        seed: of the adapter.
    """
    adapter = LiveScorer(World.load("shipped", threads=1, runs=1, general=0), seed)
    (block,) = numbered([Block("stream", tuple(document(n, text, f"{n}") for n, text in enumerate(texts)))])
    with adapter.updater.compute.joining():
        marks = service_marks(adapter.scored(block.examples), adapter.learn)
    return Learned(*marks, adapter.live_losses, adapter.promoted)
