"""What a new version waits for when an engine serves it: for no earlier version, and for no flush of the disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.client.backend import HasRoom
from perennial.streams.client.engines.vllm_backend import VllmBackend
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.client.testing import small_weights
from perennial.streams.settings import Settings
from perennial.testing import MemoryBackend
from tests.engine_doubles import Reply, VllmDouble
from tests.versions import VersionPublisher

ADAPTER = "acme/support"


class RecordingDouble(VllmDouble):
    """Notes which versions it loads and unloads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def call(self, path: str, content: dict[str, Any] | None) -> Reply:
        name = str((content or {}).get("lora_name", ""))
        if name.startswith(ADAPTER):
            self.calls.append((path.rsplit("/", maxsplit=1)[-1].partition("_")[0], name))
        return super().call(path, content)


@pytest.fixture
def engine() -> Iterator[RecordingDouble]:
    double = RecordingDouble()
    with double.serving():
        yield double


@pytest.fixture
def backend(engine: RecordingDouble, tmp_path: Path) -> VllmBackend:
    return VllmBackend(engine.url, tmp_path / "served", max_cpu_loras=4, grace_s=0.0, check_s=None)


@pytest.fixture
def versions(tmp_path: Path) -> VersionPublisher:
    return VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER)


@pytest.fixture
def subscriber(backend: VllmBackend, versions: VersionPublisher) -> Subscriber:
    settings = Settings.of(poll_s=0.05, kafka="", env_file=None)
    return Subscriber(ADAPTER, backend, store=versions.store, settings=settings, drain_s=0.0)


def publish(versions: VersionPublisher, subscriber: Subscriber) -> str:
    return subscriber.name_of(versions.publish().version)


def test_a_new_version_is_served_before_earlier_ones_are_unloaded(
    engine: RecordingDouble, backend: VllmBackend, versions: VersionPublisher, subscriber: Subscriber
):
    """Unloading first made users wait for it: up to half a second in the engine, and for the disk to flush a deletion."""
    first = publish(versions, subscriber)
    subscriber._look()
    second = publish(versions, subscriber)
    engine.busy = {first}
    subscriber._look()
    engine.busy = set()
    third = publish(versions, subscriber)
    engine.calls.clear()
    subscriber._look()
    assert backend.active_name(ADAPTER) == third
    assert engine.calls[0] == ("load", third)
    assert {("unload", first), ("unload", second)} & set(engine.calls[1:])


def test_a_newer_version_waits_for_one_unloading_at_most(
    engine: RecordingDouble, backend: VllmBackend, versions: VersionPublisher, subscriber: Subscriber
):
    names = []
    for _ in range(4):
        names.append(publish(versions, subscriber))
        engine.busy = set(names)
        subscriber._look()
    engine.busy = set()
    assert len(backend.list()) == 4
    for held in (3, 2, 1):
        subscriber._look()
        assert len(backend.list()) == held
        if held > 1:
            assert subscriber._progress.due_s <= subscriber._clock(), "it goes on at once"
    assert backend.list() == [names[-1]]
    assert not subscriber._progress.leftovers


def test_the_version_of_another_adapter_does_not_wait_for_an_unloading(
    engine: RecordingDouble, backend: VllmBackend, tmp_path: Path
):
    loaded = []
    for adapter in ("acme/support", "acme/sales"):
        publisher = VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), adapter)
        weights = small_weights(1)
        version = publisher.publish(weights).version
        loaded.append((f"{adapter}@{version[7:]}", weights, publisher.registry.manifest(adapter, version)))
    backend.load(*loaded[0])
    unloading, go_on = threading.Event(), threading.Event()

    def refuse(name: str) -> Reply | None:
        if name.startswith("evict-"):
            unloading.set()
            assert go_on.wait(30)
        return None

    engine.refuses = refuse
    thread = threading.Thread(target=backend.unload, args=(loaded[0][0],))
    thread.start()
    try:
        assert unloading.wait(30)
        backend.load(*loaded[1])
        backend.activate(loaded[1][0])
    finally:
        go_on.set()
        thread.join(30)
    assert backend.list() == [loaded[1][0]]


def test_a_retired_adapter_is_answered_by_none_of_its_versions_at_once(
    engine: RecordingDouble, backend: VllmBackend, versions: VersionPublisher, subscriber: Subscriber
):
    names = []
    for _ in range(2):
        names.append(publish(versions, subscriber))
        engine.busy = set(names)
        subscriber._look()
    versions.registry.retire(ADAPTER, "live", "no longer used", f"sha256:{names[-1][-64:]}")
    subscriber._look()
    assert backend.active_name(ADAPTER) is None
    engine.busy = set()
    while subscriber._progress.leftovers:
        subscriber._look()
    assert backend.list() == []


def test_a_swap_waits_for_no_flush_and_a_deletion_does(
    backend: VllmBackend, versions: VersionPublisher, subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
):
    """A flush takes seconds where others write to the same disk. An engine that lost its power has lost its versions."""
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    first = publish(versions, subscriber)
    subscriber._look()
    assert (backend.active_name(ADAPTER), flushed) == (first, [])
    publish(versions, subscriber)
    subscriber._look()
    assert first not in backend.list()
    assert flushed


def test_what_a_loss_of_power_damaged_is_written_again(
    backend: VllmBackend, versions: VersionPublisher, subscriber: Subscriber, engine: RecordingDouble
):
    name = publish(versions, subscriber)
    subscriber._look()
    weights = backend._folders.folder_of(name) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"")
    (backend._folders.path / ADAPTER / "@live.json").write_bytes(b"")
    engine.adapters.clear()
    settings = subscriber.settings
    after = Subscriber(ADAPTER, backend, store=versions.store, settings=settings, drain_s=0.0)
    after._look()
    assert (backend.active_name(ADAPTER), weights.read_bytes()) == (name, whole)


def test_backends_say_whether_they_have_room(backend: VllmBackend):
    assert isinstance(backend, HasRoom)
    assert not isinstance(MemoryBackend(), HasRoom), "it may hold the previous version's only place"
