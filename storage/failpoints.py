"""Places where a fault test may end or stop the process, if PERENNIAL_FAILPOINT names one.

`PERENNIAL_FAILPOINT=learner.manifest:3` kills the process (SIGKILL) the third time it comes past
`learner.manifest`; `learner.manifest:3:stop` sends SIGSTOP instead, so that a test can resume it later.
`PERENNIAL_FAILPOINT=@FILE` reads the same from a file each time, so that a process that runs can be armed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Come past the named place."""
    wanted = os.environ.get("PERENNIAL_FAILPOINT")
    if not wanted:
        return
    if wanted.startswith("@"):
        path, wanted = Path(wanted[1:]), ""
        with suppress(OSError):
            wanted = path.read_text("utf-8").strip()
    place, _, rest = wanted.partition(":")
    if place != name:
        return
    count, _, action = rest.partition(":")
    _passed[wanted] += 1
    if _passed[wanted] == int(count or 1):
        # Not os.kill: another thread may take a SIGSTOP, and this one runs on for a while, into the next lock perhaps.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)
