"""The development stack's folders and announcement: who may read them, and which `perennial up` they belong to."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from perennial.storage.errors import StoreError, StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.devstack import discovery, stack
from perennial.streams.devstack.discovery import announce, claim, connected_settings, running
from perennial.streams.devstack.guarded_process import command_pid, start_guarded
from perennial.streams.devstack.private_files import open_private_log, private_folder
from perennial.streams.devstack.signals import (
    STOP_SIGNALS,
    check_stop_signals,
    event_on_stop_signals,
    stop_signals_at_checks,
    stop_signals_held,
)
from perennial.streams.devstack.supervisor import Supervisor
from perennial.streams.observe.http_server import serve_metrics
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings, SettingsError

HEALTH_CHECK = Path(__file__).parents[3] / "deploy" / "healthcheck.py"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("PERENNIAL_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("pid", [1, os.getppid(), os.getpid()], ids=["init", "parent", "self"])
def test_case_08_the_process_id_of_a_stale_announcement_holds_no_folder(tmp_path, pid):
    """A `perennial up` that was killed left up.json; once its pid was reused, no other ever started."""
    (tmp_path / "up.json").write_text(json.dumps({"pid": pid, "kafka": "127.0.0.1:29999"}))
    (tmp_path / "up.lock").write_text(str(pid))
    assert running(tmp_path) is None
    os.close(claim(tmp_path))
    assert not (tmp_path / "up.json").exists()


def test_case_08_a_running_stack_is_found_whatever_its_process_id_is(tmp_path):
    lock = claim(tmp_path)
    assert running(tmp_path) is None  # it is starting
    announce(tmp_path, kafka="127.0.0.1:29999", store="/objects")
    facts = json.loads((tmp_path / "up.json").read_text())
    (tmp_path / "up.json").write_text(json.dumps({**facts, "pid": 2**22 + 1}))  # in another pid namespace
    assert running(tmp_path)["kafka"] == "127.0.0.1:29999"
    assert connected_settings(data_dir=tmp_path).kafka.bootstrap == "127.0.0.1:29999"
    with pytest.raises(SettingsError, match=r"already runs in this data folder; got: process \d+, Kafka at 127.0.0.1"):
        claim(tmp_path)
    os.close(lock)
    assert running(tmp_path) is None


def test_case_08_a_command_that_looks_does_not_stop_a_start(tmp_path):
    os.close(claim(tmp_path))
    looking = os.open(tmp_path / "up.lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.3, os.close, [looking]).start()
    os.close(claim(tmp_path))


def test_case_08_children_do_not_keep_the_lock(tmp_path):
    lock = claim(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as child:
        os.close(lock)
        try:
            os.close(claim(tmp_path))
        finally:
            child.kill()


def test_case_08_the_folder_of_another_user_is_named(tmp_path, monkeypatch):
    """It counted as "not running", and an operator was told that no broker was set."""
    os.close(claim(tmp_path))

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(discovery, "is_locked", refuse)
    with pytest.raises(SettingsError, match="belongs to another user"):
        connected_settings(data_dir=tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "0.0.0.0", "::"])
def test_case_17_the_supervisor_asks_where_the_roles_listen(tmp_path, monkeypatch, host):
    """PERENNIAL_METRICS_HOST=127.0.0.2: no role was ever found ready."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    settings = Settings.of(metrics_host=f"[{host}]" if ":" in host else host, env_file=None)
    metrics = Metrics("intake", settings)
    metrics.waiting(False)
    supervisor = Supervisor(settings, tmp_path, ("intake",))
    role = supervisor.children["intake"]
    role.command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    with serve_metrics(metrics, settings.observe.metrics_host) as server:
        role.port = server.port
        supervisor.start()
        try:
            supervisor.wait_healthy(20)
        finally:
            supervisor.stop()
        answer = subprocess.run(
            [sys.executable, "-I", "-S", str(HEALTH_CHECK)], timeout=120, check=False,
            env={"PERENNIAL_METRICS_HOST": host, "PERENNIAL_METRICS_PORT": str(server.port), "http_proxy": "http://127.0.0.1:9"},
        )  # fmt: skip
    assert answer.returncode == 0


def test_folders_are_for_this_user_only(tmp_path):
    """Store, topics and logs were 0755: every local user could read all documents."""
    said: list[str] = []
    assert mode(private_folder(tmp_path / "a" / "b", said.append)) == mode(tmp_path / "a") == 0o700
    assert said == []
    (tmp_path / "old").mkdir(mode=0o755)
    private_folder(tmp_path / "old", said.append)
    assert mode(tmp_path / "old") == 0o700
    assert len(said) == 1
    assert f"other users could read {tmp_path / 'old'} (mode 0755)" in said[0]
    open_private_log(tmp_path / "log").close()
    assert mode(tmp_path / "log") == 0o600
    assert mode(DirectoryStore(tmp_path / "new" / "store").root) == 0o700


def test_an_existing_data_folder_is_tightened_and_a_shared_one_is_not(tmp_path):
    said: list[str] = []
    ours, shared = tmp_path / "ours", tmp_path / "shared"
    for folder in (ours, shared):
        (folder / "kafka").mkdir(parents=True)
        (folder / "store").mkdir()
    (shared / "something else").touch()
    for folder in (ours, shared):
        folder.chmod(0o755)
        os.close(stack._claim_folder(folder, said.append))
        assert mode(folder / "kafka") == mode(folder / "store") == 0o700
        assert mode(folder / "up.lock") == 0o600
    assert (mode(ours), mode(shared)) == (0o700, 0o755)
    assert len(said) == 5


def test_child_processes_write_files_for_this_user_only(tmp_path):
    before = os.umask(0o022)
    try:
        lock = os.open(os.devnull, os.O_RDONLY)
        with start_guarded(["touch", "f"], log_path=tmp_path / "log", folder=tmp_path, lock=lock, grace_s=1) as guard:
            command_pid(guard)
            guard.wait(60)
        os.close(lock)
        supervisor = Supervisor(Settings.of(env_file=None), tmp_path / "logs", ("intake",))
        role = supervisor.children["intake"]
        role.command = [sys.executable, "-S", "-c", f"open({str(tmp_path / 'g')!r}, 'w')"]
        supervisor.start()
        assert role.process is not None
        role.process.wait(60)
    finally:
        os.umask(before)
    assert [mode(tmp_path / name) for name in ("f", "g", "log", "logs", "logs/intake.log")] == [
        0o600, 0o600, 0o600, 0o700, 0o600,
    ]  # fmt: skip


def test_case_06_a_store_in_a_file_is_not_waited_for(tmp_path):
    """`perennial init --wait-s 60` tried for a minute, as if a disk had failed."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="no folder") as caught:
            open_store(str(path))
        assert not isinstance(caught.value, StoreUnavailableError)


def test_case_06_a_data_folder_that_is_a_file_is_no_traceback(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SettingsError, match="the data folder is not usable"):
            stack._claim_folder(folder, pytest.fail)
        assert running(folder) is None


def test_case_09_the_object_store_on_this_machine_is_not_asked_through_the_proxy(monkeypatch):
    """A proxy cannot reach the MinIO of `perennial up`."""
    asked: list[str] = []

    class Absent(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_arguments):
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with HTTPServer(("127.0.0.1", 0), Absent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for host in ("127.0.0.1", "localhost"):
            s3 = S3Settings(endpoint=f"http://{host}:{server.server_port}", access_key="a", secret_key="b")
            assert not open_store("s3://bucket", s3).exists("key")
        server.shutdown()
    assert len(asked) == 2


@pytest.fixture
def interrupts():
    """Handlers as a foreground command has them; what a test sets is undone."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_an_interrupt_waits_until_a_child_is_known(number):
    """Ctrl-C while a role was being started lost the only reference to it."""
    started = []

    def start() -> None:
        with stop_signals_held():
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            started.append("child")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert started
    assert signal.getsignal(number) is signal.default_int_handler


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_event_while_its_lock_is_held(number):
    """A handler that set the event itself waited for a lock that its own thread held, and the process never ended."""
    with event_on_stop_signals() as stop:
        with stop._cond:
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        assert stop.wait(30)
        os.kill(os.getpid(), number)  # a second one changes nothing
    assert signal.getsignal(number) is signal.default_int_handler


@pytest.mark.usefixtures("interrupts")
def test_a_second_signal_may_interrupt():
    with event_on_stop_signals(interrupt_again=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(30)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_start_is_interrupted_where_it_checks(number):
    """An interrupt inside a pool of threads left a lock of the pool held: Ctrl-C stopped a start for ever."""
    reached = []

    def start() -> None:
        with stop_signals_at_checks():
            os.kill(os.getpid(), number)
            reached.append("after the signal")
            with stop_signals_held():
                check_stop_signals()

    with pytest.raises(KeyboardInterrupt):
        start()
    assert reached
    assert signal.getsignal(number) is signal.default_int_handler
    check_stop_signals()  # nothing is left for the next one


@pytest.mark.usefixtures("interrupts")
def test_a_signal_that_no_check_saw_interrupts_at_the_end():
    reached = []

    def start() -> None:
        with stop_signals_at_checks():
            with stop_signals_held():
                os.kill(os.getpid(), signal.SIGTERM)
            reached.append("after the child")
        reached.append("after the start")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert reached == ["after the child"]


@pytest.mark.usefixtures("interrupts")
def test_a_second_signal_interrupts_a_start_at_once():
    def start() -> None:
        with stop_signals_at_checks():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second signal did not interrupt")

    with pytest.raises(KeyboardInterrupt):
        start()


def test_an_interrupted_command_ends_beside_a_thread_that_waits_for_ever():
    code = (
        "import threading\n"
        "from perennial.streams.devstack.signals import exit_interrupted\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "exit_interrupted(0.5)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 130
