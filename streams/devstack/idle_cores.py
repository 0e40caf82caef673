"""Let the threads of torch's operations wait for each other by spinning, where nothing else needs the cores."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

_SPIN_COUNT: Final = "GOMP_SPINCOUNT"
_CPU_TIMES: Final = Path("/proc/stat")
_IDLE_FIELDS: Final = (3, 4)  # idle and iowait, see proc_stat(5)
_LOOK_S: Final = 0.5
SPINS: Final = 20_000
"""About as long as the pause between two operations of a training step."""
MAX_BUSY_SHARE: Final = 0.3
"""Largest share of the processor time that others may use for the cores to count as idle."""


def spin_on_idle_cores(environ: MutableMapping[str, str], busy_share: float) -> None:
    """Set how OpenMP's threads wait, for this process before it loads torch and for those that it starts.

    A training step consists of thousands of small operations, and waking a thread takes as long as many of them. On two
    idle cores threads that spin for a moment train 1.8 times as fast as threads that sleep; next to a program that keeps
    one core busy they take 3.4 times as long (docs/experiments/README.md). So this is for a command of minutes that
    begins on an idle machine, and not for a service.

    Args:
        environ: The environment to change; a value that a user has set stays.
        busy_share: Share of the processor time that is used, 0 to 1.
    """
    if busy_share <= MAX_BUSY_SHARE:
        environ.setdefault(_SPIN_COUNT, str(SPINS))  # libgomp heeds it before OMP_WAIT_POLICY


def busy_share() -> float:
    """Return the share of the processor time that all programs use during half a second; 1 where nobody can tell."""
    before = _cpu_times()
    time.sleep(_LOOK_S)
    used, idle = (after - earlier for after, earlier in zip(_cpu_times(), before, strict=True))
    return used / (used + idle) if used + idle > 0 else 1.0


def _cpu_times() -> tuple[int, int]:
    """Return the used and the idle time of all cores since the start of the machine, in ticks."""
    try:
        with _CPU_TIMES.open() as file:
            ticks = [int(field) for field in file.readline().split()[1:]]
    except (OSError, ValueError):
        return 0, 0
    idle = sum(ticks[field] for field in _IDLE_FIELDS)
    return sum(ticks) - idle, idle


def spin_if_idle() -> None:
    """Let threads spin in this process and those that it starts if the machine is idle now."""
    spin_on_idle_cores(os.environ, busy_share())
