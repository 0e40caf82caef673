"""How parallel runs (`pytest -n 4 --dist loadscope`) share the tests out: the longest first, shared fixtures together.

Groups made with `pytest.mark.xdist_group` cannot be used: pytest 9.2 ignores the node id through which pytest-xdist 3.8
passes them on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

PER_TEST = ("tests/faults/", "tests/integration/")
"""Folders whose tests are given to workers one by one; elsewhere a module is one unit, with its fixtures."""
PER_MODULE = ("tests/faults/test_outage.py", "tests/faults/test_flow_faults.py", "tests/integration/test_wheel.py")
"""Modules in those folders that stay together, because their tests share a fixture that takes long to set up."""


def expected_s(item: pytest.Item) -> float:
    """Return about how many seconds a test takes: the argument of its mark `slow`, 0 without the mark.

    In a module of `PER_MODULE` the mark tells how long the whole module takes.
    """
    mark = item.get_closest_marker("slow")
    return float(mark.args[0]) if mark is not None and mark.args else 0.0


def longest_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Sort tests by their expected time; equal ones keep their order. `LongestFirst` takes them from both ends."""
    return sorted(items, key=expected_s, reverse=True)


class LongestFirst(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist does not export it with types
    """Gives a worker one of the longest units that are left, and the shortest ones to wait behind it.

    A worker is given its next units while it still runs one. Were these long as well, they would wait behind the first
    while other workers are idle.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        self._long_units: dict[WorkerController, dict[str, bool]] = {}

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return nodeid if module.startswith(PER_TEST) and module not in PER_MODULE else module

    def _assign_work_unit(self, node: WorkerController) -> None:
        if all(self._long_units.get(node, {}).values()):  # every test of it is complete
            self._long_units[node] = next(iter(self.workqueue.values()))
        else:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)
