"""Manifests: what a version is made of, and all that is needed to make it again.

A version's id is the digest of its manifest's bytes, so the bytes hold no wall-clock time and are canonical:
UTF-8 JSON, keys sorted, no white space.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.scalars import Int64, Scalar, Text

MAX_MANIFEST_BYTES = 16 << 20
SCHEMA_VERSION = 1

Kind = Literal["update", "rollback", "revoke", "quarantine", "forget", "replayed"]
"""What made a version. All but `update` and `replayed` train nothing: they take up an earlier state.

revoke: instead of a version that must not be served. quarantine: what is served while a forgetting is under way,
the state from before the first use. forget: what a forgetting came to; its parent is the last of the versions
made anew. replayed: one of those; it has no place on the line, and its head is the one made anew before it.
"""
Outcome = Literal["promoted", "refused", "unchanged"]
AdapterName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*){0,3}$", max_length=200)]
AliasName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Seq = Annotated[int, Field(ge=1, le=10**12 - 1)]
_Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
_Name = Annotated[str, Field(min_length=1, max_length=1024)]


class _Part(BaseModel):
    # What a manifest says and this code does not know could change what the version means: refuse it.
    model_config = ConfigDict(frozen=True, extra="forbid")


class BlobRef(_Part):
    """A blob by digest."""

    digest: Digest
    size_bytes: _Count


class LearnedExample(_Part):
    """An example that this version learned. `partition` is its origin partition's key."""

    example_id: _Name
    partition: _Name
    offset: _Count
    tokens: _Count


class SkippedExample(_Part):
    """An example of the batch that this version did not learn, and why."""

    example_id: _Name
    partition: _Name
    offset: _Count
    reason: Text


class Manifest(_Part):
    """One version of an adapter.

    parent: the state trained from. head: the version at seq - 1. marks: highest offset per origin partition
    that this version and its forerunners have seen. dropped: examples sent again, at or below the marks. A
    refused or unchanged version carries its parent's blobs on, so the newest manifest is always the state to
    train from.
    """

    schema_version: Literal[1] = 1
    adapter: AdapterName
    seq: Seq
    kind: Kind
    outcome: Outcome
    reason: Text = ""
    parent: Digest | None
    head: Digest | None
    update_id: Digest
    job_id: _Name
    base_model: _Name
    base_sha256: _Name
    code: _Name
    config: dict[str, Scalar]
    seed: Int64
    threads: Annotated[int, Field(ge=1, le=65_536)]
    batch: BlobRef | None = None
    cut: _Count | None = None
    learned: list[LearnedExample] = []
    skipped: list[SkippedExample] = []
    dropped: _Count = 0
    marks: dict[str, _Count]
    weights: BlobRef
    optimizer: BlobRef | None = None
    replay: BlobRef | None = None
    anchors: BlobRef | None = None
    gate: GateFigures = GateFigures()
    tokens: _Count = 0
    rank: Annotated[int, Field(ge=1, le=65_536)]
    published_from_ms: Int64 | None = None
    published_to_ms: Int64 | None = None

    @model_validator(mode="after")
    def _line(self) -> Self:
        if (self.seq == 1) != (self.head is None):
            raise ValueError("head must be the version at seq - 1, and none at seq 1")
        return self

    @property
    def state_parent(self) -> str | None:
        """The version whose state this one began with; a refused one counts, for it carries its state on."""
        return self.head if self.kind in {"update", "replayed"} else self.parent

    @property
    def schedule_parent(self) -> str | None:
        """The version before this one in the schedule of updates that a forgetting replays.

        What a rollback left behind is not in it; what a quarantine put aside for a while is.
        """
        return self.head if self.kind == "quarantine" else self.state_parent

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return orjson.dumps(self.model_dump(mode="python"), option=orjson.OPT_SORT_KEYS)

    def digest(self) -> str:
        """The version's id."""
        return digest_of(self.to_bytes())

    def blobs(self) -> tuple[BlobRef, ...]:
        """Every blob that the version needs, once each."""
        named = (self.weights, self.optimizer, self.replay, self.anchors, self.batch)
        return tuple(dict.fromkeys(ref for ref in named if ref is not None))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a manifest. Raises IntegrityError where the bytes are none, or of a newer schema."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise IntegrityError("manifest too large", got=f"{len(data)} bytes", allowed=f"{MAX_MANIFEST_BYTES} bytes")
        try:
            return cls.model_validate(orjson.loads(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise IntegrityError(
                f"not a manifest of this version: {where}: {first['msg']}",
                got=repr(first.get("input"))[:200],
                allowed=f"schema_version {SCHEMA_VERSION}",
                remedy="read it with the release that wrote it, or a newer one",
            ) from error
        except orjson.JSONDecodeError as error:
            raise IntegrityError(f"not a manifest: {error}", got=f"{len(data)} bytes", allowed="JSON") from error


def update_id(adapter: str, parent: str | None, marks: dict[str, int], config: dict[str, Scalar]) -> str:
    """The name of an update: one state, offsets and recipe give one name, and one version may claim it."""
    return digest_of(orjson.dumps([adapter, parent, marks, config], option=orjson.OPT_SORT_KEYS))
