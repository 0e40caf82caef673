"""Threads spin on idle cores only, and never against what a user has set."""

from __future__ import annotations

import subprocess
import sys

import pytest

from perennial.streams.devstack import idle_cores
from perennial.streams.devstack.idle_cores import SPINS, busy_share, spin_on_idle_cores


@pytest.mark.parametrize(
    ("environ", "busy", "wanted"),
    [({}, 0.0, str(SPINS)), ({}, 0.3, str(SPINS)), ({}, 0.5, None), ({"GOMP_SPINCOUNT": "0"}, 0.0, "0")],
)
def test_threads_spin_on_idle_cores_only(environ: dict[str, str], busy: float, wanted: str | None) -> None:
    spin_on_idle_cores(environ, busy)
    assert environ.get("GOMP_SPINCOUNT") == wanted


def test_a_busy_core_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            assert 0.0 < busy_share() <= 1.0
        finally:
            other.kill()


def test_where_nobody_can_tell_the_cores_count_as_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_cores, "_cpu_times", lambda: (0, 0))
    assert busy_share() == 1.0
