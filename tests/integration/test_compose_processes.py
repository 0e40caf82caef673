"""Runs every service of docker-compose.yml as a plain process: its command, environment, health check and end.

Needs no Docker engine. Names and paths of containers become addresses and folders of this machine. Nothing else of the
outer environment reaches a process, and the project's own processes may write only where the read-only container could.
Grafana itself is not run; its configuration is checked in tests/unit/test_compose.py.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from perennial.storage.objects.factory import open_store
from perennial.streams.addresses import direct_opener
from perennial.streams.cli.adapters import open_registry
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker
from perennial.streams.devstack.embedded_kafka.kafka_config import OWNED
from perennial.streams.settings import Settings
from tests import compose
from tests.services import free_port, minio_binary, missing_service

DOCKERFILE = (compose.ROOT / "deploy/Dockerfile").read_text("utf-8")
HOME = "/var/lib/perennial"
DOCUMENTS = 12
SMALL = {
    "PERENNIAL_MAX_AGE_S": "2", "PERENNIAL_THREADS": "1", "PERENNIAL_STEPS": "2", "PERENNIAL_PARTITIONS": "2",
    "PERENNIAL_ANCHOR_ROWS": "2", "PERENNIAL_MAX_GENERAL_RISE_NATS": "50", "PERENNIAL_MIN_GAIN_NATS": "-50",
}  # fmt: skip
"""What a user may put into .env: small updates, so that the test is short."""

GUARD = """
import errno, os, sys
_ALLOWED = tuple(os.environ.pop("TEST_WRITABLE").split(":")) + ("/tmp", "/dev", "/proc")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def _hook(event, args):
    if event == "open":
        path, writes = args[0], bool((args[2] or 0) & _WRITES)
    elif event == "os.mkdir":
        path, writes = args[0], not os.path.isdir(args[0])
    elif event in ("os.rename", "os.link", "os.symlink"):
        path, writes = args[1], True
    else:
        return
    if writes and not isinstance(path, int):
        whole = os.path.abspath(os.fsdecode(path))
        if not any(whole == folder or whole.startswith(folder + "/") for folder in _ALLOWED):
            raise OSError(errno.EROFS, "the container's root is read-only", whole)
sys.addaudithook(_hook)
"""
"""A sitecustomize.py that gives Python code a read-only root."""


def wait_for(condition: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:.0f} s: {what()}")
        time.sleep(0.3)


@dataclass
class Services:
    """The compose file's services on this machine.

    Attributes:
        tmp: Folder for data and logs.
        addresses: Addresses in the file, and what replaces each of them here.
        processes: The running services.
        ports: Metrics port of each role.
        file: The parsed compose file.
    """

    tmp: Path
    addresses: dict[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    file: dict = field(default_factory=compose.load)

    def service(self, name: str) -> dict:
        return self.file["services"][name]

    def here(self, text: str, own: Mapping[str, str]) -> str:
        for there, here in own.items():
            text = re.sub(rf"(^|=){re.escape(there)}(?=/|$)", lambda match, here=here: match[1] + here, text)
        for there, here in self.addresses.items():
            text = text.replace(there, here)
        return text

    def own(self, name: str) -> dict[str, str]:
        """Return the service's writable folders, and the test's folder for each of them."""
        folders = {}
        for there in compose.writable(self.service(name)) - {"/tmp"}:
            folder = self.tmp / name / there.strip("/").replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            folders[there] = str(folder)
        return folders

    def environment(self, name: str) -> dict[str, str]:
        """Return the container's environment: the image's and the file's variables, and nothing else."""
        service, own = self.service(name), self.own(name)
        env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": "/nonexistent"}
        given = compose.environment(service)
        if compose.is_ours(service):
            image = dict(
                re.findall(r"^(?:ENV|   ) (\w+)=(\S+)", DOCKERFILE.partition("\nRUN groupadd")[0], re.MULTILINE)
            )
            assert image["HOME"] == HOME
            self.ports.setdefault(name, free_port())
            (self.tmp / "guard").mkdir(exist_ok=True)
            (self.tmp / "guard" / "sitecustomize.py").write_text(GUARD)
            env |= image | SMALL | given
            env |= {
                "PERENNIAL_METRICS_PORT": str(self.ports[name]), "PYTHONPATH": str(self.tmp / "guard"),
                "TEST_WRITABLE": ":".join(own.values()),
            }  # fmt: skip
        else:
            env |= given
        return {key: self.here(value, own) for key, value in env.items()}

    def spawn(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        own = self.own(name)
        folder = Path(own.get(HOME, self.tmp / name))
        folder.mkdir(exist_ok=True)
        with (self.tmp / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [words[0], *(self.here(word, own) for word in words[1:])], env=self.environment(name), cwd=folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def command(self, name: str) -> list[str]:
        words = [str(word) for word in self.service(name)["command"]]
        if compose.is_ours(self.service(name)):
            (entry,) = compose.ENTRYPOINT
            return [str(Path(sys.executable).parent / entry), *words]
        return words

    def log(self, name: str) -> str:
        return (self.tmp / f"{name}.log").read_text(errors="replace")[-3000:]

    def healthy(self, name: str) -> bool:
        """Run the service's health check here and return its result."""
        process = self.processes[name]
        assert process.poll() is None, f"{name} ended with {process.returncode}: {self.log(name)}"
        check = self.service(name)["healthcheck"]["test"]
        url = check[-1]
        if url.startswith("http://"):
            try:
                with direct_opener().open(self.here(url, {}), timeout=5) as answer:
                    return answer.status == 200
            except (urllib.error.URLError, OSError):
                return False
        words = [sys.executable if word == "python" else word for word in check[1:]]
        words[-1] = str(compose.ROOT / re.search(rf"^COPY (\S+) {re.escape(words[-1])}$", DOCKERFILE, re.MULTILINE)[1])
        env = {key: value for key, value in self.environment(name).items() if key.startswith("PERENNIAL_")}
        return subprocess.run(words, env=env, stdout=subprocess.DEVNULL, timeout=30, check=False).returncode == 0

    def end(self, name: str) -> int:
        """Stop the service as Compose does and return its exit status."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(compose.seconds(self.service(name).get("stop_grace_period", "10s")))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"{name} did not end within its grace period: {self.log(name)}")


@pytest.fixture
def services(tmp_path) -> Iterator[Services]:
    file = tmp_path / "credentials.env"
    subprocess.run(["sh", str(compose.CREDENTIALS_SCRIPT), str(file)], check=True, timeout=60, capture_output=True)
    passwords = dict(line.split("=") for line in file.read_text("utf-8").splitlines())
    made = Services(tmp_path, file=compose.load(passwords))
    yield made
    for process in made.processes.values():
        process.kill()
        process.wait()


def broker_properties(services: Services) -> dict[str, str]:
    """Return the broker configuration that the image makes of the service's environment."""
    environment = compose.environment(services.service("kafka"))
    names = {key: value for key, value in environment.items() if key.startswith("KAFKA_")}
    del names["KAFKA_HEAP_OPTS"]  # for the start script only
    return {key.removeprefix("KAFKA_").lower().replace("_", "."): value for key, value in names.items()}


def start_kafka(services: Services) -> EmbeddedBroker:
    """Start the same Kafka with the service's configuration, but with listeners on this machine."""
    wanted = broker_properties(services)
    ours = {key: value for key, value in wanted.items() if key not in OWNED and "listener" not in key}
    broker = EmbeddedBroker(services.tmp / "kafka", settings=ours).start()
    try:
        from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        try:
            found = admin.describe_configs([ConfigResource(ConfigResourceType.BROKER, "1")], config_filter="all")
        finally:
            admin.close()
        known = {key: entry["value"] for key, entry in found["broker"]["1"].items()}
        assert set(wanted) <= set(known), "every variable is a setting of this Kafka"
        assert {key: known[key] for key in ours} == ours
    except BaseException:
        broker.stop()
        raise
    for address in (entry.split("://")[1] for entry in wanted["advertised.listeners"].split(",")):
        services.addresses[address] = broker.bootstrap
    return broker


def start_minio(services: Services) -> None:
    binary = minio_binary()
    if binary is None:
        missing_service("no minio binary on PATH or in the cache folder")
    port = free_port()
    services.addresses |= {"minio:9000": f"127.0.0.1:{port}", "127.0.0.1:9000": f"127.0.0.1:{port}"}
    words = [f"127.0.0.1:{port}" if word == ":9000" else f"127.0.0.1:{free_port()}" if word == ":9001" else word
             for word in services.command("minio")]  # fmt: skip
    services.spawn("minio", [str(binary), *words])


def start_prometheus(services: Services) -> None:
    binary = shutil.which("prometheus")
    if binary is None:
        missing_service("no prometheus on PATH: install the package")
    port = free_port()
    services.addresses |= {"127.0.0.1:9090": f"127.0.0.1:{port}", "0.0.0.0:9090": f"127.0.0.1:{port}"}
    for source, target, _ in compose.mounts(services.service("prometheus")):
        if source.startswith("./"):
            services.addresses[f"={target}/"] = f"={compose.ROOT / source}/"
    services.spawn("prometheus", [binary, *services.command("prometheus")])


@pytest.mark.slow(70)
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("broker_jars")
def test_every_service_becomes_healthy_and_an_adapter_learns(services, monkeypatch):
    broker = start_kafka(services)
    try:
        start_minio(services)
        services.addresses["0.0.0.0"] = "127.0.0.1"
        wait_for(lambda: services.healthy("minio"), 180, lambda: services.log("minio"))

        for _ in range(2):
            assert services.spawn("accounts", services.command("accounts")).wait(300) == 0, services.log("accounts")
        del services.processes["accounts"]
        for made in (True, False):  # a second `docker compose up` finds everything there
            assert services.spawn("init", [*services.command("init"), "--json"]).wait(300) == 0, services.log("init")
            report = json.loads(services.log("init").splitlines()[-1])
            assert [topic["created"] for topic in report["topics"]] == [made] * len(report["topics"])
            assert not any(topic["differences"] for topic in report["topics"])
        del services.processes["init"]

        start_prometheus(services)
        for name in compose.ROLE_SERVICES:
            services.spawn(name, services.command(name))
        waiting = {"prometheus", *compose.ROLE_SERVICES}

        def all_healthy() -> bool:
            waiting.difference_update([name for name in waiting if services.healthy(name)])
            return not waiting

        wait_for(all_healthy, 300, lambda: "\n".join(f"{name}: {services.log(name)}" for name in waiting))

        env = services.environment("learner")
        for key, value in env.items():
            if key.startswith("PERENNIAL_S3_"):
                monkeypatch.setenv(key, value)
        settings = Settings.of(env_file=None, kafka=env["PERENNIAL_KAFKA"], store=env["PERENNIAL_STORE"])
        with Publisher(settings.kafka.bootstrap, settings=settings) as publisher:
            for number in range(DOCUMENTS):
                text = f"note {number}: what is learned here goes through every service of the file, once"
                publisher.document(adapter="acme/compose", document_id=str(number), text=text)
        registry = open_registry(settings)
        wait_for(
            lambda: sum(
                len(registry.manifest("acme/compose", version).learned)
                for _, version in registry.versions("acme/compose")
            ) >= DOCUMENTS,
            300, lambda: "\n".join(f"{name}: {services.log(name)}" for name in compose.ROLE_SERVICES),
        )  # fmt: skip
        assert next(iter(open_store(settings.store.uri).list("manifests/")))
        assert {name: services.end(name) for name in compose.ROLE_SERVICES} == dict.fromkeys(compose.ROLE_SERVICES, 0)
    finally:
        broker.stop()


def test_the_read_only_root_is_one(services):
    elsewhere = Path("/usr/perennial-not-allowed")  # wherever the checkout is, no service may write here
    code = (
        "import os, pathlib\n"
        "pathlib.Path(os.environ['HOME'], 'ok').write_text('x')\n"
        f"pathlib.Path({str(elsewhere)!r}).write_text('x')\n"
    )
    process = services.spawn("learner", [sys.executable, "-c", code])
    assert process.wait(120) == 1
    assert "the container's root is read-only" in services.log("learner")
    assert (Path(services.own("learner")[HOME]) / "ok").exists()
    assert not elsewhere.exists()
