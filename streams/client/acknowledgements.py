"""Send a subscriber's acknowledgements, heartbeats and last record (`replica.left`) to `adapter-acks`, in a thread.

Nothing here raises an error because of the broker, and a broker that does not answer delays no version.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, TypeAlias

from kafka import KafkaProducer

from perennial.storage.registry.registry import AliasState
from perennial.storage.signing.trust import Trust
from perennial.streams.client.subscriber_kafka import RECONNECT_S, TIMEOUT_MS
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed, ReplicaLeft
from perennial.streams.events.cloudevents import encode
from perennial.streams.kafka.connect import close_producer, connect
from perennial.streams.kafka.event_signatures import signed_event
from perennial.streams.settings.kafka_security_group import KafkaSecuritySettings
from perennial.streams.settings.signing_group import SigningSettings

_log = logging.getLogger("perennial.subscriber")

Acknowledgement: TypeAlias = AdapterActivated | AdapterFailed

_serials = itertools.count(1)
_MAX_PENDING = 64
_MAX_ERROR_CHARS = 1000
_BEATS_PER_LEASE = 3
_CLOSE_S = 3 * TIMEOUT_MS / 1000


def own_replica_name() -> str:
    """Return host name and process id, with a number from the second subscriber of a process on."""
    serial = next(_serials)
    return f"{socket.gethostname()[:200]}-{os.getpid()}{f'-{serial}' if serial > 1 else ''}"


@dataclass(frozen=True)
class ReplicaReports:
    """Makes the events of one replica.

    Attributes:
        adapter: The adapter.
        alias: The alias that the replica follows.
        replica: The replica's name.
        now: The wall clock.
    """

    adapter: str
    alias: str
    replica: str
    now: Callable[[], datetime]

    def activated(self, state: AliasState, stage_s: Mapping[str, float]) -> AdapterActivated:
        """Return the acknowledgement of what the alias names."""
        return AdapterActivated(
            adapter=self.adapter, alias=self.alias, replica=self.replica, generation=state.generation,
            version=state.version, stage_s=dict(stage_s), published_at=state.published_at, at=self.now(),
        )  # fmt: skip

    def failed(
        self, generation: int, version: str, published_at: datetime, stage_s: Mapping[str, float], error: Exception
    ) -> AdapterFailed:
        """Return the report of a version that is not served."""
        return AdapterFailed(
            adapter=self.adapter, alias=self.alias, replica=self.replica, generation=generation, version=version,
            stage_s=dict(stage_s), published_at=published_at, at=self.now(),
            error=f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS],
        )  # fmt: skip

    def left(self, generation: int, version: str | None) -> ReplicaLeft:
        """Return the last report."""
        return ReplicaLeft(
            adapter=self.adapter, alias=self.alias, replica=self.replica, generation=generation, version=version,
            at=self.now(),
        )  # fmt: skip


class Acks:
    """Sends acknowledgements, and keeps the last 64 while no broker answers.

    Older ones may be dropped, because the topic is compacted and keeps only the last one of each replica anyway. The
    last one is sent again every third of the lease, as a heartbeat: also while a backend takes long to load a version,
    because the process that holds the version before it is alive. Thread-safe.

    Args:
        bootstrap: Bootstrap servers; empty: there is no broker, and acknowledgements are dropped.
        security: TLS and SASL.
        topic: Returns the full name of a topic.
        now: The wall clock.
        lease_s: Length of a lease, in seconds.
        clock: Monotonic clock in seconds.
        signing: The key that signs them. None: they are not signed.
    """

    def __init__(
        self,
        bootstrap: str,
        security: KafkaSecuritySettings,
        topic: Callable[[str], str],
        now: Callable[[], datetime],
        lease_s: float,
        clock: Callable[[], float],
        signing: SigningSettings | None = None,
    ) -> None:
        self._trust = signing.replica_trust() if signing else Trust()
        self._bootstrap = bootstrap
        self._security = security
        self._topic = topic(AdapterActivated.topic)
        self._now = now
        self._lease_s = lease_s
        self._clock = clock
        self._producer: Any = None
        self._pending: deque[Acknowledgement | ReplicaLeft] = deque(maxlen=_MAX_PENDING)
        self._latest: Acknowledgement | None = None
        self._activated: AdapterActivated | None = None
        self._beat_s = 0.0
        self._retry_s = 0.0
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._at_exit: Callable[[], None] = lambda: None

    def start(self, at_exit: Callable[[], None]) -> None:
        """Send in a new thread until `close`. After `close`, the last acknowledgement is sent again first.

        Args:
            at_exit: Called where the interpreter exits while the connection is open, to send the last record.
        """
        if not self._bootstrap:
            return
        with self._changed:
            if self._closed:
                self._closed, self._thread, self._beat_s, self._retry_s = False, None, 0.0, 0.0
        if self._thread is None:
            self._at_exit = at_exit
            self._thread = threading.Thread(target=self._run, name="subscriber acknowledgements", daemon=True)
            self._thread.start()

    def send(self, ack: Acknowledgement) -> None:
        """Put an acknowledgement in the queue, with the lease, and send it again as heartbeat from then on."""
        if not self._bootstrap:
            return
        with self._changed:
            if self._closed:  # after `replica.left` an acknowledgement would make requests wait until its lease ends
                return
            self._latest = ack.model_copy(update={"lease_s": self._lease_s})
            if isinstance(self._latest, AdapterActivated):
                self._activated = self._latest
            self._pending.append(self._latest)
            self._beat_s = self._clock() + self._lease_s / _BEATS_PER_LEASE
            self._changed.notify_all()

    def send_activated_again(self, generation: int) -> None:
        """Send the activation of a generation again, where a failure was sent after it that has passed."""
        last = self._activated
        if last is not None and last.generation == generation and self._latest is not last:
            self.send(last.model_copy(update={"at": self._now()}))

    def tick(self) -> None:
        """Send the queue in order, with a heartbeat where one is due, and keep what the broker does not take."""
        with self._changed:
            now_s = self._clock()
            if not self._closed and self._latest is not None and now_s >= self._beat_s:
                self._beat_s = now_s + self._lease_s / _BEATS_PER_LEASE
                if not self._pending:
                    self._pending.append(self._latest.model_copy(update={"at": self._now()}))
            if not self._pending or (now_s < self._retry_s and not self._closed):
                return
        try:
            if self._producer is None:
                self._connect()
            while True:
                with self._changed:
                    if not self._pending:
                        return
                    report = self._pending[0]
                self._deliver(report)
                with self._changed:
                    if self._pending and self._pending[0] is report:
                        self._pending.popleft()
        except Exception as error:  # noqa: BLE001 - no error of a Kafka client may end the acknowledgements
            _log.warning("acknowledgements wait until the broker answers: %s", error)
            self._retry_s = self._clock() + RECONNECT_S
            self._disconnect(0)  # an idempotent producer that lost a record may never take another

    def _connect(self) -> None:
        self._producer = connect(
            KafkaProducer,
            self._bootstrap,
            TIMEOUT_MS / 1000,
            security=self._security,
            acks="all",
            max_block_ms=TIMEOUT_MS,
            request_timeout_ms=TIMEOUT_MS,
            delivery_timeout_ms=TIMEOUT_MS,
        )
        # The producer registers a function of its own that closes it. The last one registered runs first.
        atexit.unregister(self._at_exit)
        atexit.register(self._at_exit)

    def _deliver(self, report: Acknowledgement | ReplicaLeft) -> None:
        value_id = sha256(report.model_dump_json().encode()).hexdigest()[:32]
        source = f"perennial-subscriber/{report.replica}"
        record = encode(signed_event(report, self._trust), event_id=value_id, source=source, occurred_at=self._now())
        sent = self._producer.send(self._topic, key=record.key, value=record.value, headers=record.headers)
        sent.get(timeout=TIMEOUT_MS / 1000)

    def _run(self) -> None:
        while not self._closed:
            self.tick()
            with self._changed:
                if not self._closed and (not self._pending or self._clock() < self._retry_s):
                    self._changed.wait(min(1.0, self._lease_s / _BEATS_PER_LEASE))

    def close(self, left: ReplicaLeft) -> None:
        """Stop the heartbeats, send the last record if anything was acknowledged, and close the connection.

        There is one attempt to send what waits. If it fails, requests wait until the lease ends.

        Args:
            left: The last record of the replica.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            if self._latest is not None:
                self._pending.append(left)
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
        if self._thread is None or not self._thread.is_alive():
            self.tick()
            self._disconnect(1)
        atexit.unregister(self._at_exit)

    def _disconnect(self, timeout_s: float) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            close_producer(producer, timeout_s)
