"""What every role counts for Prometheus, and the small HTTP server of /metrics and /healthz.

Owns the metric names, the bound on label values and the judgement "work waits and nothing moves". Knows
nothing of topics, stores or models: roles say what happened, in plain numbers.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, ClassVar, Self

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from perennial.storage.errors import PerennialError
from perennial.streams.settings import Settings

MAX_LABEL_VALUES = 100
OTHER = "other"
DEFAULT_STALL_S = 120.0
_MAX_CONNECTIONS = 16
_REQUEST_TIMEOUT_S = 5.0
_FORGET_BUCKETS_S = (0.1, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 86_400, 3 * 86_400, 7 * 86_400, 30 * 86_400)
_STAGE_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class MetricsError(PerennialError):
    """The address of /metrics and /healthz is not usable."""

    exit_code = 2


class Metrics:
    """The figures of one role, in a registry of its own.

    Every series carries the label `role`. A label takes at most 100 distinct values in the life of the
    process; what comes after counts under "other", for each series costs memory here and in Prometheus.
    Thread-safe.
    """

    def __init__(
        self, role: str, settings: Settings | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.role = role
        self.registry = CollectorRegistry()
        self.stall_after_s = settings.observe.stall_s if settings else DEFAULT_STALL_S
        self._clock = clock
        self._lock = threading.Lock()
        self._label_values: dict[str, set[str]] = {}
        self._lag_events: dict[str, int] = {}
        self._waiting = False
        self._started = False
        self._still_since: float | None = None
        self._oldest: tuple[float, float] | None = None
        self._refused_runs: dict[str, int] = {}
        self._define()

    def _define(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"perennial_{name}", text, ("role", *labels), registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"perennial_{name}", text, ("role", *labels), registry=self.registry)

        def seconds(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _STAGE_BUCKETS_S) -> Histogram:
            names = ("role", *labels)
            return Histogram(f"perennial_{name}_seconds", text, names, registry=self.registry, buckets=buckets)

        self._events_in = counter("events_in", "Events read.", "topic")
        self._events_out = counter("events_out", "Events written and acknowledged.", "topic")
        self._refused = counter("refused", "Events put into dead-letters.", "reason")
        self._lag = gauge("lag_events", "Events published and not yet handled.", "topic")
        oldest = gauge(
            "oldest_unlearned_event_age_seconds",
            "Age of the oldest event not yet learned; grows until it is learned; 0: none.",
        )
        oldest.labels(self.role).set_function(self._oldest_now_s)
        self._drift = counter("drift", "Drift detections.", "signal", "detector", "adapter")
        self._cuts = counter("cuts", "Micro-batches cut.", "reason")
        self._cut_examples = counter("cut_examples", "Examples in micro-batches.", "reason")
        self._cut_tokens = counter("cut_tokens", "Tokens in micro-batches.", "reason")
        self._updates = counter("updates", "Updates done.", "outcome", "adapter")
        self._refused_run = gauge(
            "refused_updates_in_a_row", "Updates refused since the last that was promoted.", "adapter"
        )
        self._stages = seconds("stage", "Time per stage.", "stage")
        self._loss = gauge("loss_nats", "Mean loss per token, before or after.", "adapter", "which")
        self._trained_tokens = counter("trained_tokens", "Tokens trained on.")
        self._trained_seconds = counter("trained_seconds", "Time spent in training.")
        self._generation = gauge("alias_generation", "Generation of the adapter's alias.", "adapter")
        self._store_errors = counter("store_errors", "Calls to the object store that failed.", "op")
        self._acks = counter("acks", "Versions that subscribers activated.", "adapter")
        self._ack_stages = seconds("ack_stage", "Time per stage in subscribers.", "stage")
        self._forget_requests = gauge("forget_requests", "Retention requests in each state.", "state")
        self._forget_overdue = gauge("forget_overdue_requests", "Open retention requests that are past due.")
        self._forgotten = counter("forgotten_examples", "Examples made forgotten.")
        self._forget_time = seconds("forget", "Time from a retention request to its end.", buckets=_FORGET_BUCKETS_S)
        self._quarantined = gauge("quarantined_examples", "Examples held back from learning.")
        self._trained_tokens.labels(self.role)
        self._trained_seconds.labels(self.role)

    def _bounded(self, label: str, value: str) -> str:
        with self._lock:
            values = self._label_values.setdefault(label, set())
            if value in values:
                return value
            if len(values) >= MAX_LABEL_VALUES:
                return OTHER
            values.add(value)
            return value

    def events_in(self, topic: str, n: int = 1) -> None:
        """Events were read."""
        self._events_in.labels(self.role, self._bounded("topic", topic)).inc(n)

    def events_out(self, topic: str, n: int = 1) -> None:
        """Events were written and acknowledged."""
        self._events_out.labels(self.role, self._bounded("topic", topic)).inc(n)

    def refused(self, reason: str, n: int = 1) -> None:
        """Events went into dead-letters."""
        self._refused.labels(self.role, self._bounded("reason", reason)).inc(n)

    def lag(self, topic: str, events: int) -> None:
        """So many events of the topic are published and not handled yet; above zero, work waits."""
        topic = self._bounded("topic", topic)
        self._lag.labels(self.role, topic).set(events)
        with self._lock:
            self._lag_events[topic] = events
            self._reckon_waiting()

    def oldest_age_s(self, seconds: float) -> None:
        """The oldest unlearned event is so old now; 0: none. It grows here until the next call."""
        with self._lock:
            self._oldest = (seconds, self._clock()) if seconds > 0 else None

    def _oldest_now_s(self) -> float:
        with self._lock:
            if self._oldest is None:
                return 0.0
            age_s, at_s = self._oldest
            return age_s + max(0.0, self._clock() - at_s)

    def drift(self, signal: str, detector: str, adapter: str = OTHER) -> None:
        """A detector fired, on what came for the adapter."""
        labels = self._bounded("signal", signal), self._bounded("detector", detector)
        self._drift.labels(self.role, *labels, self._bounded("adapter", adapter)).inc()

    def cut(self, reason: str, examples: int, tokens: int) -> None:
        """A micro-batch was cut."""
        reason = self._bounded("cut_reason", reason)
        self._cuts.labels(self.role, reason).inc()
        self._cut_examples.labels(self.role, reason).inc(examples)
        self._cut_tokens.labels(self.role, reason).inc(tokens)

    def update(self, outcome: str, adapter: str) -> None:
        """An update ended (promoted, refused, ...); counts the refusals in a row of each adapter too."""
        adapter = self._bounded("adapter", adapter)
        self._updates.labels(self.role, self._bounded("outcome", outcome), adapter).inc()
        if adapter == OTHER:
            return  # of many adapters there is no row
        with self._lock:
            run = self._refused_runs.get(adapter, 0)
            run = run + 1 if outcome == "refused" else 0 if outcome == "promoted" else run
            self._refused_runs[adapter] = run
            self._refused_run.labels(self.role, adapter).set(run)

    def stage_s(self, stage: str, seconds: float) -> None:
        """A stage took so long."""
        self._stages.labels(self.role, self._bounded("stage", stage)).observe(seconds)

    def loss(self, adapter: str, which: str, nats: float) -> None:
        """The mean loss per token, `which` being before or after an update, on what."""
        labels = self._bounded("adapter", adapter), self._bounded("which", which)
        self._loss.labels(self.role, *labels).set(nats)

    def trained(self, tokens: int, seconds: float) -> None:
        """An update trained on so many tokens for so long."""
        self._trained_tokens.labels(self.role).inc(tokens)
        self._trained_seconds.labels(self.role).inc(seconds)

    def generation(self, adapter: str, n: int) -> None:
        """The generation at which the adapter's alias stands."""
        self._generation.labels(self.role, self._bounded("adapter", adapter)).set(n)

    def store_error(self, op: str) -> None:
        """A call to the object store failed."""
        self._store_errors.labels(self.role, self._bounded("op", op)).inc()

    def ack(self, adapter: str, stage_s: Mapping[str, float]) -> None:
        """A subscriber activated a version; `stage_s` says how long each stage took."""
        self._acks.labels(self.role, self._bounded("adapter", adapter)).inc()
        for stage, seconds in stage_s.items():
            self._ack_stages.labels(self.role, self._bounded("ack_stage", stage)).observe(max(0.0, seconds))

    def forget_requests(self, state: str, n: int) -> None:
        """So many retention requests are in the state now."""
        self._forget_requests.labels(self.role, self._bounded("forget_state", state)).set(n)

    def forget_overdue(self, n: int) -> None:
        """So many open retention requests are past due now."""
        self._forget_overdue.labels(self.role).set(n)

    def forgot(self, examples: int, seconds: float) -> None:
        """A retention request came to its end: so many examples forgotten, so long after it was made."""
        self._forgotten.labels(self.role).inc(examples)
        self._forget_time.labels(self.role).observe(max(0.0, seconds))

    def quarantined(self, n: int) -> None:
        """So many examples are held back from learning now."""
        self._quarantined.labels(self.role).set(n)

    def progress(self) -> None:
        """Work moved: an event was handled to its end."""
        with self._lock:
            self._started = True
            if self._still_since is not None:
                self._still_since = self._clock()

    def waiting(self, waits: bool) -> None:
        """Whether work waits. Call it with False at the first assignment too: it ends "starting"."""
        with self._lock:
            self._waiting = waits
            self._reckon_waiting()

    def _reckon_waiting(self) -> None:
        self._started = True
        if not (self._waiting or any(n > 0 for n in self._lag_events.values())):
            self._still_since = None
        elif self._still_since is None:
            self._still_since = self._clock()

    def health(self) -> tuple[bool, dict[str, object]]:
        """Whether the role is fine, and why: status "starting", "ok" or "stalled", time without progress."""
        with self._lock:
            still_s = 0.0 if self._still_since is None else max(0.0, self._clock() - self._still_since)
            stalled = still_s >= self.stall_after_s
            status = "stalled" if stalled else "ok" if self._started else "starting"
            return not stalled, {
                "status": status,
                "role": self.role,
                "work_waits": self._still_since is not None,
                "lag_events": sum(self._lag_events.values()),
                "seconds_without_progress": round(still_s, 3),
                "stall_s": self.stall_after_s,
            }

    def exposition(self) -> bytes:
        """All series in Prometheus's text format 0.0.4."""
        return generate_latest(self.registry)


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
            fine, body = self.metrics.health()
            status = HTTPStatus.OK if fine else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, "application/json", orjson.dumps(body))
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
        pass  # a client that went away, or sent no request in time: nothing to tell the operator

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # not HTTPServer's: it asks DNS for the host's full name, which can hang
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class MetricsServer:
    """The running HTTP server. `port` is the real one where 0 was asked for; close it, or use `with`."""

    def __init__(self, httpd: _BoundedServer) -> None:
        self._httpd = httpd
        self.port: int = httpd.server_port
        self._thread = threading.Thread(
            target=httpd.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering; returns when the port is free."""
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_metrics(metrics: Metrics, host: str = "127.0.0.1", port: int = 0) -> MetricsServer:
    """Answer GET and HEAD of /metrics and /healthz in threads of their own. Raises MetricsError."""
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
