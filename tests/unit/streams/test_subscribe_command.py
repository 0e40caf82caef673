"""`perennial subscribe`: one subscriber per adapter, lines of progress, a goodbye at SIGTERM."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.client.directory_backend import DirectoryBackend
from tests.engine_doubles import VllmDouble
from tests.versions import VersionPublisher

WAIT_S = 90.0


class Command:
    """The command as a child process, whose lines are read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: queue.Queue[str] = queue.Queue()
        self.seen: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def line_with(self, *texts: str) -> str:
        while True:
            line = self.lines.get(timeout=WAIT_S)
            self.seen.append(line)
            assert line, "".join(self.seen)
            if all(text in line for text in texts):
                return line


@contextmanager
def subscribing(store: Path, *arguments: str, **variables: str) -> Iterator[Command]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PERENNIAL_")}
    environment |= {"PERENNIAL_STORE": str(store), "PERENNIAL_POLL_S": "0.05", "XDG_DATA_HOME": str(store.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "perennial.streams.cli", "subscribe", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**environment, **variables},
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    try:
        yield Command(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_adapters_are_followed_until_sigterm(tmp_path: Path):
    adapters = ["acme/support", "acme/sales"]
    publishers = {name: VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), name) for name in adapters}
    served = tmp_path / "served"
    arguments = [*adapters, "acme/support", "--backend", "directory", "--folder", str(served), "--grace-s", "0"]
    with subscribing(tmp_path / "store", *arguments) as command:
        for name in adapters:
            command.line_with(name, "following `live`")
        for name, publisher in publishers.items():
            state = publisher.publish()
            line = command.line_with(name, "generation 1 is served")
            assert state.version[7:19] in line
            assert "load 0." in line
            assert DirectoryBackend(served).current(name) == f"{name}@{state.version[7:]}"
        command.process.send_signal(signal.SIGTERM)
        for name in adapters:
            command.line_with(name, "left")
        assert command.process.wait(WAIT_S) == 0
    assert len(DirectoryBackend(served).list()) == 2  # the server goes on with what it has


def test_an_engine_is_kept_at_the_live_version(tmp_path: Path):
    publisher = VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False))
    double = VllmDouble()
    double.key = "secret"
    with double.serving():
        arguments = ["acme/support", "--backend", "vllm", "--url", double.url, "--folder", str(tmp_path / "served")]
        with subscribing(tmp_path / "store", *arguments, "--grace-s", "0", VLLM_API_KEY="secret") as command:
            command.line_with("following")
            for generation in (1, 2):
                state = publisher.publish()
                command.line_with(f"generation {generation} is served")
                assert f"acme/support@{state.version[7:]}" in double.adapters
            double.refuses = lambda _name: (500, {"error": {"message": "rank 64 is greater than max_lora_rank 16"}})
            publisher.publish()
            command.line_with("can never serve", "max-lora-rank")
            command.process.send_signal(signal.SIGINT)
            command.line_with("left")
            assert command.process.wait(WAIT_S) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["acme/support", "--backend", "vllm"], "--folder PATH"),
        (["acme/support", "--backend", "directory"], "--folder PATH"),
        (["acme/support", "--backend", "vllm", "--folder", "x", "--url", "localhost"], "not the address"),
        (["one", "two", "--backend", "peft"], "one adapter"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, arguments: list[str], told: str):
    with subscribing(tmp_path / "store", *arguments) as command:
        command.line_with(told)
        assert command.process.wait(WAIT_S) in {1, 2}


def test_adapters_of_another_tenant_are_refused_before_anything_is_made(tmp_path: Path):
    arguments = ["acme/support", "globex/support", "--backend", "directory", "--folder", str(tmp_path / "served")]
    with subscribing(tmp_path / "store", *arguments, PERENNIAL_TENANT="acme") as command:
        for text in ("none of the tenant acme", "globex/support", "adapters below acme/", "PERENNIAL_TENANT"):
            command.line_with(text)
        assert command.process.wait(WAIT_S) == 2
    assert not (tmp_path / "served").exists()
    assert not (tmp_path / "store").exists()


def test_a_personal_adapter_is_served_together_with_the_shared_one(tmp_path: Path):
    store, served = DirectoryStore(tmp_path / "store", fsync=False), tmp_path / "served"
    tenant = VersionPublisher(store)
    user = VersionPublisher(store, "acme/support/user-42", extends="acme/support")
    shared, own = tenant.publish().version, user.publish().version
    arguments = ["acme/support/user-42", "--backend", "directory", "--folder", str(served), "--grace-s", "0"]
    with subscribing(tmp_path / "store", *arguments) as command:
        command.line_with("acme/support/user-42: generation 1 is served", own[7:19])
        line = command.line_with(f"serving acme/support/user-42@{own[7:19]} together with acme/support@{shared[7:19]}")
        assert DirectoryBackend(served).current("acme/support/user-42") == line.split()[-1]
        shared = tenant.publish().version
        command.line_with("acme/support: generation 2 is served", shared[7:19])
        line = command.line_with(f"serving acme/support/user-42@{own[7:19]} together with acme/support@{shared[7:19]}")
        assert DirectoryBackend(served).current("acme/support/user-42") == line.split()[-1]
        command.process.send_signal(signal.SIGTERM)
        command.line_with("left")
        assert command.process.wait(WAIT_S) == 0
    assert len(DirectoryBackend(served).list()) == 1
