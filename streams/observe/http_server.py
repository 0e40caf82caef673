"""Serve /metrics for Prometheus and /healthz for health checks."""

from __future__ import annotations

import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, ClassVar, Final, Self

import orjson
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from perennial.storage.errors import PerennialError
from perennial.streams.observe.metrics import Metrics

_MAX_CONNECTIONS: Final = 16
_REQUEST_TIMEOUT_S: Final = 5.0


class MetricsError(PerennialError):
    """The address of /metrics and /healthz is not usable."""

    exit_code = 2


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0, the default here: one request per connection, so that none can be held between scrapes.
    metrics: ClassVar[Metrics]
    timeout = _REQUEST_TIMEOUT_S
    server_version = "perennial"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, self.metrics.exposition())
        elif path == "/healthz":
            report = self.metrics.health.report()
            status = HTTPStatus.OK if report.healthy else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, "application/json", orjson.dumps(report))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"only /metrics and /healthz\n")

    do_HEAD = do_GET  # noqa: N815 - the name is the base class's

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        pass


class _BoundedServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = _MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):  # a thread per idle connection would exhaust the role
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client disconnected, or sent no request in time: not worth a log line

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks DNS for the host's full name, which can hang
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class MetricsServer:
    """The running HTTP server. Close it, or use it in a `with` statement.

    Args:
        httpd: a server that is bound to its address.

    Attributes:
        port: the port that it listens on; the one that the system chose if 0 was asked for.
    """

    def __init__(self, httpd: _BoundedServer) -> None:
        self._httpd = httpd
        self.port: int = httpd.server_port
        self._thread = threading.Thread(
            target=httpd.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering. Return when the port is free."""
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_metrics(metrics: Metrics, host: str = "127.0.0.1", port: int = 0) -> MetricsServer:
    """Start answering GET and HEAD of /metrics and /healthz, in threads of their own.

    At most 16 connections are open at a time; further ones are closed at once.

    Args:
        metrics: the figures of the role, with its health.
        host: the address to listen on.
        port: the port to listen on; 0: any free one.

    Raises:
        MetricsError: the address is not usable.
    """
    handler = type("Handler", (_Handler,), {"metrics": metrics})
    try:
        return MetricsServer(_BoundedServer((host, port), handler))
    except (OSError, OverflowError) as error:
        raise MetricsError(
            f"cannot listen for /metrics: {error}",
            got=f"{host}:{port}",
            allowed="a free port on an address of this host",
            remedy="set PERENNIAL_METRICS_PORT to another port, or to 0 to switch it off",
        ) from error
