"""`perennial keys`: make, rotate, list, remove, sign what is stored, and check it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from perennial.storage.errors import PerennialError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.records import alias_key
from perennial.storage.registry.registry import Registry
from perennial.storage.signing.key_files import KeyFileError, TrustedKeys, read_signing_key
from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.version_statements import signature_key
from perennial.streams.cli import doctor
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.app import app
from perennial.streams.cli.keys.alias_repair import RepairError
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.settings import SettingsError
from tests.keys import Keys
from tests.versions import VersionPublisher

ADAPTER = "acme/support"


class World:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.private, self.public = folder / "keys" / "signing.pem", folder / "keys" / "trusted.pem"
        self.store = DirectoryStore(folder / "store", fsync=False)
        self.environment = monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PERENNIAL_STORE", str(folder / "store"))
        monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")

    def use_keys(self) -> None:
        self.environment.setenv("PERENNIAL_SIGNING_KEY_FILE", str(self.private))
        self.environment.setenv("PERENNIAL_TRUSTED_KEYS", str(self.public))

    def registry(self) -> Registry:
        settings = connected_settings()
        return open_registry(settings, settings.signing.trust())

    def publisher(self) -> VersionPublisher:
        return VersionPublisher(self.store, ADAPTER, trust=connected_settings().signing.trust())


def keys(*arguments: str, code: int = 0) -> str:
    result: Result = CliRunner().invoke(app, ["keys", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "PRIVATE" not in result.output
    return result.stdout


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_new_key_is_trusted_at_once_and_never_overwritten(world: World) -> None:
    with pytest.raises(KeyFileError, match="no file is named"):
        keys("new")
    shown = keys("new", "--private", str(world.private), "--public", str(world.public), "--label", "first  one")
    key = read_signing_key(world.private)
    assert key.public.key_id in shown
    assert stat.S_IMODE(world.private.stat().st_mode) == 0o600
    world.use_keys()
    with pytest.raises(KeyFileError, match="exists"):
        keys("new")
    assert json.loads(keys("ls", "--json")) == [{"key": key.public.key_id, "signs": True, "label": "first one"}]
    assert key.public.key_id in keys("ls")


def test_an_installation_without_keys_is_upgraded(world: World) -> None:
    before = VersionPublisher(world.store, ADAPTER)
    states = [before.publish() for _ in range(3)]
    world.use_keys()
    keys("new")
    with pytest.raises(SignatureError):
        world.registry().alias(ADAPTER)
    counted = json.loads(keys("check", "--json", code=1))[0]
    assert (counted["versions"], len(counted["versions_distrusted"])) == (3, 3)
    assert counted["aliases_distrusted"] == {"live": "unsigned"}
    refused = json.loads(keys("sign", "--json", code=1))[0]
    assert (refused["versions_signed"], refused["aliases_signed"]) == (0, 0), "nothing unsigned is signed unasked"
    signed = json.loads(keys("sign", "--unsigned", "--json"))[0]
    assert (signed["versions_signed"], signed["aliases_signed"]) == (3, 1)
    assert json.loads(keys("sign", "--unsigned", "--json"))[0]["versions_signed"] == 0
    keys("check")
    state = world.registry().alias(ADAPTER)
    assert state is not None
    assert (state.version, state.generation) == (states[-1].version, 3), "a signature is no change of the alias"
    assert world.registry().head(ADAPTER).version == states[-1].version
    assert world.publisher().publish().generation == 4


def test_a_rotation_step_by_step(world: World) -> None:
    world.use_keys()
    keys("new")
    old = read_signing_key(world.private).public.key_id
    first = world.publisher().publish()
    keys("rotate", "--label", "second")
    new = read_signing_key(world.private).public.key_id
    assert new != old
    assert list(TrustedKeys(world.public).by_id()) == [old, new]
    assert read_signing_key(world.private.with_name("signing.pem.previous")).public.key_id == old
    second = world.publisher().publish()
    assert [world.registry().manifest(ADAPTER, each.version).seq for each in (first, second)] == [1, 2]
    assert json.loads(keys("sign", "--json"))[0]["versions_signed"] == 1
    with pytest.raises(KeyFileError, match="stays trusted"):
        keys("remove", new)
    keys("remove", old[:20])
    assert list(TrustedKeys(world.public).by_id()) == [new]
    keys("check")
    assert world.registry().manifest(ADAPTER, first.version).seq == 1
    with pytest.raises(PerennialError, match="no single trusted key"):
        keys("remove", "sha256:ff")


def test_what_a_stranger_signed_is_neither_trusted_nor_signed(world: World, tmp_path: Path) -> None:
    world.use_keys()
    keys("new")
    world.publisher().publish()
    stranger = VersionPublisher(world.store, ADAPTER, trust=Keys(tmp_path / "stranger").stranger)
    forged = stranger.publish()
    for command in (["check"], ["sign"], ["sign", "--unsigned"]):
        found = json.loads(keys(*command, "--json", code=1))[0]
        assert found["versions_distrusted"] == {forged.version: "unknown-key"}
        assert found["aliases_distrusted"] == {"live": "unknown-key"}
    finding = doctor.CHECKS["signatures"](connected_settings())
    assert not finding.ok
    assert f"{ADAPTER}#live: unknown-key" in finding.found


def test_the_doctor_says_whether_versions_are_signed(world: World) -> None:
    assert "not signed" in doctor.CHECKS["signatures"](connected_settings()).found
    VersionPublisher(world.store, ADAPTER).publish()
    world.use_keys()
    keys("new")
    assert not doctor.CHECKS["signatures"](connected_settings()).ok
    keys("sign", "--unsigned")
    finding = doctor.CHECKS["signatures"](connected_settings())
    assert finding.ok
    assert read_signing_key(world.private).public.key_id in finding.found


def test_signing_needs_a_key_and_trusts_its_own(world: World) -> None:
    with pytest.raises(KeyFileError, match="no key to sign with"):
        keys("sign")
    world.use_keys()
    keys("new")
    (world.private.parent / "other.pem").write_text(world.public.read_text())
    keys("rotate", "--public", str(world.private.parent / "other.pem"))
    with pytest.raises(SettingsError, match="not trusted by this process itself"):
        world.registry()
    assert "is not trusted" not in keys("ls", code=1)


def test_without_trusted_keys_only_unsigned_signs(world: World) -> None:
    world.use_keys()
    keys("new")
    world.environment.delenv("PERENNIAL_TRUSTED_KEYS")
    forged = VersionPublisher(world.store, ADAPTER).publish().model_copy(update={"signature": "any text"})
    world.store.delete(alias_key(ADAPTER, "live"))
    world.store.put_if_absent(alias_key(ADAPTER, "live"), forged.to_bytes())
    with pytest.raises(KeyFileError, match="no trusted keys") as raised:
        keys("sign")
    assert "PERENNIAL_TRUSTED_KEYS" in raised.value.remedy
    assert "--unsigned" in raised.value.remedy
    assert world.store.get(alias_key(ADAPTER, "live"), 1 << 20).data == forged.to_bytes(), "nothing was signed"
    signed = json.loads(keys("sign", "--unsigned", "--json"))[0]
    assert (signed["versions_signed"], signed["aliases_signed"]) == (1, 1)


def test_a_key_in_the_environment_signs_too_and_is_not_shown(world: World) -> None:
    world.use_keys()
    keys("new")
    pem = world.private.read_text()
    world.environment.delenv("PERENNIAL_SIGNING_KEY_FILE")
    world.environment.setenv("PERENNIAL_SIGNING_KEY", pem.replace("\n", "\\n"))
    settings = connected_settings()
    assert pem.splitlines()[1] not in f"{settings!r} {settings.model_dump_json()} {settings.environment()}"
    state = world.publisher().publish()
    assert world.registry().alias(ADAPTER) == world.registry().alias(ADAPTER)
    assert state.signature is not None
    world.environment.setenv("PERENNIAL_SIGNING_KEY_FILE", str(world.private))
    with pytest.raises(SettingsError, match="two keys") as raised:
        connected_settings()
    assert pem.splitlines()[1] not in f"{raised.value}"


def test_an_alias_that_moves_while_it_is_signed_stays_moved(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = VersionPublisher(world.store, ADAPTER)
    before.publish()
    world.use_keys()
    keys("new")
    swap, moved = DirectoryStore.compare_and_swap, []

    def swap_after_another(self, key, data, expected):
        if key == alias_key(ADAPTER, "live") and not moved:
            moved.append(True)
            before.publish()
        return swap(self, key, data, expected)

    monkeypatch.setattr(DirectoryStore, "compare_and_swap", swap_after_another)
    keys("sign", "--unsigned", code=0)
    state = Registry(world.store, nonce=str, now=None).alias(ADAPTER)
    assert state is not None
    assert (state.generation, state.signature is not None) == (2, True)


def test_an_adapter_that_a_stranger_took_is_given_back_to_its_owner(world: World, tmp_path: Path) -> None:
    world.use_keys()
    with pytest.raises(KeyFileError):
        keys("repair", ADAPTER, "--yes")
    keys("new")
    made = [world.publisher().publish() for _ in range(3)]
    keys("repair", ADAPTER, "--yes", code=1)
    stranger = VersionPublisher(world.store, ADAPTER, trust=Keys(tmp_path / "stranger").stranger)
    for _ in range(2):
        stranger.publish()
    with pytest.raises(SignatureError):
        world.publisher().publish()
    assert CliRunner().invoke(app, ["keys", "repair", ADAPTER], input="n\n").exit_code == 1
    with pytest.raises(SignatureError):
        world.registry().alias(ADAPTER)
    planned = json.loads(keys("repair", ADAPTER, "--yes", "--json"))
    assert planned["removed"] == [4, 5]
    state = world.registry().alias(ADAPTER)
    assert state is not None
    assert (state.version, state.seq, state.generation) == (made[-1].version, 3, 6)
    assert world.registry().head(ADAPTER).version == made[-1].version
    assert world.publisher().publish().generation == 7
    keys("check")


def test_an_alias_that_was_put_back_gets_the_generation_that_clients_ask_for(world: World) -> None:
    world.use_keys()
    keys("new")
    publisher = world.publisher()
    old, _, last = (publisher.publish() for _ in range(3))
    world.store.delete(alias_key(ADAPTER, "live"))
    world.store.put_if_absent(alias_key(ADAPTER, "live"), old.to_bytes())
    keys("repair", ADAPTER, "--generation", "4", "--yes")
    state = world.registry().alias(ADAPTER)
    assert state is not None
    assert (state.generation, state.version) == (4, last.version)


def test_a_repair_takes_no_number_in_the_middle_and_serves_nothing_revoked(world: World, tmp_path: Path) -> None:
    world.use_keys()
    keys("new")
    made = [world.publisher().publish() for _ in range(3)]
    world.store.delete(alias_key(ADAPTER, "live"))
    world.registry().revoke(ADAPTER, made[-1].version, "leak")
    keys("repair", ADAPTER, "--yes")
    state = world.registry().alias(ADAPTER)
    assert state is not None
    assert (state.version, state.seq) == (made[1].version, 2)
    world.store.delete(signature_key(ADAPTER, made[0].version))
    world.store.delete(alias_key(ADAPTER, "live"))
    with pytest.raises(RepairError, match="before trusted ones"):
        keys("repair", ADAPTER, "--yes")
