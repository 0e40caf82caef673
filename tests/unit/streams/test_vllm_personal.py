"""A personal adapter in vLLM is served together with the shared adapter that it extends, and follows both."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.manifest import Probes
from perennial.storage.registry.records import AliasState, alias_key
from perennial.streams.client.backend import BackendError
from perennial.streams.client.personal.composition import Part, compose, composed_digest
from perennial.streams.client.vllm_plugin import name_refresher
from perennial.streams.client.vllm_plugin.found_versions import SharedVersions
from perennial.streams.client.vllm_plugin.name_refresher import GRACE_S
from perennial.streams.client.vllm_plugin.requested_names import RequestedName, parse_requested_name
from perennial.streams.client.vllm_plugin.version_folders import VersionFolders
from perennial.streams.settings.tenant_group import OtherTenantError, TenantSettings
from perennial.testing import small_weights
from tests.versions import VersionPublisher
from tests.vllm_world import ADAPTER, World, run

USER = f"{ADAPTER}/user-42"
OTHER = f"{ADAPTER}/user-7"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def teach(world: World, weights: bytes, adapter: str = USER, rank: int = 2, probes: Probes | None = None) -> AliasState:
    """Publish the next version of a personal adapter."""
    publisher = VersionPublisher(world.versions.store, adapter)
    made = publisher.manifest(weights, rank=rank, probes=probes)
    manifest = made.model_copy(update={"extends": adapter.rpartition("/")[0]})
    state = publisher.registry.publish(manifest, [weights], lambda _: None).alias_state
    assert state is not None
    return state


def both(world: World, own: AliasState, shared: AliasState) -> bytes:
    """Return what the folder of two versions has to hold."""
    parts = []
    for state in (own, shared):
        manifest = world.versions.registry.manifest(state.adapter, state.version)
        parts.append(Part(state.version, manifest, world.versions.store.get(blob_key(manifest.weights.digest)).data))
    return compose(*parts).weights


def pinned(*states: AliasState) -> str:
    return f"{states[0].adapter}@{'+'.join(state.version[7:] for state in states)}"


def test_a_name_follows_both_aliases(world: World):
    async def story() -> None:
        shared_seed = 2
        own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(shared_seed))
        seen: list[tuple[int, str, str]] = []
        for turn in range(4):
            assert await world.served(USER) == both(world, own, shared)
            assert await world.served(ADAPTER) == small_weights(shared_seed)
            request = world.server.lora_requests[USER]
            assert request.lora_name == f"{USER}#live@{own.version[7:]}+{shared.version[7:]}"
            assert Path(request.lora_path).name == f"@{composed_digest(own.version, shared.version)[7:]}"
            seen.append((request.lora_int_id, request.lora_name, request.lora_path))
            if turn % 2:
                own = teach(world, small_weights(3 + turn))
            else:
                shared_seed = 20 + turn
                shared = world.versions.publish(small_weights(shared_seed))
            await world.poll()
        for part in zip(*seen, strict=True):
            assert len(set(part)) == 4, "an id, a name or a folder was used for two combinations"

    run(story())


def test_a_move_of_the_shared_adapter_is_timed_by_its_own_alias(world: World):
    async def story() -> None:
        own, _ = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        await world.served(USER)
        shared = world.versions.publish(small_weights(3))
        world.refresher._now = lambda: shared.published_at.timestamp() + 7
        assert own.published_at < shared.published_at
        await world.poll()
        assert world.metrics.published_to_served._sum.get() == pytest.approx(7)
        world.versions.registry.retire(ADAPTER, "live", "nothing is left", shared.version)
        await world.poll()
        assert world.metrics.refreshes.labels("replaced")._value.get() == 2
        assert world.metrics.published_to_served._sum.get() == pytest.approx(7), "nothing was published"
        assert world.metrics.stale_since._value.get() == 0

    run(story())


def test_without_a_live_shared_version_the_personal_one_is_served_alone(world: World):
    async def story() -> None:
        own = teach(world, small_weights(1))
        assert await world.served(USER) == small_weights(1)
        assert world.server.lora_requests[USER].lora_name == f"{USER}#live@{own.version[7:]}"
        shared = world.versions.publish(small_weights(2))
        await world.poll()
        assert await world.served(USER) == both(world, own, shared)
        world.versions.registry.retire(ADAPTER, "live", "nothing is left", shared.version)
        await world.poll()
        assert USER in world.server.lora_requests, "the name is not taken out of service meanwhile"
        assert await world.served(USER) == small_weights(1)
        assert await world.served(f"{USER}#live") == small_weights(1)

    run(story())


def test_a_shared_version_that_is_revoked_and_still_live_leaves_the_personal_one_in_service(world: World, caplog):
    async def story() -> None:
        own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        assert await world.served(USER) == both(world, own, shared)
        world.versions.registry.revoke(ADAPTER, shared.version, "wrong")
        for _ in range(3):
            await world.poll()
            assert await world.served(USER) == small_weights(1)
        assert world.metrics.refreshes.labels("withdrawn")._value.get() == 1
        assert world.metrics.stale_since._value.get() == 0
        assert await world.served(f"{USER}#live") == small_weights(1), "and so does what is asked for the first time"
        assert f"{USER} extends {ADAPTER}: {shared.version} is revoked and still live" in caplog.text
        for _ in range(3):
            await world.poll(GRACE_S)
        assert world.laid_down() == {f"@{own.version[7:]}"}
        newer = world.versions.publish(small_weights(3))
        await world.poll()
        assert await world.served(USER) == both(world, own, newer)

    run(story())


def test_no_name_leads_to_a_revoked_shared_part_while_other_names_have_their_turn(world: World, monkeypatch):
    async def story() -> None:
        shared = world.versions.publish(small_weights(2))
        for number in range(6):
            user = f"{ADAPTER}/user-{number}"
            teach(world, small_weights(10 + number), user)
            await world.served(user)
        teach(world, small_weights(20), "acme/sales")
        await world.served("acme/sales")
        world.versions.publish(small_weights(3))
        teach(world, small_weights(21), "acme/sales")
        world.versions.registry.revoke(ADAPTER, shared.version, "erased")
        asked: list[bool] = []
        add = world.engine.add_lora

        async def its_turn(request: object) -> None:
            asked.append(any(shared.version[7:] in each.lora_name for each in world.server.lora_requests.values()))
            await add(request)

        monkeypatch.setattr(world.engine, "add_lora", its_turn)
        await world.poll()
        assert asked
        assert not any(asked)

    run(story())


def test_a_shared_part_that_is_revoked_during_a_poll_is_not_put_into_service(world: World, monkeypatch):
    async def story() -> None:
        own, first = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        await world.served(USER)
        second = world.versions.publish(small_weights(3))
        add = world.engine.add_lora

        async def revoked_meanwhile(request: object) -> None:
            world.versions.registry.revoke(ADAPTER, second.version, "erased")
            await add(request)

        with monkeypatch.context() as context:
            context.setattr(world.engine, "add_lora", revoked_meanwhile)
            await world.poll()
        assert await world.served(USER) == both(world, own, first)

    run(story())


def test_an_error_that_is_remembered_holds_no_weights(world: World):
    async def story() -> None:
        teach(world, small_weights(1).replace(b"q_proj", b"k_proj"))
        world.versions.publish(small_weights(2))
        await world.served(USER)
        (error,) = world.folders._unfit.values()
        frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
        assert not any(isinstance(value, bytes | Part) for found in frames for value in found.values())

    run(story())


def test_a_personal_version_that_is_revoked_is_taken_out_of_service(world: World):
    async def story() -> None:
        own, _ = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        await world.served(USER)
        world.versions.registry.revoke(USER, own.version, "wrong")
        await world.poll()
        assert await world.served(USER) == 404

    run(story())


@pytest.mark.parametrize("revoked", [0, 1])
def test_a_name_with_a_version_keeps_its_shared_part_until_one_is_revoked(world: World, revoked: int):
    async def story() -> None:
        states = own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        assert await world.served(pinned(own)) == both(world, own, shared)
        assert world.server.lora_requests[pinned(own)].lora_name == pinned(own, shared)
        newer = world.versions.publish(small_weights(3))
        teach(world, small_weights(4))
        await world.poll()
        assert await world.served(pinned(own)) == both(world, own, shared)
        world.versions.registry.revoke(states[revoked].adapter, states[revoked].version, "wrong")
        await world.poll()
        assert pinned(own) not in world.server.lora_requests
        assert await world.served(pinned(own)) == (both(world, own, newer) if revoked else 404)

    run(story())


def test_the_name_in_a_reply_can_be_asked_for(world: World):
    async def story() -> None:
        own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        await world.served(USER)
        reply = world.server.lora_requests[USER].lora_name
        world.versions.publish(small_weights(3))
        await world.poll()
        assert await world.served(reply) == both(world, own, shared)
        assert await world.served(pinned(own, shared)) == both(world, own, shared)
        assert len({request.lora_name for request in world.server.lora_requests.values()}) == 3
        world.versions.registry.revoke(ADAPTER, shared.version, "wrong")
        await world.poll()
        assert await world.served(reply) == 404

    run(story())


def test_two_versions_that_do_not_belong_together_are_not_found(world: World):
    async def story() -> None:
        own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        stranger = VersionPublisher(world.versions.store, "acme/sales").publish(small_weights(3))
        other = teach(world, small_weights(4), OTHER)
        for states in ((own, stranger), (own, other), (own, own), (shared, shared), (shared, own)):
            assert await world.served(pinned(*states)) == 404
        refused = world.versions.manifest(small_weights(5)).model_copy(update={"outcome": "refused"})
        world.versions.registry.publish(refused, [small_weights(5)], lambda _: None)
        assert await world.served(f"{pinned(own)}+{refused.digest()[7:]}") == 404

    run(story())


def test_names_with_two_versions_are_read():
    one, two = "a" * 64, "b" * 64
    both_versions = RequestedName(USER, "canary", f"sha256:{one}", f"sha256:{two}")
    assert parse_requested_name(f"{USER}#canary@{one}+{two}") == both_versions
    for name in (f"{USER}+{two}", f"{USER}@{one}+", f"{USER}@{one}+{two}+{two}", f"{USER}@{one}+{two[1:]}", f"+{two}"):
        assert parse_requested_name(name) is None


def test_another_alias_is_that_of_both(world: World):
    async def story() -> None:
        own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        newer = world.versions.manifest(small_weights(3))
        world.versions.registry.publish(newer, [small_weights(3)], lambda _: None, "canary")
        publisher = VersionPublisher(world.versions.store, USER)
        manifest = publisher.manifest(small_weights(4)).model_copy(update={"extends": ADAPTER})
        publisher.registry.publish(manifest, [small_weights(4)], lambda _: None, "canary")
        await world.served(f"{USER}#canary")
        name = world.server.lora_requests[f"{USER}#canary"].lora_name
        assert name == f"{USER}#canary@{manifest.digest()[7:]}+{newer.digest()[7:]}"
        assert await world.served(USER) == both(world, own, shared)

    run(story())


def test_two_users_of_one_shared_adapter_have_folders_of_their_own(world: World):
    async def story() -> None:
        shared = world.versions.publish(small_weights(2))
        owns = [teach(world, small_weights(1), USER), teach(world, small_weights(5), OTHER)]
        for own in owns:
            assert await world.served(own.adapter) == both(world, own, shared)
        paths = {Path(request.lora_path) for request in world.server.lora_requests.values()}
        assert {path.parent.name for path in paths} == {"user-42", "user-7"}
        assert len({path.name for path in paths}) == 2
        changed = teach(world, small_weights(6), OTHER)
        await world.poll()
        assert await world.served(USER) == both(world, owns[0], shared), "what one user teaches reaches nobody else"
        assert await world.served(OTHER) == both(world, changed, shared)

    run(story())


def test_a_poll_reads_the_alias_of_a_shared_adapter_once(world: World, monkeypatch):
    async def story() -> None:
        shared = world.versions.publish(small_weights(2))
        owns = [teach(world, small_weights(seed), f"{ADAPTER}/user-{seed}") for seed in range(4)]
        for own in owns:
            await world.served(own.adapter)
        reads: list[str] = []
        get = DirectoryStore.get
        monkeypatch.setattr(DirectoryStore, "get", lambda self, key, *rest: reads.append(key) or get(self, key, *rest))
        for _ in range(3):
            reads.clear()
            await world.poll()
            assert reads.count(alias_key(ADAPTER, "live")) == 1
            assert all(reads.count(alias_key(own.adapter, "live")) == 1 for own in owns)
            assert not any(key.startswith("blobs/") for key in reads)
        newer = world.versions.publish(small_weights(3))
        await world.poll()
        assert [await world.served(own.adapter) for own in owns] == [both(world, own, newer) for own in owns]
        assert shared.version != newer.version

    run(story())


def test_what_a_poll_read_takes_nothing_back_that_was_resolved_meanwhile(world: World):
    async def story() -> None:
        own, _ = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        poll = name_refresher._Poll(world.now_s, SharedVersions())
        world.folders.find(parse_requested_name(USER), "shipped", poll.shared_versions)
        newer = world.versions.publish(small_weights(3))
        world.now_s += 1
        assert await world.served(USER) == both(world, own, newer)
        await world.refresher._refresh(USER, poll)
        assert await world.served(USER) == both(world, own, newer)

    run(story())


def test_a_store_that_is_away_takes_nothing_out_of_service(world: World, monkeypatch):
    async def story() -> None:
        own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        await world.served(USER)
        get = DirectoryStore.get

        def away(self: DirectoryStore, key: str, *rest: object):
            if key == alias_key(ADAPTER, "live"):
                raise OSError("unplugged")
            return get(self, key, *rest)

        with monkeypatch.context() as context:
            context.setattr(DirectoryStore, "get", away)
            await world.poll()
            assert await world.served(USER) == both(world, own, shared)
            assert await world.served(f"{USER}#live") == 404
            assert world.metrics.stale_since._value.get() > 0
        await world.poll()
        assert world.metrics.stale_since._value.get() == 0

    run(story())


def test_what_cannot_be_put_together_is_served_alone_and_not_tried_again_for_a_minute(
    world: World, monkeypatch, caplog
):
    async def story() -> None:
        weights = small_weights(1).replace(b"q_proj", b"k_proj")
        own, shared = teach(world, weights), world.versions.publish(small_weights(2))
        reads: list[str] = []
        fetch = VersionFolders._weights
        monkeypatch.setattr(
            VersionFolders, "_weights", lambda self, found: reads.append(found.manifest.adapter) or fetch(self, found)
        )
        assert [await world.served(name) for name in (USER, f"{USER}#live", USER)] == [weights] * 3
        await world.poll()
        assert await world.served(USER) == weights
        assert reads.count(ADAPTER) == 1, "both were put together once"
        assert world.laid_down() == {f"@{own.version[7:]}"}
        assert f"{USER} and {ADAPTER} have other layers" in caplog.text
        assert await world.served(pinned(own, shared)) == 404, "who asks for both is given both or nothing"

    run(story())


def test_a_misfit_that_replaces_a_revoked_shared_version_leaves_the_own_part_in_service(world: World):
    async def story() -> None:
        own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        assert await world.served(USER) == both(world, own, shared)
        world.versions.publish(small_weights(3).replace(b"q_proj", b"k_proj"))
        world.versions.registry.revoke(ADAPTER, shared.version, "erased")
        await world.poll()
        assert await world.served(USER) == small_weights(1)
        newer = world.versions.publish(small_weights(4))
        await world.poll()
        assert await world.served(USER) == both(world, own, newer)

    run(story())


def test_a_shared_version_that_cannot_be_served_leaves_the_one_before_in_service(world: World):
    async def story() -> None:
        own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        assert await world.served(USER) == both(world, own, shared)
        manifest = world.versions.manifest(small_weights(3))
        world.versions.registry.publish(manifest, [small_weights(3)], lambda _: None)
        path = world.versions.store._path(blob_key(manifest.weights.digest))
        path.chmod(0o600)
        path.write_bytes(small_weights(3)[:-1] + b"\xff")
        await world.poll()
        assert await world.served(USER) == both(world, own, shared)
        assert world.metrics.refreshes.labels("failed")._value.get() == 1
        assert world.metrics.stale_since._value.get() > 0

    run(story())


def test_a_shared_adapter_of_another_base_is_left_out(world: World, caplog):
    async def story() -> None:
        teach(world, small_weights(1))
        VersionPublisher(world.versions.store, ADAPTER, "sha256:" + "c" * 64).publish(small_weights(2))
        assert await world.served(USER) == small_weights(1)
        assert "belong to different bases" in caplog.text

    run(story())


def test_a_damaged_folder_is_written_again_and_a_whole_one_is_not_fetched(world: World, monkeypatch):
    async def story() -> None:
        own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        await world.served(USER)
        file = Path(world.server.lora_requests[USER].lora_path) / "adapter_model.safetensors"
        file.write_bytes(b"damaged")
        await world.served(f"{USER}#live")
        assert file.read_bytes() == both(world, own, shared)
        monkeypatch.setattr(VersionFolders, "_weights", lambda *_: pytest.fail("the weights were read again"))
        await world.served(pinned(own))
        assert file.read_bytes() == both(world, own, shared)

    run(story())


def test_the_bytes_of_what_was_put_together_are_counted_and_have_a_limit(world: World, caplog):
    async def story() -> None:
        own, shared = teach(world, small_weights(1)), world.versions.publish(small_weights(2))
        size_bytes = len(both(world, own, shared))
        stored_bytes = len(small_weights(1)) + len(small_weights(2))  # with two heads, so they are counted first
        world.folders._max_bytes = size_bytes + stored_bytes
        assert await world.served(USER) == both(world, own, shared)
        assert world.folders.total_bytes == size_bytes
        other = teach(world, small_weights(3), OTHER)
        assert await world.served(OTHER) == both(world, other, shared)
        assert world.folders.total_bytes == 2 * size_bytes
        third = teach(world, small_weights(4), f"{ADAPTER}/user-9")
        assert await world.served(third.adapter) == 404
        assert "PERENNIAL_RESOLVER_MAX_GIB" in caplog.text
        assert world.folders.total_bytes == 2 * size_bytes

    run(story())


def test_more_bytes_than_both_parts_have_are_counted_before_they_are_written(world: World):
    """A scale of 4 / 61 is kept with a whole alpha at rank 122 and not at 61 + 2."""
    own, shared = teach(world, small_weights(1, 61), rank=61), world.versions.publish(small_weights(2))
    found = world.folders.find(parse_requested_name(USER), "shipped")
    size_bytes = len(both(world, own, shared))
    assert size_bytes > found.size_bytes
    world.folders._max_bytes = size_bytes - 1
    with pytest.raises(BackendError, match="PERENNIAL_RESOLVER_MAX_GIB"):
        world.folders.prepare(found, "shipped")
    assert world.folders.total_bytes == 0
    assert world.laid_down() == set()
    world.folders._max_bytes = size_bytes
    world.folders.prepare(found, "shipped")
    assert world.folders.total_bytes == size_bytes


def test_a_shared_adapter_that_is_none_of_the_tenants_is_not_read(world: World, monkeypatch):
    world.folders._require_own = TenantSettings(tenant="acme").require_own
    own = teach(world, small_weights(1), "acme/user-42")
    shared = VersionPublisher(world.versions.store, "acme").publish(small_weights(2))
    get = DirectoryStore.get
    for name in ("acme/user-42", pinned(own), pinned(own, shared)):
        with monkeypatch.context() as context:
            context.setattr(
                DirectoryStore, "get",
                lambda self, key, *rest: pytest.fail(key) if key == alias_key("acme", "live") else get(self, key, *rest),
            )  # fmt: skip
            with pytest.raises(OtherTenantError, match="got: acme; allowed: adapters below acme/"):
                world.folders.find(parse_requested_name(name), "shipped")
    teach(world, small_weights(1))
    world.versions.publish(small_weights(2))
    assert world.folders.find(parse_requested_name(USER), "shipped").shared is not None


# ---- trials


def test_the_engine_tries_what_was_put_together_without_what_one_part_alone_predicts(world: World):
    async def story() -> None:
        own = teach(world, small_weights(1), probes={"sentence-1": {"1": -9.0}})
        shared = world.versions.publish(small_weights(2), probes={"sentence-1": {"1": -9.0}})
        assert await world.served(USER) == both(world, own, shared)
        assert len(world.engine.prompts) == 1
        assert await world.served(ADAPTER) == 404, "each alone is compared"
        newer = world.versions.publish(small_weights(3))
        world.engine.predicts[both(world, own, newer)] = {1: float("nan")}
        await world.poll()
        assert await world.served(USER) == both(world, own, shared)
        assert world.metrics.stale_since._value.get() > 0

    run(story())


def test_a_version_that_passed_alone_is_tried_again_with_its_shared_part(world: World):
    async def story() -> None:
        own = teach(world, small_weights(1))
        assert await world.served(USER) == small_weights(1)
        shared = world.versions.publish(small_weights(2))
        world.engine.predicts[both(world, own, shared)] = {1: float("nan")}
        await world.poll()
        assert await world.served(USER) == small_weights(1)
        newer = world.versions.publish(small_weights(3))
        await world.poll()
        assert await world.served(USER) == both(world, own, newer)

    run(story())


def test_a_rank_that_the_engine_has_no_room_for_is_the_sum_of_both(world: World, caplog):
    async def story() -> None:
        own = teach(world, small_weights(1))
        shared = world.versions.publish(small_weights(2, 8), rank=8, alpha=16)
        world.engine.refuses.add(composed_digest(own.version, shared.version)[7:])
        assert await world.served(USER) == small_weights(1), "alone"
        assert f"cannot load {USER} together with {ADAPTER}, an adapter of rank 2 + 8 = 10" in caplog.text
        assert "a --max-lora-rank of 10 or more" in caplog.text

    run(story())
