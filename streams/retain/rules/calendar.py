"""The requests that retain makes by itself: for examples whose life ended, and for documents that supersede others. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import orjson

from perennial.streams.events.models import ExampleAccepted, ForgetRequested, RetentionRequested, Selector
from perennial.streams.events.wire_error import WireError
from perennial.streams.retain.ledger import MAX_IDS, RequestRecord, StoredExample, expires_ms
from perennial.streams.retain.rules.in_force import InForce

CALENDAR: Final = "perennial/retain"
"""The `requested_by` of requests that the calendar makes."""
OWN_PREFIX: Final = "perennial:"
"""Request ids that begin so are the calendar's own; a request from outside with such an id is refused."""
GROUP_MS: Final = 1_000
"""Examples whose lives end within this time of each other are forgotten together."""
_OLD_SUPERSEDE_PREFIX: Final = "supersede-"


@dataclass(frozen=True, slots=True)
class Expiries:
    """The ends of the lives of an adapter's examples, without those that are held.

    Attributes:
        due: Ids of the examples to forget now, at most MAX_IDS, those whose life ended first; empty: none yet.
        next_ms: When the next examples are to be forgotten, in milliseconds since 1970; None: never.
        upcoming: Ids of those examples.
        end_ms: When the last life among the first that end together ended, in milliseconds since 1970; 0: none is due.
    """

    due: tuple[str, ...] = ()
    next_ms: int | None = None
    upcoming: tuple[str, ...] = ()
    end_ms: int = 0


def expiries(in_force: InForce, adapter: str, stored: Iterable[StoredExample], now_ms: int) -> Expiries:
    """Return which of an adapter's examples are due, and which fall due next.

    Examples whose lives end within GROUP_MS of each other are due together, when the last of these lives ends. So the
    examples that were rebuilt without ahead of time are exactly those that are due at the hour. None is due early.

    Args:
        in_force: Holds and policies.
        adapter: The adapter to look at.
        stored: The adapter's examples whose text the store has.
        now_ms: The guarded time, in milliseconds since 1970.
    """
    policies, holds = in_force.policies_on(adapter), in_force.hold_matchers(adapter)
    ends: list[tuple[int, str]] = []
    for item in stored:
        end_ms = expires_ms(item.example, policies)
        if end_ms is not None and not any(matches(item.example) for matches in holds):
            ends.append((end_ms, item.example.example_id))
    if not ends:
        return Expiries()
    ends.sort()
    last_ms = max(end_ms for end_ms, _ in ends[:MAX_IDS] if end_ms <= ends[0][0] + GROUP_MS)
    late = now_ms >= last_ms + 2 * GROUP_MS  # nothing was prepared for so long ago: take all that is due
    until_ms = now_ms if late else last_ms
    ids = tuple(sorted({example_id for end_ms, example_id in ends[:MAX_IDS] if end_ms <= until_ms}))
    return Expiries(due=ids, end_ms=last_ms) if now_ms >= last_ms else Expiries(next_ms=last_ms, upcoming=ids)


def expiry_request(adapter: str, example_ids: Sequence[str], at_ms: int, end_ms: int) -> RequestRecord:
    """Return the calendar's request to forget these examples; the same examples with the same end make the same id.

    An example that is learned again after it expired lives to another end.

    Args:
        adapter: The adapter.
        example_ids: The examples, sorted.
        at_ms: The guarded time, in milliseconds since 1970.
        end_ms: When their life ended, in milliseconds since 1970.
    """
    ids = list(example_ids)
    request = RetentionRequested(
        request_id=f"{OWN_PREFIX}expire:{sha256(orjson.dumps([adapter, ids, end_ms])).hexdigest()[:32]}", kind="expire",
        adapter=adapter, requested_by=CALENDAR, reason="time to live ended",
    )  # fmt: skip
    return RequestRecord(request=request, received_ms=at_ms, until_ms=at_ms, example_ids=ids)


def preparation(adapter: str, example_ids: Sequence[str], end_ms: int) -> ForgetRequested:
    """Return the job that rebuilds an adapter ahead of time without the examples that will expire.

    It has the request id of the later job for the same examples, but changes nothing that is served or stored.

    Args:
        adapter: The adapter.
        example_ids: The examples, sorted.
        end_ms: When their life ends, in milliseconds since 1970.
    """
    request = expiry_request(adapter, example_ids, end_ms, end_ms).request
    return ForgetRequested(
        job_id="sha256:" + sha256(f"prepare\n{request.request_id}\n{adapter}".encode()).hexdigest(),
        request_id=request.request_id, kind="expire", adapter=adapter, example_ids=list(example_ids), until_ms=end_ms,
        suppress=False, prepare=True, reason="time to live ends soon",
    )  # fmt: skip


def supersessions(adapter: str, stored: Sequence[StoredExample], now_ms: int) -> list[RequestRecord]:
    """Return a request for each learned document that supersedes older stored ones of its own source.

    A document never reaches documents of another source: only their owner may take those back. Documents that name no
    source count as one source. The request id names the publication, too: a redelivery makes the same id, and the same
    document published again makes another one, because an older text may have returned in between.

    Args:
        adapter: The adapter to look at.
        stored: The adapter's examples whose text the store has.
        now_ms: The guarded time, in milliseconds since 1970.
    """
    superseding = [item.example for item in stored if item.example.supersedes and item.learned]
    if not superseding:
        return []
    oldest: dict[tuple[str, str | None], int] = {}
    for item in stored:
        key = _document_key(item.example.document_id, item.example.source)
        oldest[key] = min(item.example.origin.timestamp_ms, oldest.get(key, item.example.origin.timestamp_ms))
    made: list[RequestRecord] = []
    for new in superseding:
        published_ms = new.origin.timestamp_ms
        keys = (_document_key(document_id, new.source) for document_id in new.supersedes)
        if any(oldest.get(key, published_ms) < published_ms for key in keys):
            request_id = f"{OWN_PREFIX}supersede:{new.example_id}:{_occurrence_of(new)}"
            request = RetentionRequested(
                request_id=request_id, kind="supersede", adapter=adapter,
                selector=Selector(document_ids=new.supersedes, sources=[new.source]), superseded_by=new.document_id,
                requested_by=CALENDAR, reason=f"superseded by {new.document_id}"[:1024],
            )  # fmt: skip
            made.append(RequestRecord(request=request, received_ms=now_ms, until_ms=published_ms - 1))
    return made


def require_outside_id(request_id: str) -> None:
    """Check that the id of a request from outside is none that the calendar may give.

    Raises:
        WireError: It is reserved.
    """
    if request_id.startswith(OWN_PREFIX):
        raise WireError(
            "bad-field", "request_id", got=request_id,
            allowed=f"an id that does not begin with {OWN_PREFIX}, which retain's own requests have",
        )  # fmt: skip


def earlier_ids_of(request_id: str) -> tuple[str, ...]:
    """Return the ids that earlier releases gave the calendar's request; none where they cannot be known.

    These ids name no publication: a request under one of them is the same only if it reaches as far back.
    """
    rest = request_id.removeprefix(f"{OWN_PREFIX}supersede:")
    if rest == request_id:
        return ()
    example_id = rest.partition(":")[0]
    return f"{OWN_PREFIX}supersede:{example_id}", _OLD_SUPERSEDE_PREFIX + example_id


def _occurrence_of(example: ExampleAccepted) -> str:
    """Return a short id of the publication that an example stems from."""
    origin = example.origin
    position = [origin.partition_key(), origin.leader_epoch, origin.offset]
    return sha256(orjson.dumps(position)).hexdigest()[:16]


def _document_key(document_id: str, source: str | None) -> tuple[str, str | None]:
    return unicodedata.normalize("NFC", document_id), source and unicodedata.normalize("NFC", source)
