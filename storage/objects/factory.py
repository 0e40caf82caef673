"""Open the object store at an address."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from perennial.storage.errors import StoreError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.objects.s3_settings import S3Settings


def open_store(uri: str, s3: S3Settings | None = None) -> ObjectStore:
    """Open the object store at an address.

    Args:
        uri: a folder, `file:///folder`, or `s3://bucket/prefix`.
        s3: how an S3 server is reached; by default as the environment says.

    Raises:
        StoreError: the address is not one of these, or holds credentials.
    """
    parts = urlsplit(uri)
    if "@" in parts.netloc:  # who writes a key there expects it to work; it must not end in a log instead
        raise StoreError(
            "credentials do not belong in an object store's address",
            got=f"{parts.scheme}://…@{parts.netloc.rpartition('@')[2]}",
            allowed="s3://bucket/prefix",
            remedy="set PERENNIAL_S3_ACCESS_KEY and PERENNIAL_S3_SECRET_KEY, or _FILE of each",
        )
    if parts.scheme == "s3":
        from perennial.storage.objects.s3 import open_minio

        return open_minio(uri, s3 or S3Settings.from_env())
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        return DirectoryStore(Path(unquote(parts.path)))
    if uri and "://" not in uri:
        return DirectoryStore(Path(uri))
    raise StoreError(
        "not an object store's address",
        got=uri or "nothing",
        allowed="a folder, file:///folder, or s3://bucket/prefix",
        remedy="set PERENNIAL_STORE",
    )
