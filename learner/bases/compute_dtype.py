"""The number format that forward and backward passes compute in.

The weights of a base on a CPU are always kept in fp32, and so are those of an adapter. With bf16, matrix products of
training and of measurements take inputs that are rounded to bf16 (PyTorch's autocast), so both formats run on one
copy of the weights, and a version is rebuilt in the format that its manifest records.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from perennial.learner.bases.base_model_error import BaseModelError

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Number formats by their names in settings and manifests."""
AUTO: Final = "auto"
BF16_PARAMETERS: Final = 50_000_000
"""Least size of a base for which bf16 was measured to be faster on CPUs: the shipped base is slower, SmolLM2 faster."""
_CPU_INFO: Final = Path("/proc/cpuinfo")
_BF16_FLAGS: Final = frozenset({"amx_bf16", "avx512_bf16"})
"""Units for products of bf16 matrices. With those of AVX-512 a core of an AMD EPYC (Zen 4) made 200 billion operations a
second, and 95 in fp32."""


def choose_dtype(wanted: str, device: torch.device, parameters: int) -> torch.dtype:
    """Return the number format to compute in.

    Args:
        wanted: `fp32`, `bf16`, or `auto`: bf16 on a GPU, and on a CPU that has units for products of bf16 matrices where
            the base is large enough to gain by it.
        device: Device of the base.
        parameters: Number of parameters of the base.

    Raises:
        BaseModelError: There is no such format.
    """
    if wanted in DTYPES:
        return DTYPES[wanted]
    if wanted != AUTO:
        raise BaseModelError(
            "Unknown number format", got=wanted, allowed=", ".join((AUTO, *DTYPES)), remedy=f"set it to {AUTO}"
        )
    if device.type == "cuda" or (parameters >= BF16_PARAMETERS and cpu_has_bf16_units()):
        return torch.bfloat16
    return torch.float32


def cpu_has_bf16_units(cpu_info: Path = _CPU_INFO) -> bool:
    """Return whether this CPU says that it has units for bf16, of AMX or AVX-512; False where it cannot be told."""
    try:
        lines = cpu_info.read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    return any(line.startswith("flags") and not _BF16_FLAGS.isdisjoint(line.split()) for line in lines)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a number format in settings and manifests."""
    return next(name for name, known in DTYPES.items() if known == dtype)
