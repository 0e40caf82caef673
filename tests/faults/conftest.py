"""Fixtures with which a test records its fault; `python -m tests.faults` prints the table."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.faults.report import Row, to_property

RUNS = int(os.environ.get("PERENNIAL_FAULT_RUNS", "1"))


@pytest.fixture
def fault_runs() -> int:
    """Return how often each failpoint is hit: 1, or PERENNIAL_FAULT_RUNS."""
    return RUNS


@pytest.fixture
def record_fault(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Return a function that adds a row to the table. Call it before the assertions, so that failures are in it too."""
    return lambda row: request.node.user_properties.append(to_property(row))
