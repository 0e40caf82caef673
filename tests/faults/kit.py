"""Roles as processes that can be armed while they run, killed and started again within a second or two.

Importing torch and transformers takes ten seconds of a core, so the roles are forked from a server that has done it
(multiprocessing's forkserver). Each is a process of its own that runs what `perennial worker ROLE` runs.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from perennial.streams.devstack.supervisor import ROLES
from perennial.streams.settings import Settings
from tests.faults.parts import SESSION_S

ROOT = Path(__file__).parents[2]
PRELOADED = ("tests.faults.warm",)


def places() -> list[str]:
    """Every failpoint in the source, in the order of the flow."""
    found = [
        name
        for folder in ("streams", "learner", "storage")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in re.findall(r'failpoint\("([a-z_.]+)"\)', path.read_text("utf-8"))
    ]
    return list(dict.fromkeys(found))


def run_role(role: str, environment: Mapping[str, str], log: str) -> None:
    """The body of a role's process: its output to the log, its settings from the environment, until a signal."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    _shorten_sessions()
    from perennial.streams.cli.worker import run_worker

    raise SystemExit(run_worker([role], parent_pid=os.getppid()))


def _shorten_sessions() -> None:
    """The group waits for a killed member until its session ends: here the shortest that a broker grants."""
    from perennial.streams import faust_app as agents
    from perennial.streams.intake import service as intake
    from perennial.streams.kafka import group as transport

    transport.SESSION_TIMEOUT_MS = int(SESSION_S * 1000)
    agents.SESSION_S = SESSION_S
    intake.CONSUMER_CONFIG = {**intake.CONSUMER_CONFIG, "session.timeout.ms": int(SESSION_S * 1000)}


class Crew:
    """All roles, one process each; `arm` names the place where one dies next."""

    def __init__(self, settings: Settings, folder: Path, environment: Mapping[str, str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED])
        self._folder = folder
        self._environment = {**environment, **settings.environment(), "PERENNIAL_METRICS_PORT": "0"}
        self._processes: dict[str, BaseProcess] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *roles: str) -> None:
        """Start these roles, or all."""
        for role in roles or ROLES:
            environment = {**self._environment, "PERENNIAL_FAILPOINT": f"@{self._arms(role)}"}
            process = self._context.Process(target=run_role, args=(role, environment, str(self.log(role))))
            process.start()
            self._processes[role] = process

    def log(self, role: str) -> Path:
        """Where a role's output goes."""
        return self._folder / f"{role}.log"

    def _arms(self, role: str) -> Path:
        return self._folder / f"{role}.failpoint"

    def arm(self, role: str, spec: str) -> None:
        """`place:count`, or nothing."""
        partial = self._folder / f"{role}.partial"
        partial.write_text(spec, "utf-8")
        partial.replace(self._arms(role))

    def died(self, role: str) -> int | None:
        """The exit code of a role that ended; negative: of a signal."""
        return self._processes[role].exitcode

    def signal(self, role: str, number: int) -> None:
        """Send a role a signal."""
        pid = self._processes[role].pid
        if pid is not None and self._processes[role].exitcode is None:
            os.kill(pid, number)

    def tail(self, role: str, lines: int = 30) -> str:
        """The end of a role's output."""
        return "\n".join(self.log(role).read_text("utf-8", "replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End all roles."""
        for role in self._processes:
            self.signal(role, signal.SIGTERM)
        deadline = time.monotonic() + 15
        for process in self._processes.values():
            process.join(max(0.1, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join(10)
