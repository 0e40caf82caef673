"""The figures that the gate measured, and on which it decided, as a manifest records them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from perennial.storage.registry.scalars import Int64, Number, Scalar, Text

HELD_OUT = "held-out"
SEEN = "seen"

Nats = Number | None
_Count = Annotated[Int64, Field(strict=True)] | None


class GateFigures(BaseModel):
    """The figures that the gate measured for one version; every figure is optional.

    Losses are means in nats per token, rounded to 6 decimals. A figure that was not measured is absent. A figure that
    came out as NaN or infinity is None, because JSON has no such number. Absent and None are told apart: the record
    serialises to exactly the keys that it was made from, so that a manifest keeps its digest. Keys that this release
    does not know are kept as they are.

    Attributes:
        basis: What the gain was measured on: `held-out` (examples that were measured before they were trained), or
            `seen` (rows that were trained, where the micro-batch was too small to hold anything out).
        held_out_examples: Number of examples held out.
        held_out_before: Loss of the held-out examples under the previous version, nats per token.
        held_out_after: Their loss after training on the other examples, nats per token.
        held_out_error: Standard error of the mean fall from before to after, paired by token, nats per token.
        new_before: As held_out_before, for rows that are trained; only where the basis is `seen`.
        new_after: As held_out_after, for rows that were trained.
        new_error: As held_out_error, for rows that were trained.
        anchor_base: Loss of the anchor rows (general text) under the frozen base, nats per token.
        anchor_before: Loss of the anchor rows under the previous version, nats per token.
        anchor_after: Loss of the anchor rows under the new version, nats per token.
        answer_rise: By how much the loss on the base's own answers to fixed questions is above the base's, mean over the
            questions, nats per token; absent where answers are not looked at.
        degenerate_answers: Number of trial questions that the version answered with nothing or with a loop.
        corrections: Number of distinct corrections; absent where the recipe takes no further passes over them.
        corrections_not_learned: Number of those that the version would not answer word for word, because further passes over
            them would have raised the general loss too far, or were not enough.
        replayed_rows: Number of rows of earlier examples that were mixed into training.
        replay_missing: Number of replay draws that gave no row, because the example was erased or is quarantined.
        strain: General-loss pressure before training, 0 to 1: the share of the allowed rise of general loss that was
            used up. The higher it was, the more general text was mixed in.
        steps: Number of optimizer steps that the last try took.
        tries: Number of tries, where there was more than one.
        reason: The verdict: `ok`, or why the version was refused (`learner.training.gate.GateReason`).
        forgotten_examples: Number of examples that the version forgot; only on versions of kind `forget`.
        other_engine_updates: Number of updates that were rebuilt for it by another engine (code, torch, device) than the one
            that had trained them; absent where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Scalar]

    basis: Text | None = None
    held_out_examples: _Count = None
    held_out_before: Nats = None
    held_out_after: Nats = None
    held_out_error: Nats = None
    new_before: Nats = None
    new_after: Nats = None
    new_error: Nats = None
    anchor_base: Nats = None
    anchor_before: Nats = None
    anchor_after: Nats = None
    answer_rise: Nats = None
    degenerate_answers: _Count = None
    corrections: _Count = None
    corrections_not_learned: _Count = None
    replayed_rows: _Count = None
    replay_missing: _Count = None
    strain: Nats = None
    steps: _Count = None
    tries: _Count = None
    reason: Text | None = None
    forgotten_examples: _Count = None
    other_engine_updates: _Count = None

    @property
    def loss_before(self) -> float | None:
        """Loss under the previous version, on what the gain was measured on, nats per token."""
        return self.held_out_before if self.basis == HELD_OUT else self.new_before

    @property
    def loss_after(self) -> float | None:
        """Loss under the new version, on what the gain was measured on, nats per token."""
        return self.held_out_after if self.basis == HELD_OUT else self.new_after

    @property
    def loss_error(self) -> float | None:
        """Standard error of the mean fall from before to after, nats per token."""
        return self.held_out_error if self.basis == HELD_OUT else self.new_error

    def as_dict(self) -> dict[str, Scalar]:
        """Return the figures that are present, by JSON key, sorted by key."""
        fields = {name: getattr(self, name) for name in self.model_fields_set & type(self).model_fields.keys()}
        figures = {**fields, **self.__pydantic_extra__}
        return {name: figures[name] for name in sorted(figures)}

    def merged(self, more: GateFigures) -> Self:
        """Return these figures with those that are present in `more` added or replaced."""
        return type(self).model_validate({**self.as_dict(), **more.as_dict()})

    def __eq__(self, other: object) -> bool:
        """Compare the figures that are present; absent and None differ."""
        return isinstance(other, GateFigures) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        """Hash the figures that are present."""
        return hash(tuple(self.as_dict().items()))

    @model_serializer(mode="plain")
    def _serialize(self) -> dict[str, Any]:
        return self.as_dict()
