"""Make a LoRA adapter that changes nothing, with the shapes of another one."""

from __future__ import annotations

import struct

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
