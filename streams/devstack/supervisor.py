"""Run every role as a child process: start it, wait until it is healthy, restart it when it ends, stop all in order."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perennial.storage.errors import PerennialError
from perennial.streams.addresses import direct_opener, http_url
from perennial.streams.devstack.ports import HOST, free_port
from perennial.streams.devstack.private_files import PRIVATE_UMASK, open_private_log, private_folder
from perennial.streams.devstack.signals import check_stop_signals, stop_signals_held
from perennial.streams.settings import Settings

ROLES: tuple[str, ...] = ("intake", "streams", "scorer", "learner")
"""In the order of the flow; stopped in the same order, so that what is in flight drains downstream."""

_RESTART_DELAYS_S = (0.5, 1, 2, 5, 10)
_STEADY_S = 30.0
"""A role that ran for at least so long is restarted after the shortest delay again."""
_PR_SET_PDEATHSIG = 1
_DIRECT = direct_opener()


class RoleError(PerennialError):
    """A role did not become healthy."""


def die_with_parent(parent_pid: int) -> None:
    """End this process with SIGTERM when its parent ends: by the kernel on Linux, by a watching thread everywhere.

    HAZARD: the kernel ties the request to the *thread* of the parent that forked this process. The supervisor forks
    from threads that live as long as it does.

    Args:
        parent_pid: process id of the parent at the start of this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def health(port: int, timeout_s: float = 1.0, host: str = HOST) -> dict[str, object] | None:
    """Ask a role on this machine for its health.

    Args:
        port: its metrics port.
        timeout_s: how long to wait for the answer.
        host: the address that it listens on, as PERENNIAL_METRICS_HOST says.

    Returns:
        The answer of /healthz with a field `ok`; None where nothing answers.
    """
    try:
        with _DIRECT.open(http_url(host, port, "/healthz"), timeout=timeout_s) as answer:
            return {"ok": True, **json.loads(answer.read(65536))}
    except urllib.error.HTTPError as error:
        with contextlib.suppress(ValueError):
            return {"ok": False, **json.loads(error.read(65536))}
        return {"ok": False, "status": "unknown"}
    except (OSError, ValueError):
        return None


@dataclass
class Role:
    """One role as a child process.

    Attributes:
        name: name of the role, or names joined by `+` where several share the process.
        port: port of its /metrics and /healthz.
        log_path: file to which its output is appended.
        command: the command to run.
        environment: variables in addition to those of this process.
        process: the child process, None before the first start.
        restarts: restarts since the process last ran for `_STEADY_S` seconds.
        started_at: time of the last start by the supervisor's clock.
        ended_at: time at which the supervisor noticed the end; None while the role runs.
        waits_for_settings: the process has loaded early and reads the rest of its settings from standard input.
    """

    name: str
    port: int
    log_path: Path
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    started_at: float = 0.0
    ended_at: float | None = None
    waits_for_settings: bool = False

    def start(self) -> None:
        """Start the process with all its settings, or complete the settings of one that was started early."""
        if not (self.waits_for_settings and self._complete_settings()):
            self._spawn(self.command, subprocess.DEVNULL)

    def start_early(self) -> None:
        """Start the process while some settings are not known yet: it loads its modules and the base, then waits."""
        self._spawn([*self.command, "--settings-from-stdin"], subprocess.PIPE)
        self.waits_for_settings = True

    def _spawn(self, command: list[str], stdin: int) -> None:
        folder = private_folder(self.log_path.parent)
        with open_private_log(folder / self.log_path.name) as log, stop_signals_held():
            self.process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                umask=PRIVATE_UMASK,
                start_new_session=True,  # Ctrl-C at the terminal reaches only the supervisor, which stops roles in order
            )

    def _complete_settings(self) -> bool:
        """Send the settings to the process that waits for them. Return False where it has ended."""
        self.waits_for_settings = False
        if self.process is None or self.process.stdin is None:
            return False
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(json.dumps(self.environment).encode() + b"\n")
        return self.running

    @property
    def pid(self) -> int:
        """The process id; 0 before the start."""
        return self.process.pid if self.process else 0

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the process if it is alive."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def log_tail(self, lines: int = 15) -> str:
        """Return the last lines of the log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log_path.read_text("utf-8", "replace").splitlines()[-lines:])
        return ""


@dataclass
class Supervisor:
    """Keep a child process per role running.

    Attributes:
        settings: settings of all roles. They may be replaced between `start_early` and `start`.
        log_dir: folder of the log files.
        roles: names of the roles; names joined by `+` share one process.
        environment: variables for the roles in addition to this process's own. They may be replaced likewise.
        on_event: called with a line when a role ends, or has to be killed.
        children: the roles by name.
        clock: clock in seconds.
    """

    settings: Settings
    log_dir: Path
    roles: Sequence[str] = ROLES
    environment: Mapping[str, str] = field(default_factory=dict)
    on_event: Callable[[str], None] = lambda _line: None
    children: dict[str, Role] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        for name in self.roles:
            command = [sys.executable, "-m", "perennial.streams.cli", "worker", *name.split("+")]
            command += ["--parent", str(os.getpid())]
            role = Role(name, free_port(), self.log_dir / f"{name}.log", command, {})
            role.environment = self._environment_of(role)
            self.children[name] = role

    def start_early(self) -> None:
        """Start a process per role that loads what it needs while the broker and the store are still starting."""
        for role in self.children.values():
            role.start_early()

    def start(self) -> None:
        """Start all roles at once; those that were started early get the settings they wait for."""
        for name, role in self.children.items():
            role.environment = self._environment_of(role)
            self.restart(name)

    def wait_healthy(self, timeout_s: float = 120.0, on_ready: Callable[[str], None] = lambda _name: None) -> None:
        """Wait until every role answers that it is healthy.

        Args:
            timeout_s: how long to wait for all of them.
            on_ready: called with the name of each role that is ready.

        Raises:
            RoleError: a role ended or took too long; the error has the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        waiting = dict(self.children)
        while waiting:
            for name, role in list(waiting.items()):
                answer = health(role.port, host=self.settings.observe.metrics_host)
                if answer and answer["ok"] and answer.get("status") != "starting":
                    del waiting[name]
                    on_ready(name)
                elif not role.running:
                    raise RoleError(
                        f"role {name} ended before it was ready",
                        got=role.log_tail(),
                        remedy=f"read {role.log_path}; `perennial doctor` checks what roles need",
                    )
            if waiting and time.monotonic() > deadline:
                name, role = next(iter(waiting.items()))
                raise RoleError(
                    f"role {name} was not ready in {timeout_s:.0f} s",
                    got=role.log_tail(),
                    remedy=f"read {role.log_path}",
                )
            check_stop_signals()
            time.sleep(0.1)

    def tend(self) -> None:
        """Look once at every role and restart one that ended, after delays that grow while it keeps ending."""
        now = self.clock()
        for role in self.children.values():
            if role.running or role.process is None:
                continue
            if role.ended_at is None:
                role.ended_at = now
                if now - role.started_at >= _STEADY_S:
                    role.restarts = 0
                self.on_event(
                    f"{role.name} ended with status {role.process.returncode}, restarting (log: {role.log_path})"
                )
            if now - role.ended_at >= _RESTART_DELAYS_S[min(role.restarts, len(_RESTART_DELAYS_S) - 1)]:
                role.restarts += 1
                self.restart(role.name)

    def restart(self, name: str) -> None:
        """Start a role that does not run."""
        role = self.children[name]
        role.started_at, role.ended_at = self.clock(), None
        role.start()

    def _environment_of(self, role: Role) -> dict[str, str]:
        return {
            **self.settings.environment(),
            "PERENNIAL_METRICS_PORT": str(role.port),
            "PYTHONUNBUFFERED": "1",
            **self.environment,
        }

    def stop(self, timeout_s: float = 15.0) -> None:
        """Send SIGTERM to the roles in the order of the flow, and SIGKILL to those that do not end in time.

        Args:
            timeout_s: how long all of them together may take.
        """
        for role in self.children.values():
            role.signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        for role in self.children.values():
            if role.process is None:
                continue
            try:
                role.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.on_event(f"{role.name} did not stop in {timeout_s:.0f} s, killing it")
                role.process.kill()
                role.process.wait()
            if role.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    role.process.stdin.close()
