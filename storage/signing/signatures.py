"""Sign bytes with Ed25519 and check signatures.

What is signed is the pre-authentication encoding of DSSE (https://github.com/secure-systems-lab/dsse) over a payload type
and the bytes. So a signature of one kind of thing (an alias, an event, a statement about a version) can never pass as one of
another kind. Beside a thing stands its signature as text: `sha256:<digest of the public key>:<base64>`.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.keys import digest_of

SIGNATURE_PATTERN: Final = r"^sha256:[0-9a-f]{64}:[A-Za-z0-9+/]{86}==$"
"""A signature as text: the id of the key, and the 64 bytes of the signature in base64."""

SignatureFault = Literal["unsigned", "unknown-key", "forged"]


class SignatureError(IntegrityError):
    """A signature is missing, invalid, or made with a key that is not trusted.

    Args:
        reason: `unsigned`, `unknown-key` (no signature is by a trusted key) or `forged` (one is said to be, and is not).
        message: one sentence for people.
        got: what was found.
        allowed: what would have been accepted.
        remedy: what to do now.
    """

    def __init__(
        self, reason: SignatureFault, message: str, *, got: object = None, allowed: object = None, remedy: str = ""
    ) -> None:
        self.reason: SignatureFault = reason
        super().__init__(message, got=got, allowed=allowed, remedy=remedy)


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed (PAE of DSSE version 1).

    >>> pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'

    Args:
        payload_type: names what the payload is.
        payload: the bytes.
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True)
class PublicKey:
    """A public key.

    Attributes:
        key_id: digest of the key in DER form (SubjectPublicKeyInfo), `sha256:<64 hex>`.
        raw: the key of the library.
        label: what the file says about it, for people.
    """

    key_id: str
    raw: Ed25519PublicKey
    label: str = ""

    @classmethod
    def of(cls, raw: Ed25519PublicKey, label: str = "") -> PublicKey:
        """Return the key with its id."""
        return cls(digest_of(raw.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)), raw, label)

    def fits(self, payload_type: str, payload: bytes, signature: bytes) -> bool:
        """Return whether this key made the signature of the payload."""
        try:
            self.raw.verify(signature, pre_authentication_encoding(payload_type, payload))
        except InvalidSignature:
            return False
        return True

    def pem(self) -> str:
        """Return the key as PEM, with its id and label in lines before it."""
        block = self.raw.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        return f"# {self.key_id}{f' {self.label}' if self.label else ''}\n{block}"


class SigningKey:
    """A private key. It is shown nowhere: its text form names the public key alone.

    Args:
        raw: the key of the library.

    Attributes:
        public: its public key.
    """

    def __init__(self, raw: Ed25519PrivateKey) -> None:
        self._raw = raw
        self.public = PublicKey.of(raw.public_key())

    def __repr__(self) -> str:
        return f"SigningKey({self.public.key_id})"

    def sign_bytes(self, payload_type: str, payload: bytes) -> bytes:
        """Return the 64 bytes of the signature; the same payload has the same signature each time."""
        return self._raw.sign(pre_authentication_encoding(payload_type, payload))

    def sign(self, payload_type: str, payload: bytes) -> str:
        """Return the signature as text: the key's id and the signature in base64."""
        return f"{self.public.key_id}:{base64.b64encode(self.sign_bytes(payload_type, payload)).decode()}"
