"""A MinIO server of our own for `perennial up --store minio`: found, started, and ended with its owner.

On 127.0.0.1 only, without TLS and console. Its credentials are random, made once, and live in two files that only
this user may read; they are handed on as paths, so that no environment, announcement or log holds them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from perennial.storage.errors import StoreError
from perennial.streams.devstack import process_guard as broker_supervisor
from perennial.streams.settings import SettingsError, cache_dir

MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
"""As `go install` takes it: MinIO ships no binaries any more, and its release tags are no module versions."""
STORE_URI = "s3://perennial"
HOST = "127.0.0.1"

_PORTS = range(20_000, 32_000)  # below what the kernel gives to outgoing connections: a retry cannot meet itself
_PORT_ATTEMPTS = 3
_PORT_PROBES = 200
_GRACE_S = 10.0
_POLL_S = 0.1
_RESTART_S = 2.0
_LOG_KEPT_BYTES = 8 * 1024 * 1024


class MinioServerError(StoreError):
    """The MinIO server did not start."""


def find_minio() -> Path:
    """The binary on PATH, else in the cache folder. Raises SettingsError that says how to build it."""
    on_path = shutil.which("minio")
    if on_path:
        return Path(on_path)
    binary = cache_dir() / "bin" / "minio"
    if os.access(binary, os.X_OK) and binary.is_file():
        return binary
    raise SettingsError(
        "there is no MinIO server",
        got=f"no `minio` on PATH, and no {binary}",
        remedy=f"with Go: GOBIN={binary.parent} go install {MODULE} (minutes, once); or leave out --store minio",
    )


class MinioServer:
    """A server to start, use through `environment()` and stop.

    folder: keeps objects, credentials and the log over restarts. say: told a line per step.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda _line: None) -> None:
        self._folder = folder.absolute()
        self._say = say
        self._port = 0
        self._launched_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """host:port as a URL."""
        return f"http://{HOST}:{self._port}"

    @property
    def log_path(self) -> Path:
        """Where the server writes."""
        return self._folder / "minio.log"

    @property
    def running(self) -> bool:
        """Whether the child process is alive."""
        return self._process is not None and self._process.poll() is None

    def environment(self) -> dict[str, str]:
        """What reaches this server, whatever other S3 settings are around. Holds no secret."""
        return {
            "PERENNIAL_S3_ENDPOINT": self.endpoint,
            "PERENNIAL_S3_REGION": "us-east-1",
            "PERENNIAL_S3_SECURE": "false",
            "PERENNIAL_S3_ACCESS_KEY_FILE": str(self._folder / "access-key"),
            "PERENNIAL_S3_SECRET_KEY_FILE": str(self._folder / "secret-key"),
            "PERENNIAL_S3_ACCESS_KEY": "",
            "PERENNIAL_S3_SECRET_KEY": "",
            "PERENNIAL_S3_SESSION_TOKEN": "",
            "PERENNIAL_S3_SESSION_TOKEN_FILE": "",
            "AWS_SESSION_TOKEN": "",
        }

    def start(self, timeout_s: float = 60.0) -> None:
        """Start it and wait until it is ready. What it does with conditional writes is for the caller to probe.

        Raises SettingsError without a binary, MinioServerError where it does not come up; nothing is left running then.
        """
        binary = find_minio()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self._folder / "objects").mkdir(exist_ok=True)
        for name, length in (("access-key", 10), ("secret-key", 20)):
            _secret_file(self._folder / name, length)
        if self.log_path.exists() and self.log_path.stat().st_size > _LOG_KEPT_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        deadline = time.monotonic() + timeout_s
        try:
            for _ in range(_PORT_ATTEMPTS):
                self._port = _free_port()
                self._launch(binary)
                if self._ready(deadline):
                    self._say(f"MinIO serves at {self.endpoint}")
                    return
                self.stop()  # perhaps another process took the port between our look and its bind
        except BaseException:  # Ctrl-C too: whatever stops a start must not leave a child behind
            self.stop()
            raise
        raise MinioServerError(
            got=self._log_tail(), allowed=f"an answer within {timeout_s:g} s", remedy=f"mend what {self.log_path} names"
        )

    def tend(self) -> None:
        """Start it again, at its address, where it ended by itself; at most every two seconds."""
        if self._process is None or self.running or time.monotonic() - self._launched_s < _RESTART_S:
            return
        self._say(f"MinIO ended with status {self._process.returncode}, restarting (log: {self.log_path})")
        self._launch(find_minio())

    def stop(self, timeout_s: float = 15.0) -> None:
        """End the server. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._say(f"MinIO did not stop within {timeout_s:g} s and is killed")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _launch(self, binary: Path) -> None:
        self._launched_s = time.monotonic()
        lock = self._lock()
        try:
            self._spawn(binary, lock)
        finally:
            os.close(lock)  # the child holds its own handle

    def _spawn(self, binary: Path, lock: int) -> None:
        environment: Mapping[str, str] = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ},
            "MINIO_ROOT_USER_FILE": str(self._folder / "access-key"),
            "MINIO_ROOT_PASSWORD_FILE": str(self._folder / "secret-key"),
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        }
        command = [str(binary), "server", "--quiet", "--address", f"{HOST}:{self._port}",
                   "--console-address", f"{HOST}:0", str(self._folder / "objects")]  # fmt: skip
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", broker_supervisor.__file__, str(os.getpid()), str(_GRACE_S), str(lock), "",
                 *command],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=self._folder, env=environment,
                pass_fds=(lock,), start_new_session=True,
            )  # fmt: skip
        if self._process.stdout is not None:
            with self._process.stdout as pipe:
                pipe.readline()  # its pid: it runs from here on

    def _ready(self, deadline: float) -> bool:
        while self.running and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.endpoint}/minio/health/ready", timeout=1):  # noqa: S310  # loopback
                    return True
            except (urllib.error.URLError, OSError):
                time.sleep(_POLL_S)
        return False

    def _lock(self) -> int:
        lock = os.open(self._folder / "minio.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise MinioServerError(
                f"another MinIO runs on {self._folder}", allowed="one server per data folder",
                remedy="stop it, or name another --data-dir",
            ) from None  # fmt: skip
        return lock

    def _log_tail(self, lines: int = 12) -> str:
        try:
            return "\n".join(self.log_path.read_text("utf-8", "replace").splitlines()[-lines:])
        except OSError as error:
            return str(error)


def _secret_file(path: Path, size_bytes: int) -> None:
    """Make a random secret that only this user may read, where there is none."""
    if path.exists() and path.stat().st_size:
        path.chmod(0o600)
        return
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(size_bytes))
    temporary.replace(path)


def _free_port() -> int:
    for _ in range(_PORT_PROBES):
        port = _PORTS.start + secrets.randbelow(len(_PORTS))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise MinioServerError("no free port was found", got=f"{_PORT_PROBES} tries", allowed=f"{_PORTS} on {HOST}")
