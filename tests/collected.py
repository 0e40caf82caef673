"""Collect what tests record with `record_property`, also those that ran in other processes of pytest-xdist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest

T = TypeVar("T")


class Collector(Generic[T]):
    """A pytest plugin that collects one property of all tests.

    Args:
        name: Name of the property.
        make: Makes a record of the property's fields.

    Attributes:
        found: The records, in the order in which tests ended.
    """

    def __init__(self, name: str, make: Callable[..., T]) -> None:
        self._name = name
        self._make = make
        self.found: list[T] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """See pytest's hook."""
        if report.when != "teardown":
            return
        properties: list[tuple[str, Any]] = report.user_properties
        self.found += [self._make(**fields) for name, fields in properties if name == self._name]
