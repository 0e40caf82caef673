"""`record_fault`: a test says what its fault did; `python -m tests.faults` prints the table."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.faults.report import Row, to_property

RUNS = int(os.environ.get("PERENNIAL_FAULT_RUNS", "2"))


@pytest.fixture
def fault_runs() -> int:
    """How often each failpoint is hit: 2, or what PERENNIAL_FAULT_RUNS says."""
    return RUNS


@pytest.fixture
def record_fault(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Put a row into the table. Call it before the assertions, so that a failure is in the table too."""
    return lambda row: request.node.user_properties.append(to_property(row))
