"""Make LoRA adapters that change nothing, with the shapes of another one."""

from __future__ import annotations

import json
import struct
from typing import Any

from perennial.storage.objects.safetensors_check import check_safetensors


def zero_weights(weights: bytes) -> bytes:
    """Return safetensors with the same tensors, all zero. With B = 0 an adapter answers exactly as the base.

    Args:
        weights: The LoRA weights of a version, a safetensors file.

    Raises:
        IntegrityError: They are not safetensors.
    """
    check_safetensors(weights)
    (header_bytes,) = struct.unpack_from("<Q", weights)
    return weights[: 8 + header_bytes] + bytes(len(weights) - 8 - header_bytes)


def smallest_zero_weights(weights: bytes) -> bytes:
    """Return safetensors with the smallest pair of A and B alone, all zero.

    An engine that counts adapters, and not their bytes, loads it in place of a whole one in a fraction of the time.

    Args:
        weights: The LoRA weights of a version, a safetensors file with the tensor names of a PEFT adapter file.

    Raises:
        IntegrityError: They are not safetensors.
    """
    check_safetensors(weights)
    (header_bytes,) = struct.unpack_from("<Q", weights)
    header = json.loads(weights[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for name, tensor in sorted(header.items()):
        pairs.setdefault(name.split(".lora_")[0], {})[name] = tensor
    smallest = min(pairs.values(), key=lambda pair: sum(_size_bytes(tensor) for tensor in pair.values()), default={})
    end = 0
    for name, tensor in smallest.items():
        begin, end = end, end + _size_bytes(tensor)
        smallest[name] = {**tensor, "data_offsets": [begin, end]}
    content = json.dumps(smallest).encode()
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content + bytes(end)


def _size_bytes(tensor: dict[str, Any]) -> int:
    begin, end = tensor["data_offsets"]
    return int(end) - int(begin)
