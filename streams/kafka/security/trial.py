"""Try TLS and SASL on a broker, so that a refusal is reported at once, with its reason, and alike for every client.

None of the clients does that by itself. kafka-python 3.0.12 drops what it received together with the end of a connection,
which often is the reason of a refused authentication, and tries again until its timeout; its TLS handshake has none.
aiokafka says that it is unable to bootstrap. librdkafka tries again for ever and gives the reason to its log.

The trial sends four requests: ApiVersions, SaslHandshake, SaslAuthenticate and Metadata, in versions that every broker
from Kafka 1.0 on has. https://kafka.apache.org/protocol describes them.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from typing import Any, Final

from kafka.errors import KafkaConnectionError
from kafka.net.sasl import get_sasl_mechanism

from perennial.streams.kafka.security.access_errors import Refusals
from perennial.streams.kafka.security.options import kafka_python_options
from perennial.streams.settings.kafka_security_group import KafkaSecuritySettings

_METADATA: Final = (3, 1)
_SASL_HANDSHAKE: Final = (17, 1)
_API_VERSIONS: Final = (18, 0)
_SASL_AUTHENTICATE: Final = (36, 0)
_UNSUPPORTED_MECHANISM: Final = 33
_LEAST_S: Final = 0.001
_CLIENT: Final = b"perennial-trial"
_MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
_TLS_ALERT: Final = 0x15
"""First byte of the record with which a TLS listener answers a client without TLS."""


def try_access(server: str, security: KafkaSecuritySettings, timeout_s: float) -> None:
    """Connect, agree on TLS, prove who we are, ask for metadata, and disconnect.

    Args:
        server: The broker's address, host:port.
        security: TLS and SASL.
        timeout_s: Seconds for everything together.

    Raises:
        KafkaSecurityError: The broker and the settings do not agree.
        KafkaConnectionError: The broker does not answer in time.
        SettingsError: A file cannot be used.
    """
    options = kafka_python_options(security)
    refusals = Refusals(server, security)
    deadline_s = time.monotonic() + timeout_s
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), timeout=timeout_s) as plain:
            connection = plain
            if security.uses_tls:
                plain.settimeout(max(_LEAST_S, deadline_s - time.monotonic()))
                try:
                    connection = options["ssl_context"].wrap_socket(plain, server_hostname=host)
                except TimeoutError:
                    raise
                except OSError as error:
                    raise refusals.tls(error) from error
            with connection:
                _talk(_Exchange(connection, deadline_s), options, security, refusals)
    except OSError as error:
        raise KafkaConnectionError(f"{server}: {error or type(error).__name__}") from error


def _talk(exchange: _Exchange, options: dict[str, Any], security: KafkaSecuritySettings, refusals: Refusals) -> None:
    try:
        exchange.ask(_API_VERSIONS, b"")
        if security.uses_sasl:
            _authenticate(exchange, options, security, refusals)
        # A listener with SASL ends a connection that asks for anything else first.
        exchange.ask(_METADATA, struct.pack(">i", 0))
    except _OtherProtocolError as error:
        raise refusals.protocol(str(error)) from error
    except (ConnectionError, EOFError, ssl.SSLEOFError) as error:
        raise refusals.protocol("it ended the connection") from error
    except ssl.SSLError as error:  # with TLS 1.3 the broker looks at the client's certificate after the handshake
        raise refusals.client_certificate(error) from error


def _authenticate(
    exchange: _Exchange, options: dict[str, Any], security: KafkaSecuritySettings, refusals: Refusals
) -> None:
    answer = exchange.ask(_SASL_HANDSHAKE, _string(security.sasl_mechanism.encode()))
    code = answer.int16()
    if code == _UNSUPPORTED_MECHANISM:
        raise refusals.mechanism([answer.string() for _ in range(answer.int32())])
    if code:
        raise refusals.protocol(f"it has no SASL (Kafka error {code})")
    mechanism = get_sasl_mechanism(security.sasl_mechanism)(**options)
    reason = "the broker ended the connection"
    try:
        while not mechanism.is_done():
            proof = mechanism.auth_bytes()
            body = struct.pack(">i", len(proof)) + proof
            answer = exchange.ask(_SASL_AUTHENTICATE, body)
            code, message = answer.int16(), answer.string()
            if code:
                raise refusals.credentials(message or f"Kafka error {code}")
            mechanism.receive(answer.content())
        if mechanism.is_authenticated():
            return
    except (ConnectionError, EOFError, ValueError, KeyError) as error:
        # ValueError, KeyError: the broker's answer to SCRAM is not that of a broker that knows the password.
        reason = str(error) or reason
    raise refusals.credentials(reason)


class _OtherProtocolError(Exception):
    """The answer is none of Kafka's protocol."""


class _Exchange:
    """Sends requests and reads their answers.

    Args:
        connection: A connected socket.
        deadline_s: Monotonic time at which the broker must have answered everything, in seconds.
    """

    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        self._connection = connection
        self._deadline_s = deadline_s

    def ask(self, kind: tuple[int, int], body: bytes) -> _Answer:
        """Return the answer to a request.

        Args:
            kind: The API's number, and the request's version.
            body: What follows the request's header.
        """
        request = struct.pack(">hhi", *kind, 0) + _string(_CLIENT) + body
        self._connection.settimeout(self._left_s())
        self._connection.sendall(struct.pack(">i", len(request)) + request)
        head = self._read(4)
        (size,) = struct.unpack(">i", head)
        if not 4 <= size <= _MAX_ANSWER_BYTES:
            raise _OtherProtocolError("it speaks TLS" if head[0] == _TLS_ALERT else "its answer is none of Kafka's")
        return _Answer(self._read(size)[4:])

    def _read(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            self._connection.settimeout(self._left_s())
            part = self._connection.recv(size - len(received))
            if not part:
                raise EOFError
            received += part
        return bytes(received)

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no answer in time")
        return left_s


class _Answer:
    """Reads an answer's fields in order."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def int16(self) -> int:
        return int(self._unpack(">h"))

    def int32(self) -> int:
        return int(self._unpack(">i"))

    def string(self) -> str:
        return self._take(self.int16()).decode("utf-8", "replace")

    def content(self) -> bytes:
        return self._take(self.int32())

    def _unpack(self, form: str) -> Any:
        if self._at + struct.calcsize(form) > len(self._content):
            raise _OtherProtocolError("its answer ends early")
        (value,) = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return value

    def _take(self, size: int) -> bytes:
        taken = self._content[self._at : self._at + max(0, size)]  # -1: null
        self._at += len(taken)
        return taken


def _string(content: bytes) -> bytes:
    return struct.pack(">h", len(content)) + content
