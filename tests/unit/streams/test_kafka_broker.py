"""The embedded broker's pure parts, and what it says where it cannot run; no Java, no network."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from perennial.streams.devstack import process_guard
from perennial.streams.devstack.embedded_kafka import kafka_jars
from perennial.streams.devstack.embedded_kafka.kafka_broker import BrokerError, EmbeddedBroker, fetch_jars
from perennial.streams.devstack.embedded_kafka.kafka_config import (
    log_tail,
    new_cluster_id,
    render_properties,
    server_properties,
)
from perennial.streams.devstack.embedded_kafka.kafka_jar_digests import JAR_SHA256
from perennial.streams.devstack.folder_lock import FolderLockedError, lock_folder
from perennial.streams.devstack.guarded_process import command_pid, start_guarded
from perennial.streams.settings import SettingsError, load_settings
from tests.services import sigint_ignored


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return kafka_jars.kafka_home()


JARS = {"a.jar": b"12345", "b.jar": b"123"}


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class path is two small files."""
    monkeypatch.setattr(kafka_jars, "JAR_SHA256", {name: sha256(jar).hexdigest() for name, jar in JARS.items()})


def fill(home: Path) -> list[Path]:
    jars = home / "jars"
    jars.mkdir(parents=True)
    for name, content in JARS.items():
        (jars / name).write_bytes(content)
    return [jars / "a.jar", jars / "b.jar"]


def test_listens_on_loopback_only_and_creates_no_topic_by_itself(tmp_path: Path):
    properties = server_properties(tmp_path, 9092, 9093, {})
    assert properties["listeners"] == "PLAINTEXT://127.0.0.1:9092,CONTROLLER://127.0.0.1:9093"
    assert properties["advertised.listeners"] == "PLAINTEXT://127.0.0.1:9092"
    assert properties["auto.create.topics.enable"] == "false"
    assert {v for k, v in properties.items() if k.endswith("replication.factor")} == {"1"}


def test_settings_win_over_defaults(tmp_path: Path):
    assert server_properties(tmp_path, 1, 2, {"num.io.threads": "7"})["num.io.threads"] == "7"


@pytest.mark.parametrize("key", ["listeners", "log.dirs", "node.id", "process.roles"])
def test_a_setting_that_the_broker_owns_is_refused_by_name(key: str):
    with pytest.raises(BrokerError, match=key):
        EmbeddedBroker(settings={key: "x"})


@pytest.mark.parametrize("arguments", [{"port": 0}, {"port": 65536}, {"heap_mb": 16}])
def test_unusable_arguments_are_refused(arguments: dict[str, int]):
    with pytest.raises(BrokerError, match="got: "):
        EmbeddedBroker(**arguments)  # type: ignore[arg-type]


def test_not_started_is_said():
    with pytest.raises(BrokerError, match="not started"):
        _ = EmbeddedBroker().bootstrap
    EmbeddedBroker().stop()


def test_properties_are_escaped_as_java_reads_them():
    written = render_properties({"log.dirs": "C:\\data dir/é\U0001f600"})
    assert written == "log.dirs=C\\:\\\\data\\u0020dir/\\u00e9\\ud83d\\ude00\n"
    assert written.isascii()


def test_cluster_id_is_22_characters_and_never_reads_as_an_option():
    assert new_cluster_id(bytes(16)) == "A" * 22
    assert new_cluster_id(b"\xf8" + bytes(15)) == "A" * 22
    assert new_cluster_id(b"\xff" * 16) == "_" * 21 + "w"


def test_log_tail_prefers_what_tells(tmp_path: Path):
    log = tmp_path / "broker.log"
    log.write_text("INFO a\nERROR it broke\n" + "INFO b\n" * 50)
    assert log_tail(log) == "ERROR it broke"
    log.write_text("INFO a\nINFO b\n")
    assert log_tail(log, lines=1) == "INFO b"
    log.write_text("ERROR of an earlier start\nINFO b\n")
    assert log_tail(log, start=26) == "INFO b"
    assert "No such file" in log_tail(tmp_path / "none")


def test_a_filled_cache_needs_no_network_and_says_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    jars = fill(cache)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the warm path used the network"))
    assert fetch_jars(pytest.fail) == jars


@pytest.mark.parametrize("damage", ["missing", "short", "exchanged"])
def test_a_jar_that_is_not_the_pinned_one_is_not_used(cache: Path, damage: str):
    """A jar in the cache that was exchanged for one of the same size ran as the broker."""
    fill(cache)
    match damage:
        case "missing":
            (cache / "jars" / "a.jar").unlink()
        case "short":
            (cache / "jars" / "b.jar").write_bytes(b"1")
        case _:
            (cache / "jars" / "a.jar").write_bytes(b"12346")
    assert kafka_jars.read_classpath(cache) is None


@pytest.mark.parametrize(
    ("served", "said"),
    [
        ({**JARS, "a.jar": b"evil!"}, "a.jar with another SHA-256"),
        ({"a.jar": b"12345"}, "no b.jar"),
        ({**JARS, "c.jar": b"more"}, "c.jar, which is not on the class path"),
    ],
)
def test_a_repository_that_serves_other_jars_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch, served, said):
    def download(repository: Path, _progress: object):
        repository.mkdir()
        for name, content in served.items():
            (repository / name).write_bytes(content)
            yield repository / name

    monkeypatch.setattr(kafka_jars, "_download", download)
    with pytest.raises(BrokerError) as caught:
        fetch_jars()
    assert said in caught.value.got
    assert not cache.exists()


def test_every_jar_of_the_class_path_is_pinned():
    assert len(JAR_SHA256) == 45
    assert f"kafka_2.13-{kafka_jars.KAFKA_VERSION}.jar" in JAR_SHA256
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in JAR_SHA256.values())


@pytest.mark.parametrize("url", ["http://mirror.example/maven2", "ftp://localhost/x", "file:///repo", "mirror:8081"])
def test_a_mirror_without_tls_is_refused_unless_it_is_this_machine(monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.setenv("PERENNIAL_MAVEN_URL", url)
    with pytest.raises(SettingsError, match="PERENNIAL_MAVEN_URL is not usable"):
        load_settings()
    for allowed in (
        "https://mirror.example/maven2/",
        "http://127.0.0.1:8081/m",
        "http://[::1]:8081",
        "http://localhost",
    ):
        monkeypatch.setenv("PERENNIAL_MAVEN_URL", allowed)
        assert load_settings().devstack.maven_url == allowed.rstrip("/")


def test_case_09_a_mirror_on_this_machine_is_not_asked_through_the_proxy(monkeypatch: pytest.MonkeyPatch):
    """requests sends even 127.0.0.1 through http_proxy."""
    from requests.utils import should_bypass_proxies

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "elsewhere")
    for host in ("127.0.0.1", "localhost"):
        with kafka_jars._no_proxy_for(host):
            assert should_bypass_proxies(f"http://{host}:1/m", no_proxy=None)
    with kafka_jars._no_proxy_for("mirror.example"):
        assert not should_bypass_proxies("http://mirror.example/m", no_proxy=None)
    assert os.environ["no_proxy"] == "elsewhere"


def test_no_jars_and_no_network_is_an_error_with_remedies(cache: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PERENNIAL_MAVEN_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/maven2")
        said: list[str] = []
        with pytest.raises(BrokerError) as caught:
            fetch_jars(said.append)
    assert "PERENNIAL_KAFKA=host:port" in caught.value.remedy
    assert "docker compose" in caught.value.remedy
    assert said, "progress was not shown"
    assert not cache.exists()
    assert list(cache.parent.glob("*.partial")) == []


def test_a_cache_that_cannot_be_written_is_an_error_with_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "perennial").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BrokerError, match="PERENNIAL_KAFKA"):
        fetch_jars()


def test_the_lock_names_the_process_that_holds_the_folder(tmp_path: Path):
    held = lock_folder(tmp_path / "lock")
    os.pwrite(held, b"4711", 0)
    with pytest.raises(FolderLockedError) as caught:
        lock_folder(tmp_path / "lock", wait_s=0.2)
    assert caught.value.got == "process 4711"
    os.close(held)
    os.close(lock_folder(tmp_path / "lock"))  # what the file still says does not hold the folder


def guard(folder: Path, *command: str, owner: int | None = None, remove: Path | None = None):
    lock = os.open(os.devnull, os.O_RDONLY)
    try:
        return start_guarded(
            command, log_path=folder / "log", folder=folder, lock=lock, grace_s=5, owner_pid=owner, remove=remove
        )
    finally:
        os.close(lock)


def test_the_guard_reports_the_pid_and_passes_the_exit_status_on(tmp_path: Path):
    with guard(tmp_path, sys.executable, "-c", "raise SystemExit(7)") as process:
        assert command_pid(process) > 0
        assert process.wait(120) == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_guard_ends_its_command_on_a_signal_and_keeps_the_folder(tmp_path: Path, number: signal.Signals):
    with guard(tmp_path, "sleep", "60", remove=tmp_path) as process:
        child = command_pid(process)
        process.send_signal(number)
        assert process.wait(120) == 128 + 15
    assert not process_guard.alive(child, None)
    assert tmp_path.exists()


def test_the_guard_hears_a_signal_that_its_parent_ignores(tmp_path: Path):
    with sigint_ignored():
        process = guard(tmp_path, "sleep", "60")
    with process:
        child = command_pid(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 128 + 15
    assert not process_guard.alive(child, None)


def test_the_guard_ends_its_command_and_drops_the_folder_when_the_owner_is_gone(tmp_path: Path):
    owner = subprocess.Popen(["sleep", "60"])
    folder = tmp_path / "data"
    folder.mkdir()
    with guard(tmp_path, "sleep", "60", owner=owner.pid, remove=folder) as process:
        child = command_pid(process)
        owner.kill()  # it stays a zombie until the wait below, which counts as dead
        assert process.wait(120) == 128 + 15
        owner.wait()
    assert not process_guard.alive(child, None)
    assert not folder.exists()
