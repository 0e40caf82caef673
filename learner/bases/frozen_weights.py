"""The frozen weights of a base in the number format that passes compute in, cast once and kept.

Autocast casts every weight anew in each forward pass, and again in the backward pass: it keeps only what takes gradients.
For SmolLM2 that is 800 MB of memory traffic per pass.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch

_KEPT: Final = "_perennial_cast"


def cast_once(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a frozen weight in a number format: itself if it has the format, else a copy that is kept on it.

    Args:
        weight: Parameter of the base, which takes no gradients.
        dtype: Number format.
    """
    if weight.dtype == dtype:
        return weight  # type: ignore[no-any-return]
    kept = getattr(weight, _KEPT, None)
    if kept is None or kept[0] != weight._version or kept[1].dtype != dtype:  # noqa: SLF001 - torch has no other sign
        kept = (weight._version, weight.detach().to(dtype))  # noqa: SLF001
        setattr(weight, _KEPT, kept)
    cast: torch.Tensor = kept[1]
    return cast


def cast_layers_once(model: torch.nn.Module) -> None:
    """Make the linear layers of a frozen model on a CPU take copies of their weights inside autocast, cast once.

    The bits are those of autocast. An answer of 20 tokens casts the weights 20 times otherwise.

    Args:
        model: The model; its weights take no gradients.
    """
    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            layer.__dict__["forward"] = functools.partial(_linear, layer)


def _linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_autocast_enabled("cpu") or layer.weight.requires_grad:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    dtype = torch.get_autocast_dtype("cpu")
    bias = None if layer.bias is None else cast_once(layer.bias, dtype)
    return torch.nn.functional.linear(x.to(dtype), cast_once(layer.weight, dtype), bias)
