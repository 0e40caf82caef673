"""Which requests need a second approver, and which records approve them. Pure.

A request over a pattern can destroy what all adapters learned. So it does nothing until another person has sent it a
second time, with every field as it was and `approved_by`. What counts follows from the topic alone: the two records, and
the times at which the broker took them. Where the keys of persons are set, two different ones must have signed the two.
Hazard: without keys, names are all there is, and whoever may write to `retention` can write two of them.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from perennial.streams.events.event_times import MAX_MS
from perennial.streams.events.models import RetentionRequested
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.event_signatures import check_request
from perennial.streams.retain.ledger import Approval, RequestRecord, epoch_ms
from perennial.streams.retention.kinds import KINDS, is_pattern

MAX_CLOCK_AHEAD_MS: Final = 300_000
"""How far the clock of a person's machine may be ahead of the broker's."""


@dataclass(frozen=True)
class ApprovalRules:
    """Which requests need a second approver, for how long they wait for one, and whose signatures count.

    Attributes:
        wait_ms: How long a request waits, in milliseconds; 0: no request needs an approver.
        trust: The trusted keys of persons.
    """

    wait_ms: int = 0
    trust: Trust = field(default_factory=Trust)

    def needed(self, request: RetentionRequested, received_ms: int) -> Approval | None:
        """Return what a request waits for; None where it needs no second approver.

        Args:
            request: The request as it came from the topic.
            received_ms: When the broker took it, in milliseconds since 1970.

        Raises:
            WireError: Signatures are asked for, and the request has none that counts, or is too old.
        """
        if not (self.wait_ms and KINDS[request.kind].destroys and is_pattern(request.adapter)):
            return None
        key = _signer(request, self.trust)
        if key is not None:
            self._require_recent(request, received_ms)
        return Approval(until_ms=received_ms + self.wait_ms, requester_key=key)

    def approved(self, record: RequestRecord | None, approval: RetentionRequested, received_ms: int) -> RequestRecord:
        """Return the approved request; the same record where the same person approved it before.

        Args:
            record: The request with the approval's id, which may be another one there; None where there is none.
            approval: The approval as it came from the topic.
            received_ms: When the broker took it, in milliseconds since 1970.

        Raises:
            WireError: The record approves nothing.
        """
        name = approval.approved_by or ""
        if record is None or record.approval is None:
            raise _refusal("request_id", approval.request_id, "the id of a request that waits for a second approver")
        changed = _changed_fields(record.request, approval)
        if changed:
            raise _refusal("the approval is of another request", ", ".join(changed), "every field as it was requested")
        waiting, key = record.approval, _signer(approval, self.trust)
        if same_person(name, record.request.requested_by):
            raise _refusal("approved_by", name, "another person than requested_by")
        if self.trust.verifies and waiting.requester_key in {None, key}:
            raise _refusal("signature", key, "one by another key than the request's")
        if waiting.approved_by is not None:
            if same_person(name, waiting.approved_by):
                return record
            raise _refusal("approved_by", name, f"nothing: {waiting.approved_by} has approved it")
        if received_ms > waiting.until_ms:
            raise _refusal("the approval came too late", _shown(received_ms), f"until {_shown(waiting.until_ms)}")
        given = {"approved_by": name, "approver_key": key, "approved_ms": received_ms}
        return record.model_copy(update={"approval": waiting.model_copy(update=given)})

    def _require_recent(self, request: RetentionRequested, received_ms: int) -> None:
        """Refuse a signed request that somebody kept, to send it when nobody knows its id any more."""
        made_ms = epoch_ms(request.requested_at)
        if made_ms is None:
            raise WireError("missing-field", "requested_at", got="nothing", allowed="a value: the request is signed")
        if not received_ms - self.wait_ms <= made_ms <= received_ms + MAX_CLOCK_AHEAD_MS:
            raise WireError(
                "expired", "requested_at", got=_shown(made_ms),
                allowed=f"a time between {_shown(received_ms - self.wait_ms)} and {_shown(received_ms)}",
            )  # fmt: skip


def waiting_text(record: RequestRecord) -> str:
    """Return the published explanation of a request that waits for a second approver."""
    until_ms = record.approval.until_ms if record.approval else 0
    return (
        f"waits for a second approver until {_shown(until_ms)}: another person than {record.request.requested_by} runs "
        f"`perennial forget approve {record.request.request_id}`"
    )


def expired_text(record: RequestRecord) -> str:
    """Return the published explanation of a request that nobody approved in time."""
    until_ms = record.approval.until_ms if record.approval else 0
    return f"nobody approved it until {_shown(until_ms)}; if it is still wanted, send it again under another id"


def same_person(one: str, other: str) -> bool:
    """Return whether two names are the same but for case, outer blanks and Unicode form.

    >>> same_person("Ann ", "ann"), same_person("ann", "bob")
    (True, False)
    """
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().casefold()


def _signer(request: RetentionRequested, trust: Trust) -> str | None:
    try:
        return check_request(request, trust)
    except SignatureError as error:
        raise WireError("bad-signature", error.message, got=error.got, allowed=error.allowed) from error


def _changed_fields(request: RetentionRequested, approval: RetentionRequested) -> list[str]:
    may_differ = {"request_id", "approved_by", "signature"}  # the request was found by its id
    names = (name for name in RetentionRequested.model_fields if name not in may_differ)
    return [name for name in names if getattr(request, name) != getattr(approval, name)]


def _refusal(message: str, got: object, allowed: str) -> WireError:
    return WireError("bad-approval", message, got=got, allowed=allowed)


def _shown(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(min(at_ms, MAX_MS) / 1000, UTC):%Y-%m-%d %H:%M} UTC"
