"""Servers that tests start as child processes on loopback, and what to do where a server is not installed."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from perennial.streams.addresses import direct_opener

START_TIMEOUT_S = 120.0


def missing_service(reason: str) -> None:
    """Skip the test with the reason; fail it if PERENNIAL_REQUIRE_SERVICES=1."""
    if os.environ.get("PERENNIAL_REQUIRE_SERVICES") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def minio_binary() -> Path | None:
    """Return the path of `minio`, from PATH or from the folder of downloaded servers; None if there is none."""
    on_path = shutil.which("minio")
    if on_path:
        return Path(on_path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    binary = cache / "perennial" / "bin" / "minio"
    return binary if binary.is_file() else None


@dataclass(frozen=True)
class MinioServer:
    """A MinIO server as a child process.

    Attributes:
        endpoint: Its URL.
        access: Access key.
        secret: Secret key.
        data: The folder of its data.
        process: The child process.
    """

    endpoint: str
    access: str
    secret: str
    data: Path
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End the child and wait for it."""
        self.process.terminate()
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which `open_store` reaches this server."""
        return {
            "PERENNIAL_S3_ENDPOINT": self.endpoint,
            "PERENNIAL_S3_REGION": "us-east-1",
            "PERENNIAL_S3_ACCESS_KEY": self.access,
            "PERENNIAL_S3_SECRET_KEY": self.secret,
        }


def start_minio(tmp: Path) -> MinioServer:
    """Start MinIO on a free loopback port and wait until it is ready.

    Skips the test (or fails it, see `missing_service`) without a binary.

    Args:
        tmp: A folder for its data and its log.
    """
    binary = minio_binary()
    if binary is None:
        missing_service(
            "no minio binary on PATH or in the cache folder: "
            "GOBIN=~/.cache/perennial/bin go install "
            "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
        )
        raise AssertionError
    data = tmp / "minio-data"
    data.mkdir(parents=True)
    access, secret = "perennial-tests", secrets.token_hex(16)
    port = free_port()
    log = tmp / "minio.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                str(binary),
                "server",
                "--quiet",
                "--address",
                f"127.0.0.1:{port}",
                "--console-address",
                "127.0.0.1:0",
                str(data),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                "PATH": os.environ.get("PATH", ""),
                "HOME": str(tmp),
                "MINIO_ROOT_USER": access,
                "MINIO_ROOT_PASSWORD": secret,
                "MINIO_BROWSER": "off",
                "MINIO_UPDATE": "off",
            },
        )
    server = MinioServer(f"http://127.0.0.1:{port}", access, secret, data, process)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with direct_opener().open(f"{server.endpoint}/minio/health/ready", timeout=5):
                return server
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    server.stop()
    pytest.fail(f"minio did not start: {log.read_text(errors='replace')[-2000:]}")


@contextmanager
def sigint_ignored() -> Iterator[None]:
    """Let processes that are started inside inherit an ignored SIGINT, as a shell without job control starts them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
