"""Owns the embedded broker: a real Apache Kafka in KRaft mode as a child process, for development, tests and demos.

One node that is broker and controller, on 127.0.0.1 only, without TLS and without users: never expose it. The child
runs in a session of its own, so Ctrl-C at the terminal reaches this process first and the clients can stop before the
broker does; it ends with its owner however the owner ends (see broker_supervisor.py).
"""

from __future__ import annotations

import atexit
import base64
import errno
import fcntl
import json
import os
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
from pathlib import Path
from types import TracebackType
from typing import Self

from streams import broker_supervisor
from streams.broker_jars import KAFKA_VERSION, OWN_BROKER, BrokerError, Progress, fetch_jars, java_path

__all__ = ["KAFKA_VERSION", "BrokerError", "EmbeddedBroker", "fetch_jars", "server_properties"]

HOST = "127.0.0.1"
NODE_ID = 1

# What keeps the broker this process's own; a setting that names one of these is refused.
_OWNED = (
    "process.roles", "node.id", "listeners", "advertised.listeners", "controller.listener.names",
    "controller.quorum.voters", "controller.quorum.bootstrap.servers", "log.dirs", "log.dir", "metadata.log.dir",
)  # fmt: skip

_DEVELOPMENT = {
    "auto.create.topics.enable": "false",  # a mistyped topic name must fail
    "message.max.bytes": str(2 * 1024 * 1024),
    "replica.fetch.max.bytes": str(2 * 1024 * 1024),
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "5",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "5",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "group.initial.rebalance.delay.ms": "0",
    # Sizes for one small machine: Kafka's own reserve 128 MB of heap for compaction and 20 MB of index per partition.
    "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
    "log.index.size.max.bytes": str(2 * 1024 * 1024),
    "log.segment.bytes": str(128 * 1024 * 1024),
    # After a crash the broker's own old session must run out before it may register again (Kafka's default: 9 s).
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "num.network.threads": "2",
    "num.io.threads": "4",
}

_LOG4J = """\
status = warn
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = [%d{ISO8601}] %p %m (%c)%n
rootLogger.level = info
rootLogger.appenderRef.out.ref = out
"""

_JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-XX:+ExitOnOutOfMemoryError",
        "--sun-misc-unsafe-memory-access=allow", "--enable-native-access=ALL-UNNAMED")  # fmt: skip
_LOG_KEPT_BYTES = 8 * 1024 * 1024
_POLL_S = 0.05
_GRACE_S = 30.0
_PORT_ATTEMPTS = 3
_BIND_FAILURES = ("Address already in use", "Socket server failed to bind")


class EmbeddedBroker:
    """A broker to start, use at `bootstrap` and stop; also a context manager.

    data_dir: folder that keeps topics, offsets and the cluster id over restarts; None: a temporary one, removed by
    stop(). port: TCP port on 127.0.0.1; None: a free one, and with a data_dir the one of last time where it is still
    free. on_progress: called with one line of text per step. settings: more lines for server.properties. heap_mb: the
    Java heap in MiB (resident memory is about 200 MiB more at most). owner_pid: the process whose death ends the
    broker; None: this one, which then also stops it on a normal exit.
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
        for key in sorted(self._settings.keys() & set(_OWNED)):
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
        """Process id to send SIGTERM to for a graceful end from another process. Raises BrokerError before start()."""
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
        """Start the broker and wait until it serves; a first start also downloads the jars, outside the timeout.

        Raises BrokerError where the jars cannot be had, the port or the folder is taken, or the broker fails; nothing
        is left running then.
        """
        if self.running:
            raise BrokerError(
                "this broker is already started", got=f"process {self._java_pid}", remedy="stop() it first"
            )
        classpath, java = fetch_jars(self._progress), java_path()
        folder = self._prepare_folder()
        lock = _take_lock(folder)
        try:
            deadline = time.monotonic() + timeout_s
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                self._port, controller_port = self._choose_ports(folder)
                try:
                    self._launch(folder, classpath, java, controller_port, lock)
                    self._await_ready(deadline, timeout_s)
                    break
                except _PortLostError:  # another process took a free port between our look and Kafka's bind
                    if attempt == _PORT_ATTEMPTS or self._wanted_port is not None:
                        raise
            os.ftruncate(lock, 0)
            os.pwrite(lock, b"%d" % self._java_pid, 0)
        except BaseException:  # Ctrl-C too: whatever stops a start must not leave a child behind
            self._end_group()
            self._drop_folder()
            raise
        finally:
            os.close(lock)  # the child holds its own handle: the lock is free when the child is gone
        if self._owner_pid is None:
            atexit.register(self._at_exit, os.getpid())
        self._tell(f"Apache Kafka {KAFKA_VERSION} serves at {self.bootstrap} (process {self._java_pid})")
        return self

    def stop(self, timeout_s: float = 20) -> None:
        """End the broker gracefully, by force after timeout_s seconds, and remove a temporary folder. Idempotent."""
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
        """End the broker with SIGKILL, as a crash would; the folder stays, also a temporary one, for start()."""
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
        properties.write_text(
            render_properties(server_properties(folder, self._port, controller_port, self._settings)), encoding="latin-1"
        )
        (folder / "log4j2.properties").write_text(_LOG4J, encoding="ascii")
        base = [str(java), *_JVM, f"-Djava.io.tmpdir={folder / 'tmp'}", "-cp", os.pathsep.join(map(str, classpath))]
        if not (folder / "topics" / "meta.properties").exists():
            self._tell("formatting a new data folder")
            _format(folder, [*base, "kafka.tools.StorageTool"], properties)
        self._tell(f"starting Apache Kafka {KAFKA_VERSION} on port {self._port}")
        base[1:1] = [f"-Xmx{self._heap_mb}m", f"-Dlog4j2.configurationFile={folder / 'log4j2.properties'}"]
        owner = self._owner_pid or os.getpid()
        remove = "" if self._data_dir is not None else str(folder)
        with self.log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", broker_supervisor.__file__, str(owner), str(_GRACE_S), str(lock), remove,
                 *base, "kafka.Kafka", str(properties)],
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
        tail = log_tail(self.log_path)
        kind = _PortLostError if any(sign in tail for sign in _BIND_FAILURES) else BrokerError
        where = "" if self._data_dir is None else f" {self.log_path}"
        return kind(
            f"{what}; last lines of its log{where}:\n{tail}\n",
            got=f"exit status {self._process.poll() if self._process else None}",
            remedy=f"mend what the log names; with settings or a data folder from another version, use a new folder; "
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
                "the data folder is not usable", got=str(error), allowed="a folder that this user may write to"
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
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # macOS answers EPERM where only zombies are left
            pass
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


def server_properties(folder: Path, port: int, controller_port: int, settings: Mapping[str, str]) -> dict[str, str]:
    """The broker's whole configuration: one node, loopback only, small; `settings` win over the defaults."""
    return {
        **_DEVELOPMENT,
        **settings,
        "process.roles": "broker,controller",
        "node.id": str(NODE_ID),
        # A fixed voter and not a dynamic quorum: the port of the latter is kept in the data and could not change.
        "controller.quorum.voters": f"{NODE_ID}@{HOST}:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "log.dirs": str(folder / "topics"),
    }


def render_properties(properties: Mapping[str, str]) -> str:
    r"""Java's properties syntax: backslashes and line ends escaped, what is not ASCII as \uXXXX (UTF-16)."""
    return "".join(f"{_escape(key)}={_escape(value)}\n" for key, value in sorted(properties.items()))


def _escape(text: str) -> str:
    named = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", " ": "\\ ", "=": "\\=", ":": "\\:", "#": "\\#", "!": "\\!"}
    units = struct.unpack(f">{len(text.encode('utf-16-be')) // 2}H", text.encode("utf-16-be"))
    return "".join(named.get(chr(u), chr(u) if 32 < u < 127 else f"\\u{u:04x}") for u in units)


def new_cluster_id(random_bytes: bytes) -> str:
    """A cluster id of 22 characters from 16 random bytes, as Kafka's Uuid writes it."""
    text = base64.urlsafe_b64encode(random_bytes).decode("ascii").rstrip("=")
    return f"A{text[1:]}" if text.startswith("-") else text  # a leading dash would read as an option


def log_tail(path: Path, lines: int = 12, limit_bytes: int = 64 * 1024) -> str:
    """The last lines of a log that tell most: those with ERROR, FATAL or an exception, else simply the last ones."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit_bytes))
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        return str(error)
    every = [line for line in text.splitlines() if line.strip()]
    telling = [line for line in every if any(sign in line for sign in ("ERROR", "FATAL", "Exception", "Error"))]
    return "\n".join(line[:300] for line in (telling or every)[-lines:]) or "(empty)"


def _format(folder: Path, tool: list[str], properties: Path) -> None:
    cluster = new_cluster_id(uuid.uuid4().bytes)
    command = [*tool, "format", "--ignore-formatted", "-t", cluster, "-c", str(properties)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder, check=False)
    if result.returncode != 0:
        raise BrokerError(
            f"a new data folder cannot be formatted:\n{(result.stdout + result.stderr)[-2000:]}\n",
            got=f"exit status {result.returncode}",
            remedy=f"mend what is named above, or {OWN_BROKER}",
        )


def _take_lock(folder: Path) -> int:
    """An open file descriptor that holds the folder's lock. Raises BrokerError that names the process which has it."""
    lock = os.open(folder / "broker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    """Whether the broker answers a Metadata request (v1, no topics) with itself in the list: registered and unfenced.

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
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _read_port(memory: Path) -> int | None:
    try:
        port = json.loads(memory.read_bytes())["port"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return port if isinstance(port, int) and 0 < port < 65536 else None
