"""What each role may do with the objects of the store, and the S3 policies that follow.

S3 has no permission to create an object without one to replace it: whoever may write a key may replace it. That a write
creates is a condition of the request (`If-None-Match`), and MinIO has no policy condition for it. So a role that is taken
over can replace what its role writes, and a reader notices a replaced blob or manifest by its digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

Right = Literal["read", "write", "delete"]

FOLDERS: Final = (
    "adapters", "aliases", "audit", "blobs", "collected", "costs", "dependants", "forgotten", "generations", "given-up", "history",
    "installation",
    "job-versions", "jobs", "keys", "manifests", "marks", "orphans", "parked", "pins", "probe", "prompts", "quarantine",
    "rebuilds", "refused", "restored", "retention", "revocations", "signatures", "state/curate", "state/cutting",
    "state/replay", "suppressed", "updates", "versions",
)  # fmt: skip
"""What keys begin with; docs/architecture.md says what each of them holds."""
_SINGLE_OBJECTS: Final = frozenset({"orphans"})
_VERSION: Final = (
    "adapters", "aliases", "job-versions", "manifests", "pins", "revocations", "signatures", "updates", "versions",
)  # fmt: skip
"""What a rollback or a revocation writes, besides its blobs."""


@dataclass(frozen=True)
class StoreAccess:
    """What one role may do.

    Attributes:
        purpose: Who acts in this role.
        read: Folders of which it may read and list the objects.
        write: Folders in which it may create and replace objects.
        delete: Folders of which it may delete objects.
        whole_bucket: Whether it may ask for the bucket itself, and so list all keys: the check of conditional writes does.
        creates_bucket: Whether it may make the bucket.
    """

    purpose: str
    read: tuple[str, ...]
    write: tuple[str, ...] = ()
    delete: tuple[str, ...] = ()
    whole_bucket: bool = False
    creates_bucket: bool = False

    def may(self, folder: str, right: Right) -> bool:
        """Return whether the role may do it with the objects of a folder."""
        return folder in {"read": self.read, "write": self.write, "delete": self.delete}[right]


ROLES: Final[Mapping[str, StoreAccess]] = MappingProxyType({
    "intake": StoreAccess(
        "the role that validates what comes from outside",
        read=("installation", "refused", "restored"), write=("installation",),
    ),
    "scorer": StoreAccess(
        "the role that measures examples",
        read=(
            "adapters", "aliases", "blobs", "installation", "manifests", "prompts", "restored", "revocations", "signatures",
            "versions",
        ),
        write=("installation",),
    ),
    "streams": StoreAccess(
        "the agents curate and retain",
        read=tuple(folder for folder in FOLDERS if folder not in {"orphans", "probe", "rebuilds", "state/replay"}),
        write=(
            *_VERSION, "blobs", "forgotten", "given-up", "history", "installation", "jobs", "keys", "quarantine", "refused",
            "retention", "state/curate", "state/cutting", "suppressed",
        ),
        # A cut that a crash left unfinished, requests that ended long ago, pages that others replace.
        delete=("blobs", "forgotten", "history", "jobs", "pins", "retention", "state/cutting", "suppressed"),
    ),
    "learner": StoreAccess(
        "the role that trains, forgets and publishes versions",
        read=tuple(folder for folder in FOLDERS if folder not in {"orphans", "retention", "state/replay"}),
        write=(
            *_VERSION, "blobs", "collected", "costs", "dependants", "forgotten", "given-up", "history", "installation", "jobs", "keys", "parked",
            "probe", "quarantine", "rebuilds", "refused", "state/curate", "suppressed",
        ),
        # What was forgotten is deleted here: micro-batches, weights, and manifests of rebuilds that were not finished. An
        # adapter that waited for a missing cut goes on by itself: its record `parked` is deleted. Who was rebuilt without
        # its start is no longer listed under the founders.
        delete=(
            "blobs", "dependants", "forgotten", "history", "jobs", "manifests", "parked", "pins", "probe", "rebuilds", "signatures",
            "suppressed",
        ),
        whole_bucket=True,
    ),
    "subscriber": StoreAccess(
        "processes that serve versions",
        read=("adapters", "aliases", "blobs", "manifests", "prompts", "revocations", "signatures", "versions"),
    ),
    "operator": StoreAccess(
        "people with the commands of `perennial`",
        read=FOLDERS,
        write=(
            *_VERSION, "audit", "blobs", "given-up", "history", "installation", "keys", "marks", "parked", "probe", "prompts",
            "quarantine", "state/curate", "state/replay", "suppressed",
        ),
        delete=("history", "parked", "pins", "probe", "suppressed"),
        whole_bucket=True,
    ),
    "collector": StoreAccess(
        "`perennial gc`, which deletes old weights and blobs that nothing names",
        read=FOLDERS, write=("collected", "history", "orphans"), delete=("blobs", "history", "orphans"),
    ),
    "provisioner": StoreAccess(
        "`perennial init`, `topics create` and `topics repartition`",
        read=("installation", "probe", "restored"), write=("installation", "probe"), delete=("probe",), whole_bucket=True,
        creates_bucket=True,
    ),
})  # fmt: skip
"""Roles by name. Programs that only publish, and those that ask to forget by the topic `retention`, need no account.
`perennial backup` reads and restores everything, `perennial keys repair` deletes what a stranger claimed: both need the account that the others were made with."""

_OF_TENANTS: Final = "subscriber."
PER_ADAPTER: Final = ("adapters", "aliases", "manifests", "prompts", "revocations", "signatures", "versions")
"""Folders that a subscriber reads and in which a key goes on with the adapter's name."""

_ACTIONS: Final[Mapping[Right, tuple[str, ...]]] = MappingProxyType({
    "read": ("s3:GetObject",), "write": ("s3:PutObject",),
    # A bucket with versions has to be rid of every one of them.
    "delete": ("s3:DeleteObject", "s3:DeleteObjectVersion"),
})  # fmt: skip


def role_names(tenants: Sequence[str] = ()) -> list[str]:
    """Return the roles that have accounts; each tenant has a subscriber for itself, such as `subscriber.acme`.

    Args:
        tenants: The tenants that have topics of their own.

    >>> role_names(["acme"])[-2:]
    ['provisioner', 'subscriber.acme']
    """
    return [*ROLES, *(f"{_OF_TENANTS}{tenant}" for tenant in tenants)]


def policy_of(role: str, bucket: str, prefix: str = "") -> dict[str, Any]:
    """Return a role's policy as S3 and MinIO read it.

    Args:
        role: The role; see `role_names`.
        bucket: The bucket's name.
        prefix: What all objects' names begin with, without a slash at the end; empty for none.

    >>> policy_of("intake", "perennial")["Statement"][1]["Resource"]
    ['arn:aws:s3:::perennial/installation/*', 'arn:aws:s3:::perennial/refused/*']
    """
    if role.startswith(_OF_TENANTS):
        return _tenant_policy(role.removeprefix(_OF_TENANTS), bucket, prefix)
    access, within = ROLES[role], f"{prefix}/" if prefix else ""
    arn = f"arn:aws:s3:::{bucket}"
    listing: dict[str, Any] = {
        "Effect": "Allow",
        "Action": ["s3:ListBucket", "s3:ListBucketVersions"],
        "Resource": [arn],
    }
    if access.whole_bucket:
        listing["Action"] = ["s3:GetBucketLocation", *listing["Action"]]
    else:
        listing["Condition"] = {"StringLike": {"s3:prefix": [within + _pattern(folder) for folder in access.read]}}
    if access.creates_bucket:
        listing["Action"] = ["s3:CreateBucket", *listing["Action"]]
    statements = [listing]
    rights: tuple[tuple[Right, tuple[str, ...]], ...] = (
        ("read", access.read), ("write", access.write), ("delete", access.delete),
    )  # fmt: skip
    for right, folders in rights:
        if folders:
            statements.append({
                "Effect": "Allow", "Action": list(_ACTIONS[right]),
                "Resource": [f"{arn}/{within}{_pattern(folder)}" for folder in folders],
            })  # fmt: skip
    return {"Version": "2012-10-17", "Statement": statements}


def _tenant_policy(tenant: str, bucket: str, prefix: str) -> dict[str, Any]:
    """Return the policy of a tenant's subscriber: of what belongs to an adapter it reads only what is below `tenant/`.

    Blobs are named by their digests alone, whoever they belong to. So it reads all of them, and can list none.
    """
    within = f"{prefix}/" if prefix else ""
    arn = f"arn:aws:s3:::{bucket}"
    own = [f"{within}{folder}/{tenant}/*" for folder in PER_ADAPTER]
    listing = {
        "Effect": "Allow", "Action": ["s3:ListBucket", "s3:ListBucketVersions"], "Resource": [arn],
        "Condition": {"StringLike": {"s3:prefix": own}},
    }  # fmt: skip
    reading = {
        "Effect": "Allow", "Action": list(_ACTIONS["read"]),
        "Resource": [f"{arn}/{pattern}" for pattern in (*own, f"{within}blobs/*")],
    }  # fmt: skip
    return {"Version": "2012-10-17", "Statement": [listing, reading]}


def policy_text(role: str, bucket: str, prefix: str = "") -> str:
    """Return a role's policy as the text of a file; see `policy_of`."""
    return json.dumps(policy_of(role, bucket, prefix), indent=2) + "\n"


def _pattern(folder: str) -> str:
    return f"{folder}*" if folder in _SINGLE_OBJECTS else f"{folder}/*"
