"""Put a shared adapter and the own part of a personal one into one LoRA, and take them apart again.

With the factors of both stacked, [B_s B_o] · [A_s; A_o] = B_s A_s + B_o A_o, so one adapter of the summed rank computes
what both compute together. Nothing is approximated: no product is decomposed, and the numbers of both parts lie in the
stacked tensors as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from perennial.learner.model.lora import AdapterError, LoraConfig, Tensors, rank_axis

SERVED_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks above 1 that vLLM takes as `max_lora_rank`."""


@dataclass(frozen=True)
class SharedPart:
    """One version of the adapter that a personal one extends.

    Attributes:
        config: Its rank and alpha.
        weights: What it serves, by PEFT name.
    """

    config: LoraConfig
    weights: Tensors


def stacked_config(shared: LoraConfig, own: LoraConfig, rank: int | None = None) -> LoraConfig:
    """Return rank and alpha of the LoRA that holds both parts. Its scale is that of the own part.

    Args:
        shared: Rank and alpha of the shared part.
        own: Rank and alpha of the own part.
        rank: Rank to fill up to; None: the sum of both.

    Raises:
        AdapterError: The rank is smaller than the sum, or no whole alpha gives the scale at it.
    """
    least = shared.rank + own.rank
    wanted = least if rank is None else rank
    if wanted < least or own.alpha * wanted % own.rank:
        raise AdapterError(
            "a shared and an own part do not fit one LoRA",
            got=f"ranks {shared.rank} and {own.rank}, alpha {own.alpha}, filled up to {wanted}",
            allowed=f"rank {least} or more, at which alpha / rank can be {own.alpha} / {own.rank} with a whole alpha",
            remedy="give both the same rank, or an alpha that the rank divides",
        )
    return LoraConfig(wanted, own.alpha * wanted // own.rank)


def served_rank(rank: int) -> int:
    """Return the smallest rank of `SERVED_RANKS` that holds a rank.

    Raises:
        AdapterError: There is none.
    """
    for allowed in SERVED_RANKS:
        if rank <= allowed:
            return allowed
    raise AdapterError("no server takes this rank", got=rank, allowed=SERVED_RANKS, remedy="lower PERENNIAL_RANK")


def compose(
    shared: SharedPart, weights: Mapping[str, torch.Tensor], own: LoraConfig, rank: int | None = None
) -> Tensors:
    """Return the weights of one LoRA with the config `stacked_config` that computes the sum of both parts.

    Where the scales of the parts differ, that of the shared one is folded into its B: exact if the ratio of the scales
    is a power of two, and else to one rounding. Rows and columns that fill up are zeros.

    Args:
        shared: The shared part.
        weights: The own part by PEFT name, A (own rank, inputs) and B (outputs, own rank).
        own: Rank and alpha of the own part.
        rank: Rank to fill up to; None: the sum of both.

    Raises:
        AdapterError: The parts belong to different layers, or do not fit the rank.
    """
    if shared.weights.keys() != weights.keys():
        raise AdapterError(
            "a shared and an own part have other tensors", got=sorted(shared.weights.keys() ^ weights.keys())[:4],
            allowed="the same layers of one base", remedy="train both on the same base",
        )  # fmt: skip
    stacked = stacked_config(shared.config, own, rank)
    ratio = (shared.config.alpha * own.rank) / (shared.config.rank * own.alpha)
    spare = stacked.rank - shared.config.rank - own.rank
    found: Tensors = {}
    for name, of_own in weights.items():
        below = shared.weights[name].to(of_own.device)
        axis = rank_axis(name)
        if axis and ratio != 1:
            below = below * ratio
        parts = [below, of_own]
        if spare:
            shape = list(of_own.shape)
            shape[axis] = spare
            parts.append(of_own.new_zeros(shape))
        found[name] = torch.cat(parts, axis)
    return found


def own_part(weights: Mapping[str, torch.Tensor], shared_rank: int, own_rank: int) -> Tensors:
    """Return a copy of the own part of stacked weights, or of moments of that shape, bit by bit as it was stacked.

    Args:
        weights: Stacked tensors by PEFT name.
        shared_rank: Rank of the shared part, which lies in front.
        own_rank: Rank of the own part.
    """
    return {
        name: tensor.narrow(rank_axis(name), shared_rank, own_rank).clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
