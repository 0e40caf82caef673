"""Runs every role as a child process of its own: start, wait until healthy, restart what falls over, stop in order."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perennial.storage.errors import PerennialError
from perennial.streams.settings import Settings

ROLES: tuple[str, ...] = ("intake", "streams", "scorer", "learner")
"""In the order of the flow; stopped in the same order, so that what is in flight drains downstream."""

_RESTART_DELAYS_S = (0.5, 1, 2, 5, 10)
_STEADY_S = 30.0
"""A role that ran for so long starts again at once: only one that falls over and over is to wait longer each time."""
_PR_SET_PDEATHSIG = 1


class RoleError(PerennialError):
    """A role did not become healthy."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGTERM when the parent ends (Linux), and watch for it elsewhere.

    HAZARD: the kernel ties the request to the parent's *thread* that forked us; the supervisor forks from
    threads that live as long as it does.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def health(port: int, timeout_s: float = 1.0) -> dict[str, object] | None:
    """What /healthz of a role says, with `ok` set; None where nothing answers."""
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/healthz", timeout=timeout_s
        ) as answer:  # a fixed loopback address
            return {"ok": True, **json.loads(answer.read(65536))}
    except urllib.error.HTTPError as error:
        with contextlib.suppress(ValueError):
            return {"ok": False, **json.loads(error.read(65536))}
        return {"ok": False, "status": "unknown"}
    except (OSError, ValueError):
        return None


@dataclass
class Role:
    """One child process."""

    name: str
    port: int
    log_path: Path
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    started_at: float = 0.0
    ended_at: float | None = None

    def start(self) -> None:
        """Start the process; its output goes to the log file."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # a Ctrl-C at the terminal reaches the supervisor alone, which stops us in order
            )

    @property
    def pid(self) -> int:
        """The process id, 0 before the start."""
        return self.process.pid if self.process else 0

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal, if there is a process to take it."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def log_tail(self, lines: int = 15) -> str:
        """The end of the log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log_path.read_text("utf-8", "replace").splitlines()[-lines:])
        return ""


@dataclass
class Supervisor:
    """Child processes for the roles.

    environment: added to this process's own. on_event: told in a line what happened (start, end, restart). clock: s.
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
            port = free_port()
            env = {
                **os.environ,
                **self.settings.environment(),
                "PERENNIAL_METRICS_PORT": str(port),
                "PYTHONUNBUFFERED": "1",
                **self.environment,
            }
            command = [
                sys.executable,
                "-m",
                "perennial.streams.cli",
                "worker",
                *name.split("+"),
                "--parent",
                str(os.getpid()),
            ]
            self.children[name] = Role(name, port, self.log_dir / f"{name}.log", command, env)

    def start(self) -> None:
        """Start all roles at once."""
        for name in self.children:
            self.restart(name)

    def wait_healthy(self, timeout_s: float = 120.0, on_ready: Callable[[str], None] = lambda _name: None) -> None:
        """Wait until each role's /healthz is green. Raises RoleError with the end of the role's log."""
        deadline = time.monotonic() + timeout_s
        waiting = dict(self.children)
        while waiting:
            for name, role in list(waiting.items()):
                answer = health(role.port)
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
            time.sleep(0.1)

    def tend(self) -> None:
        """Look once at every role and restart one that ended, with growing delays."""
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
        """Start a role, again after its end."""
        role = self.children[name]
        role.started_at, role.ended_at = self.clock(), None
        role.start()

    def stop(self, timeout_s: float = 15.0) -> None:
        """SIGTERM in the order of the flow, then SIGKILL for what does not end."""
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
