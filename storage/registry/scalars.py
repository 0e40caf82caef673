"""Types of the values in a manifest's open dictionaries (recipe and gate figures): what JSON stores without loss."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

_INT64 = range(-(2**63), 2**63)

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=4096)]


def _check_int64(value: object) -> object:
    # pydantic would quietly take an integer too large for JSON readers as a float
    if isinstance(value, int) and value not in _INT64:
        raise ValueError("integers have at most 64 bits")
    return value


Scalar = Annotated[bool | Int64 | Finite | Text | None, BeforeValidator(_check_int64)]
"""Any JSON scalar; numbers are finite and integers have at most 64 bits."""
Number = Annotated[
    Annotated[Int64, Field(strict=True)] | Annotated[Finite, Field(strict=True)], BeforeValidator(_check_int64)
]
"""A finite number that keeps its JSON form: 3 stays 3, and 3.0 stays 3.0."""
Later = Scalar | list[Scalar] | dict[str, Scalar]
"""What a field of a later release may hold for this one to keep it: nothing deeper, because it comes from outside."""
