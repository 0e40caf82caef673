"""Makes kafka-python clients that fail fast and leave nothing behind where no broker answers."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

from kafka.errors import KafkaConnectionError, KafkaError
from kafka.net.compat import KafkaNetClient

_log = logging.getLogger("perennial.kafka")


def connect(make: Callable[..., Any], bootstrap: str, timeout_s: float, **config: Any) -> Any:
    """`make` (KafkaProducer, KafkaConsumer) with this configuration, connected. bootstrap: host:port[,host:port].

    Raises KafkaError or ValueError where no broker answers within the time.
    """
    servers = require_listener(bootstrap, timeout_s)
    clients: list[Any] = []

    def network(**options: Any) -> Any:
        clients.append(KafkaNetClient(**options))
        return clients[-1]

    try:
        return make(
            bootstrap_servers=servers,
            bootstrap_timeout_ms=max(1, int(timeout_s * 1000)),
            allow_auto_create_topics=False,  # a made-up topic would have the wrong partitions and retention
            kafka_client=network,
            **config,
        )
    except BaseException:
        for client in clients:  # a constructor that fails leaves its thread and sockets running
            client.close()
        raise


def close_producer(producer: Any, timeout_s: float) -> None:
    """Close a KafkaProducer; what was not delivered within the time has failed then.

    Hazard: kafka-python 3.0.12 gives up closing where the flush that it begins with times out. Its thread would go on
    for ever, at its connections too, and no promise of a delivery would end.
    """
    try:
        producer.close(timeout=timeout_s)
    except (KafkaError, OSError) as error:
        _log.debug("a producer is closed by force: %s", error)
        producer._sender.force_close()  # noqa: SLF001 - there is no public way
        producer._closed = True  # noqa: SLF001 - or the collector would close it again, and print what that raises


def require_listener(bootstrap: str, timeout_s: float) -> list[str]:
    """The servers named, once one of them took a TCP connection. Raises KafkaConnectionError, ValueError.

    Comes before any client, for kafka-python leaks a socket with every attempt that is refused.
    """
    servers = [part.strip() for part in bootstrap.split(",") if part.strip()]
    said: list[str] = []
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"not host:port: {server!r}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s / len(servers)).close()
        except (OSError, OverflowError) as error:
            said.append(f"{server}: {error}")
        else:
            return servers
    raise KafkaConnectionError("; ".join(said) or "no address is given")
