"""Manifests: what a version consists of, and everything that is needed to make it again.

A version's id is the digest of its manifest's bytes. So the bytes hold no wall-clock time, and they are canonical: UTF-8
JSON, keys sorted, no white space.

A release reads its own schema and the next one, and keeps the fields that it does not know, so that the bytes and the id of
a newer manifest stay the same. So learners and subscribers can be upgraded one after another. A new field needs a default
with which older manifests mean what they meant. If older releases must not ignore it, `schema_version` rises by two: then
they refuse the manifest. A recipe with a field that a learner does not know is never trained again by it (`Recipe.recorded`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.scalars import Int64, Later, Number, Scalar, Text

MAX_MANIFEST_BYTES = 16 << 20
SCHEMA_VERSION = 1

Kind = Literal["update", "rollback", "revoke", "quarantine", "forget", "rebase", "replayed"]
"""The kind of job that made a version. All but `update` and `replayed` train nothing and take over the state of an earlier version.

update: a micro-batch was learned. rollback: an earlier state was published again. revoke: the version takes the place
of one that must not be served. quarantine: it is served while examples are being forgotten; its state is the one from
before their first use. forget: the examples are forgotten; its parent is the last of the rebuilt updates. rebase: the
updates up to its `head` were learned anew, on the base that it names; its parent is the last of the rebuilt updates.
replayed: a rebuilt update. It is not among the published versions: its seq and its head count along the rebuilt updates.
"""
Outcome = Literal["promoted", "refused", "unchanged"]
AdapterName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*){0,3}$", max_length=200)]
AliasName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Seq = Annotated[int, Field(ge=1, le=10**12 - 1)]
_Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
_Name = Annotated[str, Field(min_length=1, max_length=1024)]


class _Part(BaseModel):
    # Fields of the next schema stay part of the bytes, and so of the version's id.
    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Later]


class BlobRef(_Part):
    """A reference to a blob.

    Attributes:
        digest: names the blob.
        size_bytes: its size.
    """

    digest: Digest
    size_bytes: _Count


class LearnedExample(_Part):
    """An example that this version learned.

    Attributes:
        example_id: the example: a keyed id, see `registry.history.example_ids`; its own id in versions of earlier releases.
        partition: its origin partition's key.
        offset: its offset in that partition.
        tokens: tokens to train, summed over its rows; of a merged one also those that it shares.
        epoch: leader epoch of that offset; 0 also where it was not recorded.
        merged_into: id of the example of the same version that shares most of its tokens and was trained in full, where
            this one was trained only on its own; None: this one was trained in full.
    """

    example_id: _Name
    partition: _Name
    offset: _Count
    tokens: _Count
    epoch: _Count = 0
    merged_into: _Name | None = None

    @property
    def origin_offset(self) -> tuple[str, int, int]:
        """Origin partition key, leader epoch and offset: identifies one published record."""
        return self.partition, self.epoch, self.offset


class SkippedExample(_Part):
    """An example of the micro-batch that this version did not learn.

    Attributes:
        example_id: the example: a keyed id, see `registry.history.example_ids`; its own id in versions of earlier releases.
        partition: its origin partition's key.
        offset: its offset in that partition.
        reason: `signal`, `duplicate`, `no-text`, `no-text-on-base`, `quarantined`, `expired`, or why the gate refused the version.
        epoch: leader epoch of that offset; 0 also where it was not recorded.
    """

    example_id: _Name
    partition: _Name
    offset: _Count
    reason: Text
    epoch: _Count = 0

    @property
    def origin_offset(self) -> tuple[str, int, int]:
        """Origin partition key, leader epoch and offset: identifies one published record."""
        return self.partition, self.epoch, self.offset


class OtherVersion(_Part):
    """A version of another adapter that a version depends on.

    Attributes:
        adapter: the other adapter.
        version: its version.
        seq: the sequence number of that version.
    """

    adapter: AdapterName
    version: Digest
    seq: Seq


class Start(_Part):
    """The state that the first update of a user's adapter trains from, where users' adapters may be learned from.

    Attributes:
        shared: the shared adapter, whose name gives A in place of the adapter's own: factors with one A can be averaged.
        founders: the versions whose mean the start is; none: A as the name gives it, and B zero.
        weights: safetensors of that mean; None where there are no founders.
    """

    shared: AdapterName
    founders: Annotated[list[OtherVersion], Field(max_length=64)] = []
    weights: BlobRef | None = None

    @property
    def bare(self) -> Self:
        """The same without anything that was learned: A as the name gives it, and B zero."""
        return type(self)(shared=self.shared)

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if bool(self.founders) != (self.weights is not None):
            raise ValueError("a start has weights if and only if it has founders")
        if any(founder.adapter.rpartition("/")[0] != self.shared for founder in self.founders):
            raise ValueError("founders must be adapters of the shared one's users")
        return self


Probes = dict[str, dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Number]]
"""By name of a probe text: the most probable next token ids after it, with their log-probabilities in nats."""


class Manifest(_Part):
    """One version of an adapter.

    A refused or unchanged version names its parent's blobs, so the newest manifest always holds the state to train from.

    Attributes:
        schema_version: version of this format.
        adapter: the adapter.
        seq: sequence number among the adapter's versions, from 1, without gaps; see `Kind` for rebuilt updates.
        kind: what made the version.
        outcome: `promoted` (may be served), `refused` by the gate, or `unchanged` (nothing was trained or served).
        reason: why, for people.
        parent: the version whose state it started from.
        head: the version with the sequence number before this one; None at seq 1.
        update_id: what the function `update_id` returns for the update; only one version may claim it.
        job_id: the job that made it.
        base_model: name of the frozen base.
        base_sha256: digest of the frozen base.
        code: what computed it: release, source digest, torch version.
        config: the recipe.
        seed: seed of the recipe.
        threads: CPU threads of torch; they decide the last bits.
        batch: its micro-batch.
        cut: number of the cut that made the micro-batch.
        next_cut: number of the cut that the adapter's next update must have; None in versions of releases that did not
            count, and where no update came since.
        learned: the examples that it learned.
        skipped: the examples that it did not learn.
        dropped: count of redelivered examples, at or below the high-water marks.
        marks: high-water marks, that is, the highest offset by origin partition that the adapter has seen.
        epochs: leader epochs of these offsets, by origin partition; those that are 0 are left out.
        weights: LoRA weights, safetensors.
        optimizer: optimizer state, safetensors; None if nothing was ever trained.
        replay: replay index, JSON; None if it is empty.
        anchors: never written, always null. It stays because it is part of every stored manifest's bytes: without it
            stored manifests could not be read, and versions made again would get other ids.
        general: the general text that was mixed in and measured, JSON lines; None for the docstrings of the standard
            library. Many versions, also of other adapters, name one such blob.
        gate: what the gate measured.
        tokens: trained tokens, in all steps.
        rank: LoRA rank.
        published_from_ms: earliest Kafka timestamp of a learned example, ms since 1970.
        published_to_ms: latest such timestamp.
        probes: what the version predicts after the texts of `streams.probe_texts`; empty in versions of releases that
            did not record it, and where nothing is served.
        pass_adapters: most adapters that trained in one pass with this one, itself included. Where there were others,
            their number and the lengths of their rows decide the last bits of the weights.
        extends: the shared adapter that clients serve this one with, whose name is this one's without the last segment: the
            live weights of both, added; None: it is served alone. Nothing else depends on it.
        over: the live version of the shared adapter that lay beneath while the update was trained and judged, where users'
            adapters are trained over it; None: the base alone.
        start: the state that its first update trains from, where users' adapters may be learned from; None: A by the
            adapter's own name, and B zero.
    """

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION + 1)] = SCHEMA_VERSION
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
    next_cut: _Count | None = None
    learned: list[LearnedExample] = []
    skipped: list[SkippedExample] = []
    dropped: _Count = 0
    marks: dict[str, _Count]
    epochs: dict[str, _Count] = {}
    weights: BlobRef
    optimizer: BlobRef | None = None
    replay: BlobRef | None = None
    anchors: BlobRef | None = None
    general: BlobRef | None = None
    gate: GateFigures = GateFigures()
    tokens: _Count = 0
    rank: Annotated[int, Field(ge=1, le=65_536)]
    published_from_ms: Int64 | None = None
    published_to_ms: Int64 | None = None
    probes: Probes = {}
    pass_adapters: Annotated[int, Field(ge=1, le=65_536)] = 1
    extends: AdapterName | None = None
    start: Start | None = None
    over: OtherVersion | None = None

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        if (self.seq == 1) != (self.head is None):
            raise ValueError("head must be the version at seq - 1, and none at seq 1")
        return self

    @model_validator(mode="after")
    def _check_extends(self) -> Self:
        shared = self.adapter.rpartition("/")[0]
        if self.extends is not None and self.extends != shared:
            raise ValueError("extends must be the adapter's name without its last segment")
        if self.start is not None and self.start.shared != shared:
            raise ValueError("start must be below the adapter's name without its last segment")
        if self.over is not None and self.over.adapter != shared:
            raise ValueError("over must be a version of the adapter's name without its last segment")
        return self

    @property
    def state_parent(self) -> str | None:
        """The version whose state this one started from; it may be a refused one, which holds its parent's state."""
        return self.head if self.kind in {"update", "replayed"} else self.parent

    @property
    def schedule_parent(self) -> str | None:
        """The version before this one in the schedule of updates that a forgetting rebuilds.

        Updates that a rollback undid are not in the schedule; updates that a quarantine set aside for a while are.
        """
        return self.head if self.kind == "quarantine" else self.state_parent

    def to_bytes(self) -> bytes:
        """Return the manifest as canonical JSON.

        A field of `_LATER_FIELDS` is left out where it has its default. So a manifest that was written before the field
        existed keeps its bytes, and with them its id.
        """
        fields = self.model_dump(mode="python")
        for name, default in _LATER_FIELDS.items():
            if fields[name] == default:
                del fields[name]
        for item in (*fields["learned"], *fields["skipped"]):
            if not item["epoch"]:
                del item["epoch"]
            if item.get("merged_into", "") is None:
                del item["merged_into"]
        return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)

    def digest(self) -> str:
        """Return the version's id."""
        return digest_of(self.to_bytes())

    def blobs(self) -> tuple[BlobRef, ...]:
        """Return every blob that the version needs, once each."""
        start = self.start.weights if self.start is not None else None
        named = (self.weights, self.optimizer, self.replay, self.anchors, self.general, self.batch, start)
        return tuple(dict.fromkeys(ref for ref in named if ref is not None))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a manifest.

        Raises:
            IntegrityError: the bytes are not a manifest, or one of a newer schema.
        """
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
                allowed=f"schema_version {SCHEMA_VERSION} or {SCHEMA_VERSION + 1}",
                remedy="read it with the release that wrote it, or a newer one",
            ) from error
        except orjson.JSONDecodeError as error:
            raise IntegrityError(f"not a manifest: {error}", got=f"{len(data)} bytes", allowed="JSON") from error


_LATER_FIELDS: dict[str, object] = {
    "epochs": {}, "next_cut": None, "probes": {}, "general": None, "pass_adapters": 1, "extends": None,
    "start": None, "over": None,
}  # fmt: skip
"""Fields of a manifest that were added after the first release, with their defaults."""


def update_id(
    adapter: str,
    parent: str | None,
    marks: Mapping[str, int],
    config: Mapping[str, Scalar],
    epochs: Mapping[str, int] | None = None,
) -> str:
    """Return the id of an update, which only one version may claim.

    Args:
        adapter: the adapter.
        parent: the version whose state is trained from.
        marks: high-water marks after the update.
        config: the recipe, and whatever else tells one update from another.
        epochs: leader epochs of the marks, without those that are 0.
    """
    fields: list[object] = [adapter, parent, marks, config]
    if epochs:
        fields.append(epochs)
    return digest_of(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS))
