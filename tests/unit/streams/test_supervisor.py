"""Who falls over is started again: at once after a long life, later and later after short ones."""

from __future__ import annotations

import sys

from perennial.streams.devstack.supervisor import Supervisor
from perennial.streams.settings import Settings


def test_a_role_waits_longer_after_each_short_life_and_not_after_a_long_one(tmp_path):
    now = 1000.0
    supervisor = Supervisor(Settings.of(env_file=None), tmp_path, ("intake",), clock=lambda: now)
    role = supervisor.children["intake"]
    role.command = [sys.executable, "-S", "-c", ""]
    supervisor.start()

    def down_s(lives_s: float) -> float:
        """Let it live so long; how long it is down then."""
        nonlocal now
        before = role.process
        before.wait(30)
        now += lives_s
        supervisor.tend()
        died = now
        while role.process is before:
            now += 0.25
            supervisor.tend()
        return now - died

    assert [down_s(lives_s) for lives_s in (1, 1, 1, 1, 1, 1)] == [0.5, 1, 2, 5, 10, 10]
    assert [down_s(lives_s) for lives_s in (60, 1, 1)] == [0.5, 1, 2]
    role.process.wait(30)
