"""Count the floating-point operations of training and measuring, by formula.

A product with a weight takes 2 operations per weight and position: one multiplication and one addition. The backward
pass takes as many for the gradient of the input, and as many again for the gradient of the weight, which a frozen weight
does not have (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; docs/economics.md has the derivation).

Attention itself (the products of queries, keys and values), normalisation, the optimizer and whatever is computed twice to
save memory are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perennial.learner.model.lora import Lora
    from perennial.learner.model.tokenization import TokenRow

FORWARD = 2
FROZEN_TRAINING = 4
"""Forward, and the gradient of the input."""
LORA_TRAINING = 6
"""Forward, the gradient of the input, and that of the weight."""


@dataclass(frozen=True)
class WeightCounts:
    """How many weights a position meets.

    Attributes:
        frozen: Weights of the base's linear layers that have a LoRA: all but the head's.
        lora: Weights of the LoRA.
        head: Weights of the output layer, which only positions with a loss meet.
    """

    frozen: int
    lora: int
    head: int

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, Sequence[int]], head: int) -> WeightCounts:
        """Count the weights by the shapes of an adapter's tensors.

        Args:
            shapes: Shapes by name in PEFT's files: A (rank, inputs) and B (outputs, rank) of each layer.
            head: Weights of the output layer.
        """
        frozen = lora = 0
        for name, (rank, inputs) in shapes.items():
            if ".lora_A." in name:
                outputs = shapes[name.replace(".lora_A.", ".lora_B.")][0]
                frozen += inputs * outputs
                lora += rank * (inputs + outputs)
        return cls(frozen, lora, head)

    @classmethod
    def of(cls, lora: Lora) -> WeightCounts:
        """Count the weights of a slot and of its base."""
        head = lora.model.get_output_embeddings()
        return cls.of_shapes(lora.shapes, 0 if head is None else head.weight.numel())


def training_flops(counts: WeightCounts, rows: Sequence[TokenRow]) -> float:
    """Return the operations of one forward and backward pass over rows.

    Rows that are compared with the base (`like_base`) take a forward pass of the base more.
    """
    flops = 0
    for row in rows:
        positions, trained = len(row.ids), row.tokens
        flops += positions * (FROZEN_TRAINING * counts.frozen + LORA_TRAINING * counts.lora)
        flops += trained * FROZEN_TRAINING * counts.head
        if row.like_base:
            flops += FORWARD * (positions * counts.frozen + trained * counts.head)
    return float(flops)


def measuring_flops(counts: WeightCounts, rows: Sequence[TokenRow]) -> float:
    """Return the operations of one forward pass over rows."""
    positions, trained = sum(len(row.ids) for row in rows), sum(row.tokens for row in rows)
    return float(FORWARD * (positions * (counts.frozen + counts.lora) + trained * counts.head))
