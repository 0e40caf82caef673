"""Check the structure of safetensors bytes before anything reads tensors from them.

`safetensors.deserialize` makes the same checks, but it belongs to the learner's dependencies: the storage folder is part
of the plain install, whose processes publish and read manifests without any tensor library.
"""

from __future__ import annotations

import struct

import orjson

from perennial.storage.errors import IntegrityError

MAX_HEADER_BYTES = 16 << 20
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


def check_safetensors(data: bytes) -> None:
    """Check that the bytes are safetensors whose tensors fill the file without gap or overlap.

    The format is 8 bytes of little-endian header length, a JSON header, and the data (section "Format" of the
    safetensors README).

    Raises:
        IntegrityError: they are not.
    """
    if len(data) < 8:
        raise _refused("shorter than its own length field")
    (header_bytes,) = struct.unpack_from("<Q", data)
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise _refused(f"header of {header_bytes} bytes in {len(data)}")
    try:
        header = orjson.loads(data[8 : 8 + header_bytes])
    except orjson.JSONDecodeError as error:
        raise _refused("its header is not JSON") from error
    if not isinstance(header, dict):
        raise _refused("its header is not an object")
    header.pop("__metadata__", None)
    spans = sorted(_span(name, entry) for name, entry in header.items())
    end = 0
    for start, stop in spans:
        if start != end:
            raise _refused("its tensors overlap or leave gaps")
        end = stop
    if end != len(data) - 8 - header_bytes:
        raise _refused("its tensors do not fill it")


def _span(name: str, entry: object) -> tuple[int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if (
            dtype in _ITEM_BITS and all(type(size) is int and size >= 0 for size in shape)
        ):
            items = 1
            for size in shape:
                items *= size
            if 0 <= start <= stop and (stop - start) * 8 == items * _ITEM_BITS[dtype]:
                return start, stop
    raise _refused(f"the header's entry for tensor {name[:100]!r} is invalid")


def _refused(why: str) -> IntegrityError:
    return IntegrityError(
        f"weights and optimizer state must be safetensors: {why}",
        allowed="safetensors",
        remedy="write them with safetensors; no other format is ever loaded",
    )
