"""An adapter's state as blobs, and what computed it."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch

from perennial.learner.model.lora import to_safetensors
from perennial.learner.training.replay_buffer import index_to_bytes
from perennial.learner.training.update import TrainingState
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.manifest import BlobRef
from perennial.streams.settings import code_version

StateRefs = tuple[BlobRef, BlobRef | None, BlobRef | None]
"""Weights, optimizer, replay index."""


def code_digest() -> str:
    """What computed a version: release, torch, and a digest of the files that decide its bytes."""
    room = Path(__file__).parents[1]
    total = sha256()
    for folder in ("model", "training"):
        for path in sorted((room / folder).glob("*.py")):
            total.update(f"{folder}/{path.name}\n".encode() + path.read_bytes())
    return f"perennial {code_version()} {total.hexdigest()[:16]} torch {torch.__version__}"


def to_blobs(state: TrainingState) -> tuple[StateRefs, dict[str, bytes]]:
    """A state as blobs by digest, with the references to its weights, optimizer and replay index."""
    blobs: dict[str, bytes] = {}

    def ref(data: bytes) -> BlobRef:
        digest = digest_of(data)
        blobs[digest] = data
        return BlobRef(digest=digest, size_bytes=len(data))

    optimizer = ref(to_safetensors(state.optimizer)) if state.optimizer else None
    replay = ref(index_to_bytes(state.replay)) if state.replay else None
    return (ref(to_safetensors(state.state)), optimizer, replay), blobs


def state_key(*refs: BlobRef | None) -> str:
    """What tells a state apart from all others, by its references."""
    return " ".join(ref.digest if ref else "-" for ref in refs)
