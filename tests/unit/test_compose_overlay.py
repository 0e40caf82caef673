"""The overlay of the examples fits docker-compose.yml: what its service names, mounts, runs and waits for exists."""

from __future__ import annotations

import ast

import pytest

from perennial.storage.objects.s3 import open_minio
from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.settings import Settings, all_fields
from tests import compose

STACK = compose.load()
OVERLAY = compose.load(path=compose.OVERLAY)
SERVICES = {**STACK["services"], **OVERLAY["services"]}
ADDED = sorted(OVERLAY["services"])


def test_the_overlay_adds_services_and_changes_none():
    assert not set(OVERLAY["services"]) & set(STACK["services"])
    assert not set(OVERLAY["volumes"]) & set(STACK["volumes"])
    assert ADDED == ["subscriber"]


@pytest.mark.parametrize("name", ADDED)
def test_it_runs_our_image_with_the_stacks_addresses(name):
    service, ours = SERVICES[name], SERVICES["learner"]
    assert service["image"] == ours["image"]
    environment, theirs = compose.environment(service), compose.environment(ours)
    own = ("PERENNIAL_S3_ACCESS_KEY", "PERENNIAL_S3_SECRET_KEY", "PERENNIAL_REPLICA_KEY_FILE")
    account = {key: environment[key] for key in own}
    assert {**{key: theirs[key] for key in environment}, **account} == environment
    assert account["PERENNIAL_S3_ACCESS_KEY"] == "perennial-subscriber"
    fields = {variable for _, variable, _ in all_fields()}
    of_store = {key: value for key, value in environment.items() if key.startswith("PERENNIAL_S3_")}
    assert set(environment) - set(of_store) <= fields
    settings = Settings.of(
        env_file=None, kafka=environment["PERENNIAL_KAFKA"], store=environment["PERENNIAL_STORE"]
    )  # fmt: skip
    open_minio(settings.store.require_uri(), S3Settings.from_env(of_store))


@pytest.mark.parametrize("name", ADDED)
def test_it_runs_a_script_that_exists_with_the_arguments_that_it_takes(name):
    service = SERVICES[name]
    interpreter, script = service["entrypoint"]
    assert interpreter == "python"
    bound = {target: source for source, target, _ in compose.mounts(service) if source.startswith("./")}
    folder = next(target for target in bound if script.startswith(f"{target}/"))
    path = compose.ROOT / bound[folder] / script.removeprefix(f"{folder}/")
    main = next(node for node in ast.parse(path.read_text("utf-8")).body if getattr(node, "name", "") == "main")
    assert len(main.args.args) == len(service["command"])


@pytest.mark.parametrize("name", ADDED)
def test_it_is_limited_and_least_privileged_and_writes_only_where_it_may(name):
    service = SERVICES[name]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service.get("ports", []) == []
    for source, _, read_only in compose.mounts(service):
        if source.startswith("./"):
            assert (compose.ROOT / source).exists()
            assert read_only
        else:
            assert source in OVERLAY["volumes"]
    served = service["command"][-1]
    assert any(served.startswith(folder) for folder in compose.writable(service))
    assert "/tmp" in compose.writable(service)


@pytest.mark.parametrize("name", ADDED)
def test_it_waits_for_services_that_exist(name):
    waits = SERVICES[name]["depends_on"]
    assert set(waits) <= set(SERVICES)
    assert waits["init"]["condition"] == "service_completed_successfully"


def test_the_password_is_demanded_and_the_adapter_is_a_variable():
    text = compose.OVERLAY.read_text("utf-8")
    assert set(compose.variables(text)) == {
        "ADAPTER", "PERENNIAL_S3_SECRET_KEY_SUBSCRIBER", "PERENNIAL_TRUSTED_KEYS", "PERENNIAL_REPLICA_KEY_FILE",
    }  # fmt: skip
    assert compose.demanded(text) == {"PERENNIAL_S3_SECRET_KEY_SUBSCRIBER": "run deploy/credentials.sh"}
    filled = compose.load({"PERENNIAL_S3_SECRET_KEY_SUBSCRIBER": "mine", "ADAPTER": "acme/search"}, compose.OVERLAY)
    assert compose.environment(filled["services"]["subscriber"])["PERENNIAL_S3_SECRET_KEY"] == "mine"
    assert filled["services"]["subscriber"]["command"][0] == "acme/search"
