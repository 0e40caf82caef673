"""Files of keys: one private key in PEM (PKCS 8), and a bundle of public keys in PEM that are trusted.

Both are forms that `openssl pkey` reads and writes. Text outside of the PEM blocks is a comment; the line before a block is
the key's label.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from uuid import uuid4

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from perennial.storage.errors import PerennialError
from perennial.storage.signing.signatures import PublicKey, SigningKey

_log = logging.getLogger("perennial.signing")

MAX_FILE_BYTES: Final = 1 << 20
_BLOCK = re.compile(
    r"(?:^#[ \t]*(?P<label>[^\n]*)\n)?^(?P<pem>-----BEGIN PUBLIC KEY-----$.*?^-----END PUBLIC KEY-----$)",
    re.MULTILINE | re.DOTALL,
)
_KEY_ID = re.compile(r"sha256:[0-9a-f]{64} ?")


class KeyFileError(PerennialError):
    """A file of keys cannot be used."""

    exit_code = 2


def make_signing_key() -> SigningKey:
    """Return a new private key."""
    return SigningKey(Ed25519PrivateKey.generate())


def parse_signing_key(pem: bytes, where: str) -> SigningKey:
    """Return a private key.

    Args:
        pem: the key in PEM, not encrypted.
        where: where it comes from, for the error. The bytes themselves are in no error.

    Raises:
        KeyFileError: it is no such key.
    """
    try:
        raw = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raw = None
    if not isinstance(raw, Ed25519PrivateKey):
        raise KeyFileError(
            f"{where} holds no private key that signs", got="something else (not shown)",
            allowed="one Ed25519 key in PEM (PKCS 8), not encrypted", remedy="make one: `perennial keys new`",
        ) from None  # fmt: skip
    return SigningKey(raw)


def read_signing_key(path: Path) -> SigningKey:
    """Return the private key of a file that only its owner can read.

    Raises:
        KeyFileError: the file cannot be read, others than its owner can read it, or it holds no such key.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            pem = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    if mode & 0o077:
        raise KeyFileError(
            f"others than its owner can read the private key {path}", got=f"mode {mode:04o}", allowed="mode 0600 or 0400",
            remedy=f"chmod 600 {path}; if somebody may have read it, replace it: `perennial keys rotate`",
        )  # fmt: skip
    return parse_signing_key(pem, str(path))


def write_signing_key(path: Path, key: SigningKey) -> None:
    """Write a private key into a new file with mode 0600.

    Raises:
        KeyFileError: the file exists, or cannot be written.
    """
    pem = key._raw.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # noqa: SLF001 - no other way shows it
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise KeyFileError(
            f"{path} exists", got="a file that would be overwritten", allowed="the path of a new file",
            remedy="choose another path; to replace the key: `perennial keys rotate`",
        ) from error  # fmt: skip
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_public_keys(text: str, where: str) -> dict[str, PublicKey]:
    """Return the public keys of a bundle by their ids.

    Args:
        text: PEM blocks, each with a line `# label` before it where it has a label.
        where: where it comes from, for the error.

    Raises:
        KeyFileError: a block is no Ed25519 key, or there is none.
    """
    found: dict[str, PublicKey] = {}
    for block in _BLOCK.finditer(text):
        try:
            raw = load_pem_public_key(block["pem"].encode())
        except (ValueError, UnsupportedAlgorithm):
            raw = None
        if not isinstance(raw, Ed25519PublicKey):
            raise KeyFileError(
                f"{where} holds a key of another kind", got=block["pem"][:120], allowed="Ed25519 public keys in PEM",
                remedy="take it out of the file",
            )  # fmt: skip
        key = PublicKey.of(raw, _KEY_ID.sub("", (block["label"] or "").strip(), count=1).strip())
        found[key.key_id] = key
    if not found or text.count("-----BEGIN ") != text.count("-----BEGIN PUBLIC KEY-----"):
        raise KeyFileError(
            f"{where} is no list of public keys", got=f"{len(found)} public keys and other blocks" if found else "none",
            allowed="Ed25519 public keys in PEM", remedy="write it with `perennial keys new`",
        )  # fmt: skip
    return found


class TrustedKeys:
    """The public keys of a file. A file that is replaced is read again at the next use. Thread-safe.

    While the file cannot be read again, the last keys stay: `cp` empties a file before it fills it.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, PublicKey] = {}
        self._failing = False

    def by_id(self) -> Mapping[str, PublicKey]:
        """Return the keys by their ids; those of the last reading, where the file cannot be read again.

        Raises:
            KeyFileError: the first reading fails: the file cannot be read, or is no list of public keys.
        """
        with self._lock:
            try:
                self._read()
            except KeyFileError as error:
                if not self._keys:
                    raise
                if not self._failing:
                    _log.error("the %d keys that were read before stay trusted: %s", len(self._keys), error)
                self._failing = True
            else:
                self._failing = False
            return self._keys

    def _read(self) -> None:
        """Read the file if it is not the one that was read last.

        Raises:
            KeyFileError: the file cannot be read, or is no list of public keys.
        """
        try:
            found = self.path.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp == self._stamp:
                return
            with self.path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES).decode(errors="replace")
        except OSError as error:
            raise _unreadable(self.path, error) from error
        self._keys = parse_public_keys(text, str(self.path))
        self._stamp = stamp


def write_public_keys(path: Path, keys: Mapping[str, PublicKey]) -> None:
    """Replace a file of public keys in one step, so that no reader sees half of it.

    Raises:
        KeyFileError: the file cannot be written.
    """
    draft = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text("\n".join(key.pem() for key in keys.values()), "utf-8")
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> KeyFileError:
    return KeyFileError(
        f"the key file {path} cannot be used", got=error.strerror or str(error), allowed="a file that this process can use",
        remedy="correct the path or its permissions",
    )  # fmt: skip
