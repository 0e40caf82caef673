"""Sign the events of `adapter-updates` and `adapter-acks` and requests of `retention`, and check them.

The signature is in the event's field `signature`. It covers the type and every other field of the record as it is on the
wire, as canonical JSON (sorted keys, no white space), so that a reader checks fields that it does not know as well.

Requests to forget come in three forms of CloudEvents, and no field is accepted that their model does not know. So their
signature covers the fields as the model writes them, without those that have their defaults. It also covers the topic with
its prefix: a copy of a signed request counts on no other tenant's topic, and in no installation with another prefix.
"""

from __future__ import annotations

from typing import TypeVar

import orjson
from pydantic import Field

from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from perennial.streams.events.fields import Event
from perennial.streams.events.models import RetentionRequested

_FIELD = "signature"
E = TypeVar("E", bound=Event)


def signed_event(event: E, trust: Trust) -> E:
    """Return an event with its signature; unchanged where there is no key to sign with.

    Args:
        event: an event with a field `signature`.
        trust: the key.
    """
    body = _canonical(event.model_dump_json(by_alias=True).encode())
    signature = trust.sign(_payload_type(event), body)
    return event.model_copy(update={_FIELD: signature}) if signature else event


def check_event(event: Event, value: bytes, trust: Trust) -> None:
    """Check the signature of a record; does nothing where no signature is asked for.

    Args:
        event: the record's event.
        value: the record's value, in binary mode.
        trust: the trusted keys.

    Raises:
        SignatureError: no trusted key signed it.
        KeyFileError: the trusted keys cannot be read.
    """
    if not trust.verifies:
        return
    what = f"{event.type} of {event.key()}"
    try:
        body, signature = _canonical(value), getattr(event, _FIELD, None)
        read = type(event).model_validate_json(body)
    except (TypeError, ValueError, AttributeError) as error:
        raise SignatureError("forged", f"{what} is not in the form that is signed", got=value[:80]) from error
    # Two readers of JSON may take different ones of two fields with one name.
    if read != event.model_copy(update={_FIELD: None}):
        raise SignatureError("forged", f"{what} can be read in two ways", got=value[:80])
    trust.check(_payload_type(event), body, signature, what)


class ReceivedRequest(RetentionRequested):
    """A request to forget, or the approval of one, with the topic that it came from.

    Attributes:
        full_topic: the topic with the prefix; the signature covers it.
    """

    full_topic: str = Field(exclude=True)

    @classmethod
    def of(cls, request: RetentionRequested, full_topic: str) -> ReceivedRequest:
        """Return a request with its topic."""
        return cls.model_construct(**dict(request), full_topic=full_topic)


def signed_request(
    request: RetentionRequested, trust: Trust, full_topic: str = RetentionRequested.topic
) -> RetentionRequested:
    """Return a request to forget, or the approval of one, with its signature; unchanged where there is no key to sign with.

    Args:
        request: the request, with `requested_at`.
        trust: the key of the person who makes or approves it.
        full_topic: the topic that it is sent to, with the prefix.
    """
    signature = trust.sign(_request_type(request, full_topic), _request_body(request))
    return request.model_copy(update={_FIELD: signature}) if signature else request


def check_request(request: RetentionRequested, trust: Trust) -> str | None:
    """Return the id of the key that signed a request; None where no signature is asked for.

    Args:
        request: the request, or the approval of one. One that is no ReceivedRequest came from `retention`, without prefix.
        trust: the trusted keys of persons.

    Raises:
        SignatureError: no trusted key signed it.
        KeyFileError: the trusted keys cannot be read.
    """
    if not trust.verifies:
        return None
    full_topic = request.full_topic if isinstance(request, ReceivedRequest) else request.topic
    payload_type = _request_type(request, full_topic)
    trust.check(payload_type, _request_body(request), request.signature, f"request {request.request_id}")
    return request.signature.rpartition(":")[0] if request.signature else None


def _request_body(request: RetentionRequested) -> bytes:
    fields = request.model_dump(mode="json", exclude={_FIELD}, exclude_defaults=True)
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


def _request_type(request: RetentionRequested, full_topic: str) -> str:
    return f"{_payload_type(request)}; topic={full_topic}"


def _payload_type(event: Event) -> str:
    return f"application/vnd.perennial.event.v1+json; type={event.type}"


def _canonical(value: bytes) -> bytes:
    fields = orjson.loads(value)
    fields.pop(_FIELD, None)
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
