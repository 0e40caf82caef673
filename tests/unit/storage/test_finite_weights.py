"""Weights with NaN or infinite numbers are found in every format, and no finite number is taken for one."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.finite_weights import _CHUNK_BYTES, check_finite

FORMATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def weights(*tensors: tuple[str, bytes, int]) -> bytes:
    header: dict[str, object] = {}
    end = 0
    for number, (dtype, data, item_bytes) in enumerate(tensors):
        header[f"tensor.{number}"] = {
            "dtype": dtype, "shape": [len(data) // item_bytes], "data_offsets": [end, end + len(data)],
        }  # fmt: skip
        end += len(data)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(data for _, data, _ in tensors)


def is_accepted(data: bytes) -> bool:
    try:
        check_finite(data)
    except IntegrityError as error:
        return "NaN or infinite" not in str(error)
    return True


@given(st.binary(max_size=64), st.sampled_from(sorted(FORMATS)))
def test_any_bits_are_judged_as_numpy_judges_them(data: bytes, dtype: str):
    item_bytes = np.dtype(FORMATS[dtype]).itemsize
    data = data[: len(data) // item_bytes * item_bytes]
    finite = bool(np.isfinite(np.frombuffer(data, FORMATS[dtype])).all())
    assert is_accepted(weights((dtype, data, item_bytes))) == finite


def test_every_bf16_number_is_judged_as_the_fp32_number_with_its_bits():
    bits = np.arange(1 << 16, dtype=np.uint32)
    finite = np.isfinite((bits << 16).view(np.float32))
    pairs = zip(bits.tolist(), finite.tolist(), strict=True)
    wrong = [one for one, good in pairs if is_accepted(weights(("BF16", struct.pack("<H", one), 2))) != good]
    assert wrong == []


@pytest.mark.parametrize("place", [0, 1, _CHUNK_BYTES // 4 - 1, _CHUNK_BYTES // 4, 3 * _CHUNK_BYTES // 4 + 5])
def test_one_nan_among_many_numbers_is_found_wherever_it_is(place: int):
    numbers = np.ones(_CHUNK_BYTES, np.float32)
    assert is_accepted(weights(("F16", b"\0\0", 2), ("F32", numbers.tobytes(), 4)))
    numbers[place] = np.nan
    with pytest.raises(IntegrityError, match=r"tensor 'tensor\.1'"):
        check_finite(weights(("F16", b"\0\0", 2), ("F32", numbers.tobytes(), 4)))


def test_integers_are_finite_and_numbers_of_8_bits_are_refused():
    assert is_accepted(weights(("I32", b"\xff" * 8, 4), ("U8", b"\xff", 1)))
    with pytest.raises(IntegrityError, match="8 bits"):
        check_finite(weights(("F8_E4M3", b"\x00", 1)))


def test_what_is_no_safetensors_file_is_refused():
    with pytest.raises(IntegrityError, match="safetensors"):
        check_finite(b"\x80\x04 pickle")
