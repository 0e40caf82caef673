"""Open the object store at an address.

How to add a store (for example on Azure Blob Storage):

1. Write a module in this folder with a class that has the methods of `ObjectStore` (`object_store.py`). The backend must
   be able to create an object only if it is absent and to replace it only if its etag is unchanged; everything that the
   registry promises rests on these two. Keep objects under `keys.stored_name`, check list prefixes with
   `keys.check_prefix`, call `probe_conditional_writes` from `probe`, and map the client's errors to StoreError and
   StoreUnavailableError.
2. Add its address to `open_store` here. Import the module inside the function, so that a process that does not use the
   store does not need its client library.
3. Add it to the parameters of the fixture in `tests/contract/conftest.py`; the contract suite in
   `tests/contract/storage` then runs over it.
"""

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
    if "@" in parts.netloc:  # refused, because addresses are logged and credentials must not be
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
