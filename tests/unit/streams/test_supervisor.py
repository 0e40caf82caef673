"""The supervisor restarts what ended, after growing delays, and completes the settings of what it started early."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from perennial.streams.devstack.supervisor import Supervisor, health
from perennial.streams.settings import Settings
from tests.services import sigint_ignored

PRINTS_SETTINGS = "import sys; print(sys.argv[1:], sys.stdin.readline(), flush=True)"


def test_a_role_waits_longer_after_each_short_life_and_not_after_a_long_one(tmp_path):
    now = 1000.0
    supervisor = Supervisor(Settings.of(env_file=None), tmp_path, ("intake",), clock=lambda: now)
    role = supervisor.children["intake"]
    role.command = [sys.executable, "-S", "-c", ""]
    supervisor.start()

    def down_s(lives_s: float) -> float:
        """Let the role live so long. Return how long it is down afterwards."""
        nonlocal now
        before = role.process
        before.wait(120)
        now += lives_s
        supervisor.tend()
        died = now
        while role.process is before:
            now += 0.25
            supervisor.tend()
        return now - died

    assert [down_s(lives_s) for lives_s in (1, 1, 1, 1, 1, 1)] == [0.5, 1, 2, 5, 10, 10]
    assert [down_s(lives_s) for lives_s in (60, 1, 1)] == [0.5, 1, 2]
    role.process.wait(120)


def test_a_role_that_was_started_early_gets_the_settings_that_are_known_later(tmp_path: Path):
    supervisor = Supervisor(Settings.of(env_file=None), tmp_path, ("intake",))
    role = supervisor.children["intake"]
    role.command = [sys.executable, "-S", "-c", PRINTS_SETTINGS]
    supervisor.start_early()
    assert role.running
    early = role.process
    supervisor.settings, supervisor.environment = supervisor.settings.replace(kafka="there:1"), {"MORE": "x"}
    supervisor.start()
    assert role.process is early
    assert early is not None
    assert early.wait(120) == 0
    arguments, _, line = role.log_path.read_text().partition("] ")
    assert "--settings-from-stdin" in arguments
    sent = json.loads(line)
    assert (sent["PERENNIAL_KAFKA"], sent["MORE"]) == ("there:1", "x")
    supervisor.stop()


def test_a_role_that_ended_early_is_started_with_all_its_settings(tmp_path: Path):
    supervisor = Supervisor(Settings.of(env_file=None), tmp_path, ("intake",))
    role = supervisor.children["intake"]
    role.command = [sys.executable, "-S", "-c", "import os; print(os.environ['PERENNIAL_KAFKA'])"]
    supervisor.start_early()
    assert role.process is not None
    role.process.wait(120)
    supervisor.settings = supervisor.settings.replace(kafka="there:1")
    supervisor.start()
    role.process.wait(120)
    assert role.log_path.read_text().splitlines()[-1] == "there:1"
    supervisor.stop()


def test_a_worker_that_was_started_early_ends_with_the_supervisor(tmp_path: Path):
    """It waits on standard input, which ends with the process that holds the other end."""
    command = [sys.executable, "-m", "perennial.streams.cli", "worker", "intake", "--settings-from-stdin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=tmp_path) as worker:
        assert worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(120) == 0


def test_a_worker_hears_a_signal_that_its_parent_ignores(tmp_path: Path):
    command = [sys.executable, "-m", "perennial.streams.cli", "worker", "intake", "--settings-from-stdin"]
    with sigint_ignored():
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=tmp_path)
    with worker:
        try:
            for _ in range(600):  # ignored until the worker has set what the signal does
                worker.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    worker.wait(0.1)
                if worker.returncode is not None:
                    break
            assert worker.returncode == -signal.SIGINT
        finally:
            worker.kill()


def test_health_does_not_go_through_a_proxy(monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status": "ok"}')

        def log_message(self, *_arguments):
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert health(server.server_address[1]) == {"ok": True, "status": "ok"}
        server.shutdown()
