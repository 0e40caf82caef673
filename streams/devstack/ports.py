"""Find free TCP ports on the loopback address."""

from __future__ import annotations

import secrets
import socket

from perennial.storage.errors import PerennialError

HOST = "127.0.0.1"

_PORTS = range(20_000, 32_000)
_PROBES = 200


class NoFreePortError(PerennialError):
    """No free port was found."""


def is_free(port: int) -> bool:
    """Return whether a server could bind the port of 127.0.0.1 now; old connections in TIME_WAIT do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a random free port below the range that the kernel gives to outgoing connections.

    HAZARD: inside that range a client that keeps reconnecting to a stopped server can connect to itself and hold the
    port.

    Raises:
        NoFreePortError: none was found in 200 tries.
    """
    for _ in range(_PROBES):
        port = _PORTS.start + secrets.randbelow(len(_PORTS))
        if is_free(port):
            return port
    raise NoFreePortError(
        got=f"{_PROBES} tries", allowed=f"{_PORTS.start} to {_PORTS.stop - 1} on {HOST}", remedy="end other servers"
    )
