"""The registry's small records and where they lie: claims, aliases, revocations."""

from __future__ import annotations

from typing import Literal, TypeVar

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from perennial.storage.errors import IntegrityError, StoreError
from perennial.storage.objects.keys import hex_of
from perennial.storage.registry.manifest import AdapterName, AliasName, Digest, Seq

AliasKind = Literal["promoted", "rolled_back", "revoked", "retired"]
MAX_RECORD_BYTES = 64 << 10
SEQ_DIGITS = 12
_adapter_name: TypeAdapter[str] = TypeAdapter(AdapterName)
_alias_name: TypeAdapter[str] = TypeAdapter(AliasName)


class RegistryRecord(BaseModel):
    """A small JSON object of the registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return orjson.dumps(self.model_dump(mode="json", exclude={"etag"}), option=orjson.OPT_SORT_KEYS)


R = TypeVar("R", bound=RegistryRecord)


class Claim(RegistryRecord):
    """What lies under `updates/` and `versions/`: the version that was first."""

    version: Digest


class AliasState(RegistryRecord):
    """Where an alias points. generation grows by one per swap; nonce keeps any two states' bytes apart."""

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
    etag: str = ""


class Revocation(RegistryRecord):
    """A version that must not be served any more. seq is the version's own."""

    adapter: AdapterName
    version: Digest
    seq: Seq
    reason: str
    revoked_at: AwareDatetime


def manifest_key(adapter: str, version: str) -> str:
    """Where a version's manifest lies."""
    return f"manifests/{check_adapter(adapter)}/{hex_of(version)}.json"


def version_key(adapter: str, seq: int) -> str:
    """Where a place on the line of versions lies; padded, so that lists sort."""
    return f"versions/{adapter}/{seq:0{SEQ_DIGITS}d}"


def revocation_key(adapter: str, seq: int) -> str:
    """Where the revocation of the version at that seq lies."""
    return f"revocations/{adapter}/{seq:0{SEQ_DIGITS}d}"


def alias_key(adapter: str, alias: str) -> str:
    """Where an alias lies."""
    return f"aliases/{check_adapter(adapter)}/{check_name(_alias_name, alias)}"


def check_name(kind: TypeAdapter[str], name: str) -> str:
    """The name itself. Raises StoreError."""
    try:
        return kind.validate_python(name)
    except ValidationError as error:
        raise StoreError(
            "not a usable name",
            got=name,
            allowed="lower-case letters, digits and ._-; 1 to 4 segments joined by / (an alias: 1)",
        ) from error


def parse_record(model: type[R], key: str, data: bytes) -> R:
    """Read a record. Raises IntegrityError where the bytes are none."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(
            f"{key} does not hold what belongs there", got=data[:100], allowed=model.__name__,
            remedy="restore the object from a copy",
        ) from error  # fmt: skip


def check_adapter(adapter: str) -> str:
    """The adapter's name itself. Raises StoreError."""
    return check_name(_adapter_name, adapter)
