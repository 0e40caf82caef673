"""Every role with an account of its own at a real MinIO: whatever the table does not allow is refused."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
from minio.error import S3Error

from perennial.storage.access.minio_accounts import Account, apply_policies
from perennial.storage.access.store_table import FOLDERS, PER_ADAPTER, ROLES, Right, StoreAccess
from perennial.storage.errors import StoreError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore, blob_key, digest_of
from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.cli.access.store_app import run_policies, secret_variable
from perennial.streams.devstack import discovery
from perennial.streams.settings import Settings
from tests.security.acts import Acts
from tests.services import MinioServer, start_minio

URI = "s3://perennial/eu"
STRANGER = "stranger"
REFUSALS = ("AccessDenied", "InvalidAccessKeyId", "HTTP 403")


@dataclass(frozen=True)
class Site:
    """The server, and the secrets of its accounts."""

    server: MinioServer
    secrets: Mapping[str, str]

    def s3(self, account: str, secret: str = "") -> S3Settings:
        return S3Settings.from_env({
            **self.server.environment(), "PERENNIAL_S3_ACCESS_KEY": account,
            "PERENNIAL_S3_SECRET_KEY": secret or self.secrets[account],
        })  # fmt: skip

    @property
    def root(self) -> S3Settings:
        return S3Settings.from_env(self.server.environment())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    server = start_minio(tmp_path_factory.mktemp("minio"))
    try:
        root = S3Settings.from_env(server.environment())
        open_store(URI, root).probe()
        accounts = {role: Account(f"perennial-{role}", secrets.token_hex(16)) for role in ROLES}
        done = apply_policies(root, accounts, "perennial", "eu")
        assert done[0] == "perennial-intake: policy perennial-intake"
        assert len(done) == len(ROLES)
        found = {each.name: each.secret or "" for each in accounts.values()}
        yield Site(server, {**found, server.access: server.secret, STRANGER: secrets.token_hex(16)})
    finally:
        server.stop()


@pytest.mark.parametrize("role", [*ROLES, STRANGER])
def test_the_server_allows_a_role_what_the_table_says_and_nothing_else(role: str, site: Site, acts: Acts):
    access = ROLES.get(role) or StoreAccess("somebody without an account", read=())
    account = role if role == STRANGER else f"perennial-{role}"
    root, mine = open_store(URI, site.root), open_store(URI, site.s3(account))
    for folder in FOLDERS:
        for right in get_args(Right):
            done = tries(root, mine, folder)[right]()
            acts.add(f"{role}: {right} {folder}", allowed=access.may(folder, right), done=done)
        prefix = folder if folder == "orphans" else f"{folder}/"
        listed = done_by(lambda prefix=prefix: list(mine.list(prefix)))
        acts.add(f"{role}: list {folder}", allowed=access.may(folder, "read") or access.whole_bucket, done=listed)
    everything = done_by(lambda: list(mine.list("")))
    acts.add(f"{role}: list everything", allowed=access.whole_bucket, done=everything)
    outside = open_store("s3://perennial/us", site.s3(account))
    acts.add(f"{role}: read another prefix", allowed=False, done=done_by(lambda: outside.get("aliases/a/live")))
    acts.add(
        f"{role}: write another prefix", allowed=False, done=done_by(lambda: outside.put_if_absent("jobs/a", b"x"))
    )
    other = open_store("s3://another-bucket", site.s3(account))
    acts.add(f"{role}: write another bucket", allowed=False, done=done_by(lambda: other.put_if_absent("jobs/a", b"x")))
    accounts = {"intake": Account("perennial-intake", "a secret of my own")}
    takes_over = done_by(lambda: apply_policies(site.s3(account), accounts, "perennial", "eu"))
    acts.add(f"{role}: set the password of an account", allowed=False, done=takes_over)
    assert not acts.wrong, "allowed although the table does not"
    assert not acts.failed, "refused although the table allows it"
    assert acts.tried + acts.worked == 4 * len(FOLDERS) + 5


def test_a_tenants_subscriber_reads_what_belongs_to_its_adapters_and_nothing_else(site: Site, acts: Acts):
    root = open_store(URI, site.root)
    secret = secrets.token_hex(16)
    apply_policies(site.root, {"subscriber.acme": Account("perennial-subscriber.acme", secret)}, "perennial", "eu")
    mine = open_store(URI, site.s3("perennial-subscriber.acme", secret))
    for folder in FOLDERS:
        for tenant in ("acme", "globex", "acmes"):
            key, data = f"{folder}/{tenant}/support/1", secrets.token_bytes(8)
            if folder in {"blobs", "orphans"}:
                key, data = key_in(folder)
            root.put_if_absent(key, data)
            own = tenant == "acme" and folder in PER_ADAPTER
            act = f"subscriber.acme: {{}} {folder} of {tenant}"
            reads = own or folder == "blobs"  # blobs of all tenants lie side by side, under their digests
            acts.add(act.format("read"), allowed=reads, done=done_by(lambda key=key: mine.get(key)))
            listed = done_by(lambda folder=folder, tenant=tenant: list(mine.list(f"{folder}/{tenant}/")))
            acts.add(act.format("list"), allowed=own, done=listed)
        for right in ("write", "delete"):
            acts.add(f"subscriber.acme: {right} {folder}", allowed=False, done=tries(root, mine, folder)[right]())
        listed = done_by(lambda folder=folder: list(mine.list(f"{folder}/")))
        acts.add(f"subscriber.acme: list all of {folder}", allowed=False, done=listed)
    assert not acts.wrong, "allowed although the policy does not"
    assert not acts.failed, "refused although the policy allows it"


def key_in(folder: str) -> tuple[str, bytes]:
    data = secrets.token_bytes(8)
    if folder == "blobs":
        return blob_key(digest_of(data)), data
    return (folder if folder == "orphans" else f"{folder}/acme/{data.hex()}"), data


def tries(root: ObjectStore, mine: ObjectStore, folder: str) -> dict[str, Callable[[], bool]]:
    key, data = key_in(folder)

    def read() -> bool:
        root.put_if_absent(key, data)
        return done_by(lambda: mine.get(key))

    def write() -> bool:
        root.delete(key)
        return done_by(lambda: mine.put_if_absent(key, data))

    def delete() -> bool:
        """Without the store's own delete, which reads and lists first: the act itself must be refused."""
        root.put_if_absent(key, data)
        return done_by(lambda: mine._client.remove_object(mine._bucket, mine._name(key)))

    return {"read": read, "write": write, "delete": delete}


def done_by(act: Callable[[], object]) -> bool:
    """Return whether an act worked; False where the server said that it is not allowed."""
    try:
        act()
    except StoreError as error:
        if any(code in str(error.got) for code in REFUSALS):
            return False
        raise
    except S3Error as error:
        if error.code in REFUSALS:
            return False
        raise
    return True


def test_roles_delete_whole_objects_by_the_stores_own_delete(site: Site):
    for role, access in ROLES.items():
        mine = open_store(URI, site.s3(f"perennial-{role}"))
        for folder in access.delete:
            key, data = key_in(folder)
            open_store(URI, site.root).put_if_absent(key, data)
            assert mine.delete(key), (role, folder)
    for role in ("learner", "operator", "provisioner"):
        open_store(URI, site.s3(f"perennial-{role}")).probe()


def test_the_provisioner_makes_the_bucket(tmp_path: Path):
    server = start_minio(tmp_path)
    try:
        root = S3Settings.from_env(server.environment())
        made = {"provisioner": Account("maker", "secret of maker"), "operator": Account("other", "secret of other")}
        apply_policies(root, made, "perennial")
        as_of = {
            name: S3Settings.from_env({
                **server.environment(), "PERENNIAL_S3_ACCESS_KEY": name, "PERENNIAL_S3_SECRET_KEY": f"secret of {name}",
            })
            for name in ("maker", "other")
        }  # fmt: skip
        with pytest.raises(StoreError, match="refused the bucket"):
            open_store("s3://perennial", as_of["other"]).probe()
        open_store("s3://perennial", as_of["maker"]).probe()
        open_store("s3://perennial", as_of["other"]).probe()
    finally:
        server.stop()


def test_the_command_applies_the_policies(site: Site, monkeypatch, capsys):
    settings = Settings.of(env_file=None, store=URI).replace(s3=site.root)
    monkeypatch.setattr(discovery, "connected_settings", lambda: settings)
    for role in ROLES:
        monkeypatch.setenv(secret_variable(role), f"secret of {role}")
    assert run_policies(None, "second-", apply=True, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)[0] == "second-intake: policy second-intake"
    given = {"PERENNIAL_S3_ACCESS_KEY": "second-subscriber", "PERENNIAL_S3_SECRET_KEY": "secret of subscriber"}
    mine = open_store(URI, S3Settings.from_env({**site.server.environment(), **given}))
    assert list(mine.list("aliases/")) is not None
    with pytest.raises(StoreError, match="AccessDenied"):
        mine.put_if_absent("aliases/acme/live", b"mine")
    with pytest.raises(StoreError, match=r"refused to create policies.*AccessDenied.*an administrator"):
        apply_policies(S3Settings.from_env({**site.server.environment(), **given}), {"intake": Account("x", None)}, "b")
