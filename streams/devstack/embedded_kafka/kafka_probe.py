"""Ask a broker whether it serves, without a Kafka client."""

from __future__ import annotations

import socket
import struct

from perennial.streams.devstack.ports import HOST

_METADATA, _VERSION, _CORRELATION_ID = 3, 1, 1
_CLIENT = b"perennial"
_TIMEOUT_S = 2.0


def serves(port: int) -> bool:
    """Return whether the broker on 127.0.0.1 lists itself when asked for Metadata: it is registered and unfenced.

    An open port or an answer to ApiVersions comes earlier, when no topic can be created yet.
    """
    # A request header v1 and the body of Metadata v1 with an empty list of topics.
    request = struct.pack(">hhih", _METADATA, _VERSION, _CORRELATION_ID, len(_CLIENT)) + _CLIENT + struct.pack(">i", 0)
    try:
        with socket.create_connection((HOST, port), timeout=_TIMEOUT_S) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            answer = b""
            while len(answer) < 12:  # size, correlation id, number of brokers
                part = connection.recv(12 - len(answer))
                if not part:
                    return False
                answer += part
    except OSError:
        return False
    _, correlation_id, brokers = struct.unpack(">iii", answer)
    return bool(correlation_id == _CORRELATION_ID and brokers >= 1)
