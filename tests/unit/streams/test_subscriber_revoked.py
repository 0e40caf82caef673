"""Acknowledgements while a revoked version is still held: none, whatever the alias names by then."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed
from perennial.streams.settings import Settings
from perennial.testing import MemoryBackend
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
SETTINGS = Settings.of(poll_s=0.05, kafka="", env_file=None)


class Harness(Subscriber):
    """A subscriber that looks when the test says so, and whose acknowledgements are kept."""

    def __init__(self, backend: MemoryBackend, store: DirectoryStore) -> None:
        super().__init__(ADAPTER, backend, store=store, settings=SETTINGS, replica="here", drain_s=0.01)
        self.acks: list[AdapterActivated | AdapterFailed] = []
        self._acks.send = self.acks.append

    def look(self) -> list[int]:
        """Look once; return the generations that are acknowledged so far."""
        self._look()
        self._drop_revoked()
        return [ack.generation for ack in self.acks if isinstance(ack, AdapterActivated)]


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


@pytest.mark.parametrize("looks_between", [False, True])
def test_an_update_after_a_forgetting_is_not_acknowledged_while_requests_use_the_forgotten_version(
    store: DirectoryStore, looks_between: bool
) -> None:
    """A busy adapter learns on at once. The request to forget was closed while the replica answered from erased text."""
    versions, backend = VersionPublisher(store, ADAPTER), MemoryBackend()
    subscriber = Harness(backend, store)
    forgotten = versions.publish().version
    assert subscriber.look() == [1]
    backend.busy = {subscriber.name_of(forgotten)}
    versions.publish(kind="forget")
    versions.registry.revoke(ADAPTER, forgotten, "erased")
    if looks_between:
        assert subscriber.look() == [1]
    newest = versions.publish().version
    assert subscriber.look() == [1]
    assert subscriber.current is not None
    assert subscriber.current.version == newest, "it is served all the same"
    assert backend.busy <= set(backend.list())
    backend.busy = set()
    assert subscriber.look() == [1, 3]
    assert backend.list() == [subscriber.name_of(newest)]


def test_an_update_is_acknowledged_at_once_while_requests_use_a_version_that_is_not_revoked(
    store: DirectoryStore,
) -> None:
    versions, backend = VersionPublisher(store, ADAPTER), MemoryBackend()
    subscriber = Harness(backend, store)
    first = versions.publish().version
    subscriber.look()
    backend.busy = {subscriber.name_of(first)}
    versions.publish()
    assert subscriber.look() == [1, 2]
