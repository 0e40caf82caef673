"""The recipe: everything about training that a version depends on besides its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch

from perennial.learner.bases.compute_dtype import dtype_name
from perennial.storage.registry.manifest import OtherVersion, Start
from perennial.streams.settings import Settings

WARMUP_STEPS = 10
DEVICE_DTYPE = "device"
"""Number format of a recipe that names none: bf16 on a GPU, fp32 on a CPU."""
_DROPPED: Mapping[str, object] = {"anchors_in_proportion": False, "max_pad_share": 1.0}
"""Fields that recipes of unreleased code had, with the values that mean what their absence means."""


HAS_START = "has_start"
HAS_OVER = "has_over"
"""What the `config` of a manifest has beside the recipe where it says what the adapter begins with, or what lay beneath it, so
that releases which know nothing of that, and would train something else, refuse to train its update again."""


class UnknownFieldError(ValueError):
    """A recipe has fields of a later release."""


@dataclass(frozen=True)
class Recipe:
    """Everything about training that a version depends on besides its data; recorded in every manifest.

    Attributes:
        rank: Rank of the LoRA.
        alpha: Scale of the LoRA; see `LoraConfig`.
        learning_rate: Rate after the warm-up.
        clip_norm: Largest gradient norm of a step.
        steps: Least number of optimizer steps per update.
        rows: Rows of a full step.
        row_tokens: Longest row, in tokens.
        replay_share: Share of a full step that is replayed, 0 to 1.
        general_share: Share of a full step that is general text, 0 to 1.
        replay_size: Most examples in the replay index.
        held_out_share: Share of the documents that are measured before they are learned, 0 to 1.
        anchor_rows: Rows of general text measured per update.
        min_gain_nats: Least fall of the held-out loss, nats per token.
        max_general_rise_nats: Largest rise of the general loss over the frozen base's, nats per token.
        seed: Seed of all random draws.
        warmup_steps: Steps over which the rate rises, once in an adapter's life.
        epochs: Least number of times that each new row is trained in its update.
        packed_tokens: Most tokens of a forward pass of training, in which the rows lie one behind the other without
            padding; 0: the rows of a pass are padded to the longest.
        max_answer_rise_nats: Largest rise of the loss on the base's own answers, nats per token; 0: answers are not
            looked at.
        general_kl_weight: Weight of the divergence from the frozen base on general rows, beside the loss of the other
            rows, both per token; 0: general rows are trained as text.
        question_dropout: Share of the tokens of each question that a step leaves out, other ones each time, 0 to 1.
        dtype: Number format of training and of the gate's measurements: `fp32`, `bf16`, or `device`, which is bf16 on a
            GPU and fp32 on a CPU.
        shared_passes: Train in packed passes, which other adapters may share; False: alone, with PEFT's layers. A rebuild
            trains in passes of its own, see docs/decisions/0055.
        correction_passes: Most further passes over the corrections of an update that are not learned yet; see
            `learned.is_learned`.
        gentler_tries: How often an update that the gate refused is tried again, each time at a lower rate and with more
            general text.
        slow_average: Share of the average of the trained weights that an update keeps; the average is served, and the
            next update trains from the trained weights. 0: the trained weights are served.
        merge_share: Share of the tokens of a document, from which it is merged into another document of its update that
            has them, too, and is trained only on the others; 0: every document is trained in full.
        max_noise_nats: Largest rise of the loss on new examples that counts as noise, nats per token; 0: any that is
            within three standard errors.
        correction_votes: Who decides between corrections that answer a question differently: `off`, all are trained;
            `update`, those of the update; `history`, those of the replay index as well.
        correction_check_steps: Least steps of further passes over corrections between two looks at what is learned and at
            the general loss; whole passes.
        rehearse_update: Replay examples of the update itself, too, in its further passes over corrections; False: only those
            of earlier updates.
        replay_places: Who has a place in the replay buffer: `examples`, each by itself, or `documents`, so that one that
            supersedes others takes their place; see `replay.places`.
        replay_bytes: Bytes of text from which on the replay buffer keeps no further example; 0: any number.

    The fields with a default are newer than the others. A manifest without them was made with their defaults, so a
    default must never change.
    """

    rank: int
    alpha: int
    learning_rate: float
    clip_norm: float
    steps: int
    rows: int
    row_tokens: int
    replay_share: float
    general_share: float
    replay_size: int
    held_out_share: float
    anchor_rows: int
    min_gain_nats: float
    max_general_rise_nats: float
    seed: int
    warmup_steps: int = WARMUP_STEPS
    epochs: int = 1
    packed_tokens: int = 0
    max_answer_rise_nats: float = 0.0
    general_kl_weight: float = 0.0
    question_dropout: float = 0.0
    dtype: str = DEVICE_DTYPE
    shared_passes: bool = False
    gentler_tries: int = 0
    correction_passes: int = 0
    slow_average: float = 0.0
    merge_share: float = 0.0
    max_noise_nats: float = 0.0
    correction_votes: str = "off"
    correction_check_steps: int = 1
    rehearse_update: bool = False
    replay_places: str = "examples"
    replay_bytes: int = 0

    @classmethod
    def of(cls, settings: Settings, dtype: torch.dtype | None = None) -> Recipe:
        """Return the recipe that the settings describe.

        Args:
            settings: Training and gate.
            dtype: Number format that the base computes in; None: bf16 on a GPU, fp32 on a CPU.
        """
        values = {**settings.training.model_dump(), **settings.gate.model_dump()}
        return cls(**values, dtype=dtype_name(dtype) if dtype else DEVICE_DTYPE)

    @classmethod
    def recorded(cls, config: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a manifest records.

        Args:
            config: The `config` of the manifest.

        Raises:
            KeyError: A field without a default is missing.
            UnknownFieldError: A later release made it, with a field that decides what is trained and is not known here.
        """
        names = {HAS_START, HAS_OVER, *(f.name for f in fields(cls))}
        unknown = {name for name, value in config.items() if name not in names and _DROPPED.get(name) != value}
        if unknown:
            raise UnknownFieldError(", ".join(sorted(unknown)))
        known = [f for f in fields(cls) if f.name in config or f.default is MISSING]
        return cls(**{f.name: config[f.name] for f in known})

    def config(self) -> dict[str, float | int | str]:
        """Return the recipe as a manifest records it."""
        return asdict(self)

    def config_of(self, start: Start | None, over: OtherVersion | None) -> dict[str, float | int | str]:
        """Return the `config` of a manifest that says what the adapter depends on.

        Args:
            start: What the adapter begins with.
            over: The shared version that lay beneath.
        """
        marks = {HAS_START: start is not None, HAS_OVER: over is not None}
        return {**self.config(), **{name: True for name, given in marks.items() if given}}
