"""The plugin of vLLM finds a version by the name of a model, or says no: quickly, in bounds and without an error."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.streams.client.testing import BASE_SHA256
from perennial.streams.client.vllm_plugin import registration, resolver_metrics
from perennial.streams.client.vllm_plugin.requested_names import RequestedName, parse_requested_name
from perennial.streams.client.vllm_plugin.version_folders import VersionFolders
from perennial.testing import small_weights
from tests import vllm_stand_in
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
MODEL = "/models/base"
HEX = "a" * 64


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> resolver_metrics.ResolverMetrics:
    made = resolver_metrics.ResolverMetrics(CollectorRegistry())
    monkeypatch.setattr(registration, "resolver_metrics", lambda: made)
    return made


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_RESOLVER_DIR", str(tmp_path / "folders"))
    monkeypatch.setenv("PERENNIAL_SERVED_BASE", "shipped")
    return monkeypatch


@pytest.fixture
def resolvers(environment: pytest.MonkeyPatch, metrics: Any) -> Iterator[dict[str, Any]]:
    """What the plugin registers; call `registration.register()` once the environment is set."""
    registration.shared_resolver.cache_clear()
    yield vllm_stand_in.install(environment)
    registration.shared_resolver.cache_clear()


@pytest.fixture
def versions(tmp_path: Path) -> VersionPublisher:
    return VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER)


def resolve(resolvers: dict[str, Any], *names: str) -> list[Any]:
    registration.register()

    async def all_of_them() -> list[Any]:
        return [await resolvers["perennial"].resolve_lora(MODEL, name) for name in names]

    return asyncio.run(all_of_them())


def weights_of(request: Any) -> bytes:
    return (Path(request.lora_path) / "adapter_model.safetensors").read_bytes()


def pinned(version: str) -> str:
    return f"{ADAPTER}@{version.removeprefix('sha256:')}"


# ---- names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("acme/support", ("acme/support", None, None)),
        ("a/b/c/d", ("a/b/c/d", None, None)),
        ("acme/support#canary", ("acme/support", "canary", None)),
        (f"acme/support@{HEX}", ("acme/support", None, f"sha256:{HEX}")),
        (f"acme/support@sha256:{HEX}", ("acme/support", None, f"sha256:{HEX}")),
        (f"acme/support#canary@{HEX}", ("acme/support", "canary", f"sha256:{HEX}")),
    ],
)
def test_names_of_adapters_are_read(name, parts):
    assert parse_requested_name(name) == RequestedName(*parts)


HOSTILE = [
    "", ".", "..", "../x", "acme/../support", "acme/./support", "/etc/passwd", "acme//support", "acme/", "a/b/c/d/e",
    "acme\0support", "acme/support\n", "\nacme", "acme/support#", "acme/support@", f"acme/support@{'A' * 64}",
    f"acme/support@{HEX}0", f"acme/support@{HEX}/..", f"../@{HEX}", "acme/support#../x", "acme/support##live",
    "Acme/Support", "acmé", "a" * 201, "a" * 10_000_000, f"acme#{'b' * 65}", f"acme/support@{HEX}=2", "acme support",
    "acme\\support", "s3://bucket/x", "%2e%2e", "acme/support@live", "a\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:30]))
def test_hostile_names_are_no_adapters_and_reach_no_store(resolvers, environment, name, metrics):
    environment.setenv("PERENNIAL_STORE", "s3://nowhere/that/may/be/asked")
    assert parse_requested_name(name) is None
    assert resolve(resolvers, name) == [None]
    assert metrics.requests.labels("unknown")._value.get() == 1


@pytest.mark.parametrize(
    "name", ["globex/support", f"globex/support@{HEX}", "globex/support#canary", "acmes/support", "acme"]
)
def test_a_server_of_a_tenant_refuses_names_of_others_and_reads_nothing(resolvers, environment, metrics, caplog, name):
    environment.setenv("PERENNIAL_STORE", "s3://nowhere/that/may/be/asked")
    environment.setattr(VersionFolders, "find", lambda *_: pytest.fail("the store was asked"))
    environment.setenv("PERENNIAL_TENANT", "acme")
    others = [f"globex/{number}" for number in range(20)]
    assert resolve(resolvers, name, *others) == [None] * 21
    assert metrics.requests.labels("refused")._value.get() == 21
    (message,) = caplog.messages
    assert f"got: {name.partition('@')[0].partition('#')[0]}; allowed: adapters below acme/" in message
    assert "PERENNIAL_TENANT" in message


@pytest.mark.parametrize("tenant", ["acme", ""])
def test_a_server_of_a_tenant_serves_its_adapters(resolvers, versions, environment, tenant):
    environment.setenv("PERENNIAL_TENANT", tenant)
    versions.publish(small_weights(1))
    assert weights_of(resolve(resolvers, ADAPTER)[0]) == small_weights(1)


def test_a_server_of_a_tenant_refuses_what_extends_an_adapter_that_is_none_of_its(
    resolvers, versions, environment, metrics, caplog
):
    user = VersionPublisher(versions.store, "acme/user-42")
    manifest = user.manifest(small_weights(1)).model_copy(update={"extends": "acme"})
    user.registry.publish(manifest, [small_weights(1)], lambda _: None)
    environment.setenv("PERENNIAL_TENANT", "acme")
    assert resolve(resolvers, "acme/user-42") == [None]
    assert metrics.requests.labels("refused")._value.get() == 1
    assert "got: acme; allowed: adapters below acme/" in caplog.text


# ---- versions


def test_a_name_is_resolved_to_the_version_that_its_alias_names(resolvers, versions, tmp_path):
    old = versions.publish(small_weights(1))
    new = versions.publish(small_weights(2))
    live, by_version = resolve(resolvers, ADAPTER, pinned(old.version))
    assert weights_of(live) == small_weights(2)
    assert weights_of(by_version) == small_weights(1)
    assert live.lora_name == f"{ADAPTER}#live@{new.version[7:]}"
    assert by_version.lora_name == pinned(old.version)
    config = json.loads((Path(live.lora_path) / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == MODEL
    assert Path(live.lora_path).is_relative_to(tmp_path / "folders")
    assert Path(live.lora_path).name == f"@{new.version[7:]}"


def test_another_alias_is_followed_by_name(resolvers, versions):
    versions.publish(small_weights(1))
    manifest = versions.manifest(small_weights(2))
    versions.registry.publish(manifest, [small_weights(2)], lambda _: None, "canary")
    canary, live, nothing = resolve(resolvers, f"{ADAPTER}#canary", ADAPTER, f"{ADAPTER}#beta")
    assert weights_of(canary) == small_weights(2)
    assert canary.lora_name == f"{ADAPTER}#canary@{manifest.digest()[7:]}"
    assert weights_of(live) == small_weights(1)
    assert nothing is None


def test_no_two_requests_have_one_name(resolvers, versions):
    """An engine takes two requests with one name in a batch for one, whatever their ids."""
    version = versions.publish(small_weights(1)).version
    names = [ADAPTER, f"{ADAPTER}#live", pinned(version), f"{ADAPTER}@{version}", f"{ADAPTER}#live@{version[7:]}"]
    given = resolve(resolvers, *names, *names)
    assert len({request.lora_name for request in given}) == len(given)
    assert len({request.lora_path for request in given}) == 1


def test_what_is_not_there_is_not_found_without_a_walk(resolvers, versions, environment, caplog):
    versions.publish(small_weights(1))
    environment.setattr(DirectoryStore, "list", lambda *_: pytest.fail("a walk over the store"))
    caplog.set_level(logging.INFO, "vllm.perennial")
    names = ["acme/nobody", "gpt-4", pinned(f"sha256:{HEX}"), f"{ADAPTER}#beta@{HEX}"]
    assert resolve(resolvers, *names) == [None] * len(names)
    assert caplog.messages == []


def test_a_revoked_version_is_refused_by_every_name(resolvers, versions, caplog, metrics):
    version = versions.publish(small_weights(1)).version
    versions.registry.revoke(ADAPTER, version, "wrong")
    assert resolve(resolvers, ADAPTER, pinned(version)) == [None, None]
    assert all("revoked" in message and "remedy" in message for message in caplog.messages)
    assert metrics.requests.labels("refused")._value.get() == 2


def test_a_retired_adapter_is_not_found(resolvers, versions):
    version = versions.publish(small_weights(1)).version
    versions.registry.retire(ADAPTER, "live", "nothing is left", version)
    assert resolve(resolvers, ADAPTER) == [None]


def test_what_is_no_published_version_is_not_served(resolvers, versions):
    versions.publish(small_weights(1))
    recorded = versions.manifest(small_weights(2))
    versions.registry.record(recorded)  # a publish that was interrupted: the manifest is there, the claim is not
    refused = versions.manifest(small_weights(3)).model_copy(update={"outcome": "refused"})
    versions.registry.publish(refused, [small_weights(3)], lambda _: None)
    assert resolve(resolvers, pinned(recorded.digest()), pinned(refused.digest())) == [None, None]


@pytest.mark.parametrize("served", ["sha256:" + "c" * 64, "another/base", ""])
def test_a_version_of_another_base_is_refused(resolvers, versions, environment, served, caplog):
    versions.publish(small_weights(1))
    environment.setenv("PERENNIAL_SERVED_BASE", served)
    assert resolve(resolvers, ADAPTER) == [None]
    (message,) = caplog.messages
    assert "another base" in message
    assert "got: " in message
    assert "remedy: " in message


@pytest.mark.parametrize("served", [BASE_SHA256, "shipped"])
def test_the_base_is_compared_by_digest_or_name(resolvers, versions, environment, served):
    versions.publish(small_weights(1))
    environment.setenv("PERENNIAL_SERVED_BASE", served)
    assert weights_of(resolve(resolvers, ADAPTER)[0]) == small_weights(1)


def test_weights_that_are_not_those_of_the_manifest_are_refused(resolvers, versions, caplog):
    manifest = versions.manifest(small_weights(1))
    versions.registry.publish(manifest, [small_weights(1)], lambda _: None)
    blob = versions.store._path(blob_key(manifest.weights.digest))
    blob.chmod(0o600)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(bytes(data))
    assert resolve(resolvers, ADAPTER, ADAPTER) == [None, None]
    assert len(caplog.messages) == 1, "the same error is logged once a minute"
    assert "digest" in caplog.text or "manifest names" in caplog.text


def test_weights_with_nan_are_refused_and_not_read_again_for_a_minute(resolvers, versions, environment, caplog):
    """vLLM loads them without a word, and then answers NaN for other adapters too."""
    header_bytes = struct.unpack("<Q", small_weights(1)[:8])[0]
    poisoned = bytearray(small_weights(1))
    poisoned[8 + header_bytes : 12 + header_bytes] = struct.pack("<f", float("nan"))
    versions.publish(bytes(poisoned))
    reads: list[object] = []
    fetch = VersionFolders._weights
    environment.setattr(VersionFolders, "_weights", lambda self, found: reads.append(found) or fetch(self, found))
    assert resolve(resolvers, ADAPTER, ADAPTER, f"{ADAPTER}#live") == [None] * 3
    assert "NaN" in caplog.text
    assert len(reads) == 1


def test_a_store_that_does_not_answer_is_no_error_of_the_server(resolvers, environment, caplog, metrics):
    environment.setenv("PERENNIAL_RESOLVE_TIMEOUT_S", "0.2")
    stuck = threading.Event()
    environment.setattr(VersionFolders, "find", lambda *_: stuck.wait(30))
    try:
        assert resolve(resolvers, *([ADAPTER] * 6)) == [None] * 6
    finally:
        stuck.set()
    assert "PERENNIAL_RESOLVE_TIMEOUT_S" in caplog.text
    assert metrics.requests.labels("failed")._value.get() == 6


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("bug"), MemoryError("full")])
def test_no_error_is_raised_into_the_server(resolvers, versions, environment, error, caplog):
    def raising(*_: object) -> None:
        raise error

    versions.publish(small_weights(1))
    environment.setattr(VersionFolders, "prepare", raising)
    assert resolve(resolvers, ADAPTER) == [None]
    assert str(error) in caplog.text


# ---- folders


def test_the_folder_of_a_server_has_a_limit(resolvers, versions, environment, caplog):
    size_bytes = len(small_weights(1))
    environment.setenv("PERENNIAL_RESOLVER_MAX_GIB", str(2.5 * size_bytes / 2**30))
    states = [versions.publish(small_weights(seed)) for seed in range(3)]
    first, second, third, again = resolve(resolvers, *(pinned(state.version) for state in states), ADAPTER)
    assert first
    assert second
    assert third is None
    assert again is None
    assert "PERENNIAL_RESOLVER_MAX_GIB" in caplog.text


def test_folders_of_servers_that_ended_are_deleted_and_those_of_others_kept(resolvers, versions, tmp_path):
    versions.publish(small_weights(1))
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from perennial.streams.client.vllm_plugin.version_folders import VersionFolders\n"
        "folders = VersionFolders(lambda: None, Path(sys.argv[1]), alias='live', served_base='', max_bytes=1, signing=None)\n"
        "print(folders._opened_backend('base').path, flush=True)\n"
        "sys.stdin.read()\n"
        "os._exit(9)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "folders")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        alive = Path(other.stdout.readline().strip())
        killed = subprocess.run(words, input="", capture_output=True, text=True, timeout=60, check=False)
        left = Path(killed.stdout.strip())
        assert left.is_dir()
        (request,) = resolve(resolvers, ADAPTER)
        assert not left.exists()
        assert not left.with_name(f"{left.name}.lock").exists()
        assert alive.is_dir()
        assert Path(request.lora_path).is_dir()
        other.communicate("", timeout=60)


def test_a_damaged_folder_is_written_again(resolvers, versions):
    versions.publish(small_weights(1))
    (request,) = resolve(resolvers, ADAPTER)
    (Path(request.lora_path) / "adapter_model.safetensors").write_bytes(b"damaged")
    (again,) = resolve(resolvers, f"{ADAPTER}#live")
    assert weights_of(again) == small_weights(1)


# ---- registration


def test_the_entry_points_of_the_package_are_these():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
    name = "perennial.streams.client.vllm_plugin.registration"
    assert project["entry-points"]["vllm.general_plugins"] == {registration.NAME: f"{name}:register"}
    assert project["entry-points"]["vllm.endpoint_plugins"] == {registration.NAME: f"{name}:RefreshPlugin"}


@pytest.mark.parametrize(
    "variables", [{"PERENNIAL_STORE": ""}, {"PERENNIAL_POLL_S": "soon"}, {"PERENNIAL_SERVED_BASE": "sha256:short"}]
)
def test_a_server_starts_without_adapters_where_the_settings_are_wrong(resolvers, environment, variables, caplog):
    caplog.set_level(logging.INFO, "vllm.perennial")
    for name, value in variables.items():
        environment.setenv(name, value)
    registration.register()
    assert resolvers == {}
    assert next(iter(variables)) in caplog.text


def test_a_server_starts_where_its_vllm_has_no_resolvers(resolvers, environment, caplog):
    environment.setitem(sys.modules, "vllm.lora.resolver", None)
    registration.register()
    assert "no resolvers" in caplog.text


def test_the_plugin_is_loaded_without_vllm_and_without_torch():
    code = (
        "import sys, perennial.streams.client.vllm_plugin.registration\n"
        "print([name for name in ('vllm', 'torch', 'kafka', 'numpy', 'faust') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
