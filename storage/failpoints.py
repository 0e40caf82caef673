"""Named points in the code where a fault test may kill or stop the process; without effect in normal runs.

`PERENNIAL_FAILPOINT=publish.manifest:3` kills the process (SIGKILL) the third time it reaches the failpoint
`publish.manifest`; `publish.manifest:3:stop` sends SIGSTOP instead, so that a test can resume the process later.
`PERENNIAL_FAILPOINT=@FILE` reads the same text from a file at each failpoint, so that a test can set one in a process
that already runs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

_reached: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Kill or stop this process where PERENNIAL_FAILPOINT names this point and its count is reached.

    Args:
        name: Name of the point: the role or part, a dot, and the step before or after which the point stands.
    """
    setting = os.environ.get("PERENNIAL_FAILPOINT")
    if not setting:
        return
    if setting.startswith("@"):
        path, setting = Path(setting[1:]), ""
        with suppress(OSError):
            setting = path.read_text("utf-8").strip()
    wanted, _, rest = setting.partition(":")
    if wanted != name:
        return
    count, _, action = rest.partition(":")
    _reached[setting] += 1
    if _reached[setting] == int(count or 1):
        # os.kill would not do: another thread may take the SIGSTOP, and this thread would run on for a while, perhaps
        # into the next lock.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)
