"""The kinds of retention requests: one table that says what each kind does. Pure.

Every other place reads this table: retain (streams/retain/), the command line (streams/cli/forget/), the README's
table, the tests and the soak. The wire's type is the Literal `RetentionKind` in streams/events/models.py; a test holds
the two equal.

To add a kind:

1. Add one row to `_ROWS` below. The attributes of `KindRules` say what each column means.
2. Add its name to `RetentionKind` in streams/events/models.py; renew docs/schema and the README with `make schema`.
3. Give it what the row names:
   - `job="forget"` or `job="rollback"`: nothing more. retain writes the quarantine entry, sends the job, sends it
     again and closes the request; the learner carries the job out.
   - `job=None`: add the function that carries the kind out to `RequestWorker` in streams/retain/request_worker.py and
     name it there in `_WITHOUT_JOB`. A test fails as long as it is missing.
   - another job: CONTRIBUTING.md lists the files.
   - a value in `requires` that is new: add the field to `RetentionRequested`, and what it holds to `_FIELDS`.
4. Add a case to tests/unit/streams/test_retention_requests.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from perennial.streams.events.models import RetentionKind, RetentionRequested

SelectorRule = Literal["required", "retention_class", "optional", "refused"]
"""`retention_class`: the selector must give this field, and may give others."""
DueAtRule = Literal["deadline", "start", "end", "refused"]
"""What `due_at` of a request says: when it must have ended, when it begins, or when it stops being in force.

`refused`: a request that gives one is refused, because it takes effect at once and stays.
"""
Job = Literal["forget", "rollback"]
DEPENDANT_PREFIX: Final = "perennial:dependant:"
"""How the request id of a job begins that names no example: it makes the learner rebuild an adapter without what it
depends on. It is no request of its own: retention-status has none of its states."""


@dataclass(frozen=True, slots=True)
class KindRules:
    """One row of the table: what retention requests of one kind may say and what they lead to.

    Attributes:
        kind: The name of the kind in `retention.requested`.
        summary: What the kind does, for people.
        selector: Whether the request gives a selector.
        requires: Fields of `RetentionRequested` that a request of this kind must give. A kind that does not list such a
            field refuses it.
        patterns: The request may name many adapters by a pattern such as `acme/*`.
        due_at: The meaning of the request's `due_at`.
        job: The job that retain sends to the learner for each adapter: `forget` for the selected examples, `rollback`
            to revoke the version that is live when retain takes the request. None: retain does all of it by itself.
        suppresses_text: Equal texts are never learned again, under any document id. Only for `job="forget"`.
        emergencies: The request may set `emergency`: affected versions go out of service before the rebuilt one is ready.
        stays_in_force: The request has no end of its own: it is in state `executed` until another request or its
            `due_at` ends it. Such a request is never overdue.
        destroys: The request deletes, takes out of service, or ends what keeps from being deleted. Over a pattern such a
            request needs a second approver (PERENNIAL_SECOND_APPROVER).
        done: What `retention-status` says of a request that did what it should.
        refused_because: Why no request of this kind is accepted yet, and what to do instead; empty: accepted.
    """

    kind: RetentionKind
    summary: str
    selector: SelectorRule
    requires: tuple[Literal["time_to_live", "superseded_by"], ...] = ()
    patterns: bool = True
    due_at: DueAtRule = "deadline"
    job: Job | None = None
    suppresses_text: bool = False
    emergencies: bool = False
    stays_in_force: bool = False
    destroys: bool = True
    done: str = ""
    refused_because: str = ""


_ROWS: Final = (
    KindRules(
        "policy", "Forget examples of a retention class once they are time_to_live old; a later policy replaces it.",
        selector="retention_class", requires=("time_to_live",), due_at="refused", stays_in_force=True, done="in force",
    ),
    KindRules(
        "expire", "Forget the selected examples at due_at, or now; equal texts may be learned again.",
        selector="required", due_at="start", job="forget", done="forgotten",
    ),
    KindRules(
        "supersede", "Forget the selected examples of the source of the document superseded_by, once that is learned; equal "
        "texts may be learned again.",
        selector="required", requires=("superseded_by",), patterns=False, job="forget", done="forgotten",
    ),
    KindRules(
        "erase", "Forget the selected examples now; never learn their texts again.",
        selector="required", job="forget", suppresses_text=True, emergencies=True, done="forgotten",
    ),
    KindRules(
        "decay", "Let what was learned fade over a half-life.",
        selector="required",
        refused_because="decay is not supported: an adapter cannot fade one part of what it learned; "
        "use kind policy with time_to_live",
    ),
    KindRules(
        "hold", "Keep the selected examples, or all, from being forgotten until the hold is released or due_at.",
        selector="optional", due_at="end", stays_in_force=True, destroys=False, done="in force",
    ),
    KindRules(
        "release", "End the holds that have the same adapter and selector.",
        selector="optional", due_at="refused", done="released",
    ),
    KindRules(
        "revoke", "Take the live version out of service for good; the newest promoted version left becomes live.",
        selector="refused", job="rollback", done="revoked",
    ),
)  # fmt: skip

KINDS: Final[Mapping[RetentionKind, KindRules]] = MappingProxyType({row.kind: row for row in _ROWS})

_FIELDS: Final = {
    "time_to_live": "time_to_live (for example P30D; `permanent` ends an earlier policy with the same selector)",
    "superseded_by": "superseded_by, the id of the new document",
}


def is_pattern(adapter: str) -> bool:
    """Return whether a request for this adapter is also for adapters that do not exist yet: `acme/*`, `*`."""
    return adapter.endswith("*")


def refusal_of(request: RetentionRequested, received_ms: int) -> str:
    """Return why a request cannot be accepted and what to ask for instead; empty if it can be.

    Does not look at other requests: whether a release finds its hold is for retain to say.

    Args:
        request: The request as it came from the topic.
        received_ms: When the broker took the request, in milliseconds since 1970.
    """
    rules = KINDS[request.kind]
    return rules.refused_because or _unsupported_field(request) or _misplaced_field(request, rules, received_ms)


def _unsupported_field(request: RetentionRequested) -> str:
    if request.half_life is not None:
        return "half_life is not supported: nothing fades gradually; leave it out, or use kind policy with time_to_live"
    if request.assurance is not None:
        return (
            "assurance is not supported: every forgetting rebuilds the adapter as if it had never seen the examples; "
            "leave it out"
        )
    return ""


def _misplaced_field(request: RetentionRequested, rules: KindRules, received_ms: int) -> str:
    kind, selector = request.kind, request.selector
    for name, described in _FIELDS.items():
        given, wanted = getattr(request, name) is not None, name in rules.requires
        if given and not wanted:
            owners = " or ".join(row.kind for row in _ROWS if name in row.requires)
            return f"{name} belongs to kind {owners}; leave it out, or use kind {owners}"
        if wanted and not given:
            return f"{kind} needs {described}"
    if rules.selector == "required" and selector is None:
        return f"{kind} needs a selector: document_ids, subjects, sources, retention_class or before"
    if rules.selector == "retention_class" and (selector is None or selector.retention_class is None):
        return f"{kind} needs selector.retention_class (`permanent` for documents that name none)"
    if rules.selector == "refused" and selector is not None:
        return f"{kind} is about the live version as a whole; to forget examples use kind erase with this selector"
    if request.emergency and not rules.emergencies:
        owners = " or ".join(row.kind for row in _ROWS if row.emergencies)
        return f"emergency belongs to kind {owners}; leave it out, or use kind {owners}"
    if rules.due_at == "refused" and request.due_at is not None:
        return (
            f"{kind} takes effect at once, due_at does not apply to it; leave it out and send the {kind} when it is due"
        )
    if not rules.patterns and is_pattern(request.adapter):
        return f"{kind} needs one adapter; send one request for each adapter of {request.adapter}"
    if rules.due_at == "end" and request.due_at is not None and request.due_at.timestamp() * 1000 <= received_ms:
        return f"due_at, when the {kind} ends by itself, is in the past; leave it out or name a later time"
    return ""
