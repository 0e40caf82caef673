"""Create kafka-python clients that fail fast, and that leave no thread or socket behind where no broker answers."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kafka.errors import KafkaConnectionError, KafkaError
from kafka.net.compat import KafkaNetClient

from perennial.streams.addresses import kafka_servers
from perennial.streams.kafka.security.options import kafka_python_options
from perennial.streams.kafka.security.trial import try_access
from perennial.streams.settings import Settings
from perennial.streams.settings.kafka_security_group import KafkaSecuritySettings

_log = logging.getLogger("perennial.kafka")

_EXPLAIN_S = 2.0
"""Seconds that may pass, after a client could not be created, until it is known whether TLS or SASL is why."""


def connect(
    make: Callable[..., Any], bootstrap: str, timeout_s: float, *, security: KafkaSecuritySettings, **config: Any
) -> Any:
    """Create a connected kafka-python client.

    There is one attempt; the caller decides whether to try again.

    Args:
        make: The client's class: KafkaProducer or KafkaConsumer.
        bootstrap: Brokers as `host:port[,host:port]`.
        timeout_s: Seconds that connecting may take.
        security: TLS and SASL.
        **config: Further configuration of the client.

    Returns:
        The client.

    Raises:
        KafkaError: No broker answers within the time.
        KafkaSecurityError: The broker and the settings of TLS and SASL do not agree.
        SettingsError: A file of TLS or SASL cannot be used.
        ValueError: The brokers or the configuration are not valid.
    """
    options = kafka_python_options(security)
    servers = require_listener(bootstrap, timeout_s, security)
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
            **options,
            **config,
        )
    except BaseException as error:
        # kafka-python 3.0.12: a constructor that raises leaves the thread and the sockets of its network client running.
        for network in networks:
            network.close()
        if isinstance(error, KafkaError):
            _raise_if_refused(servers, security, timeout_s)
        raise


@contextmanager
def secured(settings: Settings, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Yield the options of TLS and SASL for kafka-python clients that are created in the block.

    For clients that are not created by `connect`. Where TLS or SASL is set, the options are tried first, on a broker that
    listens. Where the block fails, they are tried afterwards.

    Args:
        settings: Names the brokers, TLS and SASL.
        timeout_s: Seconds that a trial may take.

    Yields:
        The options; empty for plaintext.

    Raises:
        KafkaSecurityError: The broker and the settings of TLS and SASL do not agree.
        KafkaError: A broker that listens does not answer in time, or the block failed.
        SettingsError: No broker is set, or a file of TLS or SASL cannot be used.
    """
    security, servers = settings.kafka_security, kafka_servers(settings.kafka.require_bootstrap())
    options = kafka_python_options(security)
    with suppress(KafkaConnectionError):  # nobody listens: the client's own timeout is how long it may wait
        check_access(settings, timeout_s)
    try:
        yield options
    except KafkaError:
        _raise_if_refused(servers, security, timeout_s)
        raise


def check_access(settings: Settings, timeout_s: float) -> None:
    """Try TLS and SASL on a broker that listens; plaintext is not tried.

    Args:
        settings: Names the brokers, TLS and SASL.
        timeout_s: Seconds that the trial may take.

    Raises:
        KafkaSecurityError: The broker and the settings of TLS and SASL do not agree.
        KafkaError: No broker answers in time.
        SettingsError: No broker is set, or a file of TLS or SASL cannot be used.
    """
    if settings.kafka_security.protocol != "plaintext":
        require_listener(settings.kafka.require_bootstrap(), timeout_s, settings.kafka_security)


def _raise_if_refused(servers: list[str], security: KafkaSecuritySettings, timeout_s: float) -> None:
    """Raise KafkaSecurityError where TLS and SASL are why a client could not be created."""
    for server in servers:
        with suppress(KafkaError):
            try_access(server, security, min(timeout_s, _EXPLAIN_S) / len(servers))


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


def require_listener(bootstrap: str, timeout_s: float, security: KafkaSecuritySettings) -> list[str]:
    """Return the brokers as a list once one of them accepts a connection, with TLS and SASL where they are set.

    Call it before creating a kafka-python client: kafka-python 3.0.12 leaks a socket with every refused attempt.

    Args:
        bootstrap: Brokers as `host:port[,host:port]`; other spellings as `kafka_servers` takes them.
        timeout_s: Seconds for all attempts together, and again for TLS and SASL.
        security: TLS and SASL.

    Returns:
        The brokers, each as `host:port`.

    Raises:
        KafkaConnectionError: No broker accepts a connection.
        KafkaError: The broker that accepts one does not answer in time.
        KafkaSecurityError: The broker and the settings of TLS and SASL do not agree.
        SettingsError: A file of TLS or SASL cannot be used.
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
            if security.protocol != "plaintext":
                try_access(server, security, timeout_s)
            return servers
    raise KafkaConnectionError("; ".join(failures) or "no address is given")
