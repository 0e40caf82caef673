"""Measurement of stored versions on given texts, for the demo, the benchmarks and the page of an adapter."""

from __future__ import annotations

from collections.abc import Sequence

from perennial.learner.model.base import load_base
from perennial.learner.model.lora import Lora, LoraConfig, from_safetensors
from perennial.learner.model.loss import RowLoss, mean_nats
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, example_rows, text_rows
from perennial.learner.together.measure_together import MeasuredRows, measure_together
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.storage.registry.manifest import Manifest
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.settings import Settings

_MAX_ROWS_PER_TEXT = 2


class Evaluator:
    """Measures versions on a base of its own, with one LoRA slot.

    Args:
        settings: Base, device, threads, rank, alpha and row length.
        store: Store that holds the versions' weights.

    Raises:
        BaseModelError: The base cannot be loaded.
    """

    def __init__(self, settings: Settings, store: ObjectStore) -> None:
        base = load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
        self._store = store
        self._row_tokens = settings.training.row_tokens
        self._codec = ExampleTokenizer(base.tokenizer)
        self._lora = Lora(base, LoraConfig(settings.training.rank, settings.training.alpha), slot="evaluator")

    def loss(self, manifest: Manifest | None, texts: Sequence[str]) -> float:
        """Return the mean loss on the beginnings of the texts under a version, nats per token.

        Args:
            manifest: Version to measure; None for the frozen base.
            texts: Texts, of which the first rows are measured.

        Raises:
            StoreError: The weights are not in the store, or are damaged.
            AdapterError: The version belongs to another base or rank.
        """
        weights = get_blob(self._store, manifest.weights.digest) if manifest is not None else None
        return self.loss_of(weights, texts)

    def loss_of(self, weights: bytes | None, texts: Sequence[str]) -> float:
        """Return the mean loss as `loss` does, under weights in memory that the store may no longer have.

        Args:
            weights: Content of a version's safetensors file; None for the frozen base.
            texts: Texts, of which the first rows are measured.
        """
        tensors = None if weights is None else from_safetensors(weights, self._lora.shapes)
        rows = [row for text in texts for row in text_rows(text, self._codec, self._row_tokens)[:_MAX_ROWS_PER_TEXT]]
        (losses,) = measure_together(self._lora, [MeasuredRows(tensors, rows)], self._codec.pad)
        return mean_nats([RowLoss(float(nats.sum()), len(nats)) for nats in losses])

    def example_losses(self, manifest: Manifest | None, groups: Sequence[Sequence[ExampleAccepted]]) -> list[float]:
        """Return the mean loss of each group of examples under a version, nats per token.

        Args:
            manifest: Version to measure; None for the frozen base.
            groups: Examples that have something to train; the first rows of each are measured.

        Raises:
            StoreError: The weights are not in the store, or are damaged.
            AdapterError: The version belongs to another base or rank.
        """
        weights = get_blob(self._store, manifest.weights.digest) if manifest is not None else None
        tensors = None if weights is None else from_safetensors(weights, self._lora.shapes)
        measured = [
            MeasuredRows(tensors, [row for example in group for row in self._rows(example)[:_MAX_ROWS_PER_TEXT]])
            for group in groups
        ]
        found = measure_together(self._lora, measured, self._codec.pad)
        return [mean_nats([RowLoss(float(nats.sum()), len(nats)) for nats in losses]) for losses in found]

    def _rows(self, example: ExampleAccepted) -> list[TokenRow]:
        return example_rows(example, self._codec, self._row_tokens)
