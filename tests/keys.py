"""Keys for tests: an owner who signs, a stranger who signs with a key of their own, and the owner's file of trusted keys."""

from __future__ import annotations

from pathlib import Path

from perennial.storage.signing.key_files import TrustedKeys, make_signing_key, write_public_keys, write_signing_key
from perennial.storage.signing.trust import Trust


class Keys:
    """Files of keys in a folder.

    Attributes:
        owner: signs and verifies with the owner's key.
        stranger: signs with another key and trusts nobody.
        readers: trusts the owner's key and signs nothing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.private, self.public = folder / "signing.pem", folder / "trusted.pem"
        key = make_signing_key()
        write_signing_key(self.private, key)
        write_public_keys(self.public, {key.public.key_id: key.public})
        self.key_id = key.public.key_id
        self.owner = Trust(key, TrustedKeys(self.public))
        self.readers = Trust(None, TrustedKeys(self.public))
        self.stranger = Trust(make_signing_key(), None)
