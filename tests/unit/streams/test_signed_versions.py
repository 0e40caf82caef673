"""A subscriber and the plugin of vLLM with trusted keys, against somebody who can write to the store."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.records import AliasState, alias_key, revocation_key
from perennial.storage.signing.key_files import make_signing_key, write_public_keys
from perennial.storage.signing.trust import Trust
from perennial.storage.signing.version_statements import signature_key
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.client.trust.seen_generations import SeenGenerations
from perennial.streams.client.trust.untrusted import UntrustedVersionError
from perennial.streams.client.vllm_plugin.name_resolver import NameResolver
from perennial.streams.client.vllm_plugin.requested_names import parse_requested_name
from perennial.streams.client.vllm_plugin.resolver_metrics import ResolverMetrics
from perennial.streams.client.vllm_plugin.version_folders import VersionFolders
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed
from perennial.streams.settings import Settings
from perennial.testing import MemoryBackend, small_weights
from tests.keys import Keys
from tests.versions import VersionPublisher
from tests.vllm_stand_in import LoRARequest

ADAPTER = "acme/support"


class Harness(Subscriber):
    """A subscriber that looks when the test says so, and whose acknowledgements are kept."""

    def __init__(self, backend: MemoryBackend, store: DirectoryStore, settings: Settings) -> None:
        super().__init__(ADAPTER, backend, store=store, settings=settings, replica="here", drain_s=0.01)
        self.sent: list[AdapterActivated | AdapterFailed] = []
        self._bootstrap = self._acks._bootstrap = "nowhere:1"  # acknowledgements are put in the queue
        send = self._acks.send
        self._acks.send = lambda ack: (self.sent.append(ack), send(ack))[1]

    def look(self) -> str | None:
        """Look once; return the version that is served then."""
        self._progress = self._progress.retry_at(0)
        self._look()
        self._drop_revoked()
        return self.current.version if self.current else None

    def count(self, reason: str) -> float:
        labels = {"role": "subscriber", "kind": reason}
        return self._metrics.registry.get_sample_value("perennial_subscriber_failures_total", labels) or 0.0


class World:
    """A store with one adapter, its owner, a stranger who can write to the store, and clients that trust the owner."""

    def __init__(self, folder: Path) -> None:
        self.keys = Keys(folder / "keys")
        self.store = DirectoryStore(folder / "store", fsync=False)
        self.settings = Settings.of(
            kafka="", env_file=None, trusted_keys=str(self.keys.public), seen_dir=str(folder / "seen")
        )
        self.owner = VersionPublisher(self.store, ADAPTER, trust=self.keys.owner)
        self.stranger = VersionPublisher(self.store, ADAPTER, trust=self.keys.stranger)
        self.nobody = VersionPublisher(self.store, ADAPTER)
        self.backend = MemoryBackend()
        self.folder = folder

    def subscriber(self) -> Harness:
        return Harness(self.backend, self.store, self.settings)

    def folders(self) -> VersionFolders:
        return VersionFolders(
            lambda: self.nobody.registry, self.folder / "folders", alias="live", served_base="", max_bytes=1 << 30,
            signing=self.settings.signing,
        )  # fmt: skip

    def put(self, key: str, data: bytes) -> None:
        self.store.delete(key)
        assert self.store.put_if_absent(key, data)

    def put_alias(self, state: AliasState) -> None:
        self.put(alias_key(ADAPTER, "live"), state.to_bytes())

    def moved_to(self, version: str, seq: int, trust: Trust) -> None:
        """Move the alias on to any version, signed with a key or not."""
        state = self.nobody.registry.alias(ADAPTER)
        assert state is not None
        moved = state.model_copy(
            update={"version": version, "seq": seq, "generation": state.generation + 1, "nonce": "n"}
        )
        self.put_alias(moved.model_copy(update={"signature": None}).signed(trust))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# ---- the attacks: each leaves the store as the attacker wants it, and returns the reason for the refusal


def unsigned_version(world: World) -> str:
    world.nobody.publish()
    return "unsigned"


def version_of_another_key(world: World) -> str:
    world.stranger.publish()
    return "unknown-key"


def alias_of_the_owner_changed(world: World) -> str:
    forged = world.nobody.publish()
    signature = world.history[-1].signature
    world.put_alias(forged.model_copy(update={"signature": signature}))
    return "forged"


def older_alias_put_back(world: World) -> str:
    world.put_alias(world.history[0])
    return "replayed"


def alias_of_another_adapter(world: World) -> str:
    elsewhere = VersionPublisher(world.store, "acme/other", trust=world.keys.owner)
    for _ in range(5):
        state = elsewhere.publish()
    world.put_alias(state)
    return "replayed"


def other_alias_of_the_adapter(world: World) -> str:
    world.moved_to(world.history[0].version, 1, Trust())
    state = world.nobody.registry.alias(ADAPTER)
    assert state is not None
    world.put_alias(state.model_copy(update={"alias": "canary", "generation": 50}).signed(world.keys.owner))
    return "replayed"


def version_that_the_gate_refused(world: World) -> str:
    weights = small_weights(77)
    manifest = world.owner.manifest(weights).model_copy(update={"outcome": "refused"})
    world.owner.registry.publish(manifest, [weights], lambda _: None)
    world.moved_to(manifest.digest(), manifest.seq, world.keys.owner)
    return "refused-by-gate"


def version_off_the_line(world: World) -> str:
    """Signed by the owner, and never given a number: a publish that lost its race."""
    weights = small_weights(78)
    manifest = world.owner.manifest(weights)
    version = world.owner.registry.record(manifest)
    world.owner.registry.store.put_if_absent(f"blobs/sha256/{manifest.weights.digest[7:]}", weights)
    world.moved_to(version, manifest.seq, world.keys.owner)
    return "off-the-line"


def version_on_the_place_of_another(world: World) -> str:
    """Signed by the owner, and another version has its number."""
    first = world.history[0].version
    manifest = world.owner.manifest(small_weights(79)).model_copy(update={"seq": 2, "head": first, "parent": first})
    world.moved_to(world.owner.registry.record(manifest), 2, world.keys.owner)
    return "off-the-line"


def alias_that_gives_a_version_another_place(world: World) -> str:
    world.moved_to(world.history[0].version, 7, world.keys.owner)
    return "off-the-line"


def signed_alias_to_an_unsigned_version(world: World) -> str:
    weights = small_weights(80)
    manifest = world.nobody.manifest(weights)
    world.nobody.registry.publish(manifest, [weights], lambda _: None)
    world.put_alias(world.history[-1])
    world.moved_to(manifest.digest(), manifest.seq, world.keys.owner)
    return "unsigned"


def unsigned_retirement(world: World) -> str:
    state = world.history[-1]
    world.nobody.registry.retire(ADAPTER, "live", "gone", state.version)
    return "unsigned"


ATTACKS = [
    unsigned_version, version_of_another_key, alias_of_the_owner_changed, older_alias_put_back, alias_of_another_adapter,
    other_alias_of_the_adapter, version_that_the_gate_refused, version_off_the_line, version_on_the_place_of_another,
    alias_that_gives_a_version_another_place,
    signed_alias_to_an_unsigned_version, unsigned_retirement,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_and_reported_and_what_was_served_goes_on(world, attack, caplog):
    world.history = [world.owner.publish() for _ in range(2)]
    subscriber = world.subscriber()
    served = subscriber.look()
    assert served == world.history[-1].version
    reason = attack(world)
    with caplog.at_level(logging.ERROR, "perennial.subscriber"):
        assert [subscriber.look() for _ in range(3)] == [served] * 3
    assert world.backend.active == subscriber.name_of(served)
    assert subscriber.count(reason) == 3
    failed = [ack for ack in subscriber.sent if isinstance(ack, AdapterFailed)]
    assert len(failed) == 1, "the same refusal is reported once"
    assert f"{reason}: " in failed[0].error
    assert "allowed:" in failed[0].error
    assert caplog.text.count(f"{reason}: ") == 1
    # The owner repairs the alias, and the replica says again what it serves.
    world.put_alias(world.history[-1])
    assert subscriber.look() == served
    assert isinstance(subscriber._acks._latest, AdapterActivated)
    assert subscriber._acks._latest.version == served
    # What the owner signs after that is served.
    moved = world.history[-1].model_copy(update={"generation": 9, "nonce": "later"}).signed(world.keys.owner)
    world.put_alias(moved)
    assert subscriber.look() == served
    assert subscriber.generation == 9


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_client_that_starts_after_an_attack_serves_nothing_of_it(world, attack):
    world.history = [world.owner.publish() for _ in range(2)]
    first = world.subscriber()
    first.look()
    reason = attack(world)
    world.backend = MemoryBackend()
    later = world.subscriber()
    assert later.look() is None
    assert world.backend.active is None
    assert later.count(reason) == 1


@pytest.mark.parametrize("attack", ATTACKS)
def test_vllm_is_given_nothing_of_an_attack(world, attack):
    world.history = [world.owner.publish() for _ in range(2)]
    folders = world.folders()
    found = folders.find(parse_requested_name(ADAPTER), "shipped")
    assert found.version == world.history[-1].version
    reason = attack(world)
    with pytest.raises(UntrustedVersionError) as raised:
        folders.find(parse_requested_name(ADAPTER), "shipped")
    assert raised.value.reason == reason
    with pytest.raises(UntrustedVersionError):
        world.folders().find(parse_requested_name(ADAPTER), "shipped")


@pytest.mark.parametrize("attack", ATTACKS)
def test_vllm_is_given_no_personal_adapter_whose_shared_part_was_attacked(world, attack):
    world.history = [world.owner.publish() for _ in range(2)]
    user = VersionPublisher(world.store, f"{ADAPTER}/user-42", trust=world.keys.owner)
    manifest = user.manifest(small_weights(7)).model_copy(update={"extends": ADAPTER})
    user.registry.publish(manifest, [small_weights(7)], lambda _: None)
    folders = world.folders()
    name = parse_requested_name(f"{ADAPTER}/user-42")
    assert folders.find(name, "shipped").shared.version == world.history[-1].version
    reason = attack(world)
    for client in (folders, world.folders()):
        with pytest.raises(UntrustedVersionError) as raised:
            client.find(name, "shipped")
        assert raised.value.reason == reason


def test_vllm_counts_a_refusal_by_its_reason(world):
    world.history = [world.owner.publish()]
    registry = CollectorRegistry()
    resolver = NameResolver(world.folders(), 30.0, LoRARequest, ResolverMetrics(registry))
    world.stranger.publish()
    assert asyncio.run(resolver.resolve("shipped", ADAPTER)) is None
    assert registry.get_sample_value("perennial_resolver_untrusted_total", {"reason": "unknown-key"}) == 1
    assert registry.get_sample_value("perennial_resolver_requests_total", {"outcome": "refused"}) == 1


def test_a_version_that_a_name_asks_for_needs_its_own_signature(world):
    honest, forged = world.owner.publish(), world.stranger.publish()
    named = {state.version: parse_requested_name(f"{ADAPTER}@{state.version[7:]}") for state in (honest, forged)}
    assert world.folders().find(named[honest.version], "shipped").version == honest.version
    with pytest.raises(UntrustedVersionError) as raised:
        world.folders().find(named[forged.version], "shipped")
    assert raised.value.reason == "unknown-key"


def test_a_forged_alias_keeps_no_revoked_version_in_service(world):
    state = world.owner.publish()
    subscriber = world.subscriber()
    assert subscriber.look() == state.version
    world.owner.registry.revoke(ADAPTER, state.version, "erased")
    world.stranger.publish()
    assert subscriber.look() is None
    assert world.backend.list() == []


def test_a_revocation_needs_no_signature(world):
    state = world.owner.publish()
    subscriber = world.subscriber()
    assert subscriber.look() == state.version
    world.nobody.registry.revoke(ADAPTER, state.version, "by anybody")
    assert world.store.exists(revocation_key(ADAPTER, 1))
    assert subscriber.look() is None


def test_a_legal_rollback_and_a_rotation_of_keys_are_followed(world):
    states = [world.owner.publish() for _ in range(2)]
    subscriber = world.subscriber()
    assert subscriber.look() == states[-1].version
    back = world.owner.publish(kind="rollback")
    assert subscriber.look() == back.version
    new = make_signing_key()
    world.stranger = VersionPublisher(world.store, ADAPTER, trust=Trust(new))
    early = world.stranger.publish()
    assert subscriber.look() == back.version, "the new key is not trusted yet"
    write_public_keys(world.keys.public, {**world.keys.readers.trusted.by_id(), new.public.key_id: new.public})
    assert subscriber.look() == early.version
    write_public_keys(world.keys.public, {new.public.key_id: new.public})
    late = world.stranger.publish()
    assert subscriber.look() == late.version
    world.owner.registry.trust = world.keys.stranger
    assert subscriber.count("unknown-key") == 1


def test_without_trusted_keys_everything_is_served_as_before(world):
    world.settings = Settings.of(kafka="", env_file=None)
    subscriber = world.subscriber()
    for publisher in (world.nobody, world.stranger):
        assert subscriber.look() != (state := publisher.publish()).version
        assert subscriber.look() == state.version
    assert not (world.folder / "seen").exists()
    assert world.store.exists(signature_key(ADAPTER, state.version))


def test_the_trusted_keys_must_be_there_when_a_client_starts(world):
    world.keys.public.unlink()
    with pytest.raises(Exception, match="cannot be used"):
        world.subscriber()


def test_keys_whose_file_is_not_usable_later_still_decide(world):
    world.owner.publish()
    subscriber = world.subscriber()
    subscriber.look()
    state = world.owner.publish()
    world.keys.public.write_bytes(b"")  # as `cp` does before it writes
    assert subscriber.look() == state.version
    world.keys.public.unlink()
    world.stranger.publish()
    assert subscriber.look() == state.version
    assert subscriber.count("unknown-key") == 1


def test_the_highest_generation_is_kept_by_store_and_alias(tmp_path, caplog):
    seen = SeenGenerations(tmp_path / "seen", "s3://a")
    seen.note(ADAPTER, "live", 7)
    seen.note(ADAPTER, "live", 5)
    again = SeenGenerations(tmp_path / "seen", "s3://a")
    assert (again.highest(ADAPTER, "live"), again.highest(ADAPTER, "canary")) == (7, 0)
    assert SeenGenerations(tmp_path / "seen", "s3://b").highest(ADAPTER, "live") == 0
    again.note(ADAPTER, "live", 6)
    assert SeenGenerations(tmp_path / "seen", "s3://a").highest(ADAPTER, "live") == 7
    again.path_of(ADAPTER, "live").write_bytes(b'{"gener')
    assert SeenGenerations(tmp_path / "seen", "s3://a").highest(ADAPTER, "live") == 0
    (tmp_path / "file").write_text("")
    nowhere = SeenGenerations(tmp_path / "file" / "seen", "s3://a")
    nowhere.note(ADAPTER, "live", 3)
    nowhere.note(ADAPTER, "live", 4)
    assert nowhere.highest(ADAPTER, "live") == 4
    assert caplog.text.count("kept in memory only") == 1
