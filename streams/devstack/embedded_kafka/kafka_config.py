"""Configuration of the embedded broker, and the part of its log that explains a failure."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from pathlib import Path

from perennial.streams.devstack.ports import HOST

NODE_ID = 1

# These keep the broker on loopback and in its folder; a caller's setting that names one of them is refused.
OWNED = (
    "process.roles", "node.id", "listeners", "advertised.listeners", "controller.listener.names",
    "controller.quorum.voters", "controller.quorum.bootstrap.servers", "log.dirs", "log.dir",
    "metadata.log.dir",
)  # fmt: skip

DEVELOPMENT = {
    "auto.create.topics.enable": "false",  # a mistyped topic name must fail
    # One broker has no replica that survives a power cut. Without this setting a cut takes records that were acknowledged
    # and learned; later records get their offsets and would be taken for known ones (decision 0034).
    "log.flush.interval.messages": "1",
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
    # Sizes for one small machine: Kafka's defaults take 128 MB of heap for compaction and 20 MB of index per partition.
    "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
    "log.index.size.max.bytes": str(2 * 1024 * 1024),
    "log.segment.bytes": str(128 * 1024 * 1024),
    # After a crash the broker's own old session must run out before it may register again (default: 9 s).
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "num.network.threads": "2",
    "num.io.threads": "4",
}

LOG4J = """\
status = warn
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = [%d{ISO8601}] %p %m (%c)%n
rootLogger.level = info
rootLogger.appenderRef.out.ref = out
"""


def server_properties(folder: Path, port: int, controller_port: int, settings: Mapping[str, str]) -> dict[str, str]:
    """Return the broker's whole configuration: one node, loopback only, small.

    Args:
        folder: the broker's data folder.
        port: port for clients.
        controller_port: port of the controller.
        settings: further properties; they win over the defaults, not over what `OWNED` names.
    """
    return {
        **DEVELOPMENT,
        **settings,
        "process.roles": "broker,controller",
        "node.id": str(NODE_ID),
        # A fixed voter: a dynamic quorum would store the controller's port in the data, and the port could never change.
        "controller.quorum.voters": f"{NODE_ID}@{HOST}:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "log.dirs": str(folder / "topics"),
    }


def render_properties(properties: Mapping[str, str]) -> str:
    r"""Return the properties in Java's syntax: special characters escaped, blanks and non-ASCII ones as \uXXXX."""
    return "".join(f"{_escape(key)}={_escape(value)}\n" for key, value in sorted(properties.items()))


def _escape(text: str) -> str:
    escaped = []
    for (unit,) in struct.iter_unpack(">H", text.encode("utf-16-be")):
        if not 32 < unit < 127:
            escaped.append(f"\\u{unit:04x}")
        else:
            escaped.append(f"\\{unit:c}" if chr(unit) in "\\=:#!" else f"{unit:c}")
    return "".join(escaped)


def new_cluster_id(random_bytes: bytes) -> str:
    """Return a cluster id of 22 characters from 16 random bytes, as Kafka's class Uuid writes it."""
    text = base64.urlsafe_b64encode(random_bytes).decode("ascii").rstrip("=")
    return f"A{text[1:]}" if text.startswith("-") else text  # a leading dash would read as an option


def log_tail(path: Path, start: int = 0, lines: int = 12, limit_bytes: int = 64 * 1024) -> str:
    """Return the last lines of a log that tell of an error, or its last lines where none does.

    Args:
        path: the log file.
        start: byte of the file at which to begin; what is before it is ignored.
        lines: how many lines to return at most.
        limit_bytes: how much of the file's end to read at most.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - limit_bytes))
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        return str(error)
    written = [line for line in text.splitlines() if line.strip()]
    telling = [line for line in written if any(sign in line for sign in ("ERROR", "FATAL", "Exception", "Error"))]
    return "\n".join(line[:300] for line in (telling or written)[-lines:]) or "(empty)"
