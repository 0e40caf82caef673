"""Trains an adapter from scratch, to compare its state with the state after forgetting.

Uses no registry and no forgetting code. The caller gives the micro-batches as lists of examples, without those that are
forgotten. Each list is stored as curate would store it and learned by `Updater.update` from the state before; an update
that the gate refuses leaves the state as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from perennial.learner.model.lora import to_safetensors
from perennial.learner.training.replay_buffer import index_to_bytes
from perennial.learner.training.state import TrainingState
from perennial.learner.training.update import Updater
from perennial.learner.versions.micro_batches import BatchRows
from perennial.storage.objects.object_store import ObjectStore, put_blob
from perennial.storage.registry.manifest import Manifest
from perennial.streams.events.models import Batch, ExampleAccepted


@dataclass(frozen=True)
class Scratch:
    """The result of a training from scratch.

    Attributes:
        weights: Digest of the final weights.
        optimizer: Digest of the final optimizer state, None if there is none.
        replay: Digest of the final replay index, None if there is none.
        outcomes: The gate's outcome of every update, in order.
        state: The final state.
        states: The state after each update, by its cut number.
    """

    weights: str
    optimizer: str | None
    replay: str | None
    outcomes: tuple[str, ...]
    state: TrainingState
    states: Mapping[int, TrainingState]

    def equals(self, manifest: Manifest) -> bool:
        """Return whether a version has exactly this state."""
        refs = (manifest.weights, manifest.optimizer, manifest.replay)
        return tuple(ref.digest if ref else None for ref in refs) == (self.weights, self.optimizer, self.replay)


def train(
    updater: Updater,
    store: ObjectStore,
    adapter: str,
    cuts: Mapping[int, Sequence[ExampleAccepted]],
    start: TrainingState | None = None,
) -> Scratch:
    """Learn micro-batches in the order given.

    Args:
        updater: Trains one update.
        store: Keeps the micro-batches; use a store of its own, or the one that has those of `start`.
        adapter: The adapter's name.
        cuts: Examples of each micro-batch, by its cut number; an empty micro-batch is left out.
        start: State to train from; None for that of an adapter that has learned nothing.
    """
    batches = {
        cut: Batch(adapter=adapter, cut=cut, examples=list(examples), skipped=[])
        for cut, examples in cuts.items() if examples
    }  # fmt: skip
    return train_batches(updater, store, adapter, batches, start)


def store_batch(store: ObjectStore, adapter: str, cut: int, examples: Sequence[ExampleAccepted]) -> str:
    """Store a micro-batch as curate would; return its digest."""
    batch = Batch(adapter=adapter, cut=cut, examples=list(examples), skipped=[])
    return put_blob(store, batch.model_dump_json(by_alias=True).encode())


def train_batches(
    updater: Updater,
    store: ObjectStore,
    adapter: str,
    batches: Mapping[int, Batch],
    start: TrainingState | None = None,
    trained: Callable[[Batch], Sequence[ExampleAccepted]] = lambda batch: batch.examples,
) -> Scratch:
    """Learn micro-batches in the order given, by their cut number; see `train`.

    Args:
        updater: Trains one update.
        store: Keeps the micro-batches.
        adapter: The adapter's name.
        batches: Micro-batches by their cut number.
        start: State to train from; None for that of an adapter that has learned nothing.
        trained: Returns the examples of a micro-batch that are trained; an update without any is left out.
    """
    state = start or TrainingState(updater.lora.initial_weights(adapter, updater.recipe.seed))
    rows = BatchRows(store, updater.rows)
    outcomes, states = [], {}
    for cut, batch in batches.items():
        digest = put_blob(store, batch.model_dump_json(by_alias=True).encode())
        examples = trained(batch)
        if not examples:
            continue
        found = updater.update(state, examples, adapter=adapter, cut=cut, batch=digest, replayed=rows)
        outcomes.append(found.outcome)
        if found.outcome == "promoted":
            state = found.state
        states[cut] = state
    return Scratch(
        weights=_digest(to_safetensors(state.weights, state.adapter)),
        optimizer=_digest(to_safetensors(state.optimizer, state.adapter)) if state.optimizer else None,
        replay=_digest(index_to_bytes(state.replay_index)) if state.replay_index else None,
        outcomes=tuple(outcomes),
        state=state,
        states=states,
    )


def _digest(data: bytes) -> str:
    return "sha256:" + sha256(data).hexdigest()
