"""Headers of safetensors that somebody made to cost time or memory, or to be read in two ways."""

from __future__ import annotations

import json
import struct

import pytest

from perennial.learner.model.lora import load_tensors
from perennial.storage.errors import IntegrityError
from perennial.storage.objects import safetensors_check
from perennial.storage.objects.safetensors_check import (
    MAX_DIMENSIONS,
    MAX_ENTRY_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    check_safetensors,
)


def framed(header: bytes | dict[str, object], body: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def entry(start: int, stop: int, *shape: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


class Counted(int):
    """An integer that records the size of every product that it takes part in."""

    products: list[int]

    def __rmul__(self, other: int) -> int:
        product = int(other) * int(self)
        Counted.products.append(product.bit_length())
        return product


def test_attack_s_header_bomb() -> None:
    """A header of dimensions without end was multiplied into one integer: 1.6 MB took 23 s, 16 MB about 40 minutes."""
    for dimensions in (MAX_DIMENSIONS + 1, 200_000):
        bomb = framed({"a": entry(0, 4, *[2**62] * dimensions)}, b"1234")
        for read in (check_safetensors, load_tensors):
            with pytest.raises(IntegrityError, match=r"invalid|more lists or values|bytes for"):
                read(bomb)
    few = framed({"a": entry(0, 4, *[10**4000] * 2)}, b"1234")
    with pytest.raises(IntegrityError, match="bytes for"):
        check_safetensors(few)


def test_attack_s_no_product_grows_beyond_the_file() -> None:
    Counted.products = []
    assert safetensors_check._items([Counted(2**20)] * 100_000, 1 << 30) is None
    assert Counted.products == [21, 41]
    Counted.products = []
    assert safetensors_check._items([Counted(10**4000)] * 100_000, 1 << 30) is None
    assert Counted.products == []
    assert safetensors_check._items([3, 4], 12) == 12
    assert safetensors_check._items([3, 5], 12) is None
    assert safetensors_check._items([10**4000, 0], 12) == 0
    assert safetensors_check._items([], 12) == 1


@pytest.mark.parametrize(
    ("header", "body"),
    [
        # keys that come twice: readers take the first or the last
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}', 4),
        (b'{"a":{"dtype":"F32","dt\\u0079pe":"I32","shape":[1],"data_offsets":[0,4]}}', 4),
        (b'{"__metadata__":{"a":"1","a":"2"}}', 0),
        (b'{"__metadata__":{},"__metadata__":{}}', 0),
        # more than the three members, fewer, or others
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}', 4),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}', 4),
        (b'{"a":{"dtype":"F32","shape":{"0":1},"data_offsets":[0,4]}}', 4),
        (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', 4),
        (b'{"__metadata__":{"a":1}}', 0), (b'{"__metadata__":[]}', 0), (b'{"__metadata__":null}', 0),
        # numbers that are no sizes
        (b'{"a":{"dtype":"BOOL","shape":[1],"data_offsets":[false,true]}}', 1),
        (b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', 4),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4),
        (b'{"a":{"dtype":"F32","shape":[1e1],"data_offsets":[0,40]}}', 40),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,-4]}}', 4),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', 4),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 4),
        # types that nobody writes
        (b'{"a":{"dtype":"F128","shape":[1],"data_offsets":[0,16]}}', 16),
        (b'{"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}}', 4),
        # overlap and gap
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8),
        # nesting, and text that is no UTF-8 JSON
        (b'{"a":' + b"[" * 2 + b"]" * 2 + b"}", 0), (b"[" * 100_000 + b"]" * 100_000, 0),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0), (b"{" + b'"' * 100_001, 0), (b'{"\xff":1}', 0),
        ('{"a":1}'.encode("utf-16"), 0), (b"", 0), (b"null", 0), (b'"a"', 0),
    ],
)  # fmt: skip
def test_attack_s_headers_that_readers_disagree_about_are_refused(header: bytes, body: int) -> None:
    for read in (check_safetensors, load_tensors):
        with pytest.raises(IntegrityError):
            read(framed(header, bytes(body)))


def test_attack_s_a_header_has_bounded_size_and_content() -> None:
    """Each bound is judged before the JSON is parsed, whose objects take twenty times as much memory."""
    lists = b'{"a":[' + b",".join([b"[]"] * 5000) + b"]}"
    values = b'{"a":[' + b",".join([b"1"] * 50) + b"]}"
    objects = b'{"a":[' + b",".join([b"{}"] * (MAX_TENSORS + 3)) + b"]}"
    for header, why in (
        (lists, "bytes for"), (lists[:1000], "more lists"), (values, "more lists or values"),
        (objects, "entries"), (b"{" + b" " * MAX_ENTRY_BYTES + b"}", "bytes for"),
    ):  # fmt: skip
        with pytest.raises(IntegrityError, match=why):
            check_safetensors(framed(header))
    with pytest.raises(IntegrityError, match="header of"):
        check_safetensors(framed(b"{" + b" " * MAX_HEADER_BYTES))


def test_every_real_header_fits_the_bounds() -> None:
    """A mixture of experts has long names and many of them."""
    name = "exp_avg_sq.base_model.model.model.layers.{}.block_sparse_moe.experts.{}.gate_up_proj.lora_{}.weight"
    names = [name.format(layer, expert, side) for layer in range(48) for expert in range(128) for side in "AB"]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    header |= {name: entry(4 * index, 4 * index + 4, 1, 1) for index, name in enumerate(names)}
    check_safetensors(framed(header, bytes(4 * len(names))))
    check_safetensors(framed({"a": entry(0, 4, *[1] * MAX_DIMENSIONS)}, bytes(4)))
    check_safetensors(framed({"a": entry(0, 0, 0, 5), "b": entry(0, 4), "c": entry(4, 4, 0)}, bytes(4)))
    check_safetensors(framed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}   ', bytes(4)))
