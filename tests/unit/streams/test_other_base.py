"""A replica on the old base keeps the old version where the alias moves on to a version of another base."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.client import directory_backend
from perennial.streams.client.backend import Backend, BackendError, UnfitVersionError
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed
from perennial.testing import MemoryBackend, small_weights
from tests.unit.streams.test_subscriber_faults import ADAPTER, FailingDisk, Harness, until
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


# ---- the server keeps its base while it serves no version


class Replica:
    """A subscriber that looks when the test says so, an hour after the look before, so that every retry is due."""

    def __init__(self, backend: Backend, store: DirectoryStore) -> None:
        self._now_s = 0.0
        self.backend = backend
        self.subscriber = Harness(backend, store, drain_s=0.01, clock=lambda: self._now_s)

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self._now_s += 3600.0
            self.subscriber._look()
            self.subscriber._drop_revoked()

    @property
    def served(self) -> str | None:
        return served(self.backend)

    def confirmed(self) -> list[str]:
        return [ack.version for ack in self.subscriber.acks if isinstance(ack, AdapterActivated)]


def folder_after_drop(store: DirectoryStore, path: Path) -> str:
    """Serve a version on the old base from a folder until it is revoked; return the version on the new base."""
    replica = Replica(DirectoryBackend(path), store)
    first = VersionPublisher(store, ADAPTER, OLD).publish()
    replica.look()
    assert replica.served == replica.subscriber.name_of(first.version)
    versions = VersionPublisher(store, ADAPTER, NEW)
    last = versions.publish(kind="forget")
    versions.registry.revoke(ADAPTER, first.version, "erased")
    replica.look(2)
    assert replica.served is None
    assert replica.backend.list() == []
    return last.version


@pytest.mark.parametrize("gone", ["revoked", "retired"])
@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_a_server_without_a_version_takes_none_of_another_base(
    store: DirectoryStore, tmp_path: Path, kind: str, gone: str
) -> None:
    """An erasure after a rebase was confirmed by a server that answered with weights of the other base."""
    replica = Replica(MemoryBackend() if kind == "memory" else DirectoryBackend(tmp_path / "f"), store)
    first = VersionPublisher(store, ADAPTER, OLD).publish()
    replica.look()
    assert replica.confirmed() == [first.version]
    versions = VersionPublisher(store, ADAPTER, NEW)
    if gone == "revoked":
        versions.publish()
        replica.look()
        last = versions.publish(kind="forget")
        versions.registry.revoke(ADAPTER, first.version, "erased")
    else:
        versions.registry.retire(ADAPTER, "live", "moved", first.version)
        replica.look()
        assert replica.served is None
        last = versions.publish()
    replica.look(3)
    assert replica.served is None
    assert replica.backend.list() == []
    assert last.version not in replica.confirmed()
    final = replica.subscriber.acks[-1]
    assert isinstance(final, AdapterFailed), "a request to forget waits for the replica"
    # The base that it has is still served.
    back = VersionPublisher(store, ADAPTER, OLD).publish()
    replica.look()
    assert replica.served == replica.subscriber.name_of(back.version)


def test_a_folder_without_a_version_keeps_the_base_over_a_restart_until_a_digest_is_given(
    store: DirectoryStore, tmp_path: Path
) -> None:
    last = folder_after_drop(store, tmp_path / "f")
    again = Replica(DirectoryBackend(tmp_path / "f"), store)
    again.look(2)
    assert again.served is None
    assert again.confirmed() == []
    assert "--base-sha256" in again.subscriber.reported()[-1]

    moved = Replica(DirectoryBackend(tmp_path / "f", base_sha256=NEW), store)
    moved.look()
    assert moved.served == moved.subscriber.name_of(last)
    assert moved.confirmed() == [last]

    after = Replica(DirectoryBackend(tmp_path / "f"), store)  # the digest is given once
    newest = VersionPublisher(store, ADAPTER, NEW).publish()
    after.look()
    assert after.served == after.subscriber.name_of(newest.version)


def test_an_empty_folder_takes_the_first_version_of_any_base(store: DirectoryStore, tmp_path: Path) -> None:
    last = folder_after_drop(store, tmp_path / "f")
    moved = Replica(DirectoryBackend(tmp_path / "empty"), store)
    moved.look()
    assert moved.served == moved.subscriber.name_of(last)


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_a_folder_that_kept_no_base_keeps_it_when_its_version_goes(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_is_full: bool
) -> None:
    """Folders of releases that kept no base; a full disk keeps no revoked version in service."""
    versions = VersionPublisher(store, ADAPTER, OLD)
    backend = DirectoryBackend(tmp_path / "f")
    name, other = (f"{ADAPTER}@{digit * 64}" for digit in "12")
    backend.load(name, small_weights(), versions.manifest(small_weights()))
    backend.activate(name)
    kept = tmp_path / "f" / ADAPTER / "@live.base"
    assert json.loads(kept.read_bytes()) == {"base_sha256": OLD}
    kept.unlink()
    of_new = VersionPublisher(store, ADAPTER, NEW).manifest(small_weights())
    with pytest.raises(UnfitVersionError, match="another base"):
        backend.load(other, small_weights(), of_new)
    if disk_is_full:
        FailingDisk(monkeypatch).error = OSError(errno.ENOSPC, "as the test asked")
    backend.unload(name)
    assert backend.current(ADAPTER) is None
    assert backend.list() == []
    assert kept.exists() is not disk_is_full
    if not disk_is_full:
        with pytest.raises(UnfitVersionError, match="another base"):
            backend.load(other, small_weights(), of_new)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"{}", b'{"base_sha256": null}', b'{"base_sha256": "sha256:short"}', b"\xff" * 9000,
     json.dumps({"base_sha256": OLD, "more": "x" * 9000}).encode()],
)  # fmt: skip
def test_a_damaged_base_of_a_folder_is_named_and_replaced_by_a_given_digest(
    store: DirectoryStore, tmp_path: Path, content: bytes
) -> None:
    folder_after_drop(store, tmp_path / "f")
    kept = tmp_path / "f" / ADAPTER / "@live.base"
    kept.write_bytes(content)
    name, manifest = f"{ADAPTER}@{'1' * 64}", VersionPublisher(store, ADAPTER, OLD).manifest(small_weights())
    with pytest.raises(BackendError, match="damaged") as raised:
        DirectoryBackend(tmp_path / "f").load(name, small_weights(), manifest)
    assert str(kept) in str(raised.value)
    assert "--base-sha256" in str(raised.value)
    given = DirectoryBackend(tmp_path / "f", base_sha256=OLD)
    given.load(name, small_weights(), manifest)
    given.activate(name)
    assert json.loads(kept.read_bytes()) == {"base_sha256": OLD}
    DirectoryBackend(tmp_path / "f").load(name, small_weights(), manifest)


def test_a_base_that_a_loss_of_power_emptied_is_taken_from_the_version_in_service(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is flushed while versions are served, where `durable` is off; the base is when the last one leaves."""
    backend = DirectoryBackend(tmp_path / "f", durable=False)
    name, other = (f"{ADAPTER}@{digit * 64}" for digit in "12")
    of_old, of_new = (VersionPublisher(store, ADAPTER, base).manifest(small_weights()) for base in (OLD, NEW))
    backend.load(name, small_weights(), of_old)
    backend.activate(name)
    kept = tmp_path / "f" / ADAPTER / "@live.base"
    kept.write_bytes(b"")
    flushed, write = [], directory_backend._write_file

    def spy(path: Path, data: bytes, durable: bool) -> None:
        flushed.append((path.name.startswith(".@live.base."), durable))
        write(path, data, durable)

    monkeypatch.setattr(directory_backend, "_write_file", spy)
    with pytest.raises(UnfitVersionError, match="another base"):
        backend.load(other, small_weights(), of_new)
    backend.unload(name)
    assert flushed == [(True, True)]
    assert json.loads(kept.read_bytes()) == {"base_sha256": OLD}
    with pytest.raises(UnfitVersionError, match="another base"):
        backend.load(other, small_weights(), of_new)
