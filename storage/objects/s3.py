"""The object store over S3: MinIO, or any server that honours If-None-Match and If-Match on PUT.

minio-py has no parameter for conditions and sends unknown metadata as `x-amz-meta-*`, which overwrites; so
writes go to a presigned PUT address with the condition as a header. The only file that imports minio and
urllib3.

Settings: PERENNIAL_S3_ENDPOINT (host:port or URL), _REGION, _SECURE, _ACCESS_KEY, _SECRET_KEY, _SESSION_TOKEN
(each of the last three also as _FILE), _CA_FILE; where one is empty, AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL,
AWS_REGION, AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_CA_BUNDLE.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio
from minio.error import MinioException, S3Error
from urllib3.exceptions import HTTPError

from perennial.storage.errors import ConflictError, NotFoundError, StoreError, StoreUnavailableError
from perennial.storage.objects.keys import check_prefix, key_of, stored_name
from perennial.storage.objects.object_store import MAX_OBJECT_BYTES, StoredObject, probe_conditional_writes, too_large

_PUT_LIFE = timedelta(minutes=15)
_TIMEOUT = urllib3.Timeout(connect=5.0, read=60.0)
_ATTEMPTS = 4
_BACKOFF_S = 0.2
_CHUNK_BYTES = 1 << 20
_ABSENT = {"NoSuchKey", "NoSuchObject", "NoSuchVersion"}
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")
_SERVERS = (
    "MinIO from RELEASE.2025-09-07T16-13-09Z on, AWS S3, and servers that reject If-None-Match and "
    "If-Match on PUT with 412"
)
_T = TypeVar("_T")


class MinioStore:
    """A prefix of a bucket as an object store. Buckets may be versioned: a delete removes every version.

    http: the connection pool, with its own retries off; this class retries what may safely be sent again.
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
            if not _again(status):
                raise self._refused(key, status, detail)
        raise self._unavailable(key, detail)

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        """See ObjectStore. Sent once: after a lost answer the object itself says whether it was swapped."""
        condition = {"If-None-Match": "*"} if expected is None else {"If-Match": f'"{expected}"'}
        status, detail = self._put(key, data, condition)
        if status == 200:
            return detail
        if status not in {404, 409, 412} and not _again(status):
            raise self._refused(key, status, detail)
        try:
            found = self.get(key)
        except NotFoundError:
            found = None
        if found and found.data == data:
            return found.etag
        if _again(status) and status != 409 and (found.etag if found else None) == expected:
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
            remedy="stop who writes it, then delete it again",
        )

    def list(self, prefix: str, start_after: str = "") -> Iterator[str]:
        """See ObjectStore."""
        within = self._prefix + check_prefix(prefix)
        last = start_after
        for attempt in range(_ATTEMPTS):
            try:
                # A stored name is its key or the key and a "+", which sorts before all that a key may hold.
                after = f"{self._prefix}{last}+" if last else None
                for entry in self._client.list_objects(
                    self._bucket, prefix=within or None, recursive=True, start_after=after
                ):
                    key = key_of(entry.object_name[len(self._prefix) :])
                    if key is not None and key > start_after:
                        yield key
                        last = key
            except (MinioException, HTTPError, OSError) as error:
                self._raise_unless_passing(prefix, error)
                if attempt == _ATTEMPTS - 1:
                    raise self._unavailable(prefix, str(error)) from error
                time.sleep(_BACKOFF_S * 2**attempt)
            else:
                return

    def probe(self) -> None:
        """See ObjectStore; makes the bucket where there is none."""
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
        """Status and etag, or status and reason; status 0 where no answer came."""
        url = self._client.get_presigned_url("PUT", self._bucket, self._name(key), expires=_PUT_LIFE)
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
                self._raise_unless_passing(key, error)
                if attempt == _ATTEMPTS - 1:
                    raise self._unavailable(key, _without_query(error)) from error
            time.sleep(_BACKOFF_S * 2**attempt)
        raise AssertionError

    def _raise_unless_passing(self, key: str, error: Exception) -> None:
        if not isinstance(error, S3Error):
            return
        code = str(error.code)
        if code in _ABSENT:
            raise NotFoundError(f"no object {key} in {self.uri}", remedy="check the store's address") from None
        if code in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
            raise ConflictError(f"bucket {self._bucket} exists") from None
        if not _again(error.response.status):
            raise self._refused(key, error.response.status, code) from error

    def _refused(self, key: str, status: int, code: str) -> StoreError:
        if code == "NoSuchBucket":
            remedy = f"make the bucket {self._bucket}, or run `perennial doctor`, which does"
        elif code in _DENIED or status in {401, 403}:
            remedy = "check PERENNIAL_S3_ACCESS_KEY and _SECRET_KEY, the clock, and what the key may do"
        else:
            remedy = "check PERENNIAL_STORE, PERENNIAL_S3_ENDPOINT and PERENNIAL_S3_REGION"
        return StoreError(f"{self.uri} refused {key or 'the bucket'}", got=f"{status} {code}", remedy=remedy)

    def _unavailable(self, key: str, detail: str) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"{self.uri} did not answer for {key or 'the bucket'}",
            got=detail,
            remedy="check that the server at PERENNIAL_S3_ENDPOINT runs and has room, then do it again",
        )


def open_minio(uri: str, env: Mapping[str, str], http: urllib3.PoolManager | None = None) -> MinioStore:
    """The store at `s3://bucket/prefix`, reached as `env` says; StoreError where a setting is not usable."""
    address = urlsplit(uri)
    prefix = check_prefix(address.path.strip("/") + "/")[:-1] if address.path.strip("/") else ""
    endpoint, secure = _endpoint(env)
    access = _secret(env, "ACCESS_KEY", "AWS_ACCESS_KEY_ID")
    secret = _secret(env, "SECRET_KEY", "AWS_SECRET_ACCESS_KEY")
    if not access or not secret:
        raise StoreError(
            f"no credentials for {uri}",
            got=f"{'an' if access else 'no'} access key, {'a' if secret else 'no'} secret key",
            allowed="PERENNIAL_S3_ACCESS_KEY and PERENNIAL_S3_SECRET_KEY, each also as _FILE; or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            remedy="set both",
        )
    ca_file = env.get("PERENNIAL_S3_CA_FILE") or env.get("AWS_CA_BUNDLE") or env.get("SSL_CERT_FILE")
    http = http or urllib3.PoolManager(
        timeout=_TIMEOUT,
        retries=False,
        maxsize=32,
        cert_reqs="CERT_REQUIRED",
        ca_certs=ca_file or certifi.where(),
    )
    try:
        client = Minio(
            endpoint,
            access_key=access,
            secret_key=secret,
            session_token=_secret(env, "SESSION_TOKEN", "AWS_SESSION_TOKEN") or None,
            secure=secure,
            region=_first(env, "PERENNIAL_S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1",
            http_client=http,
        )
        # checks the bucket's name and sends nothing
        client.get_presigned_url("GET", address.netloc, "x", expires=_PUT_LIFE)
    except ValueError as error:
        raise StoreError(
            "not a usable S3 address", got=f"{uri} at {endpoint}", allowed=str(error),
            remedy="mend PERENNIAL_STORE or PERENNIAL_S3_ENDPOINT",
        ) from error  # fmt: skip
    return MinioStore(client, http, address.netloc, prefix)


def _endpoint(env: Mapping[str, str]) -> tuple[str, bool]:
    given = _first(env, "PERENNIAL_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") or "s3.amazonaws.com"
    wish = env.get("PERENNIAL_S3_SECURE", "").strip().lower()
    if wish not in {"", "1", "0", "true", "false", "yes", "no"}:
        raise StoreError("PERENNIAL_S3_SECURE is not usable", got=wish, allowed="true or false", remedy="mend it")
    parts = urlsplit(given if "://" in given else f"//{given}")
    if parts.scheme not in {"", "http", "https"} or not parts.netloc or parts.path.strip("/") or "@" in parts.netloc:
        raise StoreError(
            "PERENNIAL_S3_ENDPOINT is not usable",
            got=parts.netloc.rpartition("@")[2],
            allowed="host:port, or http(s)://host:port without a path or credentials",
            remedy="mend it",
        )
    secure = wish in {"1", "true", "yes"} if wish else parts.scheme != "http"
    return parts.netloc, secure


def _secret(env: Mapping[str, str], name: str, fallback: str) -> str:
    variable = f"PERENNIAL_S3_{name}"
    path = env.get(f"{variable}_FILE")
    if env.get(variable):
        return env[variable]
    if not path:
        return env.get(fallback, "")
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{variable}_FILE cannot be read",
            got=f"{path}: {error}",
            remedy="mount the file where it is expected",
        ) from error


def _first(env: Mapping[str, str], *names: str) -> str:
    return next((env[name] for name in names if env.get(name)), "")


def _again(status: int) -> bool:
    """Whether the same request may do better in a moment. 409: AWS, while another conditional write runs."""
    return status in {0, 408, 409, 425, 429} or status >= 500


def _without_query(error: Any) -> str:
    # a presigned address is a credential: none of it may reach a log
    return re.sub(r"\?[^\s'\")]*", "", str(error))
