"""Check the structure of safetensors bytes before anything reads tensors from them.

`safetensors.deserialize` makes the same checks, but it belongs to the learner's dependencies: the storage folder is part
of the plain install, whose processes publish and read manifests without any tensor library.

The header may come from somebody who means harm. Everything about it is bounded, so that neither the time nor the memory
of a check grows faster than the number of bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from perennial.storage.errors import IntegrityError

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 17
"""An optimizer state of a LoRA on a model with 128 experts in 48 layers has 111,000 tensors."""
MAX_DIMENSIONS = 8
MAX_ENTRY_BYTES = 1024
"""Most bytes of the header per tensor; the names in a PEFT adapter file take about 100."""
_METADATA = "__metadata__"
_MAX_COMMAS = MAX_DIMENSIONS + 4
"""Most commas of one entry: between its dimensions, its offsets, its three members, and itself and the next."""
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


def check_safetensors(data: bytes) -> None:
    """Check that the bytes are safetensors whose tensors fill the file without gap or overlap.

    The format is 8 bytes of little-endian header length, a JSON header, and the data (section "Format" of the
    safetensors README). Stricter than the format: no key may come twice, an entry has no other members than dtype,
    shape and data_offsets, a shape has at most `MAX_DIMENSIONS` dimensions, and names hold no brackets.

    Raises:
        IntegrityError: The bytes are not safetensors.
    """
    _checked_header(data)


def safetensors_shapes(data: bytes) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by name.

    Raises:
        IntegrityError: The bytes are not safetensors.
    """
    return {name: tuple(entry["shape"]) for name, entry in _checked_header(data).items()}


def _checked_header(data: bytes) -> dict[str, Any]:
    """Return the header without its metadata, once it and the data passed all checks."""
    if len(data) < 8:
        raise _refused("shorter than its own length field")
    (header_bytes,) = struct.unpack_from("<Q", data)
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise _refused(f"header of {header_bytes} bytes in {len(data)}")
    header = _parsed(data[8 : 8 + header_bytes])
    body_bytes = len(data) - 8 - header_bytes
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refused("its metadata is not an object of strings")
    spans = sorted(_span(name, entry, body_bytes) for name, entry in header.items())
    end = 0
    for start, stop in spans:
        if start != end:
            raise _refused("its tensors overlap or leave gaps")
        end = stop
    if end != body_bytes:
        raise _refused("its tensors do not fill it")
    return header


def _parsed(header: bytes) -> dict[str, object]:
    """Return the header's JSON object, after its size was judged by the characters that JSON is built from."""
    # Hazard: a list takes 2 bytes of JSON and 56 of memory. Counting bytes costs nothing; a name that holds one of
    # these characters is counted too, so a header of odd names may be refused.
    objects = header.count(b"{")
    if objects > MAX_TENSORS + 2:
        raise _refused(f"its header has {objects} entries, and at most {MAX_TENSORS} are read")
    if len(header) > MAX_ENTRY_BYTES * max(1, objects):
        raise _refused(f"its header has {len(header)} bytes for {objects} entries")
    if header.count(b"[") > 2 * objects or header.count(b",") > _MAX_COMMAS * max(1, objects):
        raise _refused("its header has more lists or values than its entries need")
    try:
        parsed = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise _refused("its header is nested too deep") from error
    except ValueError as error:  # not JSON, not UTF-8, a key that comes twice, or a number of thousands of digits
        raise _refused(f"its header is not JSON: {str(error)[:100]}") from error
    if not isinstance(parsed, dict):
        raise _refused("its header is not an object")
    return parsed


def _without_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Return the pairs as a dictionary. Raise ValueError where a key comes twice: readers differ in which one counts."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key comes twice")
    return members


def _span(name: str, entry: object, body_bytes: int) -> tuple[int, int]:
    """Return where in the data a tensor starts and stops, in bytes."""
    if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if isinstance(dtype, str) and dtype in _ITEM_BITS and _are_sizes(shape) and _are_sizes(offsets):
            items = _items(shape, body_bytes) if len(shape) <= MAX_DIMENSIONS else None
            if items is not None and len(offsets) == 2:
                start, stop = offsets
                if start <= stop <= body_bytes and (stop - start) * 8 == items * _ITEM_BITS[dtype]:
                    return start, stop
    raise _refused(f"the header's entry for tensor {name[:100]!r} is invalid")


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _items(shape: Sequence[int], most: int) -> int | None:
    """Return the number of items of a shape; None for more than `most`, which is found without large products."""
    if 0 in shape:
        return 0
    items = 1
    for size in shape:
        if size > most:
            return None
        items *= size
        if items > most:
            return None
    return items


def _refused(why: str) -> IntegrityError:
    return IntegrityError(
        f"weights and optimizer state must be safetensors: {why}",
        allowed="safetensors",
        remedy="write them with safetensors; no other format is ever loaded",
    )
