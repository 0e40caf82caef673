"""Split the rows of several adapters into passes that fit the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from perennial.learner.model.lora import Lora
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.together.packing import AdapterRows

PASS_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Most tokens of a pass. More gain nothing: the device is busy with so many, and activations take memory by the token."""
ACTIVATION_BYTES = 32 * 2**30
"""Most memory that the activations of a pass may take on a GPU, as they are estimated, and at most 40 % of its memory."""
_BYTES_OF_ACTIVATIONS = 1.0
"""Activations of a Llama in bf16, as a multiple of the inputs and outputs of its linear layers (measured at 8B)."""
_STEP_TOKENS = 1024


def most_pass_tokens(lora: Lora) -> int:
    """Return the most tokens of a pass: the same number for one base and kind of device, since it decides bits."""
    device = torch.device(lora.base.device)
    if device.type != "cuda":
        return PASS_TOKENS["cpu"]
    kept: dict[object, int] = lora.model.__dict__.setdefault("_most_pass_tokens", {})
    if device not in kept:
        kept[device] = _most_on_cuda(lora, device)
    return kept[device]


def _most_on_cuda(lora: Lora, device: torch.device) -> int:
    widths = sum(layer.in_features + layer.out_features for layer in lora.layers().values())
    by_token = 2 * widths * _BYTES_OF_ACTIVATIONS
    memory = min(ACTIVATION_BYTES, 0.4 * torch.cuda.get_device_properties(device).total_memory)
    fitting = int(memory / by_token) // _STEP_TOKENS * _STEP_TOKENS
    return min(PASS_TOKENS["cuda"], max(_STEP_TOKENS // 2, fitting))


def split_into_passes(parts: Sequence[AdapterRows], max_tokens: int) -> list[tuple[int, list[AdapterRows]]]:
    """Return the rows in few passes of about the same size, in the order of the adapters.

    Returns:
        The first adapter of each pass, and the rows of each adapter from it on.
    """
    rows = [(adapter, row) for adapter, part in enumerate(parts) for row in part.rows]
    total = sum(len(row.ids) for _, row in rows)
    for count in range(max(1, -(-total // max_tokens)), len(rows) + 1):
        passes: list[list[tuple[int, TokenRow]]] = [[] for _ in range(count)]
        before = 0
        for adapter, row in rows:
            passes[(2 * before + len(row.ids)) * count // (2 * total)].append((adapter, row))
            before += len(row.ids)
        passes = [of_pass for of_pass in passes if of_pass]
        if all(len(of_pass) == 1 or sum(len(row.ids) for _, row in of_pass) <= max_tokens for of_pass in passes):
            break
    else:
        passes = [[row] for row in rows]
    return [(of_pass[0][0], _by_adapter(of_pass, parts)) for of_pass in passes]


def _by_adapter(rows: Sequence[tuple[int, TokenRow]], parts: Sequence[AdapterRows]) -> list[AdapterRows]:
    return [
        replace(parts[adapter], rows=[row for owner, row in rows if owner == adapter])
        for adapter in range(rows[0][0], rows[-1][0] + 1)
    ]
