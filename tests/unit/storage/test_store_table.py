"""The table of the store's policies: it covers every kind of object, and deletes are for the few that need them."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from perennial.storage.access.store_table import FOLDERS, ROLES, policy_of, policy_text
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.parked import ParkedAdapter, park_adapter, unpark_adapter
from perennial.storage.registry.waiting_jobs import give_up_cut

ROOT = Path(__file__).parents[3]
POLICIES = ROOT / "deploy/minio"


def folders_in_the_docs() -> set[str]:
    text = (ROOT / "docs/architecture.md").read_text("utf-8").partition("## The object store")[2].partition("\n## ")[0]
    keys = [key for row in re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE) for key in re.findall(r"`([^`]+)`", row)]
    return {re.split(r"/(?:<|…|sha256|topics|maintenance)", key)[0].removesuffix("/…") for key in keys}


def test_every_kind_of_object_is_in_the_table():
    documented = folders_in_the_docs()
    assert len(documented) > 25
    assert documented - set(FOLDERS) == set()
    assert set(FOLDERS) - documented == {"adapters", "probe", "state/cutting"}
    for role, access in ROLES.items():
        assert {*access.read, *access.write, *access.delete} <= set(FOLDERS), role


def test_what_a_role_replaces_or_deletes_it_may_read():
    for role, access in ROLES.items():
        # A conditional write reads after a conflict; a delete looks first, and lists the object's versions.
        assert set(access.delete) <= set(access.read), role
        assert set(access.write) - set(access.read) == set(), role


def test_only_roles_that_forget_or_collect_delete_blobs_and_nobody_a_version():
    assert {role for role, access in ROLES.items() if access.may("blobs", "delete")} == {
        "streams",
        "learner",
        "collector",
    }
    for folder in ("aliases", "audit", "quarantine", "revocations", "updates", "versions"):
        assert not any(access.may(folder, "delete") for access in ROLES.values()), folder
    assert {role for role, access in ROLES.items() if access.may("manifests", "delete")} == {"learner"}
    assert {role for role, access in ROLES.items() if access.may("blobs", "read")} == {
        "scorer", "streams", "learner", "subscriber", "operator", "collector",
    }  # fmt: skip


class TouchedStore(DirectoryStore):
    """A store that notes the folders in which objects are written and deleted."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, fsync=False)
        self.written: set[str] = set()
        self.deleted: set[str] = set()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.written.add(key.partition("/")[0])
        return super().put_if_absent(key, data)

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        self.written.add(key.partition("/")[0])
        return super().compare_and_swap(key, data, expected)

    def delete(self, key: str) -> bool:
        self.deleted.add(key.partition("/")[0])
        return super().delete(key)


@pytest.mark.parametrize("role", ["operator", "learner"])
def test_who_parks_an_adapter_may_give_up_a_cut_and_let_it_go_on(tmp_path, role):
    """What `perennial adapters park` and `unpark --without-missing` do, and a learner that misses a cut and finds it."""
    store = TouchedStore(tmp_path)
    park_adapter(store, ParkedAdapter(adapter="acme/support", reason="by-hand", since=datetime.now(UTC)))
    give_up_cut(store, "acme/support", 3, "given up by an operator")
    unpark_adapter(store, "acme/support")
    assert store.written == {"parked", "given-up"}
    assert store.deleted == {"parked"}
    assert all(ROLES[role].may(folder, "write") for folder in store.written)
    assert all(ROLES[role].may(folder, "delete") for folder in store.deleted)


def test_subscribers_and_collectors_cannot_move_an_alias():
    assert ROLES["subscriber"].write == ROLES["subscriber"].delete == ()
    movers = {role for role, access in ROLES.items() if access.may("aliases", "write")}
    assert movers == {"streams", "learner", "operator"}


@pytest.mark.parametrize("role", ROLES)
def test_the_files_are_those_of_the_table(role):
    assert (POLICIES / f"{role}.json").read_text("utf-8") == policy_text(role, "perennial"), (
        "run: PERENNIAL_STORE=s3://perennial perennial store policies --folder deploy/minio"
    )


def test_a_prefix_is_part_of_every_resource():
    for role in ROLES:
        policy = policy_of(role, "bucket", "eu/one")
        listing, *others = policy["Statement"]
        for pattern in listing.get("Condition", {}).get("StringLike", {}).get("s3:prefix", []):
            assert pattern.startswith("eu/one/")
        for statement in others:
            assert all(each.startswith("arn:aws:s3:::bucket/eu/one/") for each in statement["Resource"])
        assert json.loads(policy_text(role, "bucket", "eu/one")) == policy
