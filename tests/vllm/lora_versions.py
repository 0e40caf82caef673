"""Versions of adapters with random weights for a real base, and what the learner's own code computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perennial.learner.bases.sources import folder_of
from perennial.learner.model.base import load_base
from perennial.learner.model.lora import Lora, LoraConfig, Tensors, to_safetensors
from perennial.learner.model.tokenization import ExampleTokenizer
from perennial.learner.training.probes import predicted_after
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.manifest import Manifest, Probes
from perennial.streams.probe_texts import PROBE_TEXTS
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
SPREAD = 0.1
"""Standard deviation of the random weights: every version predicts other tokens, and none overflows."""


@dataclass(frozen=True)
class Made:
    """A published version.

    Attributes:
        name: Name of the version for backends.
        weights: The LoRA weights as a safetensors file.
        manifest: Its manifest.
        tensors: The same weights.
        published_s: When the alias was moved to it, in seconds since 1970.
    """

    name: str
    weights: bytes
    manifest: Manifest
    tensors: Tensors
    published_s: float

    @property
    def loaded(self) -> tuple[str, bytes, Manifest]:
        """The arguments of `Backend.load`."""
        return self.name, self.weights, self.manifest


class VersionMaker:
    """Makes versions for a base, and computes with them as the learner does.

    Args:
        base: Name or folder of the base.
        rank: LoRA rank.
    """

    def __init__(self, base: str, rank: int = 8) -> None:
        self.base = load_base(base, "cpu", 1)
        self.folder = folder_of(base)
        self.rank = rank
        self.lora = Lora(self.base, LoraConfig(rank, 2 * rank), "made-by-tests")
        self.codec = ExampleTokenizer(self.base.tokenizer)

    def publisher(self, store: Path, adapter: str = ADAPTER) -> VersionPublisher:
        """Return a publisher of versions for this base into a store in a folder."""
        return VersionPublisher(DirectoryStore(store, fsync=False), adapter, self.base.digest)

    def publish(self, publisher: VersionPublisher, seed: int, spread: float = SPREAD) -> Made:
        """Publish a version with random weights; what the learner would record about it is recorded."""
        tensors = self.tensors(seed, spread)
        self.lora.load(tensors)
        return self.publish_prepared(publisher, tensors, predicted_after(PROBE_TEXTS, self.lora, self.codec))

    def publish_prepared(self, publisher: VersionPublisher, tensors: Tensors, probes: Probes) -> Made:
        """Publish a version whose probes were computed before."""
        data = to_safetensors(tensors)
        state = publisher.publish(data, rank=self.rank, alpha=2 * self.rank, probes=probes)
        manifest = publisher.registry.manifest(publisher.adapter, state.version)
        return Made(f"{publisher.adapter}@{state.version[7:]}", data, manifest, tensors, state.published_at.timestamp())

    def make(self, store: Path, seeds: Sequence[int], adapter: str = ADAPTER) -> list[Made]:
        """Publish one version per seed into a store in a folder."""
        publisher = self.publisher(store, adapter)
        return [self.publish(publisher, seed) for seed in seeds]

    def probes(self, seed: int) -> Probes:
        """Return what the learner records of the version with these weights."""
        self.lora.load(self.tensors(seed))
        return predicted_after(PROBE_TEXTS, self.lora, self.codec)

    def tensors(self, seed: int, spread: float = SPREAD) -> Tensors:
        """Return random weights."""
        generator = torch.Generator().manual_seed(seed)
        return {name: spread * torch.randn(shape, generator=generator) for name, shape in self.lora.shapes.items()}

    def nats_of(self, tensors: Tensors | None, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """Return the log-probability of each token of an answer.

        Args:
            tensors: Weights of the adapter; None: the base alone.
            prompt: Token ids before the answer.
            answer: Token ids of the answer.
        """
        self.lora.load(tensors or {name: torch.zeros(shape) for name, shape in self.lora.shapes.items()})
        self.lora.select()
        with torch.no_grad():
            logits: Any = self.base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]  # (T, V)
        nats = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
        return [float(nats[index, token]) for index, token in enumerate(answer)]
