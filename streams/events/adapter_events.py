"""Events of adapter-updates and adapter-acks: which version is live, and which replica serves it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from perennial.streams.events.fields import FROZEN, Adapter, Alias, Count, Digest, Event, Finite, Name, Signature


class BaseRef(BaseModel):
    """The frozen base model that an adapter belongs to."""

    model_config = FROZEN
    model: str
    sha256: Digest


class Learned(BaseModel):
    """Counts of what a version learned from, and the publication times of its oldest and newest example."""

    model_config = ConfigDict(**FROZEN, populate_by_name=True)
    examples: Count
    tokens: Count
    from_: AwareDatetime | None = Field(default=None, alias="from")
    to: AwareDatetime | None = None


class _AliasEvent(Event):
    """The full state of an alias, never a delta, because the topic is compacted."""

    topic: ClassVar[str] = "adapter-updates"
    adapter: Adapter
    alias: Alias = "live"
    generation: Count
    """Counts the changes of the alias."""
    version: Digest
    """The live version: the digest of its manifest."""
    seq: Count
    """Sequence number of the version among all versions of the adapter."""
    manifest_uri: str
    weights_uri: str
    weights_sha256: Digest
    weights_bytes: Count
    rank: Count
    extends: Adapter | None = None
    """The shared adapter whose live weights are served together with these; None: these are served alone."""
    base: BaseRef
    previous_version: Digest | None = None
    learned: Learned
    gate: dict[str, Finite | int | str | bool | None] = {}
    """What the gate measured."""
    reason: str
    stage_at: dict[str, AwareDatetime] = {}
    """By stage, when the oldest example of the update was published, and when the update was cut, received, trained and
    promoted; empty where these times are not known."""
    published_at: AwareDatetime
    signature: Signature | None = None
    """Signature over the event's type and all other fields; see docs/signatures.md. None: the writer had no key."""

    def key(self) -> str:
        return f"{self.adapter}#{self.alias}"


class AdapterPromoted(_AliasEvent):
    """A newer version is live."""

    type: ClassVar[str] = "adapter.promoted"


class AdapterRolledBack(_AliasEvent):
    """An earlier version is live again."""

    type: ClassVar[str] = "adapter.rolled_back"


class AdapterRevoked(_AliasEvent):
    """The previous version must not be served any more; this one replaces it."""

    type: ClassVar[str] = "adapter.revoked"


class AdapterRetired(_AliasEvent):
    """The adapter is not served any more."""

    type: ClassVar[str] = "adapter.retired"


AdapterUpdate = AdapterPromoted | AdapterRolledBack | AdapterRevoked | AdapterRetired


MAX_LEASE_S = 86_400.0
Lease = Annotated[float, Field(ge=1, le=MAX_LEASE_S, allow_inf_nan=False)]
"""Length of a lease in seconds."""


class _ReplicaEvent(Event):
    """A report of one subscriber. The topic is compacted and keeps each replica's latest report."""

    topic: ClassVar[str] = "adapter-acks"
    adapter: Adapter
    alias: Alias = "live"
    replica: Name
    generation: Count
    at: AwareDatetime
    signature: Signature | None = None
    """Signature over the event's type and all other fields; see docs/signatures.md. None: the replica has no key."""

    def key(self) -> str:
        return f"{self.adapter}#{self.replica}"


class _AcknowledgementEvent(_ReplicaEvent):
    """A report of one subscriber about a version. It is sent again every third of the lease, while it holds."""

    version: Digest
    stage_s: dict[str, Finite] = {}
    """Seconds that each stage of taking the version took."""
    published_at: AwareDatetime
    lease_s: Lease | None = None
    """Seconds after the broker stored the record for which the replica counts as alive. None: an older subscriber, which
    does not send the record again."""


class AdapterActivated(_AcknowledgementEvent):
    """A subscriber serves this version."""

    type: ClassVar[str] = "adapter.activated"


class AdapterFailed(_AcknowledgementEvent):
    """A subscriber cannot serve this version."""

    type: ClassVar[str] = "adapter.failed"
    error: str


class ReplicaLeft(_ReplicaEvent):
    """A subscriber has stopped. Nothing is to be expected of it any more."""

    type: ClassVar[str] = "replica.left"
    version: Digest | None = None
    """The version that it served last; None: none. A server that reads its folder may serve it still."""
