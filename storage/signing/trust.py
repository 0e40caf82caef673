"""`Trust`: the key that a process signs with, and the keys that it trusts; either may be missing."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass

from perennial.storage.signing.key_files import TrustedKeys
from perennial.storage.signing.signatures import SIGNATURE_PATTERN, SignatureError, SigningKey

_TEXT = re.compile(SIGNATURE_PATTERN)


@dataclass(frozen=True)
class Trust:
    """Signs what a process writes and checks what it reads.

    Attributes:
        signing_key: the key that signs. None: nothing is signed.
        trusted: the keys whose signatures are accepted. None: no signature is asked for.
    """

    signing_key: SigningKey | None = None
    trusted: TrustedKeys | None = None

    @property
    def verifies(self) -> bool:
        """Whether signatures are asked for."""
        return self.trusted is not None

    def sign(self, payload_type: str, payload: bytes) -> str | None:
        """Return the signature as text; None where there is no key to sign with."""
        return self.signing_key.sign(payload_type, payload) if self.signing_key else None

    def check(self, payload_type: str, payload: bytes, signature: str | None, what: str) -> None:
        """Check the signature of a thing; does nothing where no signature is asked for.

        Args:
            payload_type: names what the payload is.
            payload: the bytes that were signed.
            signature: the signature as text; None: there is none.
            what: names the thing, for the error.

        Raises:
            SignatureError: no trusted key signed it.
            KeyFileError: the trusted keys cannot be read.
        """
        if signature is None:
            self.check_any(payload_type, payload, (), what)
        elif not _TEXT.fullmatch(signature):
            if self.verifies:
                raise SignatureError(
                    "forged", f"{what} has no usable signature", got=signature[:40], allowed="an Ed25519 one"
                )
        else:
            key_id, _, value = signature.rpartition(":")
            self.check_any(payload_type, payload, [(key_id, base64.b64decode(value))], what)

    def check_any(self, payload_type: str, payload: bytes, signatures: Iterable[tuple[str, bytes]], what: str) -> None:
        """Check that at least one of several signatures is a trusted key's; see `check`.

        Args:
            payload_type: names what the payload is.
            payload: the bytes that were signed.
            signatures: key id and signature of each.
            what: names the thing, for the error.

        Raises:
            SignatureError: no trusted key signed it.
            KeyFileError: the trusted keys cannot be read.
        """
        if self.trusted is None:
            return
        trusted = self.trusted.by_id()
        found = list(signatures)
        known = [(trusted[key_id], value) for key_id, value in found if key_id in trusted]
        if any(key.fits(payload_type, payload, value) for key, value in known):
            return
        allowed = f"a signature by one of: {', '.join(trusted)}"
        if not found:
            raise SignatureError(
                "unsigned", f"{what} is not signed", got="no signature", allowed=allowed,
                remedy="find out who wrote it; if it is older than the keys: `perennial keys sign`",
            )  # fmt: skip
        if not known:
            raise SignatureError(
                "unknown-key", f"{what} is signed with a key that is not trusted",
                got=", ".join(key_id for key_id, _ in found), allowed=allowed,
                remedy=f"if the key is your own, add its public key to {self.trusted.path}",
            )  # fmt: skip
        raise SignatureError(
            "forged", f"the signature of {what} does not fit it", got=f"a signature said to be by {known[0][0].key_id}",
            allowed=allowed, remedy="somebody changed it: restore it from a copy, and find out who can write to the store",
        )  # fmt: skip
