"""Docstrings of installed packages under the shipped base: one domain, then another.

The whole batcher of curate sees them, as the scorer would send them: losses under the base and the texts. It is compared
with a test of the mean embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from perennial.learner.model.base import Base, load_base
from perennial.learner.roles.scorer import Scorer
from perennial.learner.training.replay_buffer import seeded_random
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.models import ExampleAccepted, ExampleScored
from perennial.streams.settings import load_settings
from tests.benchmarks.drift.arms import plain_adwin
from tests.benchmarks.drift.series import Floats
from tests.benchmarks.learning.streams import ADAPTER, DOMAINS, START_MS, Block, document, numbered
from tests.benchmarks.learning.texts import package_texts

DOCUMENTS: Final = 360
"""Documents of each domain."""
BEFORE: Final = 210
"""Documents of the first domain before the second begins."""
EMBEDDED_TOKENS: Final = 128
REFERENCE: Final = 128
RECENT: Final = 32
TEST_EVERY: Final = 8
SPLITS: Final = 200
EMBEDDING_THRESHOLD: Final = 6.0
"""Standard deviations of the distance between parts of the reference, drawn at random, from which a distance is drift."""
BATCH: Final = 48

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Domain:
    """The documents of a package, in the order of its files.

    Attributes:
        name: the package.
        scored: the documents with their losses under the base.
        embeddings: mean of the last hidden states (documents, width).
    """

    name: str
    scored: tuple[ExampleScored, ...]
    embeddings: Matrix

    @property
    def losses(self) -> Floats:
        """Losses under the base, in nats per token."""
        return np.array([each.base_loss_nats for each in self.scored], dtype=np.float64)


def load_domains(threads: int) -> list[Domain]:
    """Return the domains, scored by the service's scorer.

    Args:
        threads: CPU threads of the model.
    """
    return score_domains({name: package_texts(name, held_out=False)[:DOCUMENTS] for name in DOMAINS}, threads)


def score_domains(texts: Mapping[str, Sequence[str]], threads: int) -> list[Domain]:
    """Return the documents of each domain, scored by the service's scorer.

    Args:
        texts: the texts by domain.
        threads: CPU threads of the model.
    """
    settings = load_settings(env_file=None, device="cpu", threads=threads)
    base = load_base(settings.model.base, "cpu", threads, settings.model.dtype)
    scorer = Scorer(base, settings)
    found = []
    for name, of_domain in texts.items():
        examples = [document(number, text, f"{name}-{number}") for number, text in enumerate(of_domain)]
        scored = [
            each
            for first in range(0, len(examples), BATCH)
            for each in scorer.score(examples[first : first + BATCH], {})
        ]
        found.append(Domain(name, tuple(scored), _embeddings(base, of_domain)))
    return found


def _embeddings(base: Base, texts: Sequence[str]) -> Matrix:
    """Return the mean of the last hidden states of each text's first tokens: (texts, width)."""
    found = []
    for text in texts:
        ids = base.tokenizer(text, truncation=True, max_length=EMBEDDED_TOKENS, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = base.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]  # (1, T, width)
        found.append(hidden[0].float().mean(0).numpy())
    return np.stack(found).astype(np.float64)


@dataclass(frozen=True)
class Alarms:
    """What was reported on one stream of documents, by numbers of documents from 1.

    Attributes:
        any: any signal of the service.
        losses: the losses alone.
        cuts: what cut a micro-batch.
        adwin: plain ADWIN on the losses.
        embedding: the distance of mean embeddings.
    """

    any: list[int]
    losses: list[int]
    cuts: list[int]
    adwin: list[int]
    embedding: list[int]


def watch(parts: Sequence[tuple[Domain, Sequence[int]]], seed: int) -> Alarms:
    """Return what is reported on documents of some domains, one after another.

    Args:
        parts: each domain and which of its documents.
        seed: of the splits.
    """
    scored = [domain.scored[index] for domain, indices in parts for index in indices]
    (block,) = numbered([Block("stream", tuple(each.example for each in scored))])
    renumbered = [
        each.model_copy(update={"example": example}) for each, example in zip(scored, block.examples, strict=True)
    ]
    any_signal, of_losses, cuts = service_marks(renumbered)
    losses = np.array([each.base_loss_nats for each in scored], dtype=np.float64)
    embeddings = np.concatenate([domain.embeddings[list(indices)] for domain, indices in parts])
    rng = np.random.default_rng(seed)
    return Alarms(any_signal, of_losses, cuts, plain_adwin(losses, rng), embedding_alarms(embeddings, rng))


def service_marks(
    scored: Iterable[ExampleScored], learn: Callable[[list[ExampleAccepted]], None] = lambda _: None
) -> tuple[list[int], list[int], list[int]]:
    """Return where curate's batcher reports any drift, drift of a loss, and where drift cuts.

    Args:
        scored: the documents in order, with rising offsets; the next one is taken after what was cut is learned.
        learn: learns a micro-batch.

    Returns:
        Numbers of documents, from 1.
    """
    batcher: MicroBatcher[None] = MicroBatcher(ADAPTER, CutPolicy.of(load_settings(env_file=None)))
    any_signal, of_losses, cuts = [], [], []
    for number, each in enumerate(scored, 1):
        offer = batcher.offer(each, None, 0)
        any_signal += [number] * bool(offer.drifts)
        of_losses += [number] * any(drift.signal.endswith("_loss") for drift in offer.drifts)
        cuts += [number] * (offer.reason == "drift")
        if offer.reason:
            pending = batcher.pending_examples
            batcher.apply(batcher.cut(datetime.fromtimestamp(START_MS / 1000, UTC), offer.reason))
            learn(pending)
    return any_signal, of_losses, cuts


def embedding_alarms(embeddings: Matrix, rng: np.random.Generator) -> list[int]:
    """Return where the mean embedding of the latest documents is far from that of the reference.

    The distance is squared, over dimensions in standard deviations of the reference. After an alarm the documents that follow
    are the reference.

    Args:
        embeddings: (documents, width).
        rng: draws the splits of the reference that say how large the distance is without a change.
    """
    alarms, start = [], 0
    limit = np.inf
    centre = scale = np.zeros(0)
    for number in range(TEST_EVERY, len(embeddings) + 1, TEST_EVERY):
        since = number - start
        if since < REFERENCE:
            continue
        if since < REFERENCE + TEST_EVERY:
            reference = embeddings[start:number]
            centre, scale = reference.mean(0), reference.std(0) + 1e-9
            limit = _limit(reference / scale, rng)
        recent = embeddings[number - RECENT : number]
        if since >= REFERENCE + RECENT and float((((recent.mean(0) - centre) / scale) ** 2).sum()) > limit:
            alarms.append(number)
            start = number
    return alarms


def _limit(reference: Matrix, rng: np.random.Generator) -> float:
    distances = []
    for _ in range(SPLITS):
        order = rng.permutation(len(reference))
        distances.append(float(((reference[order[:RECENT]].mean(0) - reference[order[RECENT:]].mean(0)) ** 2).sum()))
    return float(np.mean(distances) + EMBEDDING_THRESHOLD * np.std(distances))


def shuffled(count: int, *seeds: object) -> list[int]:
    """Return the numbers below `count` in an order that the seeds draw."""
    found = list(range(count))
    seeded_random(*seeds).shuffle(found)
    return found
