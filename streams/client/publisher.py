"""`Publisher` sends documents, interactions and retention requests to Kafka.

Synchronous and thread-safe. Needs kafka-python, and neither Faust nor torch nor librdkafka.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError

from perennial.streams.client.base_publisher import BasePublisher, Delivery, PublishError, Receipt
from perennial.streams.events.cloudevents import MAX_VALUE_BYTES, Encoded
from perennial.streams.events.fields import Event
from perennial.streams.events.models import RetentionRequested
from perennial.streams.events.tenants import TENANT_TOPICS, tenant_topic
from perennial.streams.kafka.connect import close_producer, connect, require_listener
from perennial.streams.kafka.event_signatures import signed_request
from perennial.streams.kafka.installation import ORDERED_TOPICS, load_installation, open_store_of
from perennial.streams.kafka.maintenance import MaintenanceError, allowed_counts
from perennial.streams.kafka.security.access_errors import KafkaSecurityError
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.kafka.topic_guard import KeyRouting
from perennial.streams.settings import Settings, load_settings
from perennial.streams.settings.tenant_group import OtherTenantError

_SLICE_S = 0.1
_RECORD_ROOM_BYTES = 64 * 1024
"""Key, headers and framing, above the largest value: the producer's own limit counts them too."""


class _KafkaReceipt(Receipt):
    def __init__(self, future: Any, event_id: str, retired: threading.Event) -> None:
        super().__init__(event_id)
        self._future = future
        self._retired = retired

    @property
    def done(self) -> bool:
        return bool(self._future.is_done)

    def result(self, timeout_s: float = 30.0) -> Delivery:
        deadline_s = time.monotonic() + timeout_s
        # The future of a producer that was retired may never be done.
        while not self.done and not self._retired.is_set() and time.monotonic() < deadline_s:
            with suppress(KafkaError):
                self._future.get(timeout=min(_SLICE_S, max(0.0, deadline_s - time.monotonic())))
        try:
            record = self._future.get(timeout=0)
        except KafkaError as error:
            raise PublishError(
                "the event was not acknowledged",
                got=_describe(error),
                allowed=f"an acknowledgement within {timeout_s:g} s",
                remedy="see that the broker runs, then publish it again: a repeat is dropped by its content",
            ) from error
        return Delivery(record.topic, record.partition, record.offset)


class Publisher(BasePublisher):
    """Publishes events to Kafka as CloudEvents in binary mode: idempotent, acknowledged by all in-sync replicas.

    An event's id is a hash of its content, so a repeat can be dropped. Use a publisher in a `with` block, or call
    `close`: both report what was not delivered. Thread-safe.

    The example uses the in-memory double, which has the same methods and needs no broker:

    >>> from perennial.testing import MemoryPublisher as Publisher
    >>> with Publisher() as publisher:
    ...     receipt = publisher.document(adapter="acme/support", document_id="faq-7", text="Refunds take two days.")
    ...     receipt.result(timeout_s=10)
    Delivery(topic='documents', partition=0, offset=0)

    Args:
        kafka: Bootstrap servers, `host:port[,host:port]`. Default: PERENNIAL_KAFKA.
        settings: Settings to use instead of those of the environment.
        source: The CloudEvents `source` of every event.
        timeout_s: Longest time that reaching the broker, and each delivery, may take, in seconds.
        now: The wall clock.

    Raises:
        SettingsError: No broker is set.
        KeyFileError: PERENNIAL_REQUEST_KEY_FILE cannot be used.
        PublishError: No broker answers, or the broker and the settings of TLS and SASL do not agree.
    """

    def __init__(
        self,
        kafka: str | None = None,
        *,
        settings: Settings | None = None,
        source: str = "perennial-sdk",
        timeout_s: float = 10.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(source, now)
        self._settings = settings or load_settings()
        self._bootstrap = kafka or self._settings.kafka.require_bootstrap()
        self._timeout_s = timeout_s
        self._signer = RecordSigner(self._settings)
        self._person = self._settings.signing.request_trust()
        self._lock = threading.Lock()
        self._accepted = self._delivered = 0
        self._first_error: BaseException | None = None
        self._closed = False
        self._producer: Any = self._connect()
        self._retired = threading.Event()

    def _connect(self) -> Any:
        timeout_ms = max(1, int(self._timeout_s * 1000))
        try:
            return connect(
                KafkaProducer,
                self._bootstrap,
                self._timeout_s,
                security=self._settings.kafka_security,
                client_id="perennial-sdk",
                acks="all",
                enable_idempotence=True,
                linger_ms=5,
                max_request_size=MAX_VALUE_BYTES + _RECORD_ROOM_BYTES,
                max_block_ms=timeout_ms,
                request_timeout_ms=timeout_ms,
                delivery_timeout_ms=timeout_ms + 10,  # must be above request_timeout_ms + linger_ms
            )
        except KafkaSecurityError as error:
            raise _refused(error) from error
        except (KafkaError, ValueError, OSError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: BaseException) -> PublishError:
        unreachable = PublishError(
            f"no Kafka broker answers at {self._bootstrap}",
            got=_describe(error),
            allowed=f"an answer within {self._timeout_s:g} s",
            remedy="start one with `perennial up`, or set PERENNIAL_KAFKA to the host:port of one that runs",
        )
        unreachable.exit_code = 3  # a service cannot be reached
        return unreachable

    def _signed(self, event: Event) -> Event:
        if not isinstance(event, RetentionRequested) or self._person.signing_key is None:
            return event
        # An approval repeats the request, which may have no time.
        made_at = event.requested_at or (self._now() if event.approved_by is None else None)
        full_topic = self._settings.kafka.topic(self._topic_of(event))
        return signed_request(event.model_copy(update={"requested_at": made_at}), self._person, full_topic)

    def _send(self, event: Event, encoded: Encoded, event_id: str) -> Receipt:
        topic = self._settings.kafka.topic(self._topic_of(event))
        partition = self._internal_partition(event.topic, encoded.key)
        with self._lock:
            if self._closed:
                raise PublishError("the publisher is closed", remedy="publish before close() or the end of `with`")
            if self._producer is None:
                self._producer, self._retired = self._connect(), threading.Event()
            producer, retired = self._producer, self._retired
            self._accepted += 1
        headers = self._signer.sign(event.topic, encoded.key, encoded.value, encoded.headers)
        try:
            future = producer.send(topic, key=encoded.key, value=encoded.value, headers=headers, partition=partition)
        except (KafkaError, ValueError) as error:
            with self._lock:
                self._accepted -= 1
            raise self._not_taken(topic, error) from error
        future.add_callback(self._arrived)
        future.add_errback(partial(self._failed, producer))
        return _KafkaReceipt(future, event_id, retired)

    def _topic_of(self, event: Event) -> str:
        """Return the topic of an event without the prefix: that of PERENNIAL_TENANT, where tenants have one.

        Raises:
            PublishError: The event addresses an adapter of another tenant.
        """
        tenant = self._settings.tenants.tenant
        if not tenant or event.topic not in TENANT_TOPICS:
            return event.topic
        try:
            self._settings.tenants.require_own(str(getattr(event, "adapter", "")))
        except OtherTenantError as error:
            raise PublishError(
                f"{event.type}: {error.message}", got=error.got, allowed=error.allowed,
                remedy=f"{error.remedy}; nothing was sent",
            ) from None  # fmt: skip
        return tenant_topic(event.topic, tenant)

    def _internal_partition(self, topic: str, key: bytes | None) -> int | None:
        """Return the partition of a record for an internal topic by the recorded count; None for other topics.

        Raises:
            MaintenanceError: The topic is being repartitioned.
        """
        if topic not in ORDERED_TOPICS:
            return None
        store = open_store_of(self._settings)
        if store is None:
            return None
        if topic in allowed_counts(store):
            raise MaintenanceError(got=topic, remedy="try again when `perennial topics repartition` has ended")
        record = load_installation(store)
        return KeyRouting(record.routed_partitions() if record else {}).partition(topic, key)

    def _not_taken(self, topic: str, error: BaseException) -> PublishError:
        try:
            require_listener(self._bootstrap, self._timeout_s, self._settings.kafka_security)
        except KafkaSecurityError as refused:
            return _refused(refused)
        except (KafkaError, ValueError) as unreachable:
            return self._unreachable(unreachable)
        missing = isinstance(error, KafkaTimeoutError)  # the only sign of a topic that is not there
        remedy = (
            "make the topics with `perennial topics create`"
            if missing
            else "correct the topic's configuration, then publish again"
        )
        return PublishError(
            f"the broker did not take an event for topic {topic}",
            got=_describe(error),
            allowed=f"a topic that exists, and room for the event within {self._timeout_s:g} s",
            remedy=remedy,
        )

    def _arrived(self, _: object) -> None:
        with self._lock:
            self._delivered += 1

    def _failed(self, producer: Any, error: BaseException) -> None:
        """Retire a producer that lost an event; the next event makes a new one.

        Hazard: once a batch in flight has expired, kafka-python 3.0.12 sends nothing more and completes no future
        either. The producer is closed in another thread, because this is the producer's own thread.
        """
        with self._lock:
            self._first_error = self._first_error or error
            if self._producer is not producer:
                return
            self._producer = None
            self._retired.set()
        threading.Thread(target=close_producer, args=(producer, 0), name="retired producer", daemon=True).start()

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything that was sent is delivered or has failed.

        Args:
            timeout_s: Longest wait in seconds. Default: the publisher's `timeout_s`.

        Raises:
            PublishError: Something is still under way after that time.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        with self._lock:
            producer = self._producer
        if producer is None:
            return
        try:
            producer.flush(timeout=limit_s)
        except KafkaTimeoutError as error:
            with self._lock:
                missing = self._accepted - self._delivered
            raise PublishError(
                f"{missing} events were not acknowledged in time",
                got=f"{limit_s:g} s",
                remedy="see that the broker runs, then call flush() again",
            ) from error

    def close(self) -> None:
        """Deliver what is under way and close. A second call does nothing.

        Raises:
            PublishError: At least one event was taken and not delivered.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            with suppress(PublishError):
                self.flush()
        finally:
            with self._lock:
                producer, self._producer = self._producer, None
            if producer is not None:
                close_producer(producer, 1)
        with self._lock:
            missing, error = self._accepted - self._delivered, self._first_error
        if missing:
            raise PublishError(
                f"{missing} of {self._accepted} events were not delivered",
                got=_describe(error) if error else "no acknowledgement in time",
                remedy="publish them again: a repeat is dropped by its content",
            ) from error


def _refused(error: KafkaSecurityError) -> PublishError:
    refused = PublishError(error.message, got=error.got, allowed=error.allowed, remedy=error.remedy)
    refused.exit_code = error.exit_code
    return refused


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
