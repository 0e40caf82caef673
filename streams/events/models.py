"""The events of every topic, and the body of a micro-batch, as pydantic models.

Base classes and types of single fields are in fields.py, the events of documents and interactions in input_events.py,
those of adapter-updates and adapter-acks in adapter_events.py. JSON Schema and the AsyncAPI document in docs/ are
generated from the four.

Add a field to an event:

1. Add the field with a default, because records without it are still in the topics, and a docstring below it, which
   becomes its description in the JSON Schema.
2. Run `make schema`, which writes docs/schema and docs/asyncapi.json.
3. A field of a document or an interaction reaches the learner only where intake copies it into the example: add it to
   ExampleAccepted and to `_example_of` in streams/intake/validation.py.

Never rename or remove a field: a reader of the older version would refuse or misread the record. Readers ignore
unknown fields, except in events that people write, where an unknown field is more likely a misspelt one.

Add an event: write the model in the section of its topic, add it to EVENTS, name it in streams/kafka/topics.py, and run
`make schema`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, ClassVar, Literal, Self
from unicodedata import normalize

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from perennial.streams.events.adapter_events import (
    AdapterActivated,
    AdapterFailed,
    AdapterPromoted,
    AdapterRetired,
    AdapterRevoked,
    AdapterRolledBack,
    ReplicaLeft,
)
from perennial.streams.events.fields import (
    FROZEN,
    MAX_LIST_ITEMS,
    PERMANENT,
    Adapter,
    AdapterPattern,
    Alias,
    ClusterId,
    Count,
    CutNumber,
    Digest,
    Event,
    Finite,
    Id,
    Int32,
    Loss,
    Millis,
    Name,
    OutsideEvent,
    Rating,
    RetentionClass,
    Signature,
    Text,
    Time,
    TokenCount,
    TopicId,
    TopicName,
)
from perennial.streams.events.input_events import (
    MAX_TURNS,
    DocumentObserved,
    InteractionObserved,
    Turn,
    check_history,
    is_none,
)

# --- examples, scored-examples, drift: what intake accepted, and what the scorer and the detectors found --------------


class Origin(BaseModel):
    """The Kafka record from which an example came; exactly-once learning compares these positions."""

    model_config = FROZEN
    cluster_id: ClusterId
    topic: TopicName
    topic_id: TopicId
    partition: Int32
    offset: Count
    leader_epoch: Int32 = 0
    """Leader epoch of the partition that Kafka stored with the record, 0 where it stored none. It is the same whenever
    the record is read. After a lost log tail or an unclean leader election the same offset comes again under a higher
    epoch, and is another record."""
    timestamp_ms: Millis
    """When the record was published, in milliseconds since 1970."""

    def partition_key(self) -> str:
        """Return a key of the partition that differs once the topic or the cluster is created again with its name."""
        return f"{self.cluster_id}/{self.topic_id}/{self.topic}/{self.partition}"


ExampleKind = Literal["document", "correction", "turn", "rating"]
ExampleId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class ExampleAccepted(Event):
    """One valid, new input."""

    type: ClassVar[str] = "example.accepted"
    topic: ClassVar[str] = "examples"
    adapter: Adapter
    example_id: ExampleId
    """Hash of adapter, kind, document id and content: the same content again has the same id."""
    kind: ExampleKind
    document_id: Id
    """Id of the document or of the interaction."""
    learn: bool
    """False for a signal that is only watched for drift: a rating, or a turn where turns are not learned."""
    text: Text | None = None
    prompt: Text | None = None
    answer: Text | None = None
    history: (
        Annotated[list[Turn], Field(min_length=1, max_length=MAX_TURNS - 2), AfterValidator(check_history)] | None
    ) = Field(default=None, exclude_if=is_none)
    """The turns before the prompt, oldest first: a system turn, if any, then user and assistant in turns."""
    rating: Rating | None = None
    source: Name | None = None
    domain: Name | None = None
    subjects: Annotated[list[Name], Field(max_length=MAX_LIST_ITEMS)] = Field(default_factory=list)
    retention_class: RetentionClass = PERMANENT
    expires_at: AwareDatetime | None = None
    supersedes: Annotated[list[Id], Field(max_length=MAX_LIST_ITEMS)] = Field(default_factory=list)
    observed_at: AwareDatetime | None = None
    revises: ExampleId | None = None
    """Id of the example of the same document that this one follows with another text."""
    returned: bool = False
    """True where the same example may have been published before and must be learned again: it had been refused, or
    another text of the same document came in between. It is not a duplicate."""
    origin: Origin
    _system_prompt: str | None = PrivateAttr(default=None)

    @property
    def system_prompt(self) -> str | None:
        """The system prompt that the example's micro-batch records; None outside a micro-batch."""
        return self._system_prompt

    def record_system_prompt(self, text: str | None) -> None:
        """Set the property of the same name; a micro-batch calls this for each of its examples."""
        self._system_prompt = text

    def key(self) -> str:
        return self.adapter


class ExampleScored(Event):
    """An example with its loss under the frozen base and under the live adapter."""

    type: ClassVar[str] = "example.scored"
    topic: ClassVar[str] = "scored-examples"
    example: ExampleAccepted
    tokens: TokenCount
    """Number of tokens that training on the example would train."""
    base_loss_nats: Loss | None
    """Mean loss under the frozen base, in nats per token; None where it was not computed."""
    live_loss_nats: Loss | None
    """Mean loss under the live version, in nats per token; None where it was not computed."""
    live_version: Digest | None = None
    live_generation: Count = 0

    def key(self) -> str:
        return self.example.adapter


class DriftDetected(Event):
    """A detector found that a signal changed."""

    type: ClassVar[str] = "drift.detected"
    topic: ClassVar[str] = "drift"
    adapter: Adapter
    signal: Name
    detector: Name
    before: Finite
    """Mean of the signal before the change, in the signal's own unit."""
    after: Finite
    """Mean of the signal's latest values, in the same unit."""
    examples_seen: Count
    """Number of the adapter's examples that the detectors had seen by then."""
    origin: Origin
    """The record at which the change was detected."""

    def key(self) -> str:
        return self.adapter


# --- retention, retention-status: what must be forgotten or kept ------------------------------------------------------

Assurance = Literal["exact", "behavioural", "ranking"]
RetentionKind = Literal["policy", "expire", "supersede", "erase", "decay", "hold", "release", "revoke"]


def nfc(name: str | None) -> str | None:
    """Return the name in Unicode normalisation form C."""
    return None if name is None else normalize("NFC", name)


@lru_cache(maxsize=256)  # a selector of many names is asked about many examples
def _all_nfc(names: tuple[str | None, ...]) -> frozenset[str | None]:
    return frozenset(map(nfc, names))


class Selector(BaseModel):
    """Selects the examples of a retention request; every given field must match."""

    # Ids and names may hold hidden characters, so that documents that older versions accepted can be forgotten.
    model_config = ConfigDict(**FROZEN, extra="forbid")
    document_ids: Annotated[list[Id], Field(max_length=1000)] | None = None
    subjects: Annotated[list[Name], Field(max_length=1000)] | None = None
    sources: Annotated[list[Name | None], Field(max_length=1000)] | None = None
    """Sources that the examples came from; null selects examples that name no source."""
    retention_class: RetentionClass | None = None
    before: Time | None = None
    """Only examples published before this time."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not any((self.document_ids, self.subjects, self.sources, self.retention_class, self.before)):
            raise ValueError(
                "a selector needs at least one of document_ids, subjects, sources, retention_class, before"
            )
        return self

    def matches(self, example: ExampleAccepted) -> bool:
        """Return True where every given field matches the example.

        Ids, subjects and sources are compared after Unicode normalisation (NFC), because two programs may write the
        same name in two forms. `before` is compared with the publication time.
        """
        return (
            (self.document_ids is None or nfc(example.document_id) in _all_nfc(tuple(self.document_ids)))
            and (self.subjects is None or not _all_nfc(tuple(self.subjects)).isdisjoint(map(nfc, example.subjects)))
            and (self.sources is None or nfc(example.source) in _all_nfc(tuple(self.sources)))
            and (self.retention_class is None or example.retention_class == self.retention_class)
            and (self.before is None or example.origin.timestamp_ms < self.before.timestamp() * 1000)
        )


class RetentionRequested(OutsideEvent):
    """A request to forget or to hold examples, or to take a version out of service.

    Nothing supports half_life and assurance. They are in the model so that retain can refuse a request that gives them
    and say why.
    """

    type: ClassVar[str] = "retention.requested"
    topic: ClassVar[str] = "retention"
    visible: ClassVar[tuple[str, ...]] = ("request_id", "superseded_by", "requested_by", "approved_by")
    request_id: Id
    """Id of the request, chosen by its sender; the same id again is the same request."""
    kind: RetentionKind
    adapter: AdapterPattern
    """One adapter, or a pattern such as `acme/*`."""
    selector: Selector | None = None
    """Which examples the request is about; a hold or a release may leave it out and means all of them."""
    superseded_by: Id | None = None
    """Id of the document that replaces the selected ones."""
    half_life: RetentionClass | None = None
    time_to_live: RetentionClass | None = None
    """How long to keep the selected examples, as an ISO 8601 duration; for a policy."""
    assurance: Assurance | None = None
    requested_by: Name
    """Who makes the request, for the records."""
    reason: Annotated[str, Field(max_length=1024)] = ""
    """Why, for the records."""
    due_at: Time | None = None
    """When the request must be carried out at the latest; for kind expire when it begins, for kind hold when it ends."""
    emergency: bool = False
    """True to take affected versions out of service at once, before the rebuilt one is ready; only for kind erase."""
    approved_by: Name | None = Field(default=None, exclude_if=is_none)
    """Who approves the request: only in a second record, which repeats a request that waits for a second approver, with
    every other field as it was. Another person than requested_by."""
    requested_at: Time | None = Field(default=None, exclude_if=is_none)
    """When the request was made; a signed request needs it."""
    signature: Signature | None = Field(default=None, exclude_if=is_none)
    """Ed25519 signature by the person who requests or approves, over every other field; see docs/signatures.md."""

    def key(self) -> str:
        return self.adapter


RetentionState = Literal["unapproved", "accepted", "held", "quarantined", "executed", "published", "closed", "failed"]


class RetentionProgressed(Event):
    """The state of a retention request."""

    type: ClassVar[str] = "retention.progressed"
    topic: ClassVar[str] = "retention-status"
    request_id: Id
    adapter: AdapterPattern
    kind: RetentionKind
    state: RetentionState
    examples: Count = 0
    version: Digest | None = None
    detail: str = ""
    acknowledged: list[str] = []
    """Replicas that confirmed that they serve no version trained on the examples; at most 1,000 are named."""
    missing: list[str] = []
    """Replicas that did not confirm it: their lease expired, they left, or they are still behind; at most 1,000."""
    exceptions: bool = False
    """True where the request was closed at its due_at although a replica with a lease had not confirmed it."""
    at: AwareDatetime

    def key(self) -> str:
        return self.request_id


# --- adapter-jobs: everything that changes an adapter, in one order per adapter ---------------------------------------


class BlobRef(BaseModel):
    """Reference to an object that is stored under its digest."""

    model_config = FROZEN
    digest: Digest
    size_bytes: Count


class BatchSkip(BaseModel):
    """An accepted example that a cut covers and does not learn, and the reason."""

    model_config = FROZEN
    example_id: str
    """In a micro-batch, made from its log position; from earlier releases, and of what a forgetting removed, its own id."""
    origin: Origin
    reason: Literal["signal", "duplicate", "expired", "quarantined"]


MAX_REMOVED = 1_000
"""Most removed examples that an update job lists."""
CutReason = Literal["drift", "size", "age"]


class UpdateRequested(Event):
    """A micro-batch to learn."""

    type: ClassVar[str] = "update.requested"
    topic: ClassVar[str] = "adapter-jobs"
    job_id: Id
    adapter: Adapter
    cut: CutNumber
    """Number of the cut; the cuts of an adapter are consecutive."""
    batch: BlobRef
    examples: Count
    skipped: Count
    tokens: Count
    reason: CutReason
    drift: DriftDetected | None = None
    marks: dict[Annotated[str, Field(min_length=1, max_length=1024)], Count]
    """High-water marks: per origin partition the highest offset that this cut covers."""
    epochs: dict[Annotated[str, Field(min_length=1, max_length=1024)], Count] = Field(default_factory=dict)
    """Leader epochs of these offsets; a partition with epoch 0 is left out."""
    oldest_ms: Millis
    """Publication time of the oldest example."""
    newest_ms: Millis
    """Publication time of the newest example."""
    cut_at: AwareDatetime
    removed: Annotated[list[BatchSkip], Field(max_length=MAX_REMOVED)] = []
    """Examples that a forgetting removed from the micro-batch while the job waited; at most 1,000 are listed."""

    def key(self) -> str:
        return self.adapter


class RollbackRequested(Event):
    """Make an earlier version live again; examples learned since are not learned a second time."""

    type: ClassVar[str] = "rollback.requested"
    topic: ClassVar[str] = "adapter-jobs"
    job_id: Id
    adapter: Adapter
    alias: Alias = "live"
    version: Digest | None = None
    """The version to make live; None for the one that was live before `live`.

    With `revoke` it is the version that must never be served again, and the newest promoted version that is not revoked
    becomes live. The job names it, so that a redelivered job revokes no further version.
    """
    live: Digest | None = None
    """The version that was live when the request was made; without `version`, the one before this becomes live."""
    requested_by: Name
    reason: Annotated[str, Field(max_length=1024)] = ""
    revoke: bool = False

    def key(self) -> str:
        return self.adapter


class RebaseRequested(Event):
    """Learn what an adapter has learned anew, on the base, the rank and the recipe of the learner that takes the job."""

    type: ClassVar[str] = "rebase.requested"
    topic: ClassVar[str] = "adapter-jobs"
    job_id: Id
    adapter: Adapter
    min_learned_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.9
    """Share of the learned examples that the new version must have learned, too; below it the old version stays live."""
    requested_by: Name
    reason: Annotated[str, Field(max_length=1024)] = ""

    def key(self) -> str:
        return self.adapter


class ForgetRequested(Event):
    """Rebuild an adapter without certain examples: those named, and those that the selector matches."""

    type: ClassVar[str] = "forget.requested"
    topic: ClassVar[str] = "adapter-jobs"
    job_id: Id
    request_id: Id
    kind: RetentionKind
    adapter: Adapter
    selector: Selector | None = None
    example_ids: Annotated[list[str], Field(max_length=10_000)] = []
    until_ms: int
    """Examples published after this time, in milliseconds since 1970, are not matched: they are new."""
    suppress: bool = True
    """True to refuse the same texts if they are published again."""
    emergency: bool = False
    """True to take affected versions out of service at once; False to serve them until the rebuilt version is ready."""
    prepare: bool = False
    """True to only rebuild ahead of time: nothing is published or deleted until a job for the same examples comes."""
    reason: str = ""

    def key(self) -> str:
        return self.adapter

    def matches(self, example: ExampleAccepted) -> bool:
        """Return True where the example must be forgotten."""
        if example.origin.timestamp_ms > self.until_ms:
            return False
        return example.example_id in self.example_ids or (self.selector is not None and self.selector.matches(example))


# --- The body of a micro-batch ----------------------------------------------------------------------------------------


class Batch(BaseModel):
    """The body of a micro-batch in the object store.

    Outside the topics, texts are stored only here, so that they can be erased.
    """

    model_config = FROZEN
    adapter: Adapter
    cut: CutNumber
    examples: list[ExampleAccepted]
    skipped: list[BatchSkip]
    system_prompt: Text | None = Field(default=None, exclude_if=is_none)
    """The adapter's system prompt at the cut; a rebuild trains with it, whatever the prompt is by then."""

    @model_validator(mode="after")
    def _share_system_prompt(self) -> Self:
        for example in self.examples:
            example.record_system_prompt(self.system_prompt)
        return self


# --- All events -------------------------------------------------------------------------------------------------------

EVENTS: dict[str, type[Event]] = {
    model.type: model
    for model in (
        DocumentObserved, InteractionObserved, ExampleAccepted, ExampleScored, DriftDetected,
        UpdateRequested, RollbackRequested, RebaseRequested, ForgetRequested, RetentionRequested, RetentionProgressed,
        AdapterPromoted, AdapterRolledBack, AdapterRevoked, AdapterRetired, AdapterActivated, AdapterFailed,
        ReplicaLeft,
    )
}  # fmt: skip
"""Every event by its type."""

DEFAULT_TYPES: dict[str, str] = {
    "documents": DocumentObserved.type,
    "interactions": InteractionObserved.type,
    "retention": RetentionRequested.type,
}
"""Type of an event without CloudEvents headers, by topic without the prefix."""
