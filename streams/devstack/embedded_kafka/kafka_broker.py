"""Embedded broker: a real Apache Kafka in KRaft mode as a child process, for development and tests.

One node that is broker and controller, on 127.0.0.1 only, without TLS and without users: never expose it. The broker
runs in a session of its own, so Ctrl-C at the terminal reaches its owner first, and clients can stop before the broker
does. It ends with its owner, however the owner ends (see process_guard.py).
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from perennial.streams.devstack.embedded_kafka.kafka_config import (
    LOG4J,
    OWNED,
    log_tail,
    render_properties,
    server_properties,
)
from perennial.streams.devstack.embedded_kafka.kafka_jars import (
    KAFKA_VERSION,
    OWN_BROKER,
    BrokerError,
    Progress,
    fetch_jars,
    java_path,
)
from perennial.streams.devstack.embedded_kafka.kafka_probe import serves
from perennial.streams.devstack.embedded_kafka.kafka_storage import format_storage, is_formatted
from perennial.streams.devstack.folder_lock import FolderLockedError, lock_folder
from perennial.streams.devstack.guarded_process import command_pid, start_guarded
from perennial.streams.devstack.ports import HOST, free_port, is_free
from perennial.streams.devstack.private_files import private_folder
from perennial.streams.devstack.signals import check_stop_signals, stop_signals_held
from perennial.streams.paths import expand_path

__all__ = ["KAFKA_VERSION", "BrokerError", "EmbeddedBroker", "fetch_jars"]

_JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-XX:+ExitOnOutOfMemoryError",
        "--sun-misc-unsafe-memory-access=allow", "--enable-native-access=ALL-UNNAMED")  # fmt: skip
_LOG_KEPT_BYTES = 8 * 1024 * 1024
_POLL_S = 0.05
_LOCK_WAIT_S = 5.0
"""A broker that was just killed holds its folder's lock until the kernel has ended it."""
_GRACE_S = 30.0
_UNLOCK_WAIT_S = 10.0
_PORT_ATTEMPTS = 3
_LOCK = "broker.lock"
_BIND_FAILURES = ("Address already in use", "Socket server failed to bind")


class EmbeddedBroker:
    """A broker: `start` it, use it at `bootstrap`, `stop` it. Also a context manager.

    Args:
        data_dir: folder that keeps topics, offsets and the cluster id over restarts; None: a temporary folder, which
            `stop` removes.
        port: TCP port on 127.0.0.1; None: the one of the last start in this data_dir if it is free, or else a free one.
        on_progress: called with one line of text per step.
        settings: more lines for server.properties.
        heap_mb: Java heap in MiB.
        owner_pid: process whose end ends the broker; None: this process, which then also stops the broker on a normal
            exit.

    Raises:
        BrokerError: an argument is not usable.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        port: int | None = None,
        *,
        on_progress: Progress | None = None,
        settings: Mapping[str, str] | None = None,
        heap_mb: int = 384,
        owner_pid: int | None = None,
    ) -> None:
        if port is not None and not 0 < port < 65536:
            raise BrokerError("the port is not usable", got=port, allowed="1 to 65535, or None for a free one")
        if heap_mb < 128:
            raise BrokerError("the Java heap is too small for Kafka", got=heap_mb, allowed="128 MiB or more")
        self._settings = dict(settings or {})
        for key in sorted(self._settings.keys() & set(OWNED)):
            raise BrokerError(
                f"the setting {key} belongs to the embedded broker",
                got=self._settings[key],
                allowed="any other broker setting",
                remedy=f"leave it out; for a broker set up otherwise, {OWN_BROKER}",
            )
        self._data_dir = None if data_dir is None else expand_path(data_dir).absolute()
        self._wanted_port = port
        self._progress = on_progress
        self._heap_mb = heap_mb
        self._owner_pid = owner_pid
        self._folder: Path | None = self._data_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._java_pid = 0
        self._port = 0
        self._log_from = 0

    @property
    def bootstrap(self) -> str:
        """Address for clients, host:port. Raises BrokerError before `start`."""
        self._require_started()
        return f"{HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the Java process. Raises BrokerError before `start`."""
        self._require_started()
        return self._java_pid

    @property
    def supervisor_pid(self) -> int:
        """Process id of the guard, to which SIGTERM is sent for a graceful end. Raises BrokerError before `start`."""
        return self._require_started().pid

    @property
    def log_path(self) -> Path:
        """The broker's log file. Raises BrokerError before `start` where the folder is a temporary one."""
        if self._folder is None:
            self._require_started()
        return Path(self._folder or "") / "broker.log"

    @property
    def running(self) -> bool:
        """Whether the child process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = 60) -> Self:
        """Start the broker and wait until it serves.

        Args:
            timeout_s: how long the broker may take, without the download of its jars at the first start.

        Returns:
            This broker.

        Raises:
            BrokerError: the jars cannot be downloaded, the port or the folder is taken, or the broker fails. Nothing
                is left running then.
        """
        if self.running:
            raise BrokerError(
                "this broker is already started", got=f"process {self._java_pid}", remedy="stop() it first"
            )
        classpath, java = fetch_jars(self._progress), java_path()
        check_stop_signals()
        folder = self._prepare_folder()
        lock = _lock(folder)
        try:
            os.ftruncate(lock, 0)  # it names the process that held the lock before and has ended
            deadline = time.monotonic() + timeout_s
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                self._port, controller_port = self._choose_ports(folder)
                try:
                    self._launch(folder, classpath, java, controller_port, lock)
                    self._await_ready(deadline, timeout_s)
                    break
                except _PortLostError:  # another process took the port between the choice and Kafka's bind
                    if attempt == _PORT_ATTEMPTS:
                        raise
            os.pwrite(lock, b"%d" % self._java_pid, 0)
        except BaseException:  # Ctrl-C too: whatever stops a start must not leave a child behind
            os.close(lock)
            self._end_group()
            self._drop_folder()
            raise
        os.close(lock)  # the broker holds its own copy: the lock is free when the broker has ended
        if self._owner_pid is None:
            atexit.register(self._at_exit, os.getpid())
        self._report(f"Apache Kafka {KAFKA_VERSION} serves at {self.bootstrap} (process {self._java_pid})")
        return self

    def stop(self, timeout_s: float = 20) -> None:
        """End the broker and remove a temporary folder. Calling it again does nothing.

        Args:
            timeout_s: after so many seconds the broker is killed.
        """
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._report(f"the broker did not stop within {timeout_s:g} s and is killed")
            self._end_group()
        self._drop_folder()
        atexit.unregister(self._at_exit)

    def kill(self) -> None:
        """End the broker with SIGKILL, as a crash would. Its folder stays, even a temporary one."""
        self._require_started()
        self._end_group()

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, folder: Path, classpath: list[Path], java: Path, controller_port: int, lock: int) -> None:
        properties = folder / "server.properties"
        lines = render_properties(self._properties(folder, controller_port))
        properties.write_text(lines, encoding="ascii")
        (folder / "log4j2.properties").write_text(LOG4J, encoding="ascii")
        command = [str(java), *_JVM, "-cp", os.pathsep.join(map(str, classpath))]
        if not is_formatted(folder):
            self._report("formatting a new data folder")
            format_storage(folder, command)
        self._report(f"starting Apache Kafka {KAFKA_VERSION} on port {self._port}")
        command[1:1] = [
            f"-Dlog4j2.configurationFile={folder / 'log4j2.properties'}",
            f"-Xmx{self._heap_mb}m",
            f"-Djava.io.tmpdir={folder / 'tmp'}",
        ]
        self._log_from = self.log_path.stat().st_size if self.log_path.exists() else 0
        with stop_signals_held():
            self._process = start_guarded(
                [*command, "kafka.Kafka", str(properties)],
                log_path=self.log_path,
                folder=folder,
                lock=lock,
                grace_s=_GRACE_S,
                owner_pid=self._owner_pid,
                remove=folder if self._data_dir is None else None,
            )
        self._java_pid = command_pid(self._process)

    def _properties(self, folder: Path, controller_port: int) -> dict[str, str]:
        """Return the lines of server.properties."""
        return server_properties(folder, self._port, controller_port, self._settings)

    def _await_ready(self, deadline: float, timeout_s: float) -> None:
        while not serves(self._port):
            check_stop_signals()
            if not self.running:
                raise self._failed("the embedded broker ended while starting")
            if time.monotonic() > deadline:
                raise self._failed(f"the embedded broker was not ready within {timeout_s:g} s")
            time.sleep(_POLL_S)

    def _failed(self, what: str) -> BrokerError:
        tail = log_tail(self.log_path, self._log_from)
        kind = _PortLostError if any(sign in tail for sign in _BIND_FAILURES) else BrokerError
        where = "" if self._data_dir is None else f" {self.log_path}"
        return kind(
            f"{what}; last lines of its log{where}:\n{tail}\n",
            got=f"exit status {self._process.poll() if self._process else None}",
            remedy=f"correct what the log names; where the data folder is from another version, use a new one; "
            f"or {OWN_BROKER}",
        )

    def _prepare_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="perennial-kafka-"))
        folder = self._folder
        if "," in str(folder):
            raise BrokerError("Kafka cannot keep data in a folder with a comma in its path", got=str(folder))
        try:
            private_folder(folder, self._report, ours=None if is_formatted(folder) else ())
            (folder / "tmp").mkdir(exist_ok=True)
            log = folder / "broker.log"
            if log.exists() and log.stat().st_size > _LOG_KEPT_BYTES:
                log.replace(folder / "broker.log.1")
        except OSError as error:
            raise BrokerError(
                "the data folder is not usable",
                got=str(error),
                allowed="a folder that this user may write to",
            ) from error
        return folder

    def _choose_ports(self, folder: Path) -> tuple[int, int]:
        """Return the client port and the controller's port. The client port is remembered in the folder."""
        port_file = folder / "port.json"
        if self._wanted_port is not None:
            if not is_free(self._wanted_port):
                raise BrokerError(
                    f"port {self._wanted_port} of {HOST} is taken",
                    got=self._wanted_port,
                    allowed="a free port, or none to have one chosen",
                    remedy="end the process that listens there, or give another port",
                )
            port = self._wanted_port
        else:
            remembered = _read_port(port_file)
            port = remembered if remembered and is_free(remembered) else free_port()
        port_file.write_text(json.dumps({"port": port}), encoding="ascii")
        controller = free_port()
        while controller == port:
            controller = free_port()
        return port, controller

    def _end_group(self) -> None:
        """Kill what is left of the guard's process group and wait until the data folder's lock is free."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM where only zombies are left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._folder is not None:
            with suppress(FolderLockedError, FileNotFoundError):
                os.close(lock_folder(self._folder / _LOCK, _UNLOCK_WAIT_S))

    def _drop_folder(self) -> None:
        if self._data_dir is None and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _at_exit(self, pid: int) -> None:
        if os.getpid() == pid:  # a forked child inherits this hook, but not the broker
            self.stop()

    def _require_started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise BrokerError("the broker is not started", remedy="call start() first")
        return self._process

    def _report(self, line: str) -> None:
        if self._progress is not None:
            self._progress(line)


class _PortLostError(BrokerError):
    """Kafka could not bind a port that was free a moment ago."""


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the folder's lock. Raise BrokerError that names the process that holds it."""
    try:
        return lock_folder(folder / _LOCK, _LOCK_WAIT_S)
    except FolderLockedError as error:
        raise BrokerError(
            f"another broker runs on {folder}",
            got=error.got,
            allowed="one broker per data folder",
            remedy="use that broker, stop it, or give another folder",
        ) from None
    except OSError as error:
        raise BrokerError("the data folder cannot be locked", got=str(error)) from error


def _read_port(port_file: Path) -> int | None:
    try:
        port = json.loads(port_file.read_bytes())["port"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return port if isinstance(port, int) and 0 < port < 65536 else None
