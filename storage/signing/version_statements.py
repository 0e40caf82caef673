"""Signatures of versions: a DSSE envelope with an in-toto statement, beside the manifest.

A version's id is the digest of its manifest, and the manifest names every blob by digest. So a statement about that one
digest covers the whole version, and the manifest keeps its bytes. The envelope is stored under
`signatures/<adapter>/<digest>.json`. It may hold several signatures, so that a version gets one by the next key before the
key before it is taken out of the trusted ones.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perennial.storage.errors import ConflictError, NotFoundError
from perennial.storage.objects.keys import hex_of
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
PREDICATE_TYPE: Final = "urn:perennial:adapter-version:v1"
_STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
_MAX_BYTES: Final = 64 << 10
_ATTEMPTS: Final = 64


class _Part(BaseModel):
    # Fields of later releases and of other tools change nothing about what is checked here.
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class DsseSignature(_Part):
    """One signature of an envelope."""

    keyid: Annotated[str, Field(max_length=200)]
    sig: Annotated[str, Field(max_length=200)]


class DsseEnvelope(_Part):
    """A DSSE envelope."""

    payload_type: Literal["application/vnd.in-toto+json"] = Field(alias="payloadType")
    payload: str
    signatures: Annotated[list[DsseSignature], Field(max_length=64)]

    def body(self) -> bytes:
        """Return the statement's bytes. Raise ValueError where they are not base64."""
        return base64.b64decode(self.payload, validate=True)

    def decoded(self) -> list[tuple[str, bytes]]:
        """Return key id and bytes of each signature that is base64."""
        found: list[tuple[str, bytes]] = []
        for each in self.signatures:
            try:
                found.append((each.keyid, base64.b64decode(each.sig, validate=True)))
            except (ValueError, binascii.Error):
                continue
        return found


class _Subject(_Part):
    digest: dict[str, str]


class _Statement(_Part):
    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[list[_Subject], Field(min_length=1)]
    predicate_type: Literal["urn:perennial:adapter-version:v1"] = Field(alias="predicateType")
    predicate: dict[str, object]


def signature_key(adapter: str, version: str) -> str:
    """Return the key of a version's signatures."""
    return f"signatures/{adapter}/{hex_of(version)}.json"


def statement(adapter: str, version: str, weights: str) -> bytes:
    """Return the statement about a version, as canonical JSON.

    Args:
        adapter: the adapter.
        version: digest of the manifest.
        weights: digest of the weights, so that tools for in-toto find the file by it.
    """
    body = {
        "_type": _STATEMENT_TYPE,
        "subject": [
            {"name": f"manifests/{adapter}/{hex_of(version)}.json", "digest": {"sha256": hex_of(version)}},
            {"name": f"blobs/sha256/{hex_of(weights)}", "digest": {"sha256": hex_of(weights)}},
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"adapter": adapter, "version": version},
    }
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)


class VersionSignatures:
    """Writes and checks the signatures of versions in one store. Thread-safe.

    Args:
        store: the store.
        trust: the keys.
    """

    def __init__(self, store: ObjectStore, trust: Trust) -> None:
        self._store = store
        self._trust = trust

    def sign(self, adapter: str, version: str, weights: str) -> bool:
        """Store this process's signature of a version, beside those that are there; return whether it was missing.

        An object that is no valid envelope for the version is replaced: whoever can write to the store may have put it
        there first.

        Args:
            adapter: the adapter.
            version: digest of the manifest.
            weights: digest of the weights.
        """
        signer = self._trust.signing_key
        if signer is None:
            return False
        key, body = signature_key(adapter, version), statement(adapter, version, weights)
        own = DsseSignature(
            keyid=signer.public.key_id, sig=base64.b64encode(signer.sign_bytes(PAYLOAD_TYPE, body)).decode()
        )
        for _ in range(_ATTEMPTS):
            if self._store.put_if_absent(key, _to_bytes(body, [own])):
                return True
            stored = self._store.get(key, _MAX_BYTES)
            try:
                found = DsseEnvelope.model_validate_json(stored.data)
                others = found.signatures if found.body() == body else []
            except (ValidationError, ValueError):
                others = []
            if own in others:
                return False
            kept = [each for each in others if each.keyid != own.keyid]
            try:
                self._store.compare_and_swap(key, _to_bytes(body, [*kept[:32], own]), stored.etag)
            except (ConflictError, NotFoundError):
                continue
            return True
        raise ConflictError(f"too many writers sign {key}", remedy="do it again")

    def check(self, adapter: str, version: str) -> None:
        """Check that a trusted key signed a version; does nothing where no signature is asked for.

        Args:
            adapter: the adapter.
            version: digest of the manifest.

        Raises:
            SignatureError: no trusted key signed it.
            StoreError: the store does not answer.
        """
        if not self._trust.verifies:
            return
        what = f"version {version} of {adapter}"
        envelope = self.envelope(adapter, version)
        if envelope is None:
            self._trust.check_any(PAYLOAD_TYPE, b"", (), what)
            return
        body = envelope.body()
        self._trust.check_any(PAYLOAD_TYPE, body, envelope.decoded(), what)
        try:
            said = _Statement.model_validate_json(body)
        except ValidationError as error:
            raise SignatureError(
                "forged", f"the signed statement about {what} is no statement about a version", got=body[:100],
                allowed=PREDICATE_TYPE,
            ) from error  # fmt: skip
        if said.subject[0].digest.get("sha256") != hex_of(version) or said.predicate.get("adapter") != adapter:
            raise SignatureError(
                "forged", f"the signature beside {what} is another version's", got=str(said.subject[0].digest)[:100],
                allowed=version, remedy="restore the object from a copy, and find out who can write to the store",
            )  # fmt: skip

    def envelope(self, adapter: str, version: str) -> DsseEnvelope | None:
        """Return the stored envelope of a version; None if there is none.

        Raises:
            SignatureError: the object is no envelope.
            StoreError: the store does not answer.
        """
        key = signature_key(adapter, version)
        try:
            envelope = DsseEnvelope.model_validate_json(self._store.get(key, _MAX_BYTES).data)
            envelope.body()
        except NotFoundError:
            return None
        except (ValidationError, ValueError) as error:
            raise SignatureError(
                "forged", f"{key} is no DSSE envelope", got="other bytes", allowed=f"an envelope of {PAYLOAD_TYPE}",
                remedy="restore the object from a copy, or sign the version again: `perennial keys sign`",
            ) from error  # fmt: skip
        return envelope


def _to_bytes(body: bytes, signatures: list[DsseSignature]) -> bytes:
    envelope = {
        "payloadType": PAYLOAD_TYPE, "payload": base64.b64encode(body).decode(),
        "signatures": [each.model_dump() for each in signatures],
    }  # fmt: skip
    return orjson.dumps(envelope, option=orjson.OPT_SORT_KEYS)
