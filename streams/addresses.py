"""Read the addresses that settings hold: Kafka's brokers, and hosts of HTTP servers.

Every client gets its address from here, because the clients differ in what they read: librdkafka takes a listener's
scheme and blanks, kafka-python takes neither, and Faust puts a scheme of its own before the text.
"""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from urllib.request import OpenerDirector, ProxyHandler, build_opener

KAFKA_PORT = 9092
"""The port of a broker whose address names none, as in Kafka's own clients."""
LOOPBACK = "127.0.0.1"

_ALLOWED = "host:port[,host:port], each also as PLAINTEXT://host:port; an IPv6 address in brackets, [::1]:9092"
_SCHEMES = ("", "plaintext", "kafka")
_SERVER = re.compile(
    r"(?:(?P<scheme>\w+)://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?/?", re.ASCII
)
_ANY_HOST = {"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104  # a server's address, read and not bound


def kafka_servers(text: str) -> list[str]:
    """Return the brokers that a text names, each as `host:port`, in the order of the text and each once.

    Args:
        text: Addresses with commas between them. Blanks around them, the schemes PLAINTEXT and kafka, and a missing
            port (9092 then) are allowed.

    Raises:
        ValueError: A part is no address, or has a scheme that no client here speaks, such as SSL.
    """
    servers: dict[str, None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = _SERVER.fullmatch(part)
        if not found or (found["scheme"] or "").lower() not in _SCHEMES:
            raise ValueError(_ALLOWED)
        host, port = found["host"], int(found["port"] or KAFKA_PORT)
        if host.startswith("["):
            try:
                host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
            except ValueError:
                raise ValueError(_ALLOWED) from None
        if not 0 < port < 65536:
            raise ValueError(f"{_ALLOWED}; a port from 1 to 65535")
        servers[f"{host}:{port}"] = None
    if not servers and text.strip():
        raise ValueError(_ALLOWED)
    return list(servers)


def without_brackets(host: str) -> str:
    """Return a host as sockets take it: an IPv6 address without the brackets of a URL, and no blanks around."""
    host = host.strip()
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def http_url(host: str, port: int, path: str = "") -> str:
    """Return the URL under which this machine reaches a server that listens on `host`.

    Args:
        host: The address that the server listens on; every-interface addresses (0.0.0.0, ::) become loopback.
        port: Its port.
        path: Path with its slash.
    """
    reached = _ANY_HOST.get(without_brackets(host), without_brackets(host))
    return f"http://[{reached}]:{port}{path}" if ":" in reached else f"http://{reached}:{port}{path}"


def is_loopback(host: str) -> bool:
    """Return True for localhost and for the addresses by which a machine reaches only itself."""
    host = without_brackets(host).lower()
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def direct_opener() -> OpenerDirector:
    """Return an opener of URLs that never uses a proxy, for servers of this machine.

    urllib obeys http_proxy for 127.0.0.1 too, and a proxy cannot reach this machine's loopback address.
    """
    return build_opener(ProxyHandler({}))
