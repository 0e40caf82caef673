"""A subscriber of a personal adapter: it follows the shared adapter too, without a word from its user."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from perennial.storage.errors import StoreError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import StoredObject
from perennial.storage.registry.records import alias_key
from perennial.streams.client.acknowledgements import Acks
from perennial.streams.client.backend import BackendError, UnfitVersionError
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.following_thread import SubscriberError
from perennial.streams.client.personal.composition import composed_digest
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed
from perennial.streams.settings import Settings
from perennial.testing import MemoryBackend, small_weights
from tests.keys import Keys
from tests.versions import VersionPublisher

USER, TENANT = "acme/support/user-42", "acme/support"
WAIT_S = 180.0


def until(condition: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


def settings_of(**more: str) -> Settings:
    return Settings.of(poll_s=0.05, kafka="", env_file=None, **more)


def composed(own: str, shared: str) -> str:
    return f"{USER}@{composed_digest(own, shared)[7:]}"


def follower_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == f"subscriber {TENANT}"]


class World:
    """A store with both adapters, and what the replicas of its subscribers say."""

    def __init__(self, folder: Path) -> None:
        self.store = DirectoryStore(folder / "store", fsync=False)
        self.user = VersionPublisher(self.store, USER, extends=TENANT)
        self.tenant = VersionPublisher(self.store, TENANT)
        self.sent: list[AdapterActivated | AdapterFailed] = []
        self.activated: list[str] = []

    def subscriber(
        self, backend: object, store: DirectoryStore | None = None, settings: Settings | None = None
    ) -> Subscriber:
        return Subscriber(
            USER, backend, store=store or self.store, settings=settings or settings_of(), replica="here",  # type: ignore[arg-type]
            drain_s=0.01, on_activate=lambda state, _: self.activated.append(state.adapter),
        )  # fmt: skip

    def acknowledged(self, adapter: str) -> list[int]:
        return [a.generation for a in list(self.sent) if isinstance(a, AdapterActivated) and a.adapter == adapter]

    def failures(self, adapter: str) -> list[str]:
        return [a.error for a in list(self.sent) if isinstance(a, AdapterFailed) and a.adapter == adapter]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(Acks, "send", lambda _, ack: made.sent.append(ack))
    return made


def test_each_newer_version_of_either_adapter_is_served_without_a_job(world):
    shared, own = world.tenant.publish().version, world.user.publish().version
    backend = MemoryBackend()
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        assert backend.active == subscriber.served_name == composed(own, shared)
        assert subscriber.served_with == f"{TENANT}@{shared[7:]}"
        assert [name for call, name in backend.calls if call == "activate"] == [composed(own, shared)], "never alone"
        assert subscriber.current.name == subscriber.name_of(own)
        shared = world.tenant.publish().version
        until(lambda: backend.list() == [composed(own, shared)] == [backend.active], "the tenant's newer version")
        own = world.user.publish().version
        until(lambda: backend.list() == [composed(own, shared)] == [backend.active], "the user's newer version")
        until(lambda: world.acknowledged(TENANT) == [1, 2], "the follower acknowledges")
        until(lambda: world.acknowledged(USER) == [1, 2], "the subscriber acknowledges")
        assert {ack.replica for ack in world.sent if ack.adapter == TENANT} == {"here:user-42"}
        until(lambda: world.activated == [USER, TENANT, USER], "and its user is told")
        assert follower_threads()
    assert not follower_threads()
    assert world.failures(USER) == world.failures(TENANT) == []


def test_an_adapter_that_extends_nothing_is_followed_alone(world):
    world.tenant.publish()
    own = VersionPublisher(world.store, USER).publish().version
    backend = MemoryBackend()
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        assert backend.active == subscriber.served_name == subscriber.name_of(own)
        assert subscriber.served_with is None
        assert not follower_threads()


def test_a_shared_adapter_that_begins_later_and_ends_again(world):
    own = world.user.publish().version
    backend = MemoryBackend()
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        assert backend.active == subscriber.served_name == subscriber.name_of(own)
        shared = world.tenant.publish().version
        until(lambda: backend.list() == [composed(own, shared)] == [backend.active], "the tenant's first version")
        world.tenant.registry.retire(TENANT, "live", "gone", shared)
        until(lambda: backend.list() == [subscriber.name_of(own)] == [backend.active], "the own version alone")
        until(lambda: world.acknowledged(TENANT) == [1, 2], "the retirement is acknowledged")
        assert subscriber.served_with is None


def test_an_erasure_in_the_shared_adapter_waits_until_nothing_composed_of_it_is_held(world):
    forgotten, own = world.tenant.publish().version, world.user.publish().version
    backend = MemoryBackend()
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        until(lambda: world.acknowledged(TENANT) == [1], "the first version")
        backend.busy = {composed(own, forgotten)}
        clean = world.tenant.publish(kind="forget").version
        world.tenant.registry.revoke(TENANT, forgotten, "erased")
        until(lambda: backend.active == composed(own, clean), "the clean version is served at once")
        until(lambda: world.failures(TENANT), "what is still held is reported")
        assert world.acknowledged(TENANT) == [1]
        backend.busy = set()
        until(lambda: world.acknowledged(TENANT) == [1, 2], "the request may close")
        assert backend.list() == [composed(own, clean)]
        assert world.acknowledged(USER) == [1], "the user's adapter has nothing to do with it"


def test_a_revoked_own_version_leaves_nothing_in_service(world):
    world.tenant.publish()
    own = world.user.publish()
    backend = MemoryBackend()
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        world.user.registry.revoke(USER, own.version, "erased")
        until(lambda: backend.list() == [] and backend.active is None, "the revoked version leaves")
        newer = world.user.publish(kind="forget")
        until(lambda: backend.active is not None, "the next own version")
        assert subscriber.wait_for(newer.generation, WAIT_S)
        assert subscriber.served_with is not None


def test_a_version_that_extends_nothing_ends_the_follower(world):
    world.tenant.publish(), world.user.publish()
    backend = MemoryBackend()
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        world.user.extends = None
        own = world.user.publish().version
        until(lambda: backend.list() == [subscriber.name_of(own)] == [backend.active], "the own version alone")
        until(lambda: not follower_threads(), "the follower ends")
        world.user.extends = TENANT
        own = world.user.publish().version
        until(lambda: subscriber.served_with is not None, "and begins again")
        assert backend.active == subscriber.served_name != subscriber.name_of(own)


class SlowStore(DirectoryStore):
    """Does not answer for what belongs to the shared adapter until the test says so."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, fsync=False)
        self.asked, self.answers = threading.Event(), threading.Event()

    def get(self, key: str, max_bytes: int | None = None) -> StoredObject:
        if key == f"aliases/{TENANT}/live":
            self.asked.set()
            assert self.answers.wait(WAIT_S)
        return super().get(key, max_bytes)


def test_nothing_is_served_before_the_shared_alias_was_looked_at(world, tmp_path):
    shared, own = world.tenant.publish().version, world.user.publish().version
    store, backend = SlowStore(tmp_path / "store"), MemoryBackend()
    with world.subscriber(backend, store) as subscriber:
        assert store.asked.wait(WAIT_S)
        assert not subscriber.wait_for(1, 0.2)
        assert backend.active is None
        store.answers.set()
        assert subscriber.wait_for(1, WAIT_S)
        assert [name for call, name in backend.calls if call == "activate"] == [composed(own, shared)]


@pytest.mark.parametrize("named_by", ["the backend", "nobody"])
def test_a_shared_version_of_another_base_is_refused_by_its_follower(world, named_by):
    own = world.user.publish().version
    other = VersionPublisher(world.store, TENANT, base_sha256="sha256:" + "1" * 64)
    other.publish()
    backend = MemoryBackend(world.user.base_sha256 if named_by == "the backend" else None)
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        until(lambda: world.failures(TENANT), "the follower reports it")
        assert "belongs to another base" in world.failures(TENANT)[0]
        assert (backend.active, world.failures(USER)) == (subscriber.name_of(own), [])
        fitting = world.tenant.publish().version
        until(lambda: backend.active == composed(own, fitting), "the next version fits")


def test_a_shared_version_that_nobody_trusted_signed_is_not_served(world, tmp_path):
    keys = Keys(tmp_path / "keys")
    signed = VersionPublisher(world.store, USER, trust=keys.owner, extends=TENANT)
    own = signed.publish().version
    world.tenant.publish()  # without a signature
    backend = MemoryBackend()
    with world.subscriber(
        backend, settings=settings_of(trusted_keys=str(keys.public), seen_dir=str(tmp_path / "seen"))
    ) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        until(lambda: world.failures(TENANT), "the follower reports it")
        assert "UntrustedVersionError" in world.failures(TENANT)[0]
        assert backend.active == subscriber.name_of(own)


def test_a_tenants_program_serves_nothing_over_an_adapter_that_is_not_the_tenants(world):
    VersionPublisher(world.store, "acme").publish()
    VersionPublisher(world.store, "acme/user-42", extends="acme").publish()
    backend = MemoryBackend()
    with Subscriber("acme/user-42", backend, store=world.store, settings=settings_of(tenant="acme")):
        until(lambda: world.failures("acme/user-42"), "the subscriber reports it")
    assert "OtherTenantError" in world.failures("acme/user-42")[0]
    assert backend.list() == []


def test_a_restart_takes_over_and_removes_what_the_process_before_left(world, tmp_path):
    world.tenant.publish()
    own = world.user.publish().version
    backend = DirectoryBackend(tmp_path / "served", durable=False)
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
    left = backend.current(USER)
    assert backend.list() == [left]
    world.sent.clear()
    shared = world.tenant.publish().version
    with world.subscriber(DirectoryBackend(tmp_path / "served", durable=False)) as subscriber:
        until(lambda: backend.current(USER) == composed(own, shared), "the newer pair")
        until(lambda: backend.list() == [composed(own, shared)], "what was left goes")
        until(lambda: world.acknowledged(TENANT) == [2] and world.acknowledged(USER) == [1], "both acknowledge")
        assert left not in backend.list()


def left_behind(world, path):
    """Return a folder in which a process that ended serves both adapters' first versions."""
    backend = DirectoryBackend(path, durable=False)
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
    world.sent.clear()
    return DirectoryBackend(path, durable=False)


def test_what_a_process_left_is_taken_out_where_the_own_version_was_revoked_meanwhile(world, tmp_path):
    world.tenant.publish()
    own = world.user.publish().version
    backend = left_behind(world, tmp_path / "served")
    assert backend.current(USER) is not None
    world.user.registry.revoke(USER, own, "erased")
    with world.subscriber(backend):
        until(lambda: backend.list() == [], "nothing of it is held")
        assert backend.current(USER) is None


def test_what_a_process_left_is_taken_out_where_the_shared_version_is_revoked(world, tmp_path):
    shared, own = world.tenant.publish().version, world.user.publish()
    backend = left_behind(world, tmp_path / "served")
    weights = world.store.root / blob_key(world.user.registry.manifest(USER, own.version).weights.digest)
    weights.unlink()  # the own version cannot be served any more
    with world.subscriber(backend):
        until(lambda: world.failures(USER), "the subscriber reports it")
        until(follower_threads, "the shared adapter is followed all the same")
        assert backend.current(USER) is not None, "what was left goes on"
        assert world.acknowledged(TENANT) == [], "nobody says that its first version is not held"
        world.tenant.publish(kind="forget")
        world.tenant.registry.revoke(TENANT, shared, "erased")
        until(lambda: backend.list() == [] and backend.current(USER) is None, "what holds the revoked part goes")
        until(lambda: world.acknowledged(TENANT) == [2], "and only then the follower says so")


def test_a_second_run_follows_the_shared_adapter_again(world):
    versions = [world.tenant.publish().version]
    own = world.user.publish().version
    backend = MemoryBackend()
    subscriber = world.subscriber(backend)
    for number in (1, 2):
        stop = threading.Event()
        thread = threading.Thread(target=subscriber.run, args=(stop,))
        thread.start()
        until(lambda: backend.active == composed(own, versions[-1]), "both are served")
        until(follower_threads, f"the shared adapter is followed in run {number}")
        versions.append(world.tenant.publish().version)
        until(lambda: backend.active == composed(own, versions[-1]), "the tenant's newer version")
        stop.set()
        thread.join()
        assert not follower_threads()


def test_a_shared_version_that_does_not_fit_keeps_no_user_from_the_own_one(world):
    class Small(MemoryBackend):
        def load(self, name, weights, manifest):
            if manifest.rank > 4:
                raise UnfitVersionError("the rank is too large", got=manifest.rank)
            super().load(name, weights, manifest)

    world.tenant.publish(small_weights(rank=8), rank=8, alpha=16)
    own = world.user.publish().version
    backend = Small()
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        assert backend.active == subscriber.served_name == subscriber.name_of(own)
        assert subscriber.served_with is None
        own = world.user.publish().version
        until(lambda: backend.active == subscriber.name_of(own), "the user's newer version")
        shared = world.tenant.publish().version
        until(lambda: backend.active == composed(own, shared), "a tenant's version that fits")


class Recording(DirectoryBackend):
    """A folder that fails once to load a version, and remembers what was activated."""

    def __init__(self, path: Path, fails: str = "") -> None:
        super().__init__(path, durable=False)
        self.fails, self.activated = fails, []

    def load(self, name, weights, manifest):
        if name == self.fails:
            self.fails = ""
            raise BackendError("the server does not answer in time")
        super().load(name, weights, manifest)

    def activate(self, name):
        self.activated.append(name)
        super().activate(name)


def test_a_pair_that_a_process_left_goes_on_where_loading_it_again_fails_once(world, tmp_path):
    pair = composed(world.user.publish().version, world.tenant.publish().version)
    left_behind(world, tmp_path / "served")
    backend = Recording(tmp_path / "served", fails=pair)
    with world.subscriber(backend) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        until(lambda: backend.list() == [pair] == [backend.current(USER)], "the pair")
    assert set(backend.activated) == {pair}, "never alone"


def test_a_first_look_that_failed_gives_up_no_pair_that_a_process_left(world, tmp_path):
    pair = composed(world.user.publish().version, world.tenant.publish().version)
    left_behind(world, tmp_path / "served")
    failures = iter([True])

    class Away(DirectoryStore):
        def get(self, key, *rest):
            if key == alias_key(TENANT, "live") and next(failures, False):
                raise StoreError("unplugged")
            return super().get(key, *rest)

    backend = Recording(tmp_path / "served")
    with world.subscriber(backend, store=Away(world.store.root, fsync=False)) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        until(lambda: backend.list() == [pair] == [backend.current(USER)], "the pair")
    assert next(failures, "used") == "used"
    assert set(backend.activated) == {pair}, "never alone"


def test_an_own_version_that_the_servers_refuse_does_not_change_the_base_of_the_shared_one(world, tmp_path):
    shared = world.tenant.publish().version
    world.user.publish()
    backend = left_behind(world, tmp_path / "served")
    world.user.base_sha256 = "sha256:" + "c" * 64
    world.user.publish()
    with world.subscriber(backend):
        until(lambda: world.failures(USER), "the own version is refused")
        world.tenant.publish(kind="forget")
        world.tenant.registry.revoke(TENANT, shared, "erased")
        until(lambda: backend.list() == [], "what was left goes")
        until(lambda: world.acknowledged(TENANT) == [2], "and the erasure is acknowledged")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_follower_that_ends_ends_the_subscriber(world, monkeypatch):
    """Else a revoked shared version would stay in service, and no request would wait for it after the lease."""
    world.tenant.publish(), world.user.publish()
    subscriber = world.subscriber(MemoryBackend()).start()
    assert subscriber.wait_for(1, WAIT_S)
    broken = threading.Event()
    look = Subscriber._look

    def breaking(self: Subscriber) -> None:
        if self.adapter == TENANT and broken.is_set():
            raise ZeroDivisionError
        look(self)

    monkeypatch.setattr(Subscriber, "_look", breaking)
    broken.set()
    until(lambda: not subscriber.alive, "the subscriber ends")
    with pytest.raises(SubscriberError, match="did not end well"):
        subscriber.close()
