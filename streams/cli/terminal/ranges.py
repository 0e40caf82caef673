"""Limits of the numbers that options take; beyond them Python's clocks, sleeps and queues raise errors of their own."""

from __future__ import annotations

import math
from typing import Final

import typer

MAX_SECONDS: Final = 31_536_000.0
"""A year."""
MAX_ROWS: Final = 1_000_000_000


def number(value: float) -> float:
    """Refuse NaN, which passes every comparison with a limit.

    Raises:
        BadParameter: The value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number")
    return value
