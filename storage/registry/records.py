"""The registry's small records and their keys: claims, aliases, revocations; and what it returns of versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from perennial.storage.errors import IntegrityError, StoreError
from perennial.storage.objects.keys import hex_of
from perennial.storage.registry.manifest import AdapterName, AliasName, Digest, Manifest, Seq
from perennial.storage.registry.scalars import Later
from perennial.storage.signing.trust import Trust

AliasKind = Literal["promoted", "rolled_back", "revoked", "retired"]
ALIAS_PAYLOAD = "application/vnd.perennial.alias.v1+json"
MAX_RECORD_BYTES = 64 << 10
SEQ_DIGITS = 12
MAX_GENERATION = 10**12
"""A stranger may have written any generation; one above this is not gone on from."""
_adapter_name: TypeAdapter[str] = TypeAdapter(AdapterName)
_alias_name: TypeAdapter[str] = TypeAdapter(AliasName)


class RegistryRecord(BaseModel):
    """A small JSON object of the registry. It keeps fields of later releases, which signatures cover too."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Later]

    def to_bytes(self) -> bytes:
        """Return the record as canonical JSON, without its etag."""
        return orjson.dumps(self.model_dump(mode="json", exclude={"etag"}), option=orjson.OPT_SORT_KEYS)


R = TypeVar("R", bound=BaseModel)


class Claim(RegistryRecord):
    """The object under `updates/` and `versions/`: the version that claimed the key first."""

    version: Digest


class AliasState(RegistryRecord):
    """The version that an alias points at.

    Attributes:
        adapter: the adapter.
        alias: the alias's name.
        generation: grows by one with every change.
        version: the version that is served.
        seq: that version's sequence number.
        kind: what the last change was.
        previous_version: the version that the alias pointed at before its last change.
        reason: why it was changed, for people.
        published_at: when it was changed.
        nonce: keeps the bytes, and so the etags, of any two states apart.
        signature: who wrote it, over all fields before; None, and not stored, where the writer had no key.
        etag: what a compare-and-swap expects; not stored.
    """

    adapter: AdapterName
    alias: AliasName
    generation: int = Field(ge=1)
    version: Digest
    seq: Seq
    kind: AliasKind
    previous_version: Digest | None
    reason: str
    published_at: AwareDatetime
    nonce: str
    signature: str | None = Field(default=None, max_length=256)
    etag: str = ""

    def to_bytes(self) -> bytes:
        """Return the alias as canonical JSON, without its etag, and without a signature that it does not have."""
        return self._json({"etag"} if self.signature else {"etag", "signature"})

    def signed(self, trust: Trust) -> AliasState:
        """Return the alias with this process's signature; with none where it has no key, as another's may not fit it."""
        return self.model_copy(update={"signature": trust.sign(ALIAS_PAYLOAD, self._json({"etag", "signature"}))})

    def check_signature(self, trust: Trust) -> None:
        """Check that a trusted key signed the alias; does nothing where no signature is asked for.

        Raises:
            SignatureError: no trusted key signed it.
        """
        what = f"alias {self.adapter}#{self.alias} at generation {self.generation}"
        trust.check(ALIAS_PAYLOAD, self._json({"etag", "signature"}), self.signature, what)

    def _json(self, without: set[str]) -> bytes:
        return orjson.dumps(self.model_dump(mode="json", exclude=without), option=orjson.OPT_SORT_KEYS)


class GenerationFloor(RegistryRecord):
    """The generation above which an alias that the store does not have begins: subscribers have seen that far.

    Attributes:
        generation: the highest generation that was ever announced of the alias.
    """

    generation: int = Field(ge=0)


class Revocation(RegistryRecord):
    """A version that must not be served any more.

    Attributes:
        adapter: the adapter.
        version: the version.
        seq: that version's sequence number.
        reason: why, for people.
        revoked_at: when.
    """

    adapter: AdapterName
    version: Digest
    seq: Seq
    reason: str
    revoked_at: AwareDatetime


@dataclass(frozen=True)
class Head:
    """The newest version of an adapter.

    Attributes:
        seq: its sequence number, from 1.
        version: its id.
        manifest: what it consists of.
    """

    seq: int
    version: str
    manifest: Manifest


@dataclass(frozen=True)
class Publication:
    """The result of a publish.

    Attributes:
        version: the version that was published for the update; another publisher's, if that one was first.
        manifest: its manifest.
        alias_state: the alias afterwards; None if the version is not promoted, or if it was revoked before the alias was
            ever set.
        was_new: True if this call claimed the sequence number.
    """

    version: str
    manifest: Manifest
    alias_state: AliasState | None
    was_new: bool


def manifest_key(adapter: str, version: str) -> str:
    """Return the key of a version's manifest."""
    return f"manifests/{check_adapter(adapter)}/{hex_of(version)}.json"


def version_key(adapter: str, seq: int) -> str:
    """Return the key that claims a sequence number; padded, so that lists sort."""
    return f"versions/{adapter}/{seq:0{SEQ_DIGITS}d}"


def revocation_key(adapter: str, seq: int) -> str:
    """Return the key of the revocation of the version with that sequence number."""
    return f"revocations/{adapter}/{seq:0{SEQ_DIGITS}d}"


def alias_key(adapter: str, alias: str) -> str:
    """Return the key of an alias."""
    return f"aliases/{check_adapter(adapter)}/{check_name(_alias_name, alias)}"


def generation_floor_key(adapter: str, alias: str) -> str:
    """Return the key of the generation above which an alias begins; only a restored store has such an object."""
    return f"generations/{check_adapter(adapter)}/{check_name(_alias_name, alias)}"


def check_name(kind: TypeAdapter[str], name: str) -> str:
    """Return the name unchanged.

    Raises:
        StoreError: it is not a usable name.
    """
    try:
        return kind.validate_python(name)
    except ValidationError as error:
        raise StoreError(
            "not a usable name",
            got=name,
            allowed="lower-case letters, digits and ._-; 1 to 4 segments joined by / (an alias: 1)",
        ) from error


def parse_record(model: type[R], key: str, data: bytes) -> R:
    """Read a record.

    Args:
        model: the record's class.
        key: the object's key, for the error.
        data: the object's bytes.

    Raises:
        IntegrityError: the bytes are not such a record.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(
            f"{key} does not hold what belongs there", got=data[:100], allowed=model.__name__,
            remedy="restore the object from a copy",
        ) from error  # fmt: skip


def check_adapter(adapter: str) -> str:
    """Return the adapter's name unchanged.

    Raises:
        StoreError: it is not a usable name.
    """
    return check_name(_adapter_name, adapter)
