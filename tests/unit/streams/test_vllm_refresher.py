"""Names that vLLM knows follow their aliases, and what nobody uses leaves the engine and the disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.streams.client.vllm_plugin import engine_trial, name_refresher, registration
from perennial.streams.client.vllm_plugin.name_refresher import GRACE_S, UNSEEN_S
from perennial.streams.probe_texts import PROBE_TEXTS
from perennial.testing import small_weights
from tests.versions import VersionPublisher
from tests.vllm_stand_in import LoRARequest
from tests.vllm_world import ADAPTER, DAY_S, World, run


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_name_follows_its_alias_and_a_version_stays(world: World):
    async def story() -> None:
        old = world.versions.publish(small_weights(1))
        pinned = f"{ADAPTER}@{old.version[7:]}"
        assert await world.served() == small_weights(1)
        assert await world.served(pinned) == small_weights(1)
        new = world.versions.publish(small_weights(2))
        assert await world.served() == small_weights(1)
        await world.poll()
        assert await world.served() == small_weights(2)
        assert await world.served(pinned) == small_weights(1)
        assert world.server.lora_requests[ADAPTER].lora_name == f"{ADAPTER}#live@{new.version[7:]}"
        assert world.metrics.refreshes.labels("replaced")._value.get() == 1

    run(story())


def test_a_refresh_loads_nothing_in_place(world: World):
    """In place, requests under way would go on with other weights, and blocks of the prefix cache would mix versions."""

    async def story() -> None:
        seen: list[tuple[int, str, str]] = []
        for seed in range(4):
            world.versions.publish(small_weights(seed))
            await world.poll()
            assert await world.served() == small_weights(seed)
            request = world.server.lora_requests[ADAPTER]
            seen.append((request.lora_int_id, request.lora_name, request.lora_path))
        for part in zip(*seen, strict=True):
            assert len(set(part)) == 4

    run(story())


def test_requests_under_way_keep_their_version_and_its_folder(world: World):
    async def story() -> None:
        world.versions.publish(small_weights(1))
        await world.served()
        under_way = world.server.lora_requests[ADAPTER]
        states = world.engine.output_processor.request_states
        states["r1"] = SimpleNamespace(lora_name=under_way.lora_name)
        world.versions.publish(small_weights(2))
        await world.poll()
        for _ in range(5):
            await world.poll(GRACE_S)
            world.engine.loaded.pop(under_way.lora_int_id, None)  # the engine's cache was full
            assert await world.engine.answer(under_way) == small_weights(1)
        states.clear()
        await world.poll()
        assert under_way.lora_int_id not in world.engine.loaded
        await world.poll(GRACE_S - 6)
        assert len(world.laid_down()) == 2
        await world.poll(7)
        assert world.laid_down() == {f"@{world.versions.registry.alias(ADAPTER).version[7:]}"}
        assert await world.served() == small_weights(2)

    run(story())


def test_a_request_that_the_engine_has_not_seen_yet_is_waited_for(world: World):
    async def story() -> None:
        world.versions.publish(small_weights(1))
        await world.served()
        early = world.server.lora_requests[ADAPTER]
        world.versions.publish(small_weights(2))
        await world.poll()
        await world.poll(GRACE_S - 10)
        assert await world.engine.answer(early) == small_weights(1)

    run(story())


def test_without_a_view_of_requests_an_hour_is_waited(world: World):
    async def story() -> None:
        del world.engine.output_processor
        world.versions.publish(small_weights(1))
        await world.served()
        old = world.server.lora_requests[ADAPTER]
        world.versions.publish(small_weights(2))
        await world.poll()
        await world.poll(UNSEEN_S - 10)
        assert old.lora_int_id in world.engine.loaded
        await world.poll(20)
        assert old.lora_int_id not in world.engine.loaded

    run(story())


def test_a_revoked_version_is_taken_out_of_service_by_every_name(world: World):
    async def story() -> None:
        version = world.versions.publish(small_weights(1)).version
        names = [ADAPTER, f"{ADAPTER}#live", f"{ADAPTER}@{version[7:]}"]
        assert [await world.served(name) for name in names] == [small_weights(1)] * 3
        world.versions.registry.revoke(ADAPTER, version, "wrong")
        await world.poll()
        assert [await world.served(name) for name in names] == [404] * 3
        await world.poll(GRACE_S)
        await world.poll(GRACE_S)
        assert world.engine.loaded == {}
        assert world.laid_down() == set()

    run(story())


def test_a_revoked_version_is_replaced_without_a_pause_where_the_alias_moved_first(world: World):
    async def story() -> None:
        version = world.versions.publish(small_weights(1)).version
        await world.served()
        world.versions.publish(small_weights(2), kind="revoke")
        world.versions.registry.revoke(ADAPTER, version, "wrong")
        await world.poll()
        assert ADAPTER in world.server.lora_requests
        assert await world.served() == small_weights(2)

    run(story())


def test_a_retired_adapter_is_taken_out_of_service_and_comes_back(world: World):
    async def story() -> None:
        version = world.versions.publish(small_weights(1)).version
        await world.served()
        world.versions.registry.retire(ADAPTER, "live", "nothing is left", version)
        await world.poll()
        assert await world.served() == 404
        world.versions.publish(small_weights(2))
        assert await world.served() == small_weights(2)

    run(story())


def damage(world: World, weights: bytes) -> Callable[[], None]:
    """Publish a version, damage its stored weights, and return what repairs them."""
    manifest = world.versions.manifest(weights)
    world.versions.registry.publish(manifest, [weights], lambda _: None)
    path = world.versions.store._path(blob_key(manifest.weights.digest))
    path.chmod(0o600)
    path.write_bytes(weights[:-1] + b"\xff")
    return lambda: path.write_bytes(weights) and None


def test_a_version_that_cannot_be_served_leaves_the_one_before_in_service(world: World, caplog):
    async def story() -> None:
        old = world.versions.publish(small_weights(1)).version
        assert await world.served() == small_weights(1)
        damage(world, small_weights(2))
        for _ in range(3):
            await world.poll()
        assert await world.served() == small_weights(1)
        assert world.metrics.stale_since._value.get() > 0
        assert world.metrics.refreshes.labels("failed")._value.get() == 3
        assert len(caplog.messages) == 1
        world.versions.registry.revoke(ADAPTER, old, "wrong")
        await world.poll()
        assert await world.served() == 404, "a revoked version is not kept for want of another"
        await world.poll()
        assert world.metrics.stale_since._value.get() == 0

    caplog.set_level(logging.WARNING, "vllm.perennial")
    run(story())


def test_a_version_that_the_engine_refuses_is_tried_again_after_a_minute(world: World):
    async def story() -> None:
        world.versions.publish(small_weights(1))
        await world.served()
        new = world.versions.publish(small_weights(2)).version
        world.engine.refuses.add(new[7:])
        loads = iter(world.server.lora_id_counter.ids)
        before = next(loads)
        for _ in range(3):
            await world.poll()
        assert next(loads) == before + 2, "the engine is asked once"
        assert world.metrics.refreshes.labels("failed")._value.get() == 3
        assert world.metrics.stale_since._value.get() > 0
        assert await world.served() == small_weights(1)
        world.engine.refuses.clear()
        await world.poll(61)
        assert await world.served() == small_weights(2)
        assert world.metrics.stale_since._value.get() == 0

    run(story())


def test_a_store_that_is_away_takes_nothing_out_of_service(world: World, monkeypatch):
    async def story() -> None:
        world.versions.publish(small_weights(1))
        await world.served()
        with monkeypatch.context() as away:
            away.setattr(DirectoryStore, "get", lambda *_: (_ for _ in ()).throw(OSError("unplugged")))
            away.setattr(DirectoryStore, "exists", lambda *_: (_ for _ in ()).throw(OSError("unplugged")))
            for _ in range(3):
                await world.poll()
            assert await world.served() == small_weights(1)
            assert world.metrics.stale_since._value.get() > 0
        await world.poll()
        assert world.metrics.stale_since._value.get() == 0

    run(story())


def test_a_name_that_was_unloaded_by_hand_is_left_alone(world: World):
    async def story() -> None:
        world.versions.publish(small_weights(1))
        await world.served()
        ours = world.server.lora_requests.pop(ADAPTER)
        theirs = LoRARequest(ADAPTER, 77, ours.lora_path)
        world.server.lora_requests[ADAPTER] = theirs
        world.versions.publish(small_weights(2))
        await world.poll()
        assert world.server.lora_requests[ADAPTER] is theirs
        assert world.resolver.followed == {}

    run(story())


def test_a_load_in_place_over_our_id_is_not_dropped(world: World):
    async def story() -> None:
        world.versions.publish(small_weights(1))
        await world.served()
        ours = world.server.lora_requests[ADAPTER]
        world.server.lora_requests[ADAPTER] = LoRARequest(ADAPTER, ours.lora_int_id, ours.lora_path)
        await world.poll()
        await world.poll(GRACE_S)
        assert ours.lora_int_id in world.engine.loaded

    run(story())


def test_a_name_that_nobody_asks_for_takes_no_room_after_a_day(world: World):
    async def story() -> None:
        versions = [world.versions.publish(small_weights(seed)).version for seed in range(3)]
        for version in versions:
            await world.served(f"{ADAPTER}@{version[7:]}")
        await world.poll(DAY_S - 1)
        assert len(world.laid_down()) == 3
        await world.poll(2)
        await world.served(f"{ADAPTER}@{versions[0][7:]}")  # it is asked for again, and costs no fetch
        for _ in range(3):
            await world.poll(GRACE_S)
        assert world.laid_down() == {f"@{versions[0][7:]}"}
        assert set(world.server.lora_requests) == {f"{ADAPTER}@{versions[0][7:]}"}
        assert len(world.engine.loaded) == 1
        assert world.folders.total_bytes == len(small_weights(0))

    run(story())


def test_a_version_of_two_names_stays_as_long_as_one_of_them(world: World):
    async def story() -> None:
        version = world.versions.publish(small_weights(1)).version
        pinned = f"{ADAPTER}@{version[7:]}"
        await world.served()
        await world.served(pinned)
        world.versions.publish(small_weights(2))
        for _ in range(4):
            await world.poll(GRACE_S)
        assert await world.served(pinned) == small_weights(1)
        assert len(world.laid_down()) == 2

    run(story())


def test_a_rollback_to_weights_served_before_keeps_requests_apart(world: World):
    async def story() -> None:
        world.versions.publish(small_weights(1))
        await world.served()
        names = {world.server.lora_requests[ADAPTER].lora_name}
        for seed in (2, 1, 2):
            world.versions.publish(small_weights(seed), kind="rollback")
            await world.poll()
            assert await world.served() == small_weights(seed)
            names.add(world.server.lora_requests[ADAPTER].lora_name)
        assert len(names) == 4

    run(story())


def test_names_that_somebody_else_gave_are_not_used_again(world: World):
    async def story() -> None:
        version = world.versions.publish(small_weights(1)).version
        theirs = f"{ADAPTER}#live@{version[7:]}"
        world.server.lora_requests["other"] = LoRARequest(theirs, 99, "/elsewhere")
        await world.served()
        assert world.server.lora_requests[ADAPTER].lora_name == f"{theirs}=2"

    run(story())


def test_one_name_that_fails_does_not_keep_the_others(world: World, monkeypatch):
    async def story() -> None:
        world.versions.publish(small_weights(1))
        other = VersionPublisher(world.versions.store, "acme/sales")
        other.publish(small_weights(3))
        await world.served()
        await world.served("acme/sales")
        damage(world, small_weights(2))
        other.publish(small_weights(4))
        await world.poll()
        assert await world.served() == small_weights(1)
        assert await world.served("acme/sales") == small_weights(4)

    run(story())


def test_requests_and_refreshes_at_once_see_one_version_after_the_other(world: World):
    async def story() -> None:
        world.versions.publish(small_weights(0))
        order: list[int] = []
        done = asyncio.Event()

        async def clients() -> None:
            while not done.is_set():
                weights = await world.served()
                seed = next(seed for seed in range(12) if weights == small_weights(seed))
                order.append(seed)
                await asyncio.sleep(0)

        asking = [asyncio.create_task(clients()) for _ in range(4)]
        for seed in range(1, 12):
            world.versions.publish(small_weights(seed))
            await world.poll(GRACE_S)
        done.set()
        await asyncio.gather(*asking)
        assert order == sorted(order)
        assert len(world.engine.loaded) <= 4

    run(story())


# ---- trials


def test_a_version_is_tried_once_before_it_is_served_and_leaves_nothing_in_the_engine(world: World):
    async def story() -> None:
        version = world.versions.publish(small_weights(1)).version
        assert await world.served() == small_weights(1)
        assert world.engine.prompts == [PROBE_TEXTS["sentence-1"]]
        assert await world.served(f"{ADAPTER}@{version[7:]}") == small_weights(1)
        assert len(world.engine.prompts) == 1
        assert len(world.engine.loaded) == 2
        world.versions.publish(small_weights(2), probes={"passage-1": {"1": -0.5}, "question-1": {"1": -0.5}})
        await world.poll()
        assert world.engine.prompts[1:] == [PROBE_TEXTS["passage-1"], PROBE_TEXTS["question-1"]]
        assert await world.served() == small_weights(2)

    run(story())


def test_a_version_with_which_the_engine_predicts_something_else_is_not_served(world: World, caplog):
    async def story() -> None:
        world.versions.publish(small_weights(1), probes={"sentence-1": {"1": -0.4}})
        assert await world.served() == small_weights(1)
        world.versions.publish(small_weights(2), probes={"sentence-1": {"1": -0.9}})
        await world.poll()
        assert await world.served() == small_weights(1)
        assert await world.served(f"{ADAPTER}#live") == 404
        assert world.metrics.requests.labels("refused")._value.get() == 1
        assert world.metrics.stale_since._value.get() > 0
        world.versions.publish(small_weights(3), probes={"sentence-1": {"1": -0.5}})
        await world.poll()
        assert await world.served() == small_weights(3)

    run(story())
    assert "predicts something else" in caplog.text


def test_a_version_with_which_the_engine_computes_nan_is_refused_and_poisons_nobody(world: World, caplog):
    """Finite weights may overflow in the engine's number format, and NaN in the cache makes other answers NaN."""

    async def story() -> None:
        world.engine.predicts[small_weights(1)] = {1: float("nan")}
        world.versions.publish(small_weights(1))
        assert [await world.served() for _ in range(3)] == [404] * 3
        assert world.engine.nan_blocks == 0
        assert world.engine.loaded == {}
        assert sum(text == PROBE_TEXTS["sentence-1"] for text in world.engine.prompts) < 9, "tried once a minute"

    run(story())
    assert "NaN" in caplog.text


def test_an_engine_that_does_not_answer_a_trial_serves_nothing_new(world: World, monkeypatch):
    async def story() -> None:
        world.versions.publish(small_weights(1))
        await world.served()

        async def stuck(*_: object, **__: object):
            await asyncio.sleep(60)
            yield None

        with monkeypatch.context() as context:
            context.setattr(world.engine, "generate", stuck)
            context.setattr(engine_trial, "_ENGINE_S", 0.1)
            world.versions.publish(small_weights(2))
            await world.poll()
            assert await world.served() == small_weights(1)
        await world.poll()
        assert await world.served() == small_weights(2)

    run(story())


# ---- the endpoint plugin


def test_the_endpoint_plugin_refreshes_in_the_loop_of_the_server(world: World, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_POLL_S", "0.02")

    async def story() -> None:
        plugin = registration.RefreshPlugin()
        plugin.attach_router(None)
        await plugin.init_state(world.engine, SimpleNamespace(openai_serving_models=world.server), None)
        world.versions.publish(small_weights(1))
        assert await world.served() == small_weights(1)
        world.versions.publish(small_weights(2))
        for _ in range(500):
            if await world.served() == small_weights(2):
                break
            await asyncio.sleep(0.02)
        assert await world.served() == small_weights(2)
        plugin._task.cancel()

    run(story())


@pytest.mark.parametrize(("tasks", "is_tried"), [(("generate",), True), (("embed",), False)])
def test_only_a_server_that_generates_text_tries_versions(world: World, tmp_path, monkeypatch, tasks, is_tried):
    monkeypatch.chdir(tmp_path)

    async def story() -> None:
        world.engine.tasks = tasks
        world.resolver.try_out = None
        plugin = registration.RefreshPlugin()
        await plugin.init_state(world.engine, SimpleNamespace(openai_serving_models=world.server), None)
        world.versions.publish(small_weights(1))
        assert await world.served() == small_weights(1)
        assert bool(world.engine.prompts) == is_tried
        plugin._task.cancel()

    run(story())


@pytest.mark.parametrize("state", [SimpleNamespace(), SimpleNamespace(openai_serving_models=SimpleNamespace())])
def test_an_endpoint_plugin_that_finds_another_vllm_says_so(world: World, state, caplog):
    async def story() -> None:
        plugin = registration.RefreshPlugin()
        await plugin.init_state(world.engine, state, None)
        assert plugin._task is None

    run(story())
    assert "names stay at the version" in caplog.text


def test_an_error_of_a_poll_does_not_end_the_refresher(world: World, monkeypatch, caplog):
    async def story() -> None:
        calls = 0
        thrice = asyncio.Event()

        async def failing() -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                thrice.set()
            raise RuntimeError("a bug")

        monkeypatch.setattr(world.refresher, "refresh_all", failing)
        task = asyncio.create_task(world.refresher.run())
        await thrice.wait()
        task.cancel()

    run(story())
    assert "a bug" in caplog.text
    assert name_refresher.GRACE_S >= 60
