"""The events of every topic as pydantic models: the one place where fields, limits and types are said.

JSON Schema and the AsyncAPI document are generated from here (`python -m tools.generate_schemas`).
Imports nothing else of the project.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

MAX_TEXT_BYTES = 256 * 1024
MAX_ID_CHARS = 512
MAX_LIST_ITEMS = 64
PERMANENT = "permanent"

ADAPTER_PATTERN = r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*){0,3}$"
ADAPTERS_PATTERN = rf"{ADAPTER_PATTERN[:-1]}(/\*)?$|^\*$"
ALIAS_PATTERN = r"^[a-z0-9][a-z0-9._-]*$"
_DURATION = re.compile(
    r"^P(?!$)(?:(\d{1,4})Y)?(?:(\d{1,4})M)?(?:(\d{1,4})W)?(?:(\d{1,6})D)?"
    r"(?:T(?=\d)(?:(\d{1,6})H)?(?:(\d{1,6})M)?(?:(\d{1,9})S)?)?$",
    re.ASCII,
)
_DURATION_UNITS_S = (365 * 86400, 30 * 86400, 7 * 86400, 86400, 3600, 60, 1)


def duration_s(value: str) -> int:
    """Seconds in an ISO 8601 duration; a year counts 365 days and a month 30.

    Raises ValueError where the text is not a duration above zero.
    """
    match = _DURATION.fullmatch(value)
    total = sum(int(n) * unit for n, unit in zip(match.groups(), _DURATION_UNITS_S, strict=True) if n) if match else 0
    if total <= 0:
        raise ValueError(f"not an ISO 8601 duration above zero: {value!r} (for example P30D or PT12H)")
    return total


def _check_text(value: str) -> str:
    size = len(value) if value.isascii() else len(value.encode("utf-8"))
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"text has {size} bytes, at most {MAX_TEXT_BYTES} are allowed")
    return value


def _check_retention(value: str) -> str:
    if value != PERMANENT:
        duration_s(value)
    return value


Adapter = Annotated[str, Field(pattern=ADAPTER_PATTERN, max_length=200)]
AdapterPattern = Annotated[str, Field(pattern=ADAPTERS_PATTERN, max_length=202)]
"""One adapter, all below a prefix (`acme/*`), or all (`*`)."""
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_BYTES), AfterValidator(_check_text)]
Subjects = Annotated[list[Name], Field(max_length=MAX_LIST_ITEMS)]
Ids = Annotated[list[Id], Field(max_length=MAX_LIST_ITEMS)]
RetentionClass = Annotated[str, Field(max_length=32), AfterValidator(_check_retention)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Loss = Finite
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Millis = Annotated[int, Field(ge=0, le=253_402_300_799_999)]
"""Since 1970, to the end of year 9999: what is later no clock or date can show."""
Alias = Annotated[str, Field(pattern=ALIAS_PATTERN, max_length=64)]


class Event(BaseModel):
    """What all events share: immutable, and tolerant of fields that a newer writer added."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    type: ClassVar[str]
    topic: ClassVar[str]

    def key(self) -> str:
        """The Kafka key: what must stay in order stays on one partition."""
        raise TypeError(f"{type(self).__name__} has no key")


class _Outside(Event):
    """An event that people write: a misspelt field must not pass in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DocumentObserved(_Outside):
    """A document that the adapter is to learn."""

    type: ClassVar[str] = "document.observed"
    topic: ClassVar[str] = "documents"
    adapter: Adapter
    document_id: Id
    text: Text
    source: Name | None = None
    domain: Name | None = None
    subjects: Subjects = Field(default_factory=list)
    retention_class: RetentionClass = PERMANENT
    expires_at: AwareDatetime | None = None
    supersedes: Ids = Field(default_factory=list)
    observed_at: AwareDatetime | None = None

    def key(self) -> str:
        return f"{self.adapter}|{self.document_id}"


class InteractionObserved(_Outside):
    """A turn between a user and the model, with what people said of it."""

    type: ClassVar[str] = "interaction.observed"
    topic: ClassVar[str] = "interactions"
    adapter: Adapter
    interaction_id: Id
    prompt: Text
    response: Text
    correction: Text | None = None
    rating: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)] | None = None
    subjects: Subjects = Field(default_factory=list)
    retention_class: RetentionClass = PERMANENT
    expires_at: AwareDatetime | None = None
    observed_at: AwareDatetime | None = None

    def key(self) -> str:
        return f"{self.adapter}|{self.interaction_id}"


class Origin(BaseModel):
    """Where an example was first published: what learning exactly once is counted by."""

    model_config = ConfigDict(frozen=True)
    cluster_id: str
    topic: str
    topic_id: str
    partition: Count
    offset: Count
    timestamp_ms: int

    def partition_key(self) -> str:
        """The origin partition, safe against a topic or cluster made again under the same name."""
        return f"{self.cluster_id}/{self.topic_id}/{self.topic}/{self.partition}"


ExampleKind = Literal["document", "correction", "turn", "rating"]


class ExampleAccepted(Event):
    """One valid, new input. `learn` is false for a signal (rating, bare turn) that only drift looks at."""

    type: ClassVar[str] = "example.accepted"
    topic: ClassVar[str] = "examples"
    adapter: Adapter
    example_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    kind: ExampleKind
    document_id: Id
    learn: bool
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    rating: Finite | None = None
    source: str | None = None
    domain: str | None = None
    subjects: list[str] = Field(default_factory=list)
    retention_class: str = PERMANENT
    expires_at: AwareDatetime | None = None
    supersedes: list[str] = Field(default_factory=list)
    observed_at: AwareDatetime | None = None
    revises: str | None = None
    origin: Origin

    def key(self) -> str:
        return self.adapter


class ExampleScored(Event):
    """An example with what the frozen base and the live adapter lose on it, in nats per token."""

    type: ClassVar[str] = "example.scored"
    topic: ClassVar[str] = "scored-examples"
    example: ExampleAccepted
    tokens: Count
    base_loss_nats: Loss | None
    live_loss_nats: Loss | None
    live_version: Digest | None = None
    live_generation: Count = 0

    def key(self) -> str:
        return self.example.adapter


class DriftDetected(Event):
    """A detector says that a signal changed."""

    type: ClassVar[str] = "drift.detected"
    topic: ClassVar[str] = "drift"
    adapter: Adapter
    signal: Name
    detector: Name
    before: Finite
    after: Finite
    examples_seen: Count
    origin: Origin

    def key(self) -> str:
        return self.adapter


class BlobRef(BaseModel):
    """A content-addressed object."""

    model_config = ConfigDict(frozen=True)
    digest: Digest
    size_bytes: Count


CutReason = Literal["drift", "size", "age"]


class UpdateRequested(Event):
    """A micro-batch to learn. `marks` maps origin partitions to the highest offset that this cut covers."""

    type: ClassVar[str] = "update.requested"
    topic: ClassVar[str] = "adapter-jobs"
    job_id: Id
    adapter: Adapter
    cut: Count
    batch: BlobRef
    examples: Count
    skipped: Count
    tokens: Count
    reason: CutReason
    drift: DriftDetected | None = None
    marks: dict[Annotated[str, Field(min_length=1, max_length=1024)], Count]
    oldest_ms: Millis
    newest_ms: Millis
    cut_at: AwareDatetime

    def key(self) -> str:
        return self.adapter


class RollbackRequested(Event):
    """Make an earlier version live again; what was learned since stays marked as seen.

    version: the one to go back to. With `revoke` it is the one that must never be served again, and the newest
    promoted version that is not revoked becomes live: named, so that a second delivery revokes nothing more.
    """

    type: ClassVar[str] = "rollback.requested"
    topic: ClassVar[str] = "adapter-jobs"
    job_id: Id
    adapter: Adapter
    alias: Alias = "live"
    version: Digest | None = None
    requested_by: Name
    reason: Annotated[str, Field(max_length=1024)] = ""
    revoke: bool = False

    def key(self) -> str:
        return self.adapter


Assurance = Literal["exact", "behavioural", "ranking"]
RetentionKind = Literal["policy", "expire", "supersede", "erase", "decay", "hold", "release", "revoke"]


class Selector(BaseModel):
    """Which examples a retention request is about; the fields given must all match."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    document_ids: Annotated[list[Id], Field(max_length=1000)] | None = None
    subjects: Annotated[list[Name], Field(max_length=1000)] | None = None
    sources: Annotated[list[Name], Field(max_length=1000)] | None = None
    retention_class: RetentionClass | None = None
    before: AwareDatetime | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not any((self.document_ids, self.subjects, self.sources, self.retention_class, self.before)):
            raise ValueError(
                "a selector needs at least one of document_ids, subjects, sources, retention_class, before"
            )
        return self

    def matches(self, example: ExampleAccepted) -> bool:
        """Whether the example is meant: every field that is given must fit. `before` counts from its publication."""
        return (
            (self.document_ids is None or example.document_id in self.document_ids)
            and (self.subjects is None or not set(self.subjects).isdisjoint(example.subjects))
            and (self.sources is None or example.source in self.sources)
            and (self.retention_class is None or example.retention_class == self.retention_class)
            and (self.before is None or example.origin.timestamp_ms < self.before.timestamp() * 1000)
        )


class RetentionRequested(_Outside):
    """A request to forget or to hold examples, or to take a version out of service.

    half_life and assurance are in the model so that retain can refuse a request that gives them, with a reason.
    """

    type: ClassVar[str] = "retention.requested"
    topic: ClassVar[str] = "retention"
    request_id: Id
    kind: RetentionKind
    adapter: AdapterPattern
    selector: Selector | None = None
    superseded_by: Id | None = None
    half_life: RetentionClass | None = None
    time_to_live: RetentionClass | None = None
    assurance: Assurance | None = None
    requested_by: Name
    reason: Annotated[str, Field(max_length=1024)] = ""
    due_at: AwareDatetime | None = None

    def key(self) -> str:
        return self.adapter


RetentionState = Literal["accepted", "held", "quarantined", "executed", "published", "closed", "failed"]


class RetentionProgressed(Event):
    """How far a retention request has come."""

    type: ClassVar[str] = "retention.progressed"
    topic: ClassVar[str] = "retention-status"
    request_id: Id
    adapter: AdapterPattern
    kind: RetentionKind
    state: RetentionState
    examples: Count = 0
    version: Digest | None = None
    detail: str = ""
    at: AwareDatetime

    def key(self) -> str:
        return self.request_id


class ForgetRequested(Event):
    """Rebuild an adapter as if it had never seen these examples: those named, and those that the selector matches.

    until_ms: only examples published up to then are meant; what is published later is new.
    """

    type: ClassVar[str] = "forget.requested"
    topic: ClassVar[str] = "adapter-jobs"
    job_id: Id
    request_id: Id
    kind: RetentionKind
    adapter: Adapter
    selector: Selector | None = None
    example_ids: Annotated[list[str], Field(max_length=10_000)] = []
    until_ms: int
    suppress: bool = True
    reason: str = ""

    def key(self) -> str:
        return self.adapter

    def matches(self, example: ExampleAccepted) -> bool:
        """Return True where the example must be forgotten."""
        if example.origin.timestamp_ms > self.until_ms:
            return False
        return example.example_id in self.example_ids or (self.selector is not None and self.selector.matches(example))


class BaseRef(BaseModel):
    """The frozen model that an adapter belongs to."""

    model_config = ConfigDict(frozen=True)
    model: str
    sha256: Digest


class Learned(BaseModel):
    """What a version learned from: counts, and the publication times of its oldest and newest example."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)
    examples: Count
    tokens: Count
    from_: AwareDatetime | None = Field(default=None, alias="from")
    to: AwareDatetime | None = None


class _AdapterState(Event):
    """The full state of an alias; never a delta, for the topic is compacted."""

    topic: ClassVar[str] = "adapter-updates"
    adapter: Adapter
    alias: Alias = "live"
    generation: Count
    version: Digest
    seq: Count
    manifest_uri: str
    weights_uri: str
    weights_sha256: Digest
    weights_bytes: Count
    rank: Count
    base: BaseRef
    previous_version: Digest | None = None
    learned: Learned
    gate: dict[str, Finite | int | str | bool | None] = {}
    reason: str
    stage_at: dict[str, AwareDatetime] = {}
    published_at: AwareDatetime

    def key(self) -> str:
        return f"{self.adapter}#{self.alias}"


class AdapterPromoted(_AdapterState):
    """A newer version went live."""

    type: ClassVar[str] = "adapter.promoted"


class AdapterRolledBack(_AdapterState):
    """An earlier version went live again."""

    type: ClassVar[str] = "adapter.rolled_back"


class AdapterRevoked(_AdapterState):
    """The version before must not be served any more; this one replaces it."""

    type: ClassVar[str] = "adapter.revoked"


class AdapterRetired(_AdapterState):
    """The adapter is no longer served at all."""

    type: ClassVar[str] = "adapter.retired"


AdapterUpdate = AdapterPromoted | AdapterRolledBack | AdapterRevoked | AdapterRetired


class _Ack(Event):
    topic: ClassVar[str] = "adapter-acks"
    adapter: Adapter
    alias: Alias = "live"
    replica: Name
    generation: Count
    version: Digest
    stage_s: dict[str, Finite] = {}
    published_at: AwareDatetime
    at: AwareDatetime

    def key(self) -> str:
        return f"{self.adapter}#{self.replica}"


class AdapterActivated(_Ack):
    """A subscriber serves this version now."""

    type: ClassVar[str] = "adapter.activated"


class AdapterFailed(_Ack):
    """A subscriber could not take this version."""

    type: ClassVar[str] = "adapter.failed"
    error: str


EVENTS: dict[str, type[Event]] = {
    model.type: model
    for model in (
        DocumentObserved, InteractionObserved, ExampleAccepted, ExampleScored, DriftDetected,
        UpdateRequested, RollbackRequested, ForgetRequested, RetentionRequested, RetentionProgressed,
        AdapterPromoted, AdapterRolledBack, AdapterRevoked, AdapterRetired, AdapterActivated, AdapterFailed,
    )
}  # fmt: skip

DEFAULT_TYPES: dict[str, str] = {
    "documents": DocumentObserved.type,
    "interactions": InteractionObserved.type,
    "retention": RetentionRequested.type,
}
"""The type of an event that came without any header, by topic (prefix removed)."""


class BatchSkip(BaseModel):
    """An accepted example that a cut covers but does not learn, and why."""

    model_config = ConfigDict(frozen=True)
    example_id: str
    origin: Origin
    reason: Literal["signal", "duplicate", "expired", "quarantined"]


class Batch(BaseModel):
    """The body of a micro-batch: the only place besides the topics where text lives, so that it can be erased."""

    model_config = ConfigDict(frozen=True)
    adapter: Adapter
    cut: Count
    examples: list[ExampleAccepted]
    skipped: list[BatchSkip]
