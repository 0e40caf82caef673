"""Training from scratch, for comparison with what forgetting comes to: no lineage, no registry, no forgetting code.

Cuts are given as lists of examples; each is filtered by the caller, stored as curate would store it, and learned by
`Updater.update` from the state before. What the gate refuses leaves the state as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Digests of the final state, None where the state has no such part."""

    weights: str
    optimizer: str | None
    replay: str | None
    outcomes: tuple[str, ...]
    state: TrainingState

    def equals(self, manifest: Manifest) -> bool:
        """Whether a version has this very state."""
        refs = (manifest.weights, manifest.optimizer, manifest.replay)
        return tuple(ref.digest if ref else None for ref in refs) == (self.weights, self.optimizer, self.replay)


def train(updater: Updater, store: ObjectStore, adapter: str, cuts: Mapping[int, Sequence[ExampleAccepted]]) -> Scratch:
    """Learn the cuts by number, in order; an empty one is left out."""
    state = TrainingState(updater.lora.init_state(adapter, updater.recipe.seed))
    rows = BatchRows(store, updater.rows)
    outcomes = []
    for cut, examples in cuts.items():
        if not examples:
            continue
        batch = Batch(adapter=adapter, cut=cut, examples=list(examples), skipped=[])
        digest = put_blob(store, batch.model_dump_json(by_alias=True).encode())
        found = updater.update(state, examples, adapter=adapter, cut=cut, batch=digest, replayed=rows)
        outcomes.append(found.outcome)
        if found.outcome == "promoted":
            state = found.state
    return Scratch(
        weights=_digest(to_safetensors(state.weights)),
        optimizer=_digest(to_safetensors(state.optimizer)) if state.optimizer else None,
        replay=_digest(index_to_bytes(state.replay_index)) if state.replay_index else None,
        outcomes=tuple(outcomes),
        state=state,
    )


def _digest(data: bytes) -> str:
    return "sha256:" + sha256(data).hexdigest()
