"""Check that the numbers in safetensors bytes are finite, without a tensor library.

A tensor with NaN in one adapter makes a serving engine answer NaN for other adapters too, because masked attention over
a recycled block of its cache computes 0 x NaN (vLLM pull request 50283). Engines load such weights without an error.
"""

from __future__ import annotations

import json
import struct

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.safetensors_check import check_safetensors

_CHUNK_BYTES = 1 << 20
# By dtype: bytes per number; then, from the last byte of the number backwards, a mask and the bits under it that all
# NaN and infinite numbers have, and only they: the exponent, all ones (IEEE 754, section 3.4). Little-endian.
_EXPONENTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "F64": (8, (0x7F, 0xF0)),
    "F32": (4, (0x7F, 0x80)),
    "BF16": (2, (0x7F, 0x80)),
    "F16": (2, (0x7C,)),
}
_FLAGS = {mask: bytes(byte & mask == mask for byte in range(256)) for mask in (0x7F, 0xF0, 0x80, 0x7C)}


def check_finite(data: bytes) -> None:
    """Check that the bytes are safetensors in which every floating point number is finite.

    Integers are always finite. Numbers of 8 bits (F8_E4M3, F8_E5M2) are refused: LoRA weights never have them.

    Raises:
        IntegrityError: A number is NaN or infinite, has 8 bits, or the bytes are not safetensors.
    """
    check_safetensors(data)
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    body = memoryview(data)[8 + header_bytes :]
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, (start, stop) = entry["dtype"], entry["data_offsets"]
        if dtype.startswith("F8"):
            raise IntegrityError(
                f"tensor {name[:100]!r} has numbers of 8 bits", got=dtype, allowed=", ".join(_EXPONENTS),
                remedy="publish the weights in one of these formats",
            )  # fmt: skip
        if dtype in _EXPONENTS and not _is_finite(body[start:stop], dtype):
            raise IntegrityError(
                f"tensor {name[:100]!r} has numbers that are NaN or infinite", got=f"{stop - start} bytes of {dtype}",
                allowed="finite numbers",
                remedy="make an earlier version live: `perennial adapters rollback ADAPTER`",
            )  # fmt: skip


def _is_finite(numbers: memoryview, dtype: str) -> bool:
    """Return whether no number has an exponent of ones alone.

    Strided slices, `translate` and the `&` of large integers run in C: a gigabyte takes seconds, not minutes.
    """
    item_bytes, masks = _EXPONENTS[dtype]
    for begin in range(0, len(numbers), _CHUNK_BYTES):  # a multiple of every item size
        chunk = bytes(numbers[begin : begin + _CHUNK_BYTES])
        suspects = -1
        for place, mask in enumerate(masks, start=1):
            flags = chunk[item_bytes - place :: item_bytes].translate(_FLAGS[mask])
            suspects &= int.from_bytes(flags, "little")
        if suspects:
            return False
    return True
