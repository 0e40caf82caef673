"""Object keys, the names that stores keep objects under, and digests.

A key is one or more segments of letters, digits and `._@=:-` joined by `/`; no segment begins with a dot.

A key may be an object and the folder of other objects at once (`state/acme` and `state/acme/support`). A file system
cannot hold both, and MinIO leaves the second out of its lists. So every store keeps an object under its key followed by
`+`, a character that no key may hold. Blobs keep plain names, because other programs open weights by address.
"""

from __future__ import annotations

import hashlib
import re

from perennial.storage.errors import IntegrityError, StoreError

MAX_KEY_CHARS = 1024
MAX_SEGMENT_CHARS = 200

_SEGMENT = re.compile(r"[A-Za-z0-9_@=:-][A-Za-z0-9._@=:-]*")
_PREFIX = re.compile(r"[A-Za-z0-9._@=:/-]*")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_BLOBS = "blobs/sha256/"
_BLOB = re.compile(_BLOBS + r"[0-9a-f]{64}")


def is_segment(name: str) -> bool:
    """Return whether a key may have such a segment."""
    return len(name) <= MAX_SEGMENT_CHARS and _SEGMENT.fullmatch(name) is not None


def check_key(key: str) -> str:
    """Return the key unchanged.

    Raises:
        StoreError: it could point outside the store, or is not portable.
    """
    segments = key.split("/")
    usable = all(map(is_segment, segments))
    reserved = key.startswith(_BLOBS) and not _BLOB.fullmatch(key)
    if not usable or reserved or len(key) > MAX_KEY_CHARS:
        raise StoreError(
            "not a usable object key",
            got=key,
            allowed=f"segments of 1-{MAX_SEGMENT_CHARS} letters, digits and ._@=:- joined by /, none "
            f"beginning with a dot, at most {MAX_KEY_CHARS} characters; under {_BLOBS} only digests",
            remedy="correct the name that the key is made of",
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return the list prefix unchanged.

    Raises:
        StoreError: it could point outside the store.
    """
    folders = prefix.split("/")[:-1]
    if len(prefix) > MAX_KEY_CHARS or not _PREFIX.fullmatch(prefix) or not all(map(is_segment, folders)):
        raise StoreError("not a usable list prefix", got=prefix, allowed="the beginning of an object key")
    return prefix


def stored_name(key: str) -> str:
    """Return the name under which a store keeps the object; names sort as their keys do.

    Raises:
        StoreError: the key is not usable.
    """
    return check_key(key) if _BLOB.fullmatch(key) else f"{check_key(key)}+"


def key_of(name: str) -> str | None:
    """Return the key of the object that a store keeps under that name; None if it is not one of this project's."""
    try:
        key = check_key(name.removesuffix("+"))
    except StoreError:
        return None
    return key if stored_name(key) == name else None


def digest_of(data: bytes) -> str:
    """Return the digest of these bytes: `sha256:` and 64 hex digits.

    >>> digest_of(b"")
    'sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    """
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def hex_of(digest: str) -> str:
    """Return the 64 hex digits of a digest.

    Raises:
        IntegrityError: it is not a digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise IntegrityError("not a digest", got=digest, allowed="sha256: and 64 lower-case hex digits")
    return digest[7:]


def blob_key(digest: str) -> str:
    """Return the key of the blob with that digest."""
    return _BLOBS + hex_of(digest)
