"""Limits of the numbers that options take; beyond them Python's clocks, sleeps and queues raise errors of their own."""

from __future__ import annotations

import math
from typing import Any, Final

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


def seconds_option(text: str) -> Any:
    """Return an option that takes seconds, from 0 to a year.

    Args:
        text: Its help.
    """
    return typer.Option(min=0, max=MAX_SECONDS, callback=number, help=text)


def tcp_port(value: int | None) -> int | None:
    """Refuse a number that is no TCP port. A callback, for `min` and `max` would widen the help over 80 columns.

    Raises:
        BadParameter: The number is no port.
    """
    if value is not None and not 0 < value < 65536:
        raise typer.BadParameter(f"{value} is not in the range 1<=x<=65535")
    return value


def rate_of(value: float) -> float:
    """Refuse a rate at which the pause between two records has no end.

    Raises:
        BadParameter: The rate is too low, and not 0.
    """
    if 0 < number(value) < 0.001:
        raise typer.BadParameter(f"{value} is neither 0 nor at least 0.001")
    return value
