"""Owns the embedded broker's configuration: what a development Kafka is told, and what its log tells."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from pathlib import Path

HOST = "127.0.0.1"
NODE_ID = 1

# What keeps the broker this process's own; a setting that names one of these is refused.
OWNED = (
    "process.roles", "node.id", "listeners", "advertised.listeners", "controller.listener.names",
    "controller.quorum.voters", "controller.quorum.bootstrap.servers", "log.dirs", "log.dir",
    "metadata.log.dir",
)  # fmt: skip

DEVELOPMENT = {
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
    # Sizes for one small machine: Kafka's own take 128 MB of heap for compaction, 20 MB of index a partition.
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
    """The broker's whole configuration: one node, loopback only, small; `settings` win over the defaults."""
    return {
        **DEVELOPMENT,
        **settings,
        "process.roles": "broker,controller",
        "node.id": str(NODE_ID),
        # A fixed voter, not a dynamic quorum: the latter keeps its port in the data, and it could not change.
        "controller.quorum.voters": f"{NODE_ID}@{HOST}:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "log.dirs": str(folder / "topics"),
    }


def render_properties(properties: Mapping[str, str]) -> str:
    r"""Java's properties syntax: its special characters escaped, blanks and what is not ASCII as \uXXXX."""
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
    """A cluster id of 22 characters from 16 random bytes, as Kafka's Uuid writes it."""
    text = base64.urlsafe_b64encode(random_bytes).decode("ascii").rstrip("=")
    return f"A{text[1:]}" if text.startswith("-") else text  # a leading dash would read as an option


def log_tail(path: Path, start: int = 0, lines: int = 12, limit_bytes: int = 64 * 1024) -> str:
    """The last lines after byte `start` with ERROR, FATAL or an exception, else the last ones."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - limit_bytes))
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        return str(error)
    every = [line for line in text.splitlines() if line.strip()]
    telling = [line for line in every if any(sign in line for sign in ("ERROR", "FATAL", "Exception", "Error"))]
    return "\n".join(line[:300] for line in (telling or every)[-lines:]) or "(empty)"
