"""What all runs of a process share: the base, its general texts, the passes, and slots for adapters."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from perennial.learner.bases.sources import SHIPPED_NAME
from perennial.learner.model.base import Base, load_base
from perennial.learner.model.general_items import GeneralItem, GeneralItems, item_rows
from perennial.learner.model.general_text import general_texts
from perennial.learner.model.lora import Lora, LoraConfig, Tensors
from perennial.learner.model.tokenization import TokenRow, text_rows, turn_rows
from perennial.learner.model.turns import ComputeTurns, FairLock
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.training.compute import Compute
from perennial.learner.training.personal.layered_lora import LayeredLora
from perennial.learner.training.personal.stacking import SharedPart
from perennial.learner.training.update import Updater
from perennial.learner.versions.engine import code_digest
from perennial.learner.versions.version_writer import make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.object_store import get_blob
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.settings import Settings, load_settings
from tests.benchmarks.learning.arms import Arm
from tests.benchmarks.learning.orthogonal import OrthogonalCompute
from tests.benchmarks.learning.streams import Question

ROWS_PER_TEXT: Final = 2
"""Rows of a held-out text that are measured, from its beginning."""
_LEARNER_ROOM: Final = Path(__file__).parents[3]
_CURATE: Final = ("streams/curate/batcher.py", "streams/curate/cutting/policy.py", "streams/curate/drift.py")
_HARNESS: Final = ("texts.py", "retrieval.py", "streams.py", "generated.py", "world.py", "runs.py", "orthogonal.py")

Losses = list[tuple[float, int]]
"""Sum of nats and number of tokens, by text."""


class World:
    """The base and everything around it.

    Args:
        base: The base.
        settings: Of the service, for this base.
        runs: Most runs at the same time, whose passes are shared.
        general: Held-out general texts to measure.

    Attributes:
        row_tokens: Longest row of what is measured, in tokens: the same for every arm.
        code: Digest of the code that decides the figures.
    """

    def __init__(self, base: Base, settings: Settings, runs: int, general: int) -> None:
        self.base = base
        self.lock = FairLock()
        self._store = DirectoryStore(Path(tempfile.mkdtemp(prefix="perennial-learning-")))
        writer = make_version_writer(settings, self._store, self.base, self.lock)
        self._threads = settings.model.threads
        self._updater = writer.updater_of(None)
        self.codec = self._updater.codec
        self.row_tokens = settings.training.row_tokens
        self.passes = GatheredPasses(runs, settings.model.pass_wait_ms / 1000)
        self.general_rows = self._general_rows(general)
        self.code = _code_digest()
        self._tokens: dict[str, int] = {}
        self._slots: dict[tuple[int, LoraConfig], Lora] = {}
        self._mutex = threading.Lock()

    @classmethod
    def load(cls, base: str, threads: int, runs: int, general: int) -> World:
        """Return the world of a base by its name.

        Args:
            base: Name of the base.
            threads: CPU threads of the model.
            runs: Most runs at the same time.
            general: Held-out general texts to measure.
        """
        settings = load_settings(base=base, env_file=None, device="cpu", threads=threads)
        loaded = load_base(settings.model.base, "cpu", settings.model.threads, settings.model.dtype)
        return cls(loaded, settings, runs, general)

    def _general_rows(self, count: int) -> list[list[TokenRow]]:
        """Return the first row of each general text that is neither trained nor measured by the gate."""
        ref = self._updater.general.ref
        texts: Sequence[str | GeneralItem]
        if self.base.name == SHIPPED_NAME or ref is None:
            texts = general_texts("heldout")
        else:
            texts = GeneralItems.from_bytes(get_blob(self._store, ref.digest)).split()[2]
        items = [GeneralItem(text) if isinstance(text, str) else text for text in texts[:count]]
        return [item_rows(item, self.codec, self.row_tokens)[:1] for item in items]

    def updater(self, arm: Arm, worker: int) -> Updater:
        """Return the service's updater with the recipe of an arm, in the slot of one of the threads."""
        settings = arm.settings(self.base.name)
        recipe = arm.recipe(settings, self.base.compute_dtype)
        lora = self._slot(worker, LoraConfig(recipe.rank, recipe.alpha))
        passes: Compute = self.passes
        if arm.orthogonality is not None:
            recipe, passes = replace(recipe, shared_passes=True), OrthogonalCompute(arm.orthogonality)
        return replace(
            self._updater, lora=lora, recipe=recipe, lock=ComputeTurns(self.lock, self._threads), shared=passes,
            general=self._updater.general.cut_to(recipe.row_tokens),
            answers=self._updater.answers if arm.gated else None,
        )  # fmt: skip

    def over_frozen(self, updater: Updater, weights: Tensors) -> Updater:
        """Return the updater with a new LoRA over all that it has trained, which is frozen.

        Args:
            updater: The updater; its LoRA may lie over a frozen one already.
            weights: What it has trained last.
        """
        below = updater.lora
        layered = isinstance(below, LayeredLora)
        shared = SharedPart(below.config, below.compose(weights) if layered else weights)
        with self._mutex, self.lock:
            lora = LayeredLora(self.base, below.own if layered else below.config, shared, f"{below.slot}+")
        return replace(updater, lora=lora)

    def _slot(self, worker: int, config: LoraConfig) -> Lora:
        with self._mutex, self.lock:
            found = self._slots.get((worker, config))
            if found is None:
                name = f"bench-{worker}-{config.rank}-{config.alpha}"
                found = self._slots[worker, config] = Lora(self.base, config, name)
            return found

    def tokens_of(self, example: ExampleAccepted) -> int:
        """Return the tokens of an example as the scorer counts them."""
        found = self._tokens.get(example.example_id)
        if found is None:
            found = self._tokens[example.example_id] = sum(row.tokens for row in self._updater.rows(example))
        return found

    def text_rows(self, text: str) -> list[TokenRow]:
        """Return the rows of a held-out text that are measured."""
        return text_rows(text, self.codec, self.row_tokens)[:ROWS_PER_TEXT]

    def choice_rows(self, question: Question) -> list[list[TokenRow]]:
        """Return the rows of all choices of a question, first as answers, then as documents.

        A chat model is asked in its template; another one is given the sentence alone, because it cannot answer.
        """
        if self.codec.has_template:
            turns = [("user", question.prompt)]
            answers = [turn_rows(turns, answer, self.codec, self.row_tokens) for answer in question.answers]
        else:
            answers = [text_rows(answer, self.codec, self.row_tokens) for answer in question.answers]
        return [*answers, *(text_rows(text, self.codec, self.row_tokens) for text in question.documents)]

    def losses(self, updater: Updater, weights: Tensors, groups: Sequence[Sequence[TokenRow]]) -> Losses:
        """Return the loss of each group of rows under the weights."""
        of_tokens = self.token_losses(updater, weights, groups)
        return [(float(nats.sum()), len(nats)) for nats in of_tokens]

    def token_losses(
        self, updater: Updater, weights: Tensors, groups: Sequence[Sequence[TokenRow]]
    ) -> list[torch.Tensor]:
        """Return the loss of each trained token of each group of rows, (tokens,) per group."""
        rows = [row for group in groups for row in group]
        found = iter(
            updater.compute.token_losses(updater.lora, weights, rows, self.codec.pad, updater.lock, lambda: None)
        )
        return [torch.cat([next(found) for _ in group]) for group in groups]


def _code_digest() -> str:
    """Return a digest of the service's code that learns and cuts, and of the code here that decides figures."""
    total = hashlib.sha256(code_digest().encode())
    paths = [*(_LEARNER_ROOM / name for name in _CURATE), *(Path(__file__).with_name(name) for name in _HARNESS)]
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()[:16]
