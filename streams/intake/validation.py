"""Decide about one record: accept it as an example, drop it as a duplicate, or refuse it. No I/O.

A decision depends on the record and on the records at the last `window` offsets of its partition, the window. A record
is a duplicate if the latest occurrence of its document in the window is the same example (adapter, kind, document id,
text), even if that occurrence was a duplicate too. So a document that goes back to an earlier text is no duplicate. The
window depends on the log alone: whoever passes the records of the last `window` offsets through `Acceptor.accept` again
gets the same state.

An example that was refused after it had been accepted can be published again as it is, at once: `refused_at` says when
it was refused. A record that is read again after a crash may then be accepted though it was dropped before; curate drops
it if its example is learned by then. Neither decision changes the window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, NamedTuple, TypeAlias

import orjson

from perennial.storage.errors import PerennialError
from perennial.streams.events.cloudevents import Headers, decode_event
from perennial.streams.events.dead_letter import redrive_count
from perennial.streams.events.event_times import MAX_MS
from perennial.streams.events.fields import PERMANENT, Event
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.events.models import ExampleAccepted, ExampleKind
from perennial.streams.events.tenants import require_own_adapter
from perennial.streams.events.wire_error import Reason, WireError

SOURCE = "/perennial/intake"
REFUSED_WRITE_MS = 2_000
"""How long the list of refused examples may take to show a refusal after the time that it names. A publication that
was dropped in that time does not make the next one a duplicate."""
_FIXED_HEADERS: list[tuple[str, bytes]] = [
    ("content-type", b"application/json"),
    ("ce_specversion", b"1.0"),
    ("ce_type", ExampleAccepted.type.encode()),
    ("ce_source", SOURCE.encode()),
]


class OffsetOrderError(PerennialError):
    """A record's offset is not greater than the offset before it."""


class OriginPartition(NamedTuple):
    """The partition that records are read from.

    Attributes:
        cluster_id: The cluster's id.
        full_topic: The topic's name with the prefix.
        topic_id: The topic's id.
        partition: The partition's number.
        topic: The topic's name without the prefix and the tenant; it decides which types of events are allowed.
        tenant: The tenant whose topic it is: only its adapters may be addressed; None: any adapter may.
    """

    cluster_id: str
    full_topic: str
    topic_id: str
    partition: int
    topic: str
    tenant: str | None = None


class Accepted(NamedTuple):
    """A new example, ready to be produced.

    Attributes:
        example_id: The example's id.
        key: The record's key: the adapter's name.
        value: The event `example.accepted` in JSON.
        headers: CloudEvents headers in binary mode.
    """

    example_id: str
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


class Duplicate(NamedTuple):
    """The same example occurred within the window, most recently at `offset`."""

    example_id: str
    offset: int


class Refused(NamedTuple):
    """The record cannot become an example.

    Attributes:
        reason: A short identifier.
        detail: What was found and what is allowed.
    """

    reason: Reason
    detail: str


Decision: TypeAlias = Accepted | Duplicate | Refused


class Acceptor:
    """Decides about the records of one origin partition, in the order of their offsets.

    Args:
        origin: The partition.
        window: The number of offsets within which a duplicate is dropped.
        learn_turns: Whether a turn without a correction is learned.
        refused_at: Returns when an example of an adapter was refused last, in ms since the epoch, as of the time of
            the record, in ms since the epoch, or later; None if it was not. It is called for duplicates only.
    """

    def __init__(
        self, origin: OriginPartition, window: int, learn_turns: bool, refused_at: RefusedAt | None = None
    ) -> None:
        self._topic = origin.topic
        self._tenant = origin.tenant
        self._origin = {
            "cluster_id": origin.cluster_id,
            "topic": origin.full_topic,
            "topic_id": origin.topic_id,
            "partition": origin.partition,
        }
        self._window = window
        self._learn_turns = learn_turns
        self._refused_at = refused_at
        self._last_offset = -1
        self._occurrences: deque[_Occurrence] = deque()
        self._by_document: dict[_Document, _Occurrence] = {}
        self._last_time = (-1, b"")  # the last record's time in ms, and as it is written into a header

    def __len__(self) -> int:
        """Return the number of different documents in the window."""
        return len(self._by_document)

    def accept(
        self, value: bytes | None, headers: Headers | None, offset: int, timestamp_ms: int, leader_epoch: int = 0
    ) -> Decision:
        """Decide about one record. Invalid bytes are Refused and never raise an exception.

        Args:
            value: The record's value.
            headers: The record's headers.
            offset: The record's offset, greater than that of the record before.
            timestamp_ms: The record's time in ms since the epoch. It is clamped to the years 1970 to 9999.
            leader_epoch: The leader epoch that Kafka stored with the record; 0 where it stored none.

        Returns:
            The decision.

        Raises:
            OffsetOrderError: The offset is not greater than the one before.
        """
        if offset <= self._last_offset:
            raise OffsetOrderError(
                got=offset, allowed=f"more than {self._last_offset}", remedy="restart intake, which rebuilds the window"
            )
        self._last_offset = offset
        # A producer's clock may run beyond the year 9999, but later steps could not write such a time as a date.
        at_ms = timestamp_ms if 0 <= timestamp_ms <= MAX_MS else min(max(timestamp_ms, 0), MAX_MS)
        try:
            event, traceparent = decode_event(value, headers, self._topic)
            fields, content = _example_of(event, self._learn_turns)
            if self._tenant is not None:
                require_own_adapter(fields["adapter"], self._tenant)
            if "expires_at" in fields:
                _require_not_expired(fields["expires_at"], at_ms)
        except WireError as error:
            return Refused(error.reason, error.detail)
        adapter, kind, document_id = fields["adapter"], fields["kind"], fields["document_id"]
        identity = orjson.dumps([adapter, kind, document_id, sha256(content).hexdigest()])
        example_id = sha256(identity).hexdigest()[:32]
        redrives = redrive_count(headers)
        document = (adapter, document_id, fields["learn"])
        latest = self._remember(offset, example_id, document, redrives, at_ms)
        if latest is not None:
            # Hazard: an older version of this code may have refused a record that this code accepts, and a rebuilt
            # window holds it. A redrive sends that record back, and it must not count as a duplicate of its own first
            # occurrence. So only an occurrence with at least as many redrives makes a record a duplicate.
            if latest[1] != example_id:
                fields["returned"] = True
                if fields["learn"]:
                    fields["revises"] = latest[1]
            elif latest[3] >= redrives:
                if not self._was_refused(adapter, example_id, latest[4], at_ms):
                    return Duplicate(example_id, latest[0])
                fields["returned"] = True
        fields["example_id"] = example_id
        fields["origin"] = {
            **self._origin, "offset": offset, "leader_epoch": leader_epoch, "timestamp_ms": at_ms,
        }  # fmt: skip
        if at_ms != self._last_time[0]:  # records of one batch often share their time
            self._last_time = (at_ms, datetime.fromtimestamp(at_ms / 1000, UTC).isoformat().encode())
        out = [*_FIXED_HEADERS, ("ce_id", example_id.encode()), ("ce_time", self._last_time[1])]
        if traceparent is not None:
            out.append(("ce_traceparent", traceparent.encode()))
        return Accepted(example_id, adapter.encode(), orjson.dumps(fields), out)

    def _was_refused(self, adapter: str, example_id: str, previous_ms: int, at_ms: int) -> bool:
        """Return whether the example was refused between its previous publication and this one."""
        refused_ms = None if self._refused_at is None else self._refused_at(adapter, example_id, at_ms)
        return refused_ms is not None and refused_ms <= at_ms and previous_ms < refused_ms + REFUSED_WRITE_MS

    def _remember(
        self, offset: int, example_id: str, document: _Document, redrives: int, at_ms: int
    ) -> _Occurrence | None:
        """Add an occurrence to the window, and return the document's latest occurrence before it, if there is one."""
        first, occurrences = offset - self._window, self._occurrences
        while occurrences and occurrences[0][0] < first:
            expired = occurrences.popleft()
            if self._by_document.get(expired[2]) is expired:
                del self._by_document[expired[2]]
        latest = self._by_document.get(document)
        if latest is not None and latest[1] == example_id:
            redrives = max(latest[3], redrives)
        added = (offset, example_id, document, redrives, at_ms)
        occurrences.append(added)
        self._by_document[document] = added
        return latest


RefusedAt: TypeAlias = Callable[[str, str, int], int | None]
"""Returns when an example was refused last, in ms since the epoch, by adapter and example id; None if it was not."""
_Document: TypeAlias = tuple[str, str, bool]
"""Adapter, document id, and whether the example is learned: signals of an interaction revise no text."""
_Occurrence: TypeAlias = tuple[int, str, _Document, int, int]
"""Offset, example id, document, highest redrive count of the example so far, publication time in ms.

A plain tuple, because one is made per record.
"""


def _example_of(event: Event, learn_turns: bool) -> tuple[dict[str, Any], bytes]:
    """Return the example's fields without id and origin, and its content: bytes that are equal for equal examples."""
    if isinstance(event, DocumentObserved):
        text = event.text
        _require_not_blank("text", text)
        fields = {
            "adapter": event.adapter, "kind": "document", "document_id": event.document_id, "learn": True, "text": text,
        }  # fmt: skip
        if event.domain is not None:
            fields["domain"] = event.domain
        if event.supersedes:
            fields["supersedes"] = event.supersedes
        content = text.encode()
    elif isinstance(event, InteractionObserved):
        fields, content = _interaction(event, learn_turns)
    else:
        raise WireError("wrong-topic", "type", got=event.type, allowed="document.observed, interaction.observed")
    if event.source is not None:
        fields["source"] = event.source
    if event.subjects:
        fields["subjects"] = event.subjects
    if event.retention_class != PERMANENT:
        fields["retention_class"] = event.retention_class
    if event.expires_at is not None:
        fields["expires_at"] = event.expires_at
    if event.observed_at is not None:
        fields["observed_at"] = event.observed_at
    return fields, content


def _interaction(event: InteractionObserved, learn_turns: bool) -> tuple[dict[str, Any], bytes]:
    """Return the fields and the content bytes of an interaction's example.

    A correction is always learned, a turn without one only where the settings say so. A rating alone is not learned: it
    is a signal, and a changed rating is a new signal.
    """
    history, prompt, answer = _conversation(event)
    kind: ExampleKind
    content: list[object] = [prompt, answer]
    if event.correction is not None:
        _require_not_blank("correction", event.correction)
        kind, learn, answer = "correction", True, event.correction
        content = [prompt, answer]
    elif learn_turns and not answer.isspace():
        kind, learn = "turn", True
    elif event.rating is not None:
        kind, learn = "rating", False
        content = [prompt, answer, event.rating]
    else:
        kind, learn = "turn", False
    fields: dict[str, Any] = {
        "adapter": event.adapter, "kind": kind, "document_id": event.interaction_id, "learn": learn,
        "prompt": prompt, "answer": answer,
    }  # fmt: skip
    if event.rating is not None:
        fields["rating"] = event.rating
    if not history:
        return fields, orjson.dumps(content)
    fields["history"] = [{"role": role, "content": text} for role, text in history]
    # An object and no list: an example with earlier turns must never have the id of one without.
    return fields, orjson.dumps({"history": history, "last": content})


def _conversation(event: InteractionObserved) -> tuple[list[tuple[str, str]], str, str]:
    """Return role and text of the turns before the prompt, the prompt, and the response."""
    if event.messages is None:
        prompt, response = event.prompt or "", event.response or ""
        _require_not_blank("prompt", prompt)
        return [], prompt, response
    turns: list[tuple[str, str]] = [(message.role, message.content) for message in event.messages]
    for number, (_, text) in enumerate(turns[:-1]):
        _require_not_blank(f"messages.{number}.content", text)
    return turns[:-2], turns[-2][1], turns[-1][1]


def _require_not_expired(expires_at: datetime, at_ms: int) -> None:
    if expires_at.timestamp() * 1000 <= at_ms:
        raise WireError("expired", "expires_at", got=expires_at.isoformat(), allowed="a time after its publication")


def _require_not_blank(field: str, text: str) -> None:
    if text.isspace():
        raise WireError("bad-field", field, got=text, allowed="text that is not only white space")
