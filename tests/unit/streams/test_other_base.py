"""A replica on the old base keeps the old version where the alias moves on to a version of another base."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.client.backend import Backend
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed
from perennial.testing import MemoryBackend
from tests.unit.streams.test_subscriber_faults import ADAPTER, Harness, until
from tests.versions import VersionPublisher

OLD, NEW = (f"sha256:{digit * 64}" for digit in "ab")


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def served(backend: Backend) -> str | None:
    return backend.current(ADAPTER) if isinstance(backend, DirectoryBackend) else backend.active  # type: ignore[attr-defined]


@pytest.mark.parametrize("names_base", [True, False])
@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_a_version_of_another_base_is_refused_and_the_one_before_stays(
    store: DirectoryStore, tmp_path: Path, kind: str, names_base: bool
) -> None:
    base_sha256 = OLD if names_base else None
    backend: Backend = (
        MemoryBackend(base_sha256) if kind == "memory" else DirectoryBackend(tmp_path / "f", base_sha256=base_sha256)
    )
    first = VersionPublisher(store, ADAPTER, OLD).publish()
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(first.generation, 120)
        second = VersionPublisher(store, ADAPTER, NEW).publish()
        until(lambda: any(isinstance(ack, AdapterFailed) for ack in subscriber.acks))
        assert served(backend) == subscriber.name_of(first.version)
        assert subscriber.generation == first.generation
        failed = next(ack for ack in subscriber.acks if isinstance(ack, AdapterFailed))
    assert (failed.version, "another base" in failed.error) == (second.version, True)
    assert NEW in failed.error
    assert not [ack for ack in subscriber.acks if isinstance(ack, AdapterActivated) and ack.version == second.version]


def test_servers_of_a_folder_keep_their_base_over_a_restart_of_the_subscriber(
    store: DirectoryStore, tmp_path: Path
) -> None:
    first = VersionPublisher(store, ADAPTER, OLD).publish()
    with Harness(DirectoryBackend(tmp_path / "f"), store) as subscriber:
        assert subscriber.wait_for(first.generation, 120)
    second = VersionPublisher(store, ADAPTER, NEW).publish()
    backend = DirectoryBackend(tmp_path / "f")
    with Harness(backend, store) as subscriber:
        until(lambda: any(isinstance(ack, AdapterFailed) for ack in subscriber.acks))
        assert backend.current(ADAPTER) == subscriber.name_of(first.version)
        failed = next(ack for ack in subscriber.acks if isinstance(ack, AdapterFailed))
    assert "--base-sha256" in failed.error
    backend = DirectoryBackend(tmp_path / "f", base_sha256=NEW)  # the servers run the new base now
    with Harness(backend, store) as subscriber:
        assert subscriber.wait_for(second.generation, 120)
        assert backend.current(ADAPTER) == subscriber.name_of(second.version)
