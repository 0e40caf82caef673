"""The state that an adapter trains from, in memory and as stored blobs.

How to add one more part of the state (tensors that only training needs may lie in the optimizer state, as those of the slow
average do):

1. In this file, add a field to `TrainingState`, a field of the same name to `StateRefs`, and one line each to
   `StateRefs.of_manifest`, `StateRefs.manifest_fields`, `to_blobs` and `load_state`.
2. In `storage/registry/manifest.py`, add a `BlobRef | None` field to `Manifest` and to `Manifest.blobs`, so that the
   blob is verified before publishing, kept while a version needs it, and deleted when an example is forgotten. Let
   `Manifest.to_bytes` leave it out while it is None. Hazard: a manifest's digest is its version's id, so stored
   manifests must keep their bytes.
3. In `storage/registry/registry.py`, add it to the safetensors that `_verify` checks.
4. Compute it where `Updater.update` makes the next `TrainingState` (`learner/training/update.py`).

Everything else (updates, rollbacks, rebuilds for forgetting, caches) passes these two classes on as they are. Keep the
order in which `to_blobs` fills its dictionary: blobs are written to the store in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from perennial.learner.model.lora import Tensors, from_safetensors, to_safetensors
from perennial.learner.training.replay_buffer import ReplayEntry, index_from_bytes, index_to_bytes
from perennial.learner.training.trainer import optimizer_from_bytes
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.manifest import BlobRef, Manifest


@dataclass(frozen=True)
class TrainingState:
    """The state of an adapter between two updates.

    Attributes:
        weights: LoRA tensors by PEFT name, float32 on the CPU: what is served.
        optimizer: AdamW moments and step count, and where the recipe averages also the fast weights and the number of
            averaged updates; None before the adapter's first promoted update.
        replay_index: earlier examples that may be mixed into training, sorted by example id.
        adapter: the adapter that the stored tensors name; None: none. Needed where several adapters begin with equal
            weights: blobs are deleted adapter by adapter, so no two adapters may share those of their states.
    """

    weights: Tensors
    optimizer: Tensors | None = None
    replay_index: tuple[ReplayEntry, ...] = ()
    adapter: str | None = None


@dataclass(frozen=True)
class StateRefs:
    """References to the blobs of a `TrainingState`; None where that part of the state is empty.

    Attributes:
        weights: safetensors of the LoRA weights.
        optimizer: safetensors of the optimizer state.
        replay_index: JSON of the replay index.
    """

    weights: BlobRef
    optimizer: BlobRef | None = None
    replay_index: BlobRef | None = None

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Self:
        """Return the references that a manifest holds."""
        return cls(manifest.weights, manifest.optimizer, manifest.replay)

    def manifest_fields(self) -> dict[str, Any]:
        """Return the references by the manifest's field names, to be passed on as keyword arguments."""
        return {"weights": self.weights, "optimizer": self.optimizer, "replay": self.replay_index}

    def digests(self) -> tuple[str | None, ...]:
        """Return the digest of each part; equal tuples mean equal states."""
        return tuple(ref.digest if ref else None for ref in self.manifest_fields().values())


def to_blobs(state: TrainingState) -> tuple[StateRefs, dict[str, bytes]]:
    """Serialize a state.

    Returns:
        The references, and the blobs by digest in the order in which they are written to the store.
    """
    blobs: dict[str, bytes] = {}

    def ref(data: bytes) -> BlobRef:
        digest = digest_of(data)
        blobs[digest] = data
        return BlobRef(digest=digest, size_bytes=len(data))

    optimizer = ref(to_safetensors(state.optimizer, state.adapter)) if state.optimizer else None
    replay_index = ref(index_to_bytes(state.replay_index)) if state.replay_index else None
    weights = ref(to_safetensors(state.weights, state.adapter))
    return StateRefs(weights, optimizer, replay_index), blobs


def load_state(
    refs: StateRefs, read: Callable[[BlobRef], bytes], shapes: Mapping[str, tuple[int, ...]]
) -> TrainingState:
    """Read a state from its blobs.

    Args:
        refs: the blobs to read.
        read: returns a blob's bytes, digest verified.
        shapes: shape of each LoRA tensor that the base and rank ask for.

    Raises:
        IntegrityError: a blob does not parse, or the optimizer state belongs to another adapter.
        AdapterError: the weights belong to another base or rank.
    """
    weights = from_safetensors(read(refs.weights), shapes)
    optimizer = optimizer_from_bytes(read(refs.optimizer), shapes) if refs.optimizer else None
    replay_index = index_from_bytes(read(refs.replay_index)) if refs.replay_index else ()
    return TrainingState(weights, optimizer, replay_index)
