"""What intake decides about one record, as a pure function of the record and of the partition's last offsets.

Owns the window in which repeats are dropped and the making of `example.accepted`. The window is defined by the log
itself: a record is a repeat if the same example (adapter, kind, document id, text) occurred at one of the last
`window` offsets of the same partition, whether or not that occurrence was itself dropped. So a window is rebuilt,
to the same state, by passing the last `window` offsets through `accept` again.
"""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, NamedTuple, TypeAlias

import orjson

from perennial.storage.errors import PerennialError
from perennial.streams.events.cloudevents import Envelope, Headers, Reason, WireError, decode_without_id
from perennial.streams.events.dead_letter import redrive_count
from perennial.streams.events.models import (
    PERMANENT,
    DocumentObserved,
    ExampleAccepted,
    ExampleKind,
    InteractionObserved,
)

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


class Acceptor:
    """Decides about the records of one origin partition, in offset order.

    window: offsets within which a repeat is dropped. learn_turns: whether a bare turn is learned.
    """

    def __init__(self, origin: OriginPartition, window: int, learn_turns: bool) -> None:
        self._topic = origin.topic
        self._origin = {
            "cluster_id": origin.cluster_id,
            "topic": origin.full_topic,
            "topic_id": origin.topic_id,
            "partition": origin.partition,
        }
        self._window = window
        self._learn_turns = learn_turns
        self._last_offset = -1
        self._occurrences: deque[_Seen] = deque()
        self._seen: dict[str, _Seen] = {}
        self._latest: dict[tuple[str, str], _Seen] = {}
        self._time = (-1, b"")

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
            envelope = decode_without_id(value, headers, self._topic)
            fields, text = _example_of(envelope, self._learn_turns)
            expires_at = fields.get("expires_at")
            if expires_at is not None:
                _refuse_expired(expires_at, at_ms)
        except WireError as error:
            return Refused(error.reason, error.detail)
        adapter, kind, document_id = fields["adapter"], fields["kind"], fields["document_id"]
        identity = orjson.dumps([adapter, kind, document_id, sha256(text).hexdigest()])
        example_id = sha256(identity).hexdigest()[:32]
        replays = redrive_count(headers)
        before, revised = self._remember(offset, example_id, (adapter, document_id), fields["learn"], replays)
        # A rebuilt window also holds what an older version refused, so a replay repeats only a replay as late as itself.
        if before is not None and before[3] >= replays:
            return Duplicate(example_id, before[0])
        fields["example_id"] = example_id
        if revised is not None:
            fields["revises"] = revised[1]
        fields["origin"] = {**self._origin, "offset": offset, "timestamp_ms": at_ms}
        if at_ms != self._time[0]:  # records of one batch share their time
            self._time = (at_ms, datetime.fromtimestamp(at_ms / 1000, UTC).isoformat().encode())
        out = [*_FIXED_HEADERS, ("ce_id", example_id.encode()), ("ce_time", self._time[1])]
        if envelope.traceparent is not None:
            out.append(("ce_traceparent", envelope.traceparent.encode()))
        return Accepted(example_id, adapter.encode(), orjson.dumps(fields), out)

    def _remember(
        self, offset: int, example_id: str, document: tuple[str, str], learn: bool, replays: int
    ) -> tuple[_Seen | None, _Seen | None]:
        """Put an occurrence into the window. Returns the one before of the example, and of what it revises."""
        first, occurrences = offset - self._window, self._occurrences
        while occurrences and occurrences[0][0] < first:
            gone = occurrences.popleft()
            if self._seen.get(gone[1]) is gone:
                del self._seen[gone[1]]
            if self._latest.get(gone[2]) is gone:
                del self._latest[gone[2]]
        before = self._seen.get(example_id)
        seen = (offset, example_id, document, replays if before is None else max(before[3], replays))
        occurrences.append(seen)
        self._seen[example_id] = seen
        if not learn:
            return before, None
        revised = self._latest.get(document)
        self._latest[document] = seen
        return before, revised


_Seen: TypeAlias = tuple[int, str, tuple[str, str], int]
"""An occurrence: offset, example id, (adapter, document id), most replays of the example so far."""


def _example_of(envelope: Envelope, learn_turns: bool) -> tuple[dict[str, Any], bytes]:
    """Fields of the example, without id and origin, and the bytes that make two examples the same."""
    event = envelope.event
    if isinstance(event, DocumentObserved):
        text = event.text
        _refuse_blank("text", text)
        fields = {
            "adapter": event.adapter, "kind": "document", "document_id": event.document_id, "learn": True, "text": text,
        }  # fmt: skip
        if event.source is not None:
            fields["source"] = event.source
        if event.domain is not None:
            fields["domain"] = event.domain
        if event.supersedes:
            fields["supersedes"] = event.supersedes
        same = text.encode()
    elif isinstance(event, InteractionObserved):
        fields, same = _interaction(event, learn_turns)
    else:
        raise WireError("wrong-topic", "type", got=envelope.type, allowed="document.observed, interaction.observed")
    if event.subjects:
        fields["subjects"] = event.subjects
    if event.retention_class != PERMANENT:
        fields["retention_class"] = event.retention_class
    if event.expires_at is not None:
        fields["expires_at"] = event.expires_at
    if event.observed_at is not None:
        fields["observed_at"] = event.observed_at
    return fields, same


def _interaction(event: InteractionObserved, learn_turns: bool) -> tuple[dict[str, Any], bytes]:
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
    fields: dict[str, Any] = {
        "adapter": event.adapter, "kind": kind, "document_id": event.interaction_id, "learn": learn,
        "prompt": event.prompt, "answer": answer,
    }  # fmt: skip
    if event.rating is not None:
        fields["rating"] = event.rating
    return fields, orjson.dumps(same)


def _refuse_expired(expires_at: datetime, at_ms: int) -> None:
    if expires_at.timestamp() * 1000 <= at_ms:
        raise WireError("expired", "expires_at", got=expires_at.isoformat(), allowed="a time after its publication")


def _refuse_blank(field: str, text: str) -> None:
    if text.isspace():
        raise WireError("bad-field", field, got=text, allowed="text that is not only white space")
