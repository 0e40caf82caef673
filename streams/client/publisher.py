"""The SDK: `Publisher` sends documents and interactions, `Subscriber` puts new adapter versions into a model.

Synchronous, thread-safe, small: needs kafka-python and the object store, neither faust nor torch. Owns what is sent;
what is followed lives in streams/subscriber.py and is part of this module's names.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from typing import Any, Self

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError
from pydantic import ValidationError

from perennial.storage.errors import PerennialError
from perennial.streams.events.cloudevents import MAX_VALUE_BYTES, WireError, encode
from perennial.streams.events.models import DocumentObserved, Event, InteractionObserved, RetentionRequested
from perennial.streams.kafka.connect import close_producer, connect, require_listener
from perennial.streams.settings import Settings, load_settings

_SLICE_S = 0.1
_RECORD_ROOM_BYTES = 64 * 1024
"""Key, headers and framing, above the largest value: the producer's own limit counts them too."""


class PublishError(PerennialError):
    """An event was not published."""


@dataclass(frozen=True)
class Delivery:
    """Where the broker stored an event: topic with its prefix, partition, offset."""

    topic: str
    partition: int
    offset: int


class Receipt:
    """The promise of a delivery: the event is on its way, and `result` waits until the broker has it."""

    def __init__(self, future: Any, event_id: str, retired: threading.Event) -> None:
        self._future = future
        self._retired = retired
        self.event_id = event_id

    @property
    def done(self) -> bool:
        """Whether it is delivered or has failed."""
        return bool(self._future.is_done)

    def result(self, timeout_s: float = 30.0) -> Delivery:
        """Wait until all in-sync replicas have the event. Raises PublishError where they do not in time."""
        deadline_s = time.monotonic() + timeout_s
        # A producer that was retired may never end its promises.
        while not self.done and not self._retired.is_set() and time.monotonic() < deadline_s:
            with suppress(KafkaError):
                self._future.get(timeout=min(_SLICE_S, max(0.0, deadline_s - time.monotonic())))
        try:
            record = self._future.get(timeout=0)
        except KafkaError as error:
            raise PublishError(
                "the event was not acknowledged",
                got=_said(error),
                allowed=f"an acknowledgement within {timeout_s:g} s",
                remedy="see that the broker runs, then publish it again: a repeat is dropped by its content",
            ) from error
        return Delivery(record.topic, record.partition, record.offset)


class Publisher:
    """Sends events to Kafka: idempotent, acknowledged by all in-sync replicas, as CloudEvents in binary mode.

    kafka: host:port[,host:port], by default PERENNIAL_KAFKA. source: the CloudEvents source. timeout_s: the longest
    that reaching the broker, and each delivery, may take. An event's id is the hash of its content, so that what is
    sent twice can be dropped. Thread-safe. Use it in a `with` block, or call close(): both say what got lost.
    Raises SettingsError where no broker is set and PublishError where none answers.
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
        self._settings = settings or load_settings()
        self._bootstrap = kafka or self._settings.kafka.require_bootstrap()
        self._source = source
        self._timeout_s = timeout_s
        self._now = now
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
                client_id="perennial-sdk",
                acks="all",
                enable_idempotence=True,
                linger_ms=5,
                max_request_size=MAX_VALUE_BYTES + _RECORD_ROOM_BYTES,
                max_block_ms=timeout_ms,
                request_timeout_ms=timeout_ms,
                delivery_timeout_ms=timeout_ms + 10,  # must be above request_timeout_ms + linger_ms
            )
        except (KafkaError, ValueError, OSError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: BaseException) -> PublishError:
        return PublishError(
            f"no Kafka broker answers at {self._bootstrap}",
            got=_said(error),
            allowed=f"an answer within {self._timeout_s:g} s",
            remedy="start one with `perennial up`, or set PERENNIAL_KAFKA to the host:port of one that runs",
        )

    def document(self, *, adapter: str, document_id: str, text: str, **fields: Any) -> Receipt:
        """Publish a document that the adapter is to learn; `fields` as in DocumentObserved. Raises PublishError."""
        return self._publish(DocumentObserved, adapter=adapter, document_id=document_id, text=text, **fields)

    def interaction(self, *, adapter: str, interaction_id: str, prompt: str, response: str, **fields: Any) -> Receipt:
        """Publish a turn; `fields` (correction, rating, ...) as in InteractionObserved. Raises PublishError."""
        given = {"adapter": adapter, "interaction_id": interaction_id, "prompt": prompt, "response": response}
        return self._publish(InteractionObserved, **given, **fields)

    def retention(self, *, request_id: str, kind: str, adapter: str, requested_by: str, **fields: Any) -> Receipt:
        """Publish a request to forget or to hold; `fields` as in RetentionRequested. Raises PublishError."""
        given = {"request_id": request_id, "kind": kind, "adapter": adapter, "requested_by": requested_by}
        return self._publish(RetentionRequested, **given, **fields)

    def _publish(self, model: type[Event], **fields: Any) -> Receipt:
        try:
            return self.publish(model(**fields))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"]) or model.__name__
            got = first.get("input")
            raise PublishError(
                f"{model.type}: {name} is not valid",
                got=got if isinstance(got, str | int | float | None) else type(got).__name__,
                allowed=first["msg"],
                remedy=f"mend {name}; nothing was sent",
            ) from None

    def publish(self, event: Event) -> Receipt:
        """Publish an event of any type to the topic of its type. Raises PublishError."""
        value = event.model_dump_json(by_alias=True).encode()
        event_id = sha256(f"{event.type}\n".encode() + value).hexdigest()[:32]
        try:
            encoded = encode(event, event_id=event_id, source=self._source, occurred_at=self._now())
        except WireError as error:
            raise PublishError(
                f"{event.type}: {error.message}",
                got=error.got,
                allowed=error.allowed,
                remedy=f"{error.remedy}; nothing was sent",
            ) from error
        topic = self._settings.kafka.topic(event.topic)
        with self._lock:
            if self._closed:
                raise PublishError("the publisher is closed", remedy="publish before close() or the end of `with`")
            if self._producer is None:
                self._producer, self._retired = self._connect(), threading.Event()
            producer, retired = self._producer, self._retired
            self._accepted += 1
        try:
            future = producer.send(topic, key=encoded.key, value=encoded.value, headers=encoded.headers)
        except (KafkaError, ValueError) as error:
            with self._lock:
                self._accepted -= 1
            raise self._not_taken(topic, error) from error
        future.add_callback(self._arrived)
        future.add_errback(partial(self._failed, producer))
        return Receipt(future, event_id, retired)

    def _not_taken(self, topic: str, error: BaseException) -> PublishError:
        try:
            require_listener(self._bootstrap, self._timeout_s)
        except (KafkaError, ValueError) as unreachable:
            return self._unreachable(unreachable)
        missing = isinstance(error, KafkaTimeoutError)  # the only sign of a topic that is not there
        remedy = "make the topics with `perennial topics create`" if missing else "mend the topic, publish again"
        return PublishError(
            f"the broker did not take an event for topic {topic}",
            got=_said(error),
            allowed=f"a topic that exists, and room for the event within {self._timeout_s:g} s",
            remedy=remedy,
        )

    def _arrived(self, _: object) -> None:
        with self._lock:
            self._delivered += 1

    def _failed(self, producer: Any, error: BaseException) -> None:
        """Retire a producer that lost an event; the next event makes a new one.

        Hazard: once a batch in flight has expired, kafka-python 3.0.12 sends nothing more and ends no receipt either.
        It is closed elsewhere, for this is its own thread.
        """
        with self._lock:
            self._first_error = self._first_error or error
            if self._producer is not producer:
                return
            self._producer = None
            self._retired.set()
        threading.Thread(target=close_producer, args=(producer, 0), name="retired producer", daemon=True).start()

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything sent so far is delivered or has failed. Raises PublishError where the time ends."""
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
        """Deliver what is under way and close. Raises PublishError where an event was taken and never delivered."""
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
                got=_said(error) if error else "no acknowledgement in time",
                remedy="publish them again: a repeat is dropped by its content",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(PublishError):  # the error that ended the block is the one to hear of
                self.close()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
