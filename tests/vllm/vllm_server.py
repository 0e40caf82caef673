"""A vLLM server as a child process, from the environment that `make vllm-env` builds."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perennial.streams.addresses import direct_opener
from tests.services import free_port

START_TIMEOUT_S = 400.0
_PR_SET_PDEATHSIG = 1
_POLLS = "EngineCor"
"""Part of the name of vLLM's engine core, which Linux cuts off after 15 characters."""
ENGINE_CORE_NICE = 10
MAX_LORAS, MAX_CPU_LORAS, MAX_RANK = 3, 4, 16
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # The calls by which tests read what the engine holds: `/collective_rpc`.
    "VLLM_SERVER_DEV_MODE": "1",
    # Threads that spin while they wait make a token twenty times slower where cores are shared.
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "HF_HUB_OFFLINE": "1",
}


_libc = ctypes.CDLL(None, use_errno=True)


def _end_with_parent() -> None:
    """Let the kernel end the server with the test: it has a session of its own, which no terminal ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _processes() -> Iterator[tuple[int, str, list[str]]]:
    """Yield the process id, the name and the fields behind the name of `/proc/<pid>/stat` for every process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, _, behind = stat.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        yield int(stat.parent.name), before.partition("(")[2], behind.split()


@dataclass
class VllmServer:
    """A running server.

    Attributes:
        python: Python of the environment with vLLM.
        model: Folder of the base.
        log: File for the server's output.
        arguments: More arguments of the server.
        environment: More environment variables.
        port: Its port.
    """

    python: Path
    model: Path
    log: Path
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> VllmServer:
        """Start it and wait until it answers."""
        # The console script `vllm` asks for the version of a distribution named vllm, which vllm-cpu is not.
        command = [
            str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model),
            "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(self.port), "--enable-lora",
            "--max-loras", str(MAX_LORAS), "--max-cpu-loras", str(MAX_CPU_LORAS), "--max-lora-rank", str(MAX_RANK),
            "--enforce-eager",
            # The cache of keys and values is committed when it is first written: a small one is full before memory is measured.
            "--num-gpu-blocks-override", "128", *self.arguments,
        ]  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.log.parent, start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - it takes no lock
                env={**inherited, **ENVIRONMENT, **self.environment},
            )  # fmt: skip
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                if self.call("/health", timeout_s=5)[0] == 200:
                    self._let_others_run()
                    return self
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"vLLM does not answer:\n{self.log.read_text(errors='replace')[-6000:]}")
            time.sleep(0.5)

    def _let_others_run(self) -> None:
        """Lower the priority of the engine core, which polls with `sched_yield` while its worker computes.

        At the same priority on two cores, requests, clients and a subscriber waited up to seconds for a core, and the
        worker lost a third of its throughput (docs/experiments).
        """
        for pid, name, fields in _processes():
            if int(fields[2]) == self._group and _POLLS in name:
                os.setpriority(os.PRIO_PROCESS, pid, ENGINE_CORE_NICE)  # its first thread is the one that polls

    def stop(self) -> None:
        """End the server and the processes that it started."""
        if self.process is None:
            return
        for sign, wait_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            try:
                os.killpg(self.process.pid, sign)
                self.process.wait(wait_s)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.process = None

    def call(self, path: str, content: dict[str, Any] | None = None, timeout_s: float = 120) -> tuple[int, Any]:
        """Make a call; return the status and the JSON, or the text where it is none."""
        data = json.dumps(content).encode() if content is not None else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with direct_opener().open(request, timeout=timeout_s) as response:
                status, body = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode(errors="replace")

    def resident_ids(self) -> set[int]:
        """Return the numbers of the adapters in the engine's memory; vLLM counts them from 1 in order of loading."""
        status, answer = self.call("/collective_rpc", {"method": "list_loras"})
        assert status == 200, answer
        return set(answer["results"][0])

    def cpu_s(self) -> float:
        """Return the processor time that the server and its processes have used, in seconds.

        Without vLLM's engine core, which polls while its worker computes.
        """
        used = (fields for _, name, fields in _processes() if int(fields[2]) == self._group and _POLLS not in name)
        return sum(int(fields[11]) + int(fields[12]) for fields in used) / os.sysconf("SC_CLK_TCK")

    @property
    def _group(self) -> int:
        """Number of the server's process group."""
        assert self.process is not None
        return self.process.pid

    def anonymous_mib(self) -> float:
        """Return the memory of the server and its processes in MiB, without files that are mapped."""
        assert self.process is not None
        kib = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid:  # its process group
                    lines = (stat.parent / "smaps_rollup").read_text().splitlines()
                    kib += sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
            except (OSError, ValueError):
                continue
        return kib / 1024
