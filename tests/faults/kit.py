"""Roles as processes whose failpoints can be set while they run, and which start again within a second or two.

To import torch and transformers takes ten seconds of a core, so the roles are forked from a server that has imported
them (multiprocessing's forkserver). Each is a process of its own that runs what `perennial worker ROLE` runs.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from perennial.streams.devstack.supervisor import ROLES
from perennial.streams.settings import Settings
from tests.faults.parts import SESSION_S

ROOT = Path(__file__).parents[2]
PRELOADED = ("tests.faults.warm",)
DRAIN_S = 180.0
"""Seconds that a role has to end after SIGTERM."""


def failpoints() -> list[str]:
    """Return every failpoint in the source, in the order of the flow."""
    found = [
        name
        for folder in ("streams", "learner", "storage")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in re.findall(r'failpoint\("([a-z_.]+)"\)', path.read_text("utf-8"))
    ]
    return list(dict.fromkeys(found))


def run_role(role: str, environment: Mapping[str, str], log: str) -> None:
    """Run a role until a signal ends it; the body of its process.

    Args:
        role: Its name.
        environment: Environment variables with its settings.
        log: The file that takes its output.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    _shorten_sessions()
    from perennial.streams.cli.worker import run_worker

    raise SystemExit(run_worker([role], parent_pid=os.getppid()))


def _shorten_sessions() -> None:
    """Shorten the sessions of all consumer groups: a group waits for a killed member until its session ends."""
    from perennial.streams import faust_app
    from perennial.streams.intake import input_consumer
    from perennial.streams.kafka import group

    group.SESSION_TIMEOUT_MS = int(SESSION_S * 1000)
    group.METADATA_AGE_MS = faust_app.METADATA_AGE_MS = 2_000  # type: ignore[misc]  # so that added partitions are seen
    faust_app.SESSION_S = SESSION_S
    shorter = {**input_consumer.CONSUMER_CONFIG, "session.timeout.ms": int(SESSION_S * 1000)}
    input_consumer.CONSUMER_CONFIG = shorter


class Crew:
    """All roles, one process each.

    Args:
        settings: Their settings.
        folder: For their logs.
        environment: More environment variables, such as the store's credentials.

    Attributes:
        restarts: How often `tend` has started a role again.
    """

    def __init__(self, settings: Settings, folder: Path, environment: Mapping[str, str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED])
        self._folder = folder
        self._environment = {**environment, **settings.environment(), "PERENNIAL_METRICS_PORT": "0"}
        self._processes: dict[str, BaseProcess] = {}
        self._held: set[str] = set()
        self.restarts = 0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *roles: str) -> None:
        """Start these roles; all if none is given."""
        for role in roles or ROLES:
            environment = {**self._environment, "PERENNIAL_FAILPOINT": f"@{self._failpoint_file(role)}"}
            process = self._context.Process(target=run_role, args=(role, environment, str(self.log(role))))
            process.start()
            self._processes[role] = process

    def use(self, settings: Settings) -> None:
        """Give other settings to the roles that start from now on."""
        self._environment = {**self._environment, **settings.environment()}

    def tend(self) -> None:
        """Start the roles again that have ended, but none that is held."""
        for role, process in list(self._processes.items()):
            if process.exitcode is not None and role not in self._held:
                self.restarts += 1
                self.start(role)

    @contextmanager
    def held(self, role: str) -> Iterator[None]:
        """Kill a role, and keep it away until the end of the block; it then starts again."""
        self._held.add(role)
        self.signal(role, signal.SIGKILL)
        self._processes[role].join()
        try:
            yield
        finally:
            self._held.discard(role)
            self.start(role)

    def drain(self, role: str) -> int | None:
        """Let a role finish what it has in hand (SIGTERM), then start it again.

        Returns:
            Its exit code; None where it did not end within `DRAIN_S` seconds and was killed.
        """
        self._held.add(role)
        process = self._processes[role]
        try:
            self.signal(role, signal.SIGTERM)
            deadline = time.monotonic() + DRAIN_S
            while process.exitcode is None and time.monotonic() < deadline:
                self.tend()
                time.sleep(0.1)
            code = process.exitcode
            if code is None:
                process.kill()
                process.join()
        finally:
            self._held.discard(role)
            self.start(role)
        return code

    def log(self, role: str) -> Path:
        """Return the file that takes a role's output."""
        return self._folder / f"{role}.log"

    def _failpoint_file(self, role: str) -> Path:
        return self._folder / f"{role}.failpoint"

    def set_failpoint(self, role: str, spec: str) -> None:
        """Set where a running role dies.

        Args:
            role: The role.
            spec: `failpoint:count`; empty for nowhere.
        """
        partial = self._folder / f"{role}.partial"
        partial.write_text(spec, "utf-8")
        partial.replace(self._failpoint_file(role))

    def exit_code(self, role: str) -> int | None:
        """Return the exit code of a role, negative if a signal ended it; None while it runs."""
        return self._processes[role].exitcode

    def signal(self, role: str, number: int) -> None:
        """Send a signal to a role that runs."""
        pid = self._processes[role].pid
        if pid is not None and self._processes[role].exitcode is None:
            os.kill(pid, number)

    def tail(self, role: str, lines: int = 30) -> str:
        """Return the last lines of a role's output."""
        return "\n".join(self.log(role).read_text("utf-8", "replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End all roles, with SIGKILL those that do not end by themselves."""
        for role in self._processes:
            self.signal(role, signal.SIGTERM)
        deadline = time.monotonic() + 120
        for process in self._processes.values():
            process.join(max(0.1, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
