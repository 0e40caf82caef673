"""The steps of every publisher before it sends: build the event, check it, name it by its content, encode it.

Holds the interface that `Publisher` and the in-memory double of `perennial.testing` share. Imports no Kafka client.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Self

from pydantic import ValidationError

from perennial.storage.errors import PerennialError
from perennial.streams.events.cloudevents import Encoded, encode
from perennial.streams.events.fields import Event
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.events.models import RetentionRequested
from perennial.streams.events.wire_error import WireError, from_pydantic


class PublishError(PerennialError):
    """An event was not published."""


@dataclass(frozen=True)
class Delivery:
    """The position at which the broker stored an event.

    Attributes:
        topic: Full name of the topic, with its prefix.
        partition: Number of the partition.
        offset: Offset in the partition.
    """

    topic: str
    partition: int
    offset: int


class Receipt(ABC):
    """The delivery of one event, which is under way.

    Attributes:
        event_id: The event's CloudEvents id. Unless you gave one it is a hash of the content: the same content always has
            the same id.
    """

    def __init__(self, event_id: str) -> None:
        self.event_id = event_id

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether the event is delivered or its delivery has failed."""

    @abstractmethod
    def result(self, timeout_s: float = 30.0) -> Delivery:
        """Wait until all in-sync replicas have the event.

        Args:
            timeout_s: Longest wait in seconds.

        Raises:
            PublishError: The delivery failed, or is not confirmed in time.
        """


class BasePublisher(ABC):
    """The methods that all publishers have; a subclass says how an encoded event is sent.

    Args:
        source: The CloudEvents `source` of every event.
        now: The wall clock, for the CloudEvents `time`.
    """

    def __init__(self, source: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._source = source
        self._now = now

    def document(self, *, adapter: str, document_id: str, text: str, **fields: Any) -> Receipt:
        """Publish a document that an adapter is to learn.

        Args:
            adapter: Name of the adapter, for example `acme/support`: 1 to 4 segments.
            document_id: Your id of the document, 1 to 512 characters.
            text: The text to learn, 1 B to 256 KiB of UTF-8.
            **fields: Further fields of `DocumentObserved`: source, domain, subjects, retention_class, expires_at,
                supersedes, observed_at.

        Raises:
            PublishError: A field is not valid, or the broker does not take the event.
        """
        return self._build(DocumentObserved, adapter=adapter, document_id=document_id, text=text, **fields)

    def interaction(
        self,
        *,
        adapter: str,
        interaction_id: str,
        prompt: str | None = None,
        response: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        **fields: Any,
    ) -> Receipt:
        """Publish a model's response and what it was asked, with what a person said of the response.

        Args:
            adapter: Name of the adapter, for example `acme/support`.
            interaction_id: Your id of the interaction, 1 to 512 characters.
            prompt: What the model was asked.
            response: What the model answered.
            messages: The whole conversation instead of prompt and response, as chat APIs write it: `role` (`system`,
                `user` or `assistant`) and `content` of each turn, the oldest first. The last turn is the response.
            **fields: Further fields of `InteractionObserved`: correction (the answer to learn), rating (-1 to 1),
                source, subjects, retention_class, expires_at, observed_at.

        Raises:
            PublishError: A field is not valid, or the broker does not take the event.
        """
        given: dict[str, Any] = {"adapter": adapter, "interaction_id": interaction_id}
        asked = {"prompt": prompt, "response": response, "messages": None if messages is None else list(messages)}
        given |= {name: value for name, value in asked.items() if value is not None}
        return self._build(InteractionObserved, **given, **fields)

    def retention(self, *, request_id: str, kind: str, adapter: str, requested_by: str, **fields: Any) -> Receipt:
        """Publish a request to forget examples, to hold them, or to take a version out of service.

        Args:
            request_id: Your id of the request, 1 to 512 characters.
            kind: What is asked for, for example `erase`; docs/schema/retention.requested.json lists the kinds.
            adapter: Name of the adapter, or a pattern such as `acme/*`.
            requested_by: Who asks, for the records.
            **fields: Further fields of `RetentionRequested`: selector, superseded_by, time_to_live, reason, due_at,
                requested_at. To approve a request of another person, give its fields as they were, and approved_by.

        Raises:
            PublishError: A field is not valid, or the broker does not take the event.
        """
        given = {"request_id": request_id, "kind": kind, "adapter": adapter, "requested_by": requested_by}
        return self._build(RetentionRequested, **given, **fields)

    def _build(self, model: type[Event], **fields: Any) -> Receipt:
        try:
            event = model(**fields)
        except ValidationError as error:
            found = from_pydantic(error, b"", model)
            raise PublishError(
                f"{model.type}: {found.message or model.__name__} is not valid",
                got=found.got,
                allowed=found.allowed,
                remedy=f"correct {found.message or model.__name__}; nothing was sent",
            ) from None
        return self.publish(event)

    def publish(self, event: Event, *, event_id: str | None = None) -> Receipt:
        """Publish an event to the topic of its type.

        Args:
            event: An event of any type.
            event_id: The event's CloudEvents id. Default: a hash of its content.

        Raises:
            PublishError: The event is too large, or the broker does not take it.
        """
        event = self._signed(event)
        value = event.model_dump_json(by_alias=True).encode()
        event_id = event_id or sha256(f"{event.type}\n".encode() + value).hexdigest()[:32]
        try:
            encoded = encode(event, event_id=event_id, source=self._source, occurred_at=self._now())
        except WireError as error:
            raise PublishError(
                f"{event.type}: {error.message}",
                got=error.got,
                allowed=error.allowed,
                remedy=f"{error.remedy}; nothing was sent",
            ) from error
        return self._send(event, encoded, event_id)

    def _signed(self, event: Event) -> Event:
        """Return the event with the signature of the person who publishes it, where one is made."""
        return event

    @abstractmethod
    def _send(self, event: Event, encoded: Encoded, event_id: str) -> Receipt:
        """Send an encoded event to the topic of its type."""

    @abstractmethod
    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything that was sent is delivered or has failed.

        Args:
            timeout_s: Longest wait in seconds. Default: the publisher's own limit.

        Raises:
            PublishError: Something is still under way after that time.
        """

    @abstractmethod
    def close(self) -> None:
        """Deliver what is under way and close. A second call does nothing.

        Raises:
            PublishError: At least one event was taken and not delivered.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(PublishError):  # the error that ended the block is the one to report
                self.close()
