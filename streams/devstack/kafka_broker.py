"""Owns the embedded broker: a real Apache Kafka in KRaft mode as a child process, for development and tests.

One node that is broker and controller, on 127.0.0.1 only, without TLS and without users: never expose it. The
child runs in a session of its own, so Ctrl-C at the terminal reaches this process first and the clients can
stop before the broker does; it ends with its owner however the owner ends (see broker_supervisor.py).
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from perennial.streams.devstack import process_guard as broker_supervisor
from perennial.streams.devstack.kafka_config import (
    HOST,
    LOG4J,
    NODE_ID,
    OWNED,
    log_tail,
    new_cluster_id,
    render_properties,
    server_properties,
)
from perennial.streams.devstack.kafka_jars import (
    KAFKA_VERSION,
    OWN_BROKER,
    BrokerError,
    Progress,
    fetch_jars,
    java_path,
    kafka_home,
)

__all__ = ["KAFKA_VERSION", "BrokerError", "EmbeddedBroker", "fetch_jars"]

_JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-XX:+ExitOnOutOfMemoryError",
        "--sun-misc-unsafe-memory-access=allow", "--enable-native-access=ALL-UNNAMED")  # fmt: skip
_LOG_KEPT_BYTES = 8 * 1024 * 1024
_POLL_S = 0.05
LOCK_WAIT_S = 5.0
"""A broker that was just killed holds its folder until the kernel has ended it."""
_GRACE_S = 30.0
_PORT_ATTEMPTS = 3
_PORT_PROBES = 200
_PORTS = range(20_000, 32_000)
_BIND_FAILURES = ("Address already in use", "Socket server failed to bind")


class EmbeddedBroker:
    """A broker to start, use at `bootstrap` and stop; also a context manager.

    data_dir: folder that keeps topics, offsets and the cluster id over restarts; None: a temporary one,
    removed by stop(). port: TCP port on 127.0.0.1; None: a free one, and with a data_dir the one of last time
    where it is still free. on_progress: called with one line of text per step. settings: more lines for
    server.properties. heap_mb: the Java heap in MiB.
    owner_pid: the process whose death ends the broker; None: this one, which then also stops it on a normal
    exit.
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
        self._data_dir = None if data_dir is None else Path(data_dir).absolute()
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
        """host:port for clients. Raises BrokerError before start()."""
        self._require_started()
        return f"{HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the Java process. Raises BrokerError before start()."""
        self._require_started()
        return self._java_pid

    @property
    def supervisor_pid(self) -> int:
        """Process id to send SIGTERM to for a graceful end. Raises BrokerError before start()."""
        return self._require_started().pid

    @property
    def log_path(self) -> Path:
        """The broker's log file. Raises BrokerError before start() where the folder is a temporary one."""
        if self._folder is None:
            self._require_started()
        return Path(self._folder or "") / "broker.log"

    @property
    def running(self) -> bool:
        """Whether the child process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = 60) -> Self:
        """Start the broker and wait until it serves; a first start fetches the jars too, outside the timeout.

        Raises BrokerError where the jars cannot be had, the port or the folder is taken, or the broker fails;
        nothing is left running then.
        """
        if self.running:
            raise BrokerError(
                "this broker is already started", got=f"process {self._java_pid}", remedy="stop() it first"
            )
        classpath, java = fetch_jars(self._progress), java_path()
        folder = self._prepare_folder()
        lock = _take_lock(folder)
        try:
            os.ftruncate(lock, 0)  # the pid in it is of a process that is gone
            deadline = time.monotonic() + timeout_s
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                self._port, controller_port = self._choose_ports(folder)
                try:
                    self._launch(folder, classpath, java, controller_port, lock)
                    self._await_ready(deadline, timeout_s)
                    break
                except _PortLostError:  # another process took a free port between our look and Kafka's bind
                    if attempt == _PORT_ATTEMPTS:
                        raise
            os.pwrite(lock, b"%d" % self._java_pid, 0)
        except BaseException:  # Ctrl-C too: whatever stops a start must not leave a child behind
            os.close(lock)
            self._end_group()
            self._drop_folder()
            raise
        os.close(lock)  # the child holds its own handle: the lock is free when the child is gone
        if self._owner_pid is None:
            atexit.register(self._at_exit, os.getpid())
        self._tell(f"Apache Kafka {KAFKA_VERSION} serves at {self.bootstrap} (process {self._java_pid})")
        return self

    def stop(self, timeout_s: float = 20) -> None:
        """End the broker, by force after timeout_s seconds, and remove a temporary folder. Idempotent."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._tell(f"the broker did not stop within {timeout_s:g} s and is killed")
            self._end_group()
        self._drop_folder()
        atexit.unregister(self._at_exit)

    def kill(self) -> None:
        """End the broker with SIGKILL, as a crash would; its folder stays, even a temporary one."""
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
        lines = render_properties(server_properties(folder, self._port, controller_port, self._settings))
        properties.write_text(lines, encoding="ascii")
        (folder / "log4j2.properties").write_text(LOG4J, encoding="ascii")
        base = [str(java), *_JVM, "-cp", os.pathsep.join(map(str, classpath))]
        if not (folder / "topics" / "meta.properties").exists():
            self._tell("formatting a new data folder")
            _format(folder, [*base, "kafka.tools.StorageTool"])
        self._tell(f"starting Apache Kafka {KAFKA_VERSION} on port {self._port}")
        base[1:1] = [f"-Xmx{self._heap_mb}m", f"-Djava.io.tmpdir={folder / 'tmp'}"]
        base[1:1] = [f"-Dlog4j2.configurationFile={folder / 'log4j2.properties'}"]
        owner = self._owner_pid or os.getpid()
        remove = "" if self._data_dir is not None else str(folder)
        with self.log_path.open("ab") as log:
            self._log_from = log.tell()
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", broker_supervisor.__file__, str(owner), str(_GRACE_S), str(lock),
                 remove, *base, "kafka.Kafka", str(properties)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=folder,
                pass_fds=(lock,), start_new_session=True,
            )  # fmt: skip
        self._process = process
        if process.stdout is not None:
            with process.stdout as pipe:
                self._java_pid = int(pipe.readline() or 0)

    def _await_ready(self, deadline: float, timeout_s: float) -> None:
        while not _serves(self._port):
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
            remedy=f"mend what the log names; where the data folder is from another version, use a new one; "
            f"or {OWN_BROKER}",
        )

    def _prepare_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="perennial-kafka-"))
        folder = self._folder
        if "," in str(folder):
            raise BrokerError("Kafka cannot keep data in a folder with a comma in its path", got=str(folder))
        try:
            (folder / "tmp").mkdir(parents=True, exist_ok=True)
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
        """The client port and the controller's; the client port is remembered in the folder."""
        memory = folder / "port.json"
        if self._wanted_port is not None:
            if not _is_free(self._wanted_port):
                raise BrokerError(
                    f"port {self._wanted_port} of {HOST} is taken",
                    got=self._wanted_port,
                    allowed="a free port, or none to have one chosen",
                    remedy="end the process that listens there, or give another port",
                )
            port = self._wanted_port
        else:
            remembered = _read_port(memory)
            port = remembered if remembered and _is_free(remembered) else _free_port()
        memory.write_text(json.dumps({"port": port}), encoding="ascii")
        controller = _free_port()
        while controller == port:
            controller = _free_port()
        return port, controller

    def _end_group(self) -> None:
        """Kill what is left of the child's process group and wait until the data folder's lock is free."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM where only zombies are left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 10
        while self._folder is not None and time.monotonic() < deadline:
            try:
                os.close(_take_lock(self._folder))
            except BrokerError:
                time.sleep(_POLL_S)
            else:
                break

    def _drop_folder(self) -> None:
        if self._data_dir is None and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _at_exit(self, pid: int) -> None:
        if os.getpid() == pid:  # a forked child inherits the hook, not the broker
            self.stop()

    def _require_started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise BrokerError("the broker is not started", remedy="call start() first")
        return self._process

    def _tell(self, line: str) -> None:
        if self._progress is not None:
            self._progress(line)


class _PortLostError(BrokerError):
    """Kafka could not bind a port that was free a moment ago."""


def _format(folder: Path, tool: list[str]) -> None:
    """Make folder/topics: an empty, formatted storage folder with ids of its own.

    Kafka's own tool costs a second of Java, so it runs once per cache; its result holds feature levels only,
    and is copied. meta.properties is written as Kafka's MetaPropertiesVersion.V1 has it, and last.
    """
    home = kafka_home()
    made = Path(tempfile.mkdtemp(prefix="formatted.", dir=home if os.access(home, os.W_OK) else folder))
    try:
        template = home / "formatted"
        if not template.exists():
            _run_format(made, tool)
            try:
                (made / "topics").rename(template)
            except OSError:  # a read-only cache, or another process was first
                template = made / "topics"
        partial = folder / "topics.partial"
        shutil.rmtree(partial, ignore_errors=True)  # what a killed start left; the folder's lock is ours
        shutil.copytree(template, partial)
        ids = [new_cluster_id(uuid.uuid4().bytes) for _ in range(2)]
        (partial / "meta.properties").write_text(
            f"version=1\ncluster.id={ids[0]}\ndirectory.id={ids[1]}\nnode.id={NODE_ID}\n", encoding="ascii"
        )
        partial.rename(folder / "topics")
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _run_format(made: Path, tool: list[str]) -> None:
    properties = made / "server.properties"
    properties.write_text(render_properties(server_properties(made, 1, 2, {})), encoding="ascii")
    command = [*tool, "format", "-t", new_cluster_id(uuid.uuid4().bytes), "-c", str(properties)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=made, check=False)
    if result.returncode != 0:
        raise BrokerError(
            f"a new data folder cannot be formatted:\n{(result.stdout + result.stderr)[-2000:]}\n",
            got=f"exit status {result.returncode}",
            remedy=f"mend what is named above, or {OWN_BROKER}",
        )


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take_lock(folder: Path) -> int:
    """A file descriptor that holds the folder's lock. Raises BrokerError that names the holding process."""
    lock = os.open(folder / "broker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_WAIT_S
    try:
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EWOULDBLOCK, "locked")
            time.sleep(0.1)
    except OSError as error:
        holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
        os.close(lock)
        if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
            raise BrokerError("the data folder cannot be locked", got=str(error)) from error
        raise BrokerError(
            f"another broker runs on {folder}",
            got=f"process {holder}" if holder else "a process that is just starting",
            allowed="one broker per data folder",
            remedy="use that broker, stop it, or give another folder",
        ) from None
    return lock


def _serves(port: int) -> bool:
    """Whether the broker answers a Metadata request (v1, no topics) with itself: registered and unfenced.

    An open port or an ApiVersions answer comes earlier, when a topic cannot be created yet.
    """
    client = b"perennial"
    body = struct.pack(">hhih", 3, 1, 1, len(client)) + client + struct.pack(">i", 0)
    try:
        with socket.create_connection((HOST, port), timeout=2) as link:
            link.sendall(struct.pack(">i", len(body)) + body)
            answer = b""
            while len(answer) < 12:  # size, correlation id, number of brokers
                part = link.recv(12 - len(answer))
                if not part:
                    return False
                answer += part
    except OSError:
        return False
    _, correlation, brokers = struct.unpack(">iii", answer)
    return bool(correlation == 1 and brokers >= 1)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Kafka binds: over connections in TIME_WAIT
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    """A free port below the range that the kernel gives to outgoing connections.

    Inside that range a client that keeps reconnecting to a stopped broker can meet itself and hold the port.
    """
    for _ in range(_PORT_PROBES):
        port = _PORTS.start + secrets.randbelow(len(_PORTS))
        if _is_free(port):
            return port
    raise BrokerError("no free port was found", got=f"{_PORT_PROBES} tries", allowed=f"{_PORTS} on {HOST}")


def _read_port(memory: Path) -> int | None:
    try:
        port = json.loads(memory.read_bytes())["port"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return port if isinstance(port, int) and 0 < port < 65536 else None
