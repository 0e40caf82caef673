"""The client library without a broker: what is refused before it is sent, and what a subscriber does over a folder."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import StoredObject
from perennial.storage.registry.registry import AliasState
from perennial.streams.client.base_publisher import PublishError
from perennial.streams.client.failure_kinds import RetryPolicy
from perennial.streams.client.following_thread import SubscriberError
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed
from perennial.streams.settings import Settings, SettingsError
from perennial.testing import MemoryBackend
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
SETTINGS = Settings.of(poll_s=0.05)
QUICK = RetryPolicy(first_s=0.02, max_s=0.1, recheck_s=0.3)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perennial.streams.client.subscriber.RETRY", QUICK)


def until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.01)


class FlakyStore(DirectoryStore):
    """A folder whose reads fail on demand."""

    fails: Callable[[str], bool] = staticmethod(lambda _key: False)

    def get(self, key: str, max_bytes: int = 1 << 30) -> StoredObject:
        if self.fails(key):
            raise StoreUnavailableError(f"asked to fail at {key}")
        return super().get(key, max_bytes)


@pytest.fixture
def store(tmp_path: Path) -> FlakyStore:
    return FlakyStore(tmp_path / "store", fsync=False)


@pytest.fixture
def versions(store: FlakyStore) -> VersionPublisher:
    return VersionPublisher(store, ADAPTER)


class Harness(Subscriber):
    """A subscriber whose acknowledgements are kept, not sent: there is no broker here."""

    def __init__(self, backend: MemoryBackend, store: FlakyStore, **options: object) -> None:
        super().__init__(ADAPTER, backend, store=store, settings=SETTINGS, replica="here", **options)
        self.acks: list[AdapterActivated | AdapterFailed] = []
        self._acks.send = self.acks.append

    def acknowledged(self) -> list[tuple[str, int]]:
        return [(ack.type.removeprefix("adapter."), ack.generation) for ack in self.acks]


def test_importing_the_client_loads_neither_faust_nor_torch_nor_librdkafka():
    code = (
        "import sys; from perennial import DirectoryBackend, Publisher, Subscriber;"
        "print(sorted({'faust', 'mode', 'torch', 'confluent_kafka', 'river', 'numpy', 'perennial.learner'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_no_broker_answers_is_said_in_bounded_time():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(PublishError, match="perennial up") as caught:
        Publisher(f"127.0.0.1:{port}", timeout_s=1)
    assert f"127.0.0.1:{port}" in str(caught.value)


def test_no_broker_is_set():
    with pytest.raises(SettingsError, match="PERENNIAL_KAFKA"):
        Publisher(settings=Settings.of(kafka=""))


def test_no_store_is_set():
    with pytest.raises(SettingsError, match="PERENNIAL_STORE"):
        Subscriber(ADAPTER, MemoryBackend(), settings=Settings.of(store=""))


def test_the_newest_version_is_served_and_the_one_before_is_gone(versions: VersionPublisher, store: FlakyStore):
    backend = MemoryBackend()
    seen: list[tuple[int, set[str]]] = []
    with Harness(backend, store, on_activate=lambda s, t: seen.append((s.generation, set(t)))) as subscriber:
        first = versions.publish()
        assert subscriber.wait_for(1, 120)
        second = versions.publish()
        assert subscriber.wait_for(2, 120)
        name = subscriber.name_of(second.version)
        until(lambda: backend.list() == [name])
        assert backend.active == name
        assert subscriber.current is not None
        assert subscriber.current.version == second.version
        until(lambda: len(subscriber.acks) == 2)
    stages = {"fetch", "verify", "load", "warm", "activate", "publish_to_served"}
    assert seen == [(1, stages), (2, stages)]
    assert subscriber.acknowledged() == [("activated", 1), ("activated", 2)]
    assert set(subscriber.acks[0].stage_s) == stages
    old = subscriber.name_of(first.version)
    calls = [call for call, called in backend.calls if called == old]
    assert calls == ["load", "warm", "activate", "drain", "unload"]


def test_versions_that_were_passed_over_are_not_loaded(versions: VersionPublisher, store: FlakyStore):
    for _ in range(5):
        last = versions.publish()
    backend = MemoryBackend()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(5, 120)
    assert [name for call, name in backend.calls if call == "load"] == [subscriber.name_of(last.version)]


def test_a_lower_generation_is_never_applied(versions: VersionPublisher, store: FlakyStore):
    versions.publish()
    old = store.get(f"aliases/{ADAPTER}/live")
    versions.publish()
    backend = MemoryBackend()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(2, 120)
        served = backend.active
        now = store.get(f"aliases/{ADAPTER}/live")
        store.compare_and_swap(f"aliases/{ADAPTER}/live", old.data, now.etag)  # a store restored from a backup
        looks = _count_looks(subscriber)
        until(lambda: looks[0] >= 3)
        assert backend.active == served
        assert subscriber.generation == 2
    assert subscriber.acknowledged() == [("activated", 2)]


def _count_looks(subscriber: Subscriber) -> list[int]:
    looks, original = [0], subscriber._registry.alias

    def counted(adapter: str, alias: str = "live") -> AliasState | None:
        looks[0] += 1
        return original(adapter, alias)

    subscriber._registry.alias = counted
    return looks


def test_a_damaged_version_is_refused_and_the_next_one_served(versions: VersionPublisher, store: FlakyStore):
    good = versions.publish()
    backend = MemoryBackend()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(1, 120)
        damage_next(versions, store)
        until(lambda: subscriber._progress.attempts > QUICK.quick_attempts)
        assert backend.active == subscriber.name_of(good.version)
        assert [name for call, name in backend.calls if call == "load"] == [subscriber.name_of(good.version)]
        last = versions.publish()
        assert subscriber.wait_for(3, 120)
        assert backend.active == subscriber.name_of(last.version)
    failed = [ack for ack in subscriber.acks if isinstance(ack, AdapterFailed)]
    assert [ack.generation for ack in failed] == [2]
    assert "IntegrityError" in failed[0].error


def damage_next(versions: VersionPublisher, store: FlakyStore) -> None:
    """Publish a version, one bit of whose weights is flipped before any subscriber can read them."""
    held = store.fails
    store.fails = lambda key: key.startswith("aliases/") and threading.current_thread().name.startswith("subscriber")
    state = versions.publish()
    digest = versions.registry.manifest(ADAPTER, state.version).weights.digest
    stored = store.get(blob_key(digest))
    data = bytearray(stored.data)
    data[-1] ^= 1
    store.compare_and_swap(blob_key(digest), bytes(data), stored.etag)
    store.fails = held


def test_a_store_that_comes_back_late_is_waited_for(versions: VersionPublisher, store: FlakyStore):
    failures = 0

    def down(key: str) -> bool:
        nonlocal failures
        failures += key.startswith("blobs/")
        return key.startswith("blobs/") and failures <= 12  # more often than a broken version is tried

    backend = MemoryBackend()
    state = versions.publish()
    store.fails = down
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(1, 120)
        assert backend.active == subscriber.name_of(state.version)
    assert subscriber.acknowledged() == [("failed", 1), ("activated", 1)]


@pytest.mark.parametrize("call", ["load", "warm", "activate"])
def test_a_backend_that_fails_keeps_the_version_before(versions: VersionPublisher, store: FlakyStore, call: str):
    backend = MemoryBackend()
    first = versions.publish()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(1, 120)
        backend.fails = lambda called, _name: called == call
        second = versions.publish()
        until(lambda: subscriber._progress.attempts >= 3)
        assert backend.active == subscriber.name_of(first.version)
        assert subscriber.name_of(second.version) not in backend.list()
        assert subscriber.acknowledged().count(("failed", 2)) == 1  # once, not at each attempt
        assert subscriber.current is not None
        assert subscriber.current.generation == 1
        backend.fails = lambda _called, _name: False
        assert subscriber.wait_for(2, 120)
        assert backend.active == subscriber.name_of(second.version)


def test_a_backend_that_fails_once_is_tried_again(versions: VersionPublisher, store: FlakyStore):
    backend = MemoryBackend()
    backend.fails = lambda called, _name: called == "load" and [c for c, _ in backend.calls].count("load") == 1
    versions.publish()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(1, 120)
    assert subscriber.acknowledged() == [("failed", 1), ("activated", 1)]


def test_a_version_of_another_base_is_refused(store: FlakyStore):
    VersionPublisher(store, ADAPTER, base_sha256="sha256:" + "c" * 64).publish()
    backend = MemoryBackend(base_sha256="sha256:" + "b" * 64)
    with Harness(backend, store) as subscriber:
        until(lambda: subscriber.acks)
        assert backend.calls == []
    assert "another base" in subscriber.acks[0].error


def test_a_revocation_is_done_only_when_the_version_is_gone(versions: VersionPublisher, store: FlakyStore):
    backend = MemoryBackend()
    first = versions.publish()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(1, 120)
        revoked = subscriber.name_of(first.version)
        backend.busy.add(revoked)
        versions.registry.revoke(ADAPTER, first.version, "erased")
        second = versions.publish(kind="forget")
        assert subscriber.wait_for(2, 120)
        assert backend.active == subscriber.name_of(second.version)
        until(lambda: ("failed", 2) in subscriber.acknowledged())
        assert ("activated", 2) not in subscriber.acknowledged()
        backend.busy.clear()
        until(lambda: ("activated", 2) in subscriber.acknowledged())
        assert backend.list() == [subscriber.name_of(second.version)]


def test_a_revoked_version_is_not_put_into_service(versions: VersionPublisher, store: FlakyStore):
    state = versions.publish()
    versions.registry.revoke(ADAPTER, state.version, "erased")
    backend = MemoryBackend()
    with Harness(backend, store) as subscriber:
        until(lambda: subscriber.acks)
        assert backend.calls == []
        assert "revoked" in subscriber.acks[0].error


def test_a_retired_adapter_gets_no_new_requests_while_the_last_ones_end(versions: VersionPublisher, store: FlakyStore):
    """Unloading changes nothing while requests use the version: under constant load it would be served for ever."""
    backend = MemoryBackend()
    first = versions.publish()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(1, 120)
        name = subscriber.name_of(first.version)
        backend.busy.add(name)
        versions.registry.retire(ADAPTER, "live", "customer left", first.version)
        until(lambda: ("failed", 2) in subscriber.acknowledged())
        assert backend.active is None
        assert backend.list() == [name]
        backend.busy.clear()
        until(lambda: ("activated", 2) in subscriber.acknowledged())
        assert backend.list() == []


def test_a_retired_adapter_is_unloaded_and_comes_back(versions: VersionPublisher, store: FlakyStore):
    backend = MemoryBackend()
    versions.publish()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(1, 120)
        versions.registry.retire(ADAPTER, "live", "moved", versions.registry.alias(ADAPTER).version)
        assert subscriber.wait_for(2, 120)
        until(lambda: backend.list() == [])
        assert backend.active is None
        assert subscriber.current is None
        until(lambda: ("activated", 2) in subscriber.acknowledged())
        back = versions.publish()
        assert subscriber.wait_for(3, 120)
        assert backend.active == subscriber.name_of(back.version)


def test_what_an_earlier_process_left_is_tidied_but_never_before_there_is_better(
    versions: VersionPublisher, store: FlakyStore
):
    backend = MemoryBackend()
    left, strange = f"{ADAPTER}@{'0' * 64}", f"acme/other@{'0' * 64}"
    backend.held = {left: b"", strange: b""}
    backend.active = left
    with Harness(backend, store) as subscriber:
        looks = _count_looks(subscriber)
        until(lambda: looks[0] >= 2)
        assert backend.list() == sorted([left, strange])
        state = versions.publish()
        assert subscriber.wait_for(1, 120)
        until(lambda: backend.list() == sorted([strange, subscriber.name_of(state.version)]))


def test_a_callback_that_fails_does_not_stop_the_service(versions: VersionPublisher, store: FlakyStore):
    def failing(_state: object, _stage_s: object) -> None:
        raise ValueError("mine")

    with Harness(MemoryBackend(), store, on_activate=failing) as subscriber:
        versions.publish()
        assert subscriber.wait_for(1, 120)
        versions.publish()
        assert subscriber.wait_for(2, 120)


def test_run_returns_when_it_is_stopped_and_a_subscriber_starts_once(versions: VersionPublisher, store: FlakyStore):
    versions.publish()
    stop = threading.Event()
    subscriber = Harness(MemoryBackend(), store)
    thread = threading.Thread(target=subscriber.run, args=(stop,))
    thread.start()
    assert subscriber.wait_for(1, 120)
    stop.set()
    thread.join(120)
    assert not thread.is_alive()
    other = Harness(MemoryBackend(), store).start()
    with pytest.raises(SubscriberError, match="started before"):
        other.start()
    other.close()


def test_an_unreachable_broker_leaves_polling(versions: VersionPublisher, store: FlakyStore):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    versions.publish()
    with Subscriber(
        ADAPTER, MemoryBackend(), kafka=f"127.0.0.1:{port}", store=store, settings=SETTINGS, replica="here"
    ) as subscriber:
        assert subscriber.wait_for(1, 120)
