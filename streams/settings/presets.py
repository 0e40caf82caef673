"""Presets: defaults of settings by the size of the base, kept as data in presets.toml.

All roles take the same preset from the name of the base, also those that never load it. The number of parameters is
known for the named bases, is added up from the headers of a folder's weights, is estimated from the size of a GGUF
file, and is otherwise read out of the name ("SmolLM2-135M", "Llama-3.1-8B").
"""

from __future__ import annotations

import json
import re
import struct
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Final

from perennial.streams.paths import expand_path

NAMED_BASES: Final[Mapping[str, int]] = {"shipped": 3_225_344, "smollm2": 134_515_008}
"""Number of parameters of the bases that have a name of their own."""
_MAX_HEADER_BYTES: Final = 100 << 20
_BITS_PER_WEIGHT: Final = 5
"""Roughly what a quantised weight of a GGUF file takes; it only has to find the right preset."""
_SIZE_IN_NAME: Final = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([MB])(?![A-Za-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Preset:
    """Settings for bases of a size.

    Attributes:
        name: Short name.
        max_parameters: Largest number of parameters of a base that the preset is for.
        source: Where the values come from.
        values: Settings by their flat names.
    """

    name: str
    max_parameters: int
    source: str
    values: Mapping[str, Any]


@lru_cache(maxsize=1)
def presets() -> tuple[Preset, ...]:
    """Return all presets, the one for the smallest bases first."""
    data = tomllib.loads((Path(__file__).parent / "presets.toml").read_text("utf-8"))
    return tuple(Preset(**entry) for entry in data["preset"])


def preset_settings() -> frozenset[str]:
    """Return the flat names of all settings that some preset has a value for."""
    return frozenset(name for preset in presets() for name in preset.values)


def preset_of(base: str) -> Preset | None:
    """Return the preset for a base; None where its size cannot be told."""
    parameters = parameters_of(base)
    if parameters is None:
        return None
    return next(preset for preset in presets() if parameters <= preset.max_parameters)


def parameters_of(base: str) -> int | None:
    """Return the number of parameters of a base, an estimate for a GGUF file; None where it cannot be told.

    Args:
        base: Name of the base, as PERENNIAL_BASE has it.
    """
    if base in NAMED_BASES:
        return NAMED_BASES[base]
    path = expand_path(base)
    try:
        if base and path.is_dir():
            return sum(_parameters_in(file) for file in path.glob("*.safetensors")) or None
        if base.lower().endswith(".gguf") and path.is_file():
            return path.stat().st_size * 8 // _BITS_PER_WEIGHT
    except (OSError, ValueError, struct.error, AttributeError, TypeError):  # whoever loads the base says what is wrong
        return None
    found = _SIZE_IN_NAME.findall(base.partition("@")[0])
    return int(float(found[-1][0]) * {"M": 1e6, "B": 1e9}[found[-1][1].upper()]) if found else None


def _parameters_in(file: Path) -> int:
    """Return the number of weights that the header of a safetensors file lists."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        if size > _MAX_HEADER_BYTES:
            return 0
        header = json.loads(opened.read(size))
    return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
