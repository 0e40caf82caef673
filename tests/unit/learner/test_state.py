"""An adapter's state as blobs and back."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.learner.training.state import StateRefs, TrainingState, load_state, to_blobs
from perennial.storage.registry.manifest import Manifest

SHAPES = {"q.lora_A.weight": (2, 3), "q.lora_B.weight": (3, 2)}
WEIGHTS = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
MOMENTS = {f"{kind}.{name}": torch.ones(shape) for kind in ("exp_avg", "exp_avg_sq") for name, shape in SHAPES.items()}
OPTIMIZER = {**MOMENTS, "step": torch.tensor([3.0])}
REPLAY_INDEX = (ReplayEntry("e1", "sha256:" + "a" * 64),)


@pytest.mark.parametrize(
    ("state", "parts"),
    [
        (TrainingState(WEIGHTS), ["weights"]),
        (TrainingState(WEIGHTS, OPTIMIZER, REPLAY_INDEX), ["optimizer", "replay_index", "weights"]),
    ],
)
def test_a_state_reads_back_from_its_blobs_which_are_written_in_one_order(state: TrainingState, parts: list[str]):
    refs, blobs = to_blobs(state)
    assert [getattr(refs, part).digest for part in parts] == list(blobs)
    again = load_state(refs, lambda ref: blobs[ref.digest], SHAPES)
    assert to_blobs(again) == (refs, blobs)
    assert (again.optimizer is None, again.replay_index) == (state.optimizer is None, state.replay_index)


def test_every_part_of_a_state_has_a_reference_and_a_field_of_the_manifest():
    parts = [field.name for field in fields(TrainingState) if field.name != "adapter"]  # which only names the others
    assert [field.name for field in fields(StateRefs)] == parts
    refs, _ = to_blobs(TrainingState(WEIGHTS, OPTIMIZER, REPLAY_INDEX))
    named = refs.manifest_fields()
    assert len(named) == len(parts)
    assert named.keys() <= Manifest.model_fields.keys()
    assert StateRefs.of_manifest(Manifest.model_construct(**named)) == refs
    assert refs.digests() == tuple(ref.digest for ref in named.values())
