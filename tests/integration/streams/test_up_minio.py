"""`perennial up --store minio`: the whole loop to a served version, found by other commands, and what is refused."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perennial.storage.errors import StoreError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.addresses import direct_opener
from perennial.streams.devstack.discovery import running
from perennial.streams.devstack.minio_server import MODULE, STORE_URI, MinioServer, MinioServerError, find_minio
from perennial.streams.devstack.stack import Stack, _choose_store
from perennial.streams.settings import Settings, SettingsError
from tests.oracle import wait_until
from tests.services import minio_binary, missing_service

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "graphs", "and", "matrices", "wait",
    "for", "their", "turn", "to", "be", "learned",
]  # fmt: skip
SMALL = {
    "PERENNIAL_PARTITIONS": "1", "PERENNIAL_THREADS": "1", "PERENNIAL_MAX_BATCH_EXAMPLES": "12",
    "PERENNIAL_MAX_AGE_S": "3", "PERENNIAL_STEPS": "1", "PERENNIAL_ROWS": "4", "PERENNIAL_ROW_TOKENS": "48",
    "PERENNIAL_MAX_TOKENS": "48", "PERENNIAL_ANCHOR_ROWS": "2", "PERENNIAL_MAX_GENERAL_RISE_NATS": "50",
    "PERENNIAL_MIN_GAIN_NATS": "-50", "PERENNIAL_LEARNING_RATE": "1e-4", "PERENNIAL_POLL_S": "1",
}  # fmt: skip


@pytest.fixture
def minio():
    binary = minio_binary()
    if binary is None:
        missing_service(f"no minio binary on PATH or in the cache folder: go install {MODULE}")
    return binary


def environment(data_dir: Path, **more: str) -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PERENNIAL_", "AWS_"))}
    # A stray token of another account must not reach the server.
    return {
        **outside,
        **SMALL,
        "PERENNIAL_DATA_DIR": str(data_dir),
        "COLUMNS": "200",
        "AWS_SESSION_TOKEN": "stray",
        **more,
    }


def perennial(data_dir, *arguments: str, stdin: str = ""):
    return subprocess.run(
        [sys.executable, "-m", "perennial.streams.cli", *arguments], env=environment(data_dir), cwd=data_dir.parent,
        input=stdin, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@contextmanager
def up(data_dir, *arguments: str) -> Iterator[Path]:
    log = data_dir.parent / "up.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "perennial.streams.cli", "up", *arguments], env=environment(data_dir), cwd=data_dir.parent,
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        wait_until(lambda: process.poll() is not None or running(data_dir) is not None, 180, f"perennial is up: {log}")
        assert process.poll() is None, log.read_text()
        yield log
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


@pytest.mark.slow(40)
@pytest.mark.timeout(900)
def test_the_whole_loop_runs_on_a_minio_of_its_own(minio, broker_jars, tmp_path):
    data_dir, rng = tmp_path / "data", random.Random(1)
    lines = "".join(
        json.dumps(
            {"adapter": "acme/a", "document_id": f"{n}", "text": f"note {n}: {' '.join(rng.choices(WORDS, k=24))}"}
        )
        + "\n"
        for n in range(24)
    )
    with up(data_dir, "--store", "minio", "--shared-model") as log:
        published = perennial(data_dir, "publish", "documents", "-", "--json", stdin=lines)
        assert json.loads(published.stdout)["delivered"] == 24, published.stderr
        facts = running(data_dir)
        assert facts["store"] == STORE_URI
        store = open_store(STORE_URI, S3Settings.from_env(facts["s3"]))
        wait_until(lambda: any(store.list("aliases/acme/a/")), 150, f"a promoted version; logs in {data_dir / 'logs'}")
        (line,) = json.loads(perennial(data_dir, "adapters", "ls", "--json").stdout)
        assert (line["adapter"], line["last_outcome"]) == ("acme/a", "promoted")

        secret = (data_dir / "minio" / "secret-key").read_text()
        said = [log, *(data_dir / "logs").iterdir(), data_dir / "up.json"]
        assert [each for each in said if secret in each.read_text()] == []
        assert facts["s3"]["PERENNIAL_S3_ENDPOINT"] in log.read_text()
        for name in ("secret-key", "access-key"):
            assert stat.S_IMODE((data_dir / "minio" / name).stat().st_mode) == 0o600
    assert not reachable(facts["s3"]["PERENNIAL_S3_ENDPOINT"])


def open_url(endpoint):
    import urllib.error

    try:
        direct_opener().open(f"{endpoint}/minio/health/ready", timeout=2).close()
    except urllib.error.URLError as error:
        raise OSError(str(error)) from error


def test_a_server_keeps_its_objects_and_keys_and_comes_back_at_its_address(minio, tmp_path):
    said = []
    server = MinioServer(tmp_path / "minio", said.append)
    server.start()
    try:
        store = open_store(STORE_URI, S3Settings.from_env(server.environment()))
        store.probe()
        assert store.put_if_absent("a/b", b"kept")
        with pytest.raises(MinioServerError, match="another MinIO"):
            MinioServer(tmp_path / "minio").start()
        endpoint, supervisor = server.endpoint, server._process
        (pid,) = children(supervisor.pid)
        os.kill(pid, signal.SIGKILL)
        supervisor.wait(120)
        wait_until(lambda: server.tend() or server.running, 120, "the server runs again")
        assert server.endpoint == endpoint
        wait_until(lambda: reachable(endpoint), 120, "the server answers again")
        assert store.get("a/b").data == b"kept"
    finally:
        server.stop()
    server.start()
    try:
        assert open_store(STORE_URI, S3Settings.from_env(server.environment())).get("a/b").data == b"kept"
    finally:
        server.stop()
    assert any("restarting" in line for line in said)


def test_a_server_ends_with_its_owner(minio, tmp_path):
    body = f"""
        import os, pathlib
        from perennial.streams.devstack.minio_server import MinioServer
        server = MinioServer(pathlib.Path({str(tmp_path / "minio")!r}))
        server.start()
        print(server.endpoint, flush=True)
        os.kill(os.getpid(), 9)
    """
    owner = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, timeout=120, check=False
    )
    assert owner.returncode == -signal.SIGKILL, owner.stderr
    wait_until(lambda: not reachable(owner.stdout.strip()), 120, "the server ended")


def reachable(endpoint):
    try:
        open_url(endpoint)
    except OSError:
        return False
    return True


def children(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


LYING = '''#!{python}
"""Takes every write, whatever its condition: what old servers and some proxies do."""
import hashlib, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

kept = {{}}


class Handler(BaseHTTPRequestHandler):
    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def do_PUT(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kept[self.path.split("?")[0]] = data
        self.answer(200, ETag=hashlib.md5(data).hexdigest())

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/minio/health") or path.count("/") == 1 or path.endswith("/"):
            return self.answer(200, b"<ListVersionsResult><Name>perennial</Name><IsTruncated>false</IsTruncated></ListVersionsResult>")
        if path in kept:
            data = kept[path]
            return self.answer(200, data, ETag=hashlib.md5(data).hexdigest(), **{{"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}})
        self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>", **{{"Content-Type": "application/xml"}})

    do_HEAD = do_GET

    def do_DELETE(self):
        kept.pop(self.path.split("?")[0], None)
        self.answer(204)


host, port = sys.argv[sys.argv.index("--address") + 1].split(":")
ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
'''


def test_a_server_that_ignores_conditions_is_refused_before_any_role_works(broker, topic_prefix, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    binary = folder / "minio"
    binary.write_text(LYING.format(python=sys.executable))
    binary.chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    stack = Stack(
        Settings.of(kafka=broker.bootstrap, topic_prefix=topic_prefix, env_file=None), tmp_path / "data", minio=True
    )
    try:
        with pytest.raises(StoreError, match="ignores conditional writes") as error:
            stack.start()
        assert stack.supervisor is not None
        assert all(role.waits_for_settings for role in stack.supervisor.children.values())
    finally:
        stack.stop()
    assert not any(role.running for role in stack.supervisor.children.values())
    assert "RELEASE.2025-09-07T16-13-09Z" in str(error.value.remedy) + error.value.message
    assert stack.server is not None
    assert not stack.server.running


def test_a_missing_or_broken_binary_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(SettingsError, match="no MinIO server") as error:
        find_minio()
    assert MODULE in error.value.remedy
    binary = tmp_path / "cache" / "perennial" / "bin" / "minio"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\necho what is wrong >&2\nexit 3\n")
    binary.chmod(0o700)
    server = MinioServer(tmp_path / "minio")
    with pytest.raises(MinioServerError) as failed:
        server.start()
    assert "what is wrong" in failed.value.got
    assert not server.running


def test_a_data_folder_stays_with_its_kind_of_store(tmp_path):
    data_dir = tmp_path / "data"
    (data_dir / "store").mkdir(parents=True)
    refused = perennial(data_dir, "up", "--store", "minio")
    assert refused.returncode == 2
    assert "keeps its objects in a folder" in refused.stderr

    settings = Settings.of(store="", data_dir=tmp_path / "other", env_file=None)
    assert _choose_store(settings, None) == (settings, False)
    assert _choose_store(settings, "minio") == (settings, True)
    (tmp_path / "other" / "minio").mkdir(parents=True)
    assert _choose_store(settings, None) == (settings, True)
    elsewhere = settings.replace(store="s3://elsewhere")
    assert _choose_store(elsewhere, None) == (elsewhere, False)
    assert _choose_store(settings, "s3://elsewhere") == (elsewhere, False)


def test_ci_builds_the_server_that_the_remedy_names():
    script = (Path(__file__).parents[3] / ".ci" / "run").read_text()
    found = dict(re.findall(r"^minio_(module|version)=(\S+)$", script, re.MULTILINE))
    assert f"{found['module']}@{found['version']}" == MODULE
