"""What intake decides about one record, as a pure function of the record and of the partition's last offsets.

Owns the window in which repeats are dropped and the making of `example.accepted`. The window is defined by the log
itself: a record is a repeat if the same example (adapter, kind, document id, text) occurred at one of the last
`window` offsets of the same partition, whether or not that occurrence was itself dropped. So a window is rebuilt,
to the same state, by passing the last `window` offsets through `accept` again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import NamedTuple, TypeAlias

import orjson

from storage.errors import PerennialError
from streams.events import PERMANENT, DocumentObserved, ExampleAccepted, ExampleKind, InteractionObserved
from streams.wire import Envelope, Headers, Reason, WireError, decode

SOURCE = "/perennial/intake"
MAX_TIMESTAMP_MS = 253_402_300_799_999
"""The last millisecond of year 9999: a producer's clock may say more, but no later step could write it as a date."""

_FIXED_HEADERS: list[tuple[str, bytes]] = [
    ("content-type", b"application/json"),
    ("ce_specversion", b"1.0"),
    ("ce_type", ExampleAccepted.type.encode()),
    ("ce_source", SOURCE.encode()),
]


class OffsetOrderError(PerennialError):
    """Offsets of a partition must grow."""


class OriginPartition(NamedTuple):
    """The partition that records come from. topic: its name without the prefix decides which events may come."""

    cluster_id: str
    full_topic: str
    topic_id: str
    partition: int
    topic: str


class Accepted(NamedTuple):
    """A new example, ready to produce: value is an `example.accepted` in JSON, headers are binary mode."""

    example_id: str
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


class Duplicate(NamedTuple):
    """The same example occurred before, at `offset`."""

    example_id: str
    offset: int


class Refused(NamedTuple):
    """The record is not usable. reason: slug. detail: what came and what is allowed."""

    reason: Reason
    detail: str


Decision: TypeAlias = Accepted | Duplicate | Refused


class _Seen(NamedTuple):
    offset: int
    example_id: str
    document: tuple[str, str]


class Acceptor:
    """Decides about the records of one origin partition, in offset order.

    window: offsets within which a repeat is dropped. learn_turns: whether a bare turn is learned.
    """

    def __init__(self, origin: OriginPartition, window: int, learn_turns: bool) -> None:
        self._origin = origin
        self._window = window
        self._learn_turns = learn_turns
        self._last_offset = -1
        self._occurrences: deque[_Seen] = deque()
        self._seen: dict[str, _Seen] = {}
        self._latest: dict[tuple[str, str], _Seen] = {}

    def __len__(self) -> int:
        """Examples in the window."""
        return len(self._seen)

    def accept(self, value: bytes | None, headers: Headers | None, offset: int, timestamp_ms: int) -> Decision:
        """Decide about one record.

        offset: greater than the one before. timestamp_ms: the record's; outside years 1970 to 9999 it is clamped.
        Raises OffsetOrderError; hostile bytes are Refused, never an exception.
        """
        if offset <= self._last_offset:
            raise OffsetOrderError(got=offset, allowed=f"more than {self._last_offset}", remedy="rebuild the window")
        self._last_offset = offset
        at_ms = min(max(timestamp_ms, 0), MAX_TIMESTAMP_MS)
        try:
            envelope = decode(value, headers, self._origin.topic)
            example = _example_of(envelope, self._learn_turns)
            _refuse_expired(example.event.expires_at, at_ms)
        except WireError as error:
            return Refused(error.reason, error.detail)
        return self._remember(example, offset, at_ms, envelope.traceparent)

    def _remember(self, example: _Example, offset: int, at_ms: int, traceparent: str | None) -> Decision:
        self._forget_before(offset - self._window)
        event = example.event
        identity = [event.adapter, example.kind, example.document_id, sha256(example.text).hexdigest()]
        example_id = sha256(orjson.dumps(identity)).hexdigest()[:32]
        before = self._seen.get(example_id)
        seen = _Seen(offset, example_id, (event.adapter, example.document_id))
        self._occurrences.append(seen)
        self._seen[example_id] = seen
        revised = None
        if example.learn:
            revised = self._latest.get(seen.document)
            self._latest[seen.document] = seen
        if before is not None:
            return Duplicate(example_id, before.offset)
        fields: dict[str, object] = {
            "adapter": event.adapter,
            "example_id": example_id,
            "kind": example.kind,
            "document_id": example.document_id,
            "learn": example.learn,
            **example.body,
            "origin": {
                "cluster_id": self._origin.cluster_id,
                "topic": self._origin.full_topic,
                "topic_id": self._origin.topic_id,
                "partition": self._origin.partition,
                "offset": offset,
                "timestamp_ms": at_ms,
            },
        }
        _add_common(fields, event)
        if revised is not None:
            fields["revises"] = revised.example_id
        headers = [
            *_FIXED_HEADERS,
            ("ce_id", example_id.encode()),
            ("ce_time", datetime.fromtimestamp(at_ms / 1000, UTC).isoformat().encode()),
        ]
        if traceparent is not None:
            headers.append(("ce_traceparent", traceparent.encode()))
        return Accepted(example_id, event.adapter.encode(), orjson.dumps(fields), headers)

    def _forget_before(self, first: int) -> None:
        occurrences = self._occurrences
        while occurrences and occurrences[0].offset < first:
            seen = occurrences.popleft()
            if self._seen.get(seen.example_id) is seen:
                del self._seen[seen.example_id]
            if self._latest.get(seen.document) is seen:
                del self._latest[seen.document]


class _Example(NamedTuple):
    """An example before its origin. text: the bytes that make two examples the same."""

    event: DocumentObserved | InteractionObserved
    kind: ExampleKind
    document_id: str
    learn: bool
    text: bytes
    body: Mapping[str, object]


def _example_of(envelope: Envelope, learn_turns: bool) -> _Example:
    event = envelope.event
    if isinstance(event, DocumentObserved):
        _refuse_blank("text", event.text)
        body: dict[str, object] = {"text": event.text}
        if event.source is not None:
            body["source"] = event.source
        if event.domain is not None:
            body["domain"] = event.domain
        if event.supersedes:
            body["supersedes"] = event.supersedes
        return _Example(event, "document", event.document_id, True, event.text.encode(), body)
    if isinstance(event, InteractionObserved):
        return _interaction(event, learn_turns)
    raise WireError("wrong-topic", "type", got=envelope.type, allowed="document.observed, interaction.observed")


def _interaction(event: InteractionObserved, learn_turns: bool) -> _Example:
    """A correction is learned; a bare turn by policy alone; a rating is a signal, and a changed rating a new one."""
    _refuse_blank("prompt", event.prompt)
    kind: ExampleKind
    answer = event.response
    same: list[object] = [event.prompt, answer]
    if event.correction is not None:
        _refuse_blank("correction", event.correction)
        kind, learn, answer = "correction", True, event.correction
        same = [event.prompt, answer]
    elif learn_turns and not answer.isspace():
        kind, learn = "turn", True
    elif event.rating is not None:
        kind, learn = "rating", False
        same = [event.prompt, answer, event.rating]
    else:
        kind, learn = "turn", False
    body: dict[str, object] = {"prompt": event.prompt, "answer": answer}
    if event.rating is not None:
        body["rating"] = event.rating
    return _Example(event, kind, event.interaction_id, learn, orjson.dumps(same), body)


def _add_common(fields: dict[str, object], event: DocumentObserved | InteractionObserved) -> None:
    if event.subjects:
        fields["subjects"] = event.subjects
    if event.retention_class != PERMANENT:
        fields["retention_class"] = event.retention_class
    if event.expires_at is not None:
        fields["expires_at"] = event.expires_at.isoformat()
    if event.observed_at is not None:
        fields["observed_at"] = event.observed_at.isoformat()


def _refuse_expired(expires_at: datetime | None, at_ms: int) -> None:
    if expires_at is not None and expires_at.timestamp() * 1000 <= at_ms:
        raise WireError("expired", "expires_at", got=expires_at.isoformat(), allowed="a time after its publication")


def _refuse_blank(field: str, text: str) -> None:
    if text.isspace():
        raise WireError("bad-field", field, got=text, allowed="text that is not only white space")
