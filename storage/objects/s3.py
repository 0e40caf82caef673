"""An object store over S3: MinIO, or any server that honours If-None-Match and If-Match on PUT.

minio-py has no parameter for conditions. A condition passed as metadata would be sent as `x-amz-meta-*`, and the server
would ignore it and overwrite the object. So writes go to a presigned PUT address with the condition as a header. This
is the only file that imports minio and urllib3.

Retries are loops here instead of a retry library's: whether a request may be sent again depends on its kind and on the
status of the answer, and listing continues after the last key that was received.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio
from minio.error import MinioException, S3Error
from urllib3.exceptions import HTTPError

from perennial.storage.errors import ConflictError, NoSpaceError, NotFoundError, StoreError, StoreUnavailableError
from perennial.storage.objects.keys import check_prefix, key_of, stored_name
from perennial.storage.objects.object_store import MAX_OBJECT_BYTES, StoredObject, probe_conditional_writes, too_large
from perennial.storage.objects.s3_settings import S3Settings

_PRESIGNED_LIFETIME = timedelta(minutes=15)
_TIMEOUT = urllib3.Timeout(connect=5.0, read=60.0)
_ATTEMPTS = 4
_BACKOFF_S = 0.2
_CHUNK_BYTES = 1 << 20
_ABSENT = {"NoSuchKey", "NoSuchObject", "NoSuchVersion"}
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_FULL = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage"}
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")
_SERVERS = (
    "MinIO from RELEASE.2025-09-07T16-13-09Z on, AWS S3, and servers that reject If-None-Match and "
    "If-Match on PUT with 412"
)
_T = TypeVar("_T")


class MinioStore:
    """An object store under a prefix of a bucket. The bucket may be versioned: a delete removes every version.

    Args:
        client: signs requests and reads objects.
        http: the connection pool, with its own retries off; this class retries what may safely be sent again.
        bucket: the bucket's name.
        prefix: what all objects' names begin with; empty for none.
    """

    def __init__(self, client: Minio, http: urllib3.PoolManager, bucket: str, prefix: str = "") -> None:
        self._client = client
        self._http = http
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See ObjectStore."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_BACKOFF_S * 2**attempt)
            status, detail = self._put(key, data, {"If-None-Match": "*"})
            if status == 200:
                return True
            if status == 412:
                return False
            if not _is_transient(status):
                raise self._refused(key, status, detail)
        raise self._unavailable(key, detail)

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        """See ObjectStore; sent only once: after a lost answer the object itself is read to see whether it changed."""
        condition = {"If-None-Match": "*"} if expected is None else {"If-Match": f'"{expected}"'}
        status, detail = self._put(key, data, condition)
        if status == 200:
            return detail
        if status not in {404, 409, 412} and not _is_transient(status):
            raise self._refused(key, status, detail)
        try:
            found = self.get(key)
        except NotFoundError:
            found = None
        if found and found.data == data:
            return found.etag
        if _is_transient(status) and status != 409 and (found.etag if found else None) == expected:
            raise self._unavailable(key, f"{detail}; whether the write took place is not known yet")
        raise ConflictError(
            f"object {key} was changed by another writer",
            got=found.etag if found else "no object",
            allowed=expected or "no object",
            remedy="read it again and decide anew",
        )

    def get(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> StoredObject:
        """See ObjectStore."""
        name = self._name(key)

        def read() -> StoredObject:
            response = self._client.get_object(self._bucket, name)
            try:
                size_bytes = int(response.headers.get("content-length", 0))
                data = bytearray()
                while size_bytes <= max_bytes:
                    part = response.read(_CHUNK_BYTES)
                    if not part:
                        return StoredObject(bytes(data), response.headers.get("etag", "").strip('"'))
                    data += part
                    size_bytes = max(size_bytes, len(data))
                raise too_large(key, size_bytes, max_bytes)
            finally:
                response.close()
                response.release_conn()

        return self._retried(key, read)

    def exists(self, key: str) -> bool:
        """See ObjectStore."""
        name = self._name(key)
        try:
            self._retried(key, lambda: self._client.stat_object(self._bucket, name))
        except NotFoundError:
            return False
        return True

    def delete(self, key: str) -> bool:
        """See ObjectStore; on a versioned bucket the versions and delete markers are removed one by one."""
        name = self._name(key)
        existed = self.exists(key)
        for _ in range(_ATTEMPTS):
            versions = self._retried(key, lambda: self._versions(name))
            if not versions:
                return existed
            for version in versions:
                self._retried(key, partial(self._client.remove_object, self._bucket, name, version_id=version))
        raise StoreUnavailableError(
            f"versions of {key} keep appearing in {self.uri}",
            remedy="stop the process that writes it, then delete it again",
        )

    def list(self, prefix: str, start_after: str = "") -> Iterator[str]:
        """See ObjectStore."""
        within = self._prefix + check_prefix(prefix)
        last = start_after
        for attempt in range(_ATTEMPTS):
            try:
                # The object of a key is stored as `key` or `key+`. "+" sorts before every character of a key, so a
                # listing after `last+` leaves out both names of `last` and nothing else.
                after = f"{self._prefix}{last}+" if last else None
                for entry in self._client.list_objects(
                    self._bucket, prefix=within or None, recursive=True, start_after=after
                ):
                    key = key_of(entry.object_name[len(self._prefix) :])
                    if key is not None and key > start_after:
                        yield key
                        last = key
            except (MinioException, HTTPError, OSError) as error:
                self._raise_unless_transient(prefix, error)
                if attempt == _ATTEMPTS - 1:
                    raise self._unavailable(prefix, str(error)) from error
                time.sleep(_BACKOFF_S * 2**attempt)
            else:
                return

    def probe(self) -> None:
        """See ObjectStore; creates the bucket if it does not exist."""
        if not self._retried("", lambda: self._client.bucket_exists(self._bucket)):
            with contextlib.suppress(ConflictError):
                self._retried("", lambda: self._client.make_bucket(self._bucket))
        probe_conditional_writes(
            self,
            f"this server (or a proxy before it) ignores conditional writes, without which two writers "
            f"overwrite each other. Those that honour them: {_SERVERS}. MinIO before that release loses "
            "updates (minio/minio#21526): upgrade it, or use a folder as PERENNIAL_STORE",
        )

    def _name(self, key: str) -> str:
        return self._prefix + stored_name(key)

    def _put(self, key: str, data: bytes, condition: dict[str, str]) -> tuple[int, str]:
        """Send one conditional PUT; return (200, etag) or (status, reason), with status 0 if no answer came."""
        url = self._client.get_presigned_url("PUT", self._bucket, self._name(key), expires=_PRESIGNED_LIFETIME)
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        headers = {"Content-Type": "application/octet-stream", "Content-MD5": md5, **condition}
        try:
            answer = self._http.urlopen("PUT", url, body=data, headers=headers, retries=False, redirect=False)
        except (HTTPError, OSError) as error:
            return 0, _without_query(error)
        if answer.status == 200:
            return 200, answer.headers.get("etag", "").strip('"')
        code = _CODE.search(answer.data)
        return answer.status, code.group(1).decode() if code else f"HTTP {answer.status}"

    def _versions(self, name: str) -> tuple[str | None, ...]:
        found = []
        for entry in self._client.list_objects(self._bucket, prefix=name, recursive=True, include_version=True):
            if entry.object_name != name:  # the name itself sorts before whatever it is a prefix of
                break
            found.append(entry.version_id)
        return tuple(found)

    def _retried(self, key: str, call: Callable[[], _T]) -> _T:
        for attempt in range(_ATTEMPTS):
            try:
                return call()
            except (MinioException, HTTPError, OSError) as error:
                self._raise_unless_transient(key, error)
                if attempt == _ATTEMPTS - 1:
                    raise self._unavailable(key, _without_query(error)) from error
            time.sleep(_BACKOFF_S * 2**attempt)
        raise AssertionError

    def _raise_unless_transient(self, key: str, error: Exception) -> None:
        if not isinstance(error, S3Error):
            return
        code = str(error.code)
        if code in _ABSENT:
            raise NotFoundError(f"no object {key} in {self.uri}", remedy="check the store's address") from None
        if code in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
            raise ConflictError(f"bucket {self._bucket} exists") from None
        if not _is_transient(error.response.status):
            raise self._refused(key, error.response.status, code) from error

    def _refused(self, key: str, status: int, code: str) -> StoreError:
        if code in _FULL:
            return self._full(key, code)
        if code == "NoSuchBucket":
            remedy = f"make the bucket {self._bucket}, or run `perennial doctor`, which does"
        elif code in _DENIED or status in {401, 403}:
            remedy = "check PERENNIAL_S3_ACCESS_KEY and _SECRET_KEY, the clock, and what the key may do"
        else:
            remedy = "check PERENNIAL_STORE, PERENNIAL_S3_ENDPOINT and PERENNIAL_S3_REGION"
        return StoreError(f"{self.uri} refused {key or 'the bucket'}", got=f"{status} {code}", remedy=remedy)

    def _full(self, key: str, code: str) -> NoSpaceError:
        return NoSpaceError(
            f"{self.uri} has no room for {key or 'an object'}", got=code,
            remedy=f"add space to the server, or raise the quota of the bucket {self._bucket}",
        )  # fmt: skip

    def _unavailable(self, key: str, detail: str) -> StoreUnavailableError:
        if detail in _FULL:
            return self._full(key, detail)
        return StoreUnavailableError(
            f"{self.uri} did not answer for {key or 'the bucket'}",
            got=detail,
            remedy="check that the server at PERENNIAL_S3_ENDPOINT runs and has room, then do it again",
        )


def open_minio(uri: str, s3: S3Settings, http: urllib3.PoolManager | None = None) -> MinioStore:
    """Open the store at `s3://bucket/prefix`.

    Args:
        uri: address of the bucket and the prefix in it.
        s3: how the server is reached.
        http: the connection pool; by default one of its own with TLS checks on.

    Raises:
        StoreError: a setting or the address is not usable.
    """
    address = urlsplit(uri)
    prefix = check_prefix(address.path.strip("/") + "/")[:-1] if address.path.strip("/") else ""
    endpoint, secure = s3.address()
    access_key, secret_key, session_token = s3.credentials()
    http = http or urllib3.PoolManager(
        timeout=_TIMEOUT,
        retries=False,
        maxsize=32,
        cert_reqs="CERT_REQUIRED",
        ca_certs=s3.ca_file or certifi.where(),
    )
    try:
        client = Minio(
            endpoint,
            access_key=access_key,
            secret_key=secret_key,
            session_token=session_token or None,
            secure=secure,
            region=s3.region,
            http_client=http,
        )
        # checks the bucket's name and sends nothing
        client.get_presigned_url("GET", address.netloc, "x", expires=_PRESIGNED_LIFETIME)
    except ValueError as error:
        raise StoreError(
            "not a usable S3 address",
            got=f"{uri} at {endpoint}",
            allowed=str(error),
            remedy="correct PERENNIAL_STORE or PERENNIAL_S3_ENDPOINT",
        ) from error
    return MinioStore(client, http, address.netloc, prefix)


def _is_transient(status: int) -> bool:
    """Return whether the same request may succeed in a moment; AWS sends 409 while another conditional write runs."""
    return status in {0, 408, 409, 425, 429} or status >= 500


def _without_query(error: Any) -> str:
    # A presigned address is a credential, so its query must not reach a log.
    return re.sub(r"\?[^\s'\")]*", "", str(error))
