"""An adapter that learns a stream while the service's batcher watches it: the live loss is that of the latest version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from perennial.learner.roles.adapter_cache import NO_ADAPTER, LiveAdapter
from perennial.learner.roles.scorer import Scorer
from perennial.streams.events.models import ExampleAccepted, ExampleScored
from perennial.streams.settings import load_settings
from tests.benchmarks.drift.real_text import service_marks
from tests.benchmarks.learning.arms import OURS
from tests.benchmarks.learning.runs import Learner
from tests.benchmarks.learning.streams import ADAPTER, Block, Stream, document, numbered
from tests.benchmarks.learning.world import World

Marks = tuple[list[int], list[int], list[int]]


class LiveScorer:
    """Scores documents under the base and under what an adapter has learned so far.

    Args:
        world: the base.
        seed: of the adapter's initial weights and of all draws.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.updater = world.updater(OURS, 0)
        self._scorer = Scorer(world.base, load_settings(env_file=None, device="cpu", threads=1))
        self._learner = Learner(world, OURS, self.updater, f"bench/drift-{seed}", Stream("releases", seed, 1, (), {}))
        self._live = NO_ADAPTER

    def scored(self, examples: Sequence[ExampleAccepted]) -> Iterator[ExampleScored]:
        """Yield the documents with their losses, each scored when it is asked for."""
        for example in examples:
            yield self._scorer.score([example], {ADAPTER: self._live})[0]

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


def learned_marks(texts: Sequence[str], seed: int) -> tuple[Marks, int]:
    """Return where curate's batcher reports drift while an adapter learns the texts, on one thread.

    Each promoted version is live from the next document on; a service that is busy is later.

    Args:
        texts: in order of arrival.
        seed: of the adapter.

    Returns:
        Marks of any signal, of losses, and of cuts by drift; the number of promoted updates.
    """
    adapter = LiveScorer(World.load("shipped", threads=1, runs=1, general=0), seed)
    (block,) = numbered([Block("stream", tuple(document(n, text, f"{n}") for n, text in enumerate(texts)))])
    with adapter.updater.compute.joining():
        marks = service_marks(adapter.scored(block.examples), adapter.learn)
    return marks, adapter.promoted
