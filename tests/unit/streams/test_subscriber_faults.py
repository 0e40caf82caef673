"""What a subscriber does when its host, its store, its broker or its version fails: it goes on, and drops what is revoked."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import StoredObject
from perennial.streams.client.acknowledgements import Acks
from perennial.streams.client.backend import Backend
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.failure_kinds import RetryPolicy
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed, ReplicaLeft
from perennial.streams.events.cloudevents import decode
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from perennial.streams.settings.kafka_security_group import KafkaSecuritySettings
from perennial.testing import MemoryBackend
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
SETTINGS = Settings.of(poll_s=0.05, kafka="", env_file=None)
QUICK = RetryPolicy(first_s=0.02, max_s=0.1, recheck_s=0.2)
AT = datetime(2026, 1, 1, tzinfo=UTC)
V1 = "sha256:" + "1" * 64


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perennial.streams.client.subscriber.RETRY", QUICK)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


@pytest.fixture
def versions(store: DirectoryStore) -> VersionPublisher:
    return VersionPublisher(store, ADAPTER)


class Harness(Subscriber):
    """A subscriber whose acknowledgements are kept, not sent: there is no broker here."""

    def __init__(self, backend: Backend, store: DirectoryStore, **options: Any) -> None:
        super().__init__(ADAPTER, backend, store=store, settings=SETTINGS, replica="here", **options)
        self.acks: list[AdapterActivated | AdapterFailed] = []
        self._acks.send = self.acks.append

    @property
    def attempts(self) -> int:
        return self._progress.attempts

    def reported(self) -> list[str]:
        return [ack.error for ack in self.acks if isinstance(ack, AdapterFailed)]


def until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.01)


# ---- failures that pass


class FailingDisk:
    """Makes the writes of `DirectoryBackend` fail after a half of the data, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from perennial.streams.client import directory_backend

        self.error: OSError | None = None
        self._write = directory_backend._write_file
        monkeypatch.setattr(directory_backend, "_write_file", self.write)

    def write(self, path: Path, data: bytes, durable: bool) -> None:
        if self.error is not None:
            path.write_bytes(data[: len(data) // 2])
            raise self.error
        self._write(path, data, durable)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, "space"),
        (errno.EACCES, "permission"),
        (errno.EROFS, "permission"),
        (errno.EIO, "io"),
    ],
)
def test_case_15_a_version_is_served_when_the_disk_takes_it_again(
    versions: VersionPublisher,
    store: DirectoryStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: str,
):
    """After five failures in three seconds a subscriber gave a version up for good, also where the disk was only full."""
    disk = FailingDisk(monkeypatch)
    backend = DirectoryBackend(tmp_path / "served")
    metrics = Metrics("subscriber")
    first = versions.publish()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"perennial_{name}", {"role": "subscriber", **labels})

    with Harness(backend, store, metrics=metrics) as subscriber:
        assert subscriber.wait_for(1, 120)
        disk.error = OSError(number, "as the test asked")
        second = versions.publish()
        until(lambda: subscriber.attempts >= 10)
        assert backend.current(ADAPTER) == subscriber.name_of(first.version)
        assert len(subscriber.reported()) == 1  # once, not at each attempt
        assert value("serving_stale_since_seconds", adapter=ADAPTER) == second.published_at.timestamp()
        disk.error = None
        assert subscriber.wait_for(2, 120)
        assert backend.current(ADAPTER) == subscriber.name_of(second.version)
        assert (value("subscriber_failures_total", kind=kind) or 0) >= 10
        assert value("serving_stale_since_seconds", adapter=ADAPTER) == 0
        until(lambda: backend.list() == [subscriber.name_of(second.version)])
    assert not list(backend.path.rglob(".*"))  # no half-written file or folder is left


def test_case_15_a_full_disk_when_the_pointer_is_written_leaves_no_files(
    versions: VersionPublisher, store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each attempt on a full disk left a half-written pointer file."""
    state = versions.publish()
    manifest = versions.registry.manifest(ADAPTER, state.version)
    backend = DirectoryBackend(tmp_path / "served")
    name = f"{ADAPTER}@{state.version.removeprefix('sha256:')}"
    backend.load(name, store.get(blob_key(manifest.weights.digest)).data, manifest)
    FailingDisk(monkeypatch).error = OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="full"):
        backend.activate(name)
    assert backend.current(ADAPTER) is None
    assert not list(backend.path.rglob(".*"))


def test_case_15_a_full_disk_does_not_keep_a_version_from_being_deleted(
    versions: VersionPublisher, store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Deleting a version makes a folder first, which a full disk refuses: nothing was ever deleted then."""
    state = versions.publish()
    manifest = versions.registry.manifest(ADAPTER, state.version)
    backend = DirectoryBackend(tmp_path / "served")
    name = f"{ADAPTER}@{state.version.removeprefix('sha256:')}"
    backend.load(name, store.get(blob_key(manifest.weights.digest)).data, manifest)

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("perennial.streams.client.directory_backend.tempfile.mkdtemp", full)
    backend.unload(name)
    assert backend.list() == []
    assert not list(backend.path.rglob("*.safetensors"))


def test_case_15_a_pointer_file_that_a_killed_process_left_is_deleted_later(
    versions: VersionPublisher, store: DirectoryStore, tmp_path: Path
):
    """The same kind: nothing deleted the file that is renamed to the pointer where a process was killed before that."""
    state = versions.publish()
    manifest = versions.registry.manifest(ADAPTER, state.version)
    backend = DirectoryBackend(tmp_path / "served")
    name = f"{ADAPTER}@{state.version.removeprefix('sha256:')}"
    backend.load(name, store.get(blob_key(manifest.weights.digest)).data, manifest)
    old, young = (backend.path / ADAPTER / f".@live.json.{kind}" for kind in ("old", "young"))
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    backend.activate(name)
    assert (old.exists(), young.exists()) == (False, True)


class OutOfMemoryError(RuntimeError):
    """Named as torch.OutOfMemoryError is."""


@pytest.mark.parametrize("error", [MemoryError(), OutOfMemoryError("CUDA out of memory"), TimeoutError(), KeyError(1)])
def test_case_15_a_backend_without_memory_or_server_serves_once_it_has_it(
    versions: VersionPublisher, store: DirectoryStore, error: Exception
):
    """The same kind: a device without memory, a server that does not answer, an error that nobody knows."""
    backend = MemoryBackend()
    failing = [True]
    load = backend.load

    def without(*given: Any) -> None:
        if failing[0]:
            raise error
        load(*given)

    backend.load = without
    versions.publish()
    with Harness(backend, store) as subscriber:
        until(lambda: subscriber.attempts >= 10)
        failing[0] = False
        assert subscriber.wait_for(1, 120)
    assert len(subscriber.reported()) == 1


def test_case_15_another_reason_is_reported_and_the_same_one_is_not(versions: VersionPublisher, store: DirectoryStore):
    """`adapter.failed` is sent once for each change of the reason."""
    backend = MemoryBackend()
    error: list[Exception] = [OSError(errno.ENOSPC, "full")]

    def failing(*_: Any) -> None:
        raise error[0]

    backend.load = failing
    versions.publish()
    with Harness(backend, store) as subscriber:
        until(lambda: subscriber.attempts >= 5)
        error[0] = PermissionError(errno.EACCES, "denied")
        until(lambda: len(subscriber.acks) == 2)
        before = subscriber.attempts
        until(lambda: subscriber.attempts >= before + 5)
    assert [text.partition(":")[0] for text in subscriber.reported()] == ["OSError", "PermissionError"]


def test_case_15_a_damaged_object_that_is_restored_is_served_without_a_restart(
    versions: VersionPublisher, store: DirectoryStore
):
    """A version whose object was damaged was given up until the next generation."""
    backend = MemoryBackend()
    state = versions.publish()
    key = blob_key(versions.registry.manifest(ADAPTER, state.version).weights.digest)
    whole = store.get(key)
    damaged = store.compare_and_swap(key, whole.data[:-1], whole.etag)
    with Harness(backend, store) as subscriber:
        until(lambda: subscriber.attempts >= QUICK.quick_attempts + 2)
        assert [call for call, _ in backend.calls if call == "load"] == []
        store.compare_and_swap(key, whole.data, damaged)
        assert subscriber.wait_for(1, 120)
    assert len(subscriber.reported()) == 1


def test_case_15_a_download_that_was_cut_off_is_made_again(versions: VersionPublisher, tmp_path: Path):
    """The same kind: half an object, once."""
    reads = [0]

    class CuttingStore(DirectoryStore):
        def get(self, key: str, max_bytes: int = 1 << 30) -> StoredObject:
            found = super().get(key, max_bytes)
            if not key.startswith("blobs/"):
                return found
            reads[0] += 1
            return StoredObject(found.data[: len(found.data) // 2], found.etag) if reads[0] == 1 else found

    versions.publish()
    with Harness(MemoryBackend(), CuttingStore(tmp_path / "store", fsync=False)) as subscriber:
        assert subscriber.wait_for(1, 120)
    assert reads[0] == 2


def test_case_15_no_error_of_the_store_ends_a_subscriber(versions: VersionPublisher, tmp_path: Path):
    """The same kind: an error that the store does not name ended the thread that follows the alias."""
    failing = [True]

    class BrokenStore(DirectoryStore):
        def get(self, key: str, max_bytes: int = 1 << 30) -> StoredObject:
            if failing[0] and key.startswith("aliases/"):
                raise OSError(errno.EIO, "input/output error")
            return super().get(key, max_bytes)

    versions.publish()
    with Harness(MemoryBackend(), BrokenStore(tmp_path / "store", fsync=False)) as subscriber:
        until(lambda: subscriber._progress.fruitless >= 8)
        failing[0] = False
        assert subscriber.wait_for(1, 120)


# ---- revocations


def test_attack_l_a_revoked_version_is_dropped_without_a_broker(
    versions: VersionPublisher, store: DirectoryStore, caplog: pytest.LogCaptureFixture
):
    """A subscriber without a broker is never waited for, and served the erased text on."""
    backend = MemoryBackend()
    first = versions.publish()
    with caplog.at_level(logging.WARNING), Harness(backend, store) as subscriber:
        assert subscriber.wait_for(1, 120)
        versions.registry.revoke(ADAPTER, first.version, "erased")
        until(lambda: subscriber.current is None)
        until(lambda: backend.list() == [])
        assert backend.active is None
        second = versions.publish()
        assert subscriber.wait_for(2, 120)
        assert backend.active == subscriber.name_of(second.version)
    assert "no broker is set" in caplog.text
    assert "revoked" in subscriber.reported()[0]


def test_attack_l_a_revoked_version_is_dropped_where_the_next_one_cannot_be_served(
    versions: VersionPublisher, store: DirectoryStore
):
    """A version is not served on because the one after it fails."""
    backend = MemoryBackend()
    first = versions.publish()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(1, 120)
        backend.fails = lambda call, _name: call == "load"
        versions.publish(kind="forget")
        until(lambda: subscriber.attempts >= 3)
        assert backend.active == subscriber.name_of(first.version)
        versions.registry.revoke(ADAPTER, first.version, "erased")
        until(lambda: backend.list() == [])
        assert subscriber.current is None


def test_attack_l_a_revoked_version_that_an_earlier_process_left_is_dropped(
    versions: VersionPublisher, store: DirectoryStore
):
    """A process that ended left its version in service until a newer one could be served."""
    backend = MemoryBackend()
    first = versions.publish()
    name = f"{ADAPTER}@{first.version.removeprefix('sha256:')}"
    versions.registry.revoke(ADAPTER, first.version, "erased")
    backend.held, backend.active = {name: b""}, name
    with Harness(backend, store):
        until(lambda: backend.list() == [])
    assert backend.active is None


def test_a_swap_before_a_revocation_leaves_no_moment_without_a_version(
    versions: VersionPublisher, store: DirectoryStore
):
    """The alias may change and the version before it may be revoked between the two readings of one look."""
    backend = MemoryBackend()
    first = versions.publish()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(1, 120)
        done, drop = threading.Event(), subscriber._drop_revoked

        def change_first() -> None:
            if not done.is_set():
                versions.publish(kind="forget")
                versions.registry.revoke(ADAPTER, first.version, "erased")
                done.set()
            drop()

        subscriber._drop_revoked = change_first
        assert subscriber.wait_for(2, 120)
        assert done.is_set()
    assert subscriber.reported() == []
    assert ("deactivate", subscriber.name_of(first.version)) not in backend.calls


# ---- leases and goodbyes


class FakeBroker:
    """Takes the records of `Acks`, or refuses them while `down`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Any] = []
        self.keys: set[bytes] = set()
        self.down = False
        monkeypatch.setattr("perennial.streams.client.acknowledgements.connect", lambda *_, **__: self)
        monkeypatch.setattr("perennial.streams.client.acknowledgements.close_producer", lambda *_: None)

    def send(self, _topic: str, *, key: bytes, value: bytes, headers: Any) -> FakeBroker:
        if self.down:
            raise ConnectionError("down")
        self.events.append(decode(value, headers, "adapter-acks").event)
        self.keys.add(key)
        return self

    def get(self, timeout: float) -> None:
        """Confirm the delivery."""


def acks_at(now_s: list[float]) -> Acks:
    return Acks("broker:9092", KafkaSecuritySettings(_env_file=None), str, lambda: AT, 60.0, lambda: now_s[0])


def activated(generation: int = 1) -> AdapterActivated:
    return AdapterActivated(adapter=ADAPTER, replica="here", generation=generation, version=V1, published_at=AT, at=AT)


GOODBYE = ReplicaLeft(adapter=ADAPTER, replica="here", generation=1, version=V1, at=AT)


def test_attack_l_a_lease_is_renewed_every_third_and_ended_by_a_goodbye(monkeypatch: pytest.MonkeyPatch):
    """Nothing told a replica that was stopped from one that still serves."""
    broker, now_s = FakeBroker(monkeypatch), [0.0]
    acks = acks_at(now_s)
    acks.tick()
    assert broker.events == []  # it serves nothing yet: nobody waits for it
    acks.send(activated())
    for _ in range(601):
        acks.tick()
        now_s[0] += 0.1
    assert [type(event) for event in broker.events] == [AdapterActivated] * 4  # at 0, 20, 40 and 60 s
    assert {event.lease_s for event in broker.events} == {60.0}
    acks.close(GOODBYE)
    acks.close(GOODBYE)
    now_s[0] += 100
    acks.tick()
    assert broker.events[4:] == [GOODBYE]
    assert broker.keys == {f"{ADAPTER}#here".encode()}


def test_attack_l_a_replica_that_acknowledged_nothing_says_no_goodbye(monkeypatch: pytest.MonkeyPatch):
    """It has no record, and the topic holds only replicas that served a version."""
    broker = FakeBroker(monkeypatch)
    acks_at([0.0]).close(GOODBYE)
    assert broker.events == []


def test_nothing_is_acknowledged_after_a_goodbye_until_the_subscriber_runs_again(monkeypatch: pytest.MonkeyPatch):
    broker, now_s = FakeBroker(monkeypatch), [0.0]
    acks = acks_at(now_s)
    acks.send(activated())
    acks.close(GOODBYE)
    acks.send(activated(2))
    acks.tick()
    assert [type(event) for event in broker.events] == [AdapterActivated, ReplicaLeft]
    acks.start(lambda: None)
    until(lambda: len(broker.events) == 3)
    acks.close(GOODBYE)
    assert [type(event) for event in broker.events[2:]] == [AdapterActivated, ReplicaLeft]


def test_heartbeats_do_not_pile_up_while_no_broker_answers(monkeypatch: pytest.MonkeyPatch):
    broker, now_s = FakeBroker(monkeypatch), [0.0]
    acks, broker.down = acks_at(now_s), True
    acks.send(activated())
    for _ in range(100):
        acks.tick()
        now_s[0] += 20
    broker.down = False
    acks.tick()
    assert len(broker.events) == 1


def test_attack_l_close_says_goodbye_with_what_was_served(
    versions: VersionPublisher, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
):
    """The end of a `with` block, also by an exception, ends the lease."""
    broker = FakeBroker(monkeypatch)
    state = versions.publish()
    settings = SETTINGS.replace(replica_lease_s=3)

    def serve_and_fail() -> None:
        with Subscriber(
            ADAPTER, MemoryBackend(), kafka="127.0.0.1:1", store=store, settings=settings, replica="here"
        ) as subscriber:
            assert subscriber.wait_for(1, 120)
            until(lambda: len(broker.events) >= 2)  # the acknowledgement and a heartbeat
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        serve_and_fail()
    *beats, last = broker.events
    assert {(type(event), event.generation, event.lease_s) for event in beats} == {(AdapterActivated, 1, 3.0)}
    assert (type(last), last.generation, last.version) == (ReplicaLeft, 1, state.version)


def test_attack_l_fifty_restarts_leave_no_lease(
    versions: VersionPublisher, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
):
    """The default name of a replica is new at each restart."""
    broker = FakeBroker(monkeypatch)
    versions.publish()
    for _ in range(50):
        with Subscriber(ADAPTER, MemoryBackend(), kafka="127.0.0.1:1", store=store, settings=SETTINGS) as subscriber:
            assert subscriber.wait_for(1, 120)
            name = subscriber.replica
            until(lambda name=name: any(event.replica == name for event in broker.events))
    latest = {event.replica: event for event in broker.events}
    assert len(latest) == 50
    assert all(isinstance(event, ReplicaLeft) for event in latest.values())


SCRIPT = """
import sys
from perennial import MemoryBackend, Settings, Subscriber
from perennial.testing import publish_version
publish_version(sys.argv[1], "acme/support")
subscriber = Subscriber("acme/support", MemoryBackend(), store=sys.argv[1], settings=Settings.of(poll_s=0.05, kafka=""),
                        on_activate=lambda *_: print("served", flush=True))
subscriber._acks.close = lambda goodbye: print("goodbye", goodbye.generation, flush=True)
{start}
"""


@pytest.mark.parametrize(
    ("start", "by_signal", "code"),
    [
        ("subscriber.run()", True, -signal.SIGTERM),
        ("with subscriber: subscriber.wait_for(1, 60); sys.exit(3)", False, 3),
    ],
)
def test_attack_l_a_process_that_ends_says_goodbye(tmp_path: Path, start: str, by_signal: bool, code: int):
    """SIGTERM, as Kubernetes sends it, ended the process without a word."""
    command = [sys.executable, "-c", SCRIPT.format(start=start), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "served\n"
        if by_signal:
            process.send_signal(signal.SIGTERM)
        assert process.stdout.read().splitlines()[0] == "goodbye 1"
        assert process.wait(60) == code
