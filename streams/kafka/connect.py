"""Create kafka-python clients that fail fast, and that leave no thread or socket behind where no broker answers."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

from kafka.errors import KafkaConnectionError, KafkaError
from kafka.net.compat import KafkaNetClient

from perennial.streams.addresses import kafka_servers

_log = logging.getLogger("perennial.kafka")


def connect(make: Callable[..., Any], bootstrap: str, timeout_s: float, **config: Any) -> Any:
    """Create a connected kafka-python client.

    There is one attempt; the caller decides whether to try again.

    Args:
        make: The client's class: KafkaProducer or KafkaConsumer.
        bootstrap: Brokers as `host:port[,host:port]`.
        timeout_s: Seconds that connecting may take.
        **config: Further configuration of the client.

    Returns:
        The client.

    Raises:
        KafkaError: No broker answers within the time.
        ValueError: The brokers or the configuration are not valid.
    """
    servers = require_listener(bootstrap, timeout_s)
    networks: list[Any] = []

    def make_network(**options: Any) -> Any:
        networks.append(KafkaNetClient(**options))
        return networks[-1]

    try:
        return make(
            bootstrap_servers=servers,
            bootstrap_timeout_ms=max(1, int(timeout_s * 1000)),
            allow_auto_create_topics=False,  # such a topic would have the wrong partition count and retention
            kafka_client=make_network,
            **config,
        )
    except BaseException:
        # kafka-python 3.0.12: a constructor that raises leaves the thread and the sockets of its network client running.
        for network in networks:
            network.close()
        raise


def close_producer(producer: Any, timeout_s: float) -> None:
    """Close a KafkaProducer. Records that are not delivered within the time have failed.

    Hazard: `KafkaProducer.close` of kafka-python 3.0.12 begins with a flush (since dpkp/kafka-python#2537), and where
    that flush times out it raises before it stops the sender. The sender's thread would run on for ever, keep its
    connections, and no delivery future would ever complete.

    Args:
        producer: The producer to close.
        timeout_s: Seconds to wait for outstanding deliveries.
    """
    try:
        producer.close(timeout=timeout_s)
    except (KafkaError, OSError) as error:
        _log.debug("a producer did not close in time and is closed by force: %s", error)
        producer._sender.force_close()  # noqa: SLF001 - there is no public way
        # Otherwise the producer's finaliser would call close() again and print what it raises.
        producer._closed = True  # noqa: SLF001


def require_listener(bootstrap: str, timeout_s: float) -> list[str]:
    """Return the brokers as a list once one of them accepts a TCP connection.

    Call it before creating a kafka-python client: kafka-python 3.0.12 leaks a socket with every refused attempt.

    Args:
        bootstrap: Brokers as `host:port[,host:port]`; other spellings as `kafka_servers` takes them.
        timeout_s: Seconds for all attempts together.

    Returns:
        The brokers, each as `host:port`.

    Raises:
        KafkaConnectionError: No broker accepts a connection.
        ValueError: A part is no address.
    """
    servers = kafka_servers(bootstrap)
    failures: list[str] = []
    for server in servers:
        host, _, port = server.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s / len(servers)).close()
        except (OSError, OverflowError) as error:
            failures.append(f"{server}: {error}")
        else:
            return servers
    raise KafkaConnectionError("; ".join(failures) or "no address is given")
