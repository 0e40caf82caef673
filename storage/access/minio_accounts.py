"""Create policies and accounts on a MinIO server, with minio-py's client of MinIO's administration."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import certifi
import urllib3
from minio.credentials import StaticProvider
from minio.error import MinioAdminException
from minio.minioadmin import MinioAdmin
from urllib3.exceptions import HTTPError

from perennial.storage.access.store_table import policy_of
from perennial.storage.errors import StoreError, StoreUnavailableError
from perennial.storage.objects.s3_settings import S3Settings

_NOT_INITIALIZED = "NotInitialized"
_INITIALIZE_S = 60.0
_POLL_S = 0.2
_TIMEOUT = urllib3.Timeout(connect=5.0, read=60.0)


@dataclass(frozen=True)
class Account:
    """An account of a role.

    Attributes:
        name: Access key.
        secret: Secret key; None leaves the account as it is.
    """

    name: str
    secret: str | None


def apply_policies(
    s3: S3Settings, accounts: Mapping[str, Account], bucket: str, prefix: str = "", policy_prefix: str = "perennial-"
) -> list[str]:
    """Create or replace the policies, create the accounts that come with a secret, and give each its role's policy.

    It may be repeated: a policy is replaced by the same one, an account keeps its name and gets the secret.

    Args:
        s3: Name the server, and its administrator.
        accounts: Accounts by role.
        bucket: The bucket's name.
        prefix: What all objects' names begin with.
        policy_prefix: Precedes a role's name in the name of its policy.

    Returns:
        What was done, one line for each account.

    Raises:
        StoreError: A setting is not usable, or the server refuses.
        StoreUnavailableError: The server does not answer.
    """
    done = []
    try:
        admin = _ready_admin(s3)
        for role, account in accounts.items():
            policy = f"{policy_prefix}{role}"
            admin.policy_add(policy, policy=policy_of(role, bucket, prefix))
            if account.secret is not None:
                admin.user_add(account.name, account.secret)
            admin.policy_set(policy, user=account.name)
            done.append(f"{account.name}: policy {policy}")
    except MinioAdminException as error:
        raise StoreError(
            "the server refused to create policies and accounts", got=_reason(error),
            allowed="the credentials of an administrator of MinIO",
            remedy="set PERENNIAL_S3_ACCESS_KEY and PERENNIAL_S3_SECRET_KEY to an administrator's for this command",
        ) from None  # fmt: skip
    except (HTTPError, OSError) as error:
        raise StoreUnavailableError(
            got=f"{type(error).__name__}: {error}", remedy="check that the server at PERENNIAL_S3_ENDPOINT runs"
        ) from error
    return done


def _ready_admin(s3: S3Settings) -> Any:
    """Return a client once the server handles accounts: MinIO answers before it does, for a second or so."""
    admin, deadline_s = _admin(s3), time.monotonic() + _INITIALIZE_S
    while True:
        try:
            admin.policy_list()
        except MinioAdminException as error:
            if _NOT_INITIALIZED not in _reason(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(_POLL_S)
        else:
            return admin


def _admin(s3: S3Settings) -> Any:
    endpoint, secure = s3.address()
    access_key, secret_key, session_token = s3.credentials()
    http = urllib3.PoolManager(
        timeout=_TIMEOUT, retries=False, maxsize=2, cert_reqs="CERT_REQUIRED", ca_certs=s3.ca_file or certifi.where()
    )
    return MinioAdmin(
        endpoint=endpoint, credentials=StaticProvider(access_key, secret_key, session_token or None), region=s3.region,
        secure=secure, http_client=http,
    )  # fmt: skip


def _reason(error: Any) -> str:
    """Return code and message of MinIO's answer, without the request."""
    try:
        answer = json.loads(error._body)  # noqa: SLF001 - there is no public way
        return f"{answer['Code']}: {answer['Message']}"
    except (AttributeError, KeyError, TypeError, ValueError):
        return type(error).__name__
