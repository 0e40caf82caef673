"""A wall clock that is set back: waiting examples are cut at their age all the same.

That a wrong clock makes nothing expire early is tested with retention's clock.
"""

from __future__ import annotations

import time

import pytest

from tests.faults import parts
from tests.faults.report import Row
from tests.integration.streams import test_curate as curating

bench = curating.bench

SET_BACK = """
import time, types
from pathlib import Path
from perennial.streams.curate import agent
def time_ns():
    return time.time_ns() - 3600 * 10**9 * Path({flag!r}).exists()
agent.time = types.SimpleNamespace(time_ns=time_ns, monotonic_ns=time.monotonic_ns)
"""


@pytest.mark.slow(20)
def test_a_clock_set_back_an_hour_keeps_nothing_waiting(bench, tmp_path, record_fault):
    flag = tmp_path / "back"
    with parts.child("streams", bench.settings, more=SET_BACK.format(flag=str(flag))):
        bench.publish(curating.scored(n) for n in range(5))
        bench.wait(lambda: bench.learned().total() >= 5)
        bench.publish(curating.scored(n) for n in range(5, 10))
        time.sleep(1)  # long enough to arrive, too short to be cut by age
        flag.touch()
        began = time.monotonic()
        deadline = began + 120
        while bench.learned().total() < 10 and time.monotonic() < deadline:
            time.sleep(0.2)
        recovery_s = time.monotonic() - began
    learned = bench.learned()
    twice = sum(count > 1 for count in learned.values())
    record_fault(Row("clock set back an hour", 1, lost=10 - len(learned), learned_twice=twice, recovery_s=recovery_s))
    assert (len(learned), twice) == (10, 0)
