"""MinIO server for `perennial up --store minio`: find it, start it, and end it with its owner.

It listens on 127.0.0.1 only, without TLS and console. Its credentials are random, made once, and stored in two files
that only this user may read. Other programs get the paths of these files, so that no environment, announcement or log
holds a credential.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from perennial.storage.errors import StoreError
from perennial.streams.addresses import direct_opener
from perennial.streams.devstack.folder_lock import FolderLockedError, lock_folder
from perennial.streams.devstack.guarded_process import command_pid, start_guarded
from perennial.streams.devstack.ports import HOST, free_port
from perennial.streams.devstack.private_files import private_folder
from perennial.streams.devstack.signals import check_stop_signals, stop_signals_held
from perennial.streams.paths import cache_dir
from perennial.streams.settings import SettingsError

MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
"""As `go install` takes it: MinIO ships no binaries any more, and its release tags are no module versions."""
STORE_URI = "s3://perennial"

_DIRECT = direct_opener()
_PORT_ATTEMPTS = 3
_GRACE_S = 10.0
_POLL_S = 0.1
_RESTART_S = 2.0
_LOG_KEPT_BYTES = 8 * 1024 * 1024


class MinioServerError(StoreError):
    """The MinIO server did not start."""


def find_minio() -> Path:
    """Return the binary on PATH, else the one in the cache folder.

    Raises:
        SettingsError: there is none; the error says how to build it.
    """
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
    """A MinIO server: `start` it, use it through `environment`, `stop` it.

    Args:
        folder: folder that keeps objects, credentials and the log over restarts.
        on_progress: called with one line of text per step.
    """

    def __init__(self, folder: Path, on_progress: Callable[[str], None] = lambda _line: None) -> None:
        self._folder = folder.absolute()
        self._report = on_progress
        self._port = 0
        self._launched_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """URL of the server: http://host:port."""
        return f"http://{HOST}:{self._port}"

    @property
    def log_path(self) -> Path:
        """The server's log file."""
        return self._folder / "minio.log"

    @property
    def running(self) -> bool:
        """Whether the child process is alive."""
        return self._process is not None and self._process.poll() is None

    def environment(self) -> dict[str, str]:
        """Return the variables that lead a client to this server, whatever other S3 settings exist. None is a secret."""
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
        """Start the server and wait until it is ready. Whether it obeys conditional writes is for the caller to test.

        Args:
            timeout_s: how long it may take.

        Raises:
            SettingsError: there is no binary.
            MinioServerError: the server does not start, or the folder is in use. Nothing is left running then.
        """
        binary = find_minio()
        private_folder(private_folder(self._folder, self._report) / "objects", self._report)
        for name, length in (("access-key", 10), ("secret-key", 20)):
            _secret_file(self._folder / name, length)
        if self.log_path.exists() and self.log_path.stat().st_size > _LOG_KEPT_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        deadline = time.monotonic() + timeout_s
        try:
            for _ in range(_PORT_ATTEMPTS):
                self._port = free_port()
                self._launch(binary)
                if self._ready(deadline):
                    self._report(f"MinIO serves at {self.endpoint}")
                    return
                self.stop()  # another process may have taken the port between the choice and the bind
        except BaseException:  # Ctrl-C too: whatever stops a start must not leave a child behind
            self.stop()
            raise
        raise MinioServerError(
            got=self._log_tail(),
            allowed=f"an answer within {timeout_s:g} s",
            remedy=f"correct what {self.log_path} names",
        )

    def tend(self) -> None:
        """Start the server again, at its address, where it ended by itself; at most every two seconds."""
        if self._process is None or self.running or time.monotonic() - self._launched_s < _RESTART_S:
            return
        self._report(f"MinIO ended with status {self._process.returncode}, restarting (log: {self.log_path})")
        self._launch(find_minio())

    def stop(self, timeout_s: float = 15.0) -> None:
        """End the server. Calling it again does nothing.

        Args:
            timeout_s: after so many seconds the server is killed.
        """
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._report(f"MinIO did not stop within {timeout_s:g} s and is killed")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _launch(self, binary: Path) -> None:
        self._launched_s = time.monotonic()
        lock = self._lock()
        try:
            self._spawn(binary, lock)
        finally:
            os.close(lock)  # the server holds its own copy

    def _spawn(self, binary: Path, lock: int) -> None:
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ},
            "MINIO_ROOT_USER_FILE": str(self._folder / "access-key"),
            "MINIO_ROOT_PASSWORD_FILE": str(self._folder / "secret-key"),
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        }
        command = [str(binary), "server", "--quiet", "--address", f"{HOST}:{self._port}",
                   "--console-address", f"{HOST}:0", str(self._folder / "objects")]  # fmt: skip
        with stop_signals_held():
            self._process = start_guarded(
                command,
                log_path=self.log_path,
                folder=self._folder,
                lock=lock,
                grace_s=_GRACE_S,
                environment=environment,
            )
        command_pid(self._process)

    def _ready(self, deadline: float) -> bool:
        while self.running and time.monotonic() < deadline:
            check_stop_signals()
            try:
                with _DIRECT.open(f"{self.endpoint}/minio/health/ready", timeout=1):
                    return True
            except OSError:
                time.sleep(_POLL_S)
        return False

    def _lock(self) -> int:
        try:
            return lock_folder(self._folder / "minio.lock")
        except FolderLockedError:
            raise MinioServerError(
                f"another MinIO runs on {self._folder}", allowed="one server per data folder",
                remedy="stop it, or name another --data-dir",
            ) from None  # fmt: skip

    def _log_tail(self, lines: int = 12) -> str:
        try:
            return "\n".join(self.log_path.read_text("utf-8", "replace").splitlines()[-lines:])
        except OSError as error:
            return str(error)


def _secret_file(path: Path, size_bytes: int) -> None:
    """Write a random secret that only this user may read, unless the file has one already."""
    if path.exists() and path.stat().st_size:
        path.chmod(0o600)
        return
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(size_bytes))
    temporary.replace(path)
