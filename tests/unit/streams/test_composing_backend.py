"""A personal adapter and the shared one beneath it as one version of any backend: every order of events on both sides."""

from __future__ import annotations

import threading
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.registry import Registry
from perennial.streams.client.backend import BackendError, Deactivates, HasRoom, UnfitVersionError
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.personal.composing_backend import ComposingBackend
from perennial.streams.client.personal.composition import composed_digest
from perennial.streams.client.personal.served_parts import follower_name, parts_of
from perennial.streams.client.testing import MemoryBackend, next_manifest

USER, TENANT = "acme/support/user-42", "acme/support"
STEM = "base_model.model.model.layers.0.self_attn.q_proj"
_seeds = count()


class Versions:
    """Makes versions of both adapters, and hands them to a side as a subscriber does."""

    def __init__(self, folder: Path) -> None:
        self._registry = Registry(DirectoryStore(folder / "store", fsync=False))

    def make(
        self, adapter: str, rank: int = 2, extends: str | None = TENANT, **manifest: Any
    ) -> tuple[str, bytes, Any]:
        rng = np.random.default_rng(next(_seeds))
        weights = save(
            {
                f"{STEM}.lora_A.weight": rng.standard_normal((rank, 3)).astype(np.float32),
                f"{STEM}.lora_B.weight": rng.standard_normal((3, rank)).astype(np.float32),
            }
        )
        made = next_manifest(self._registry, adapter, weights, rank=rank, alpha=2 * rank, **manifest)
        made = made.model_copy(update={"extends": extends if adapter == USER else None})
        return f"{adapter}@{made.digest()[7:]}", weights, made


def serve(side: Any, version: tuple[str, bytes, Any]) -> str:
    side.load(*version)
    side.warm(version[0])
    side.activate(version[0])
    return version[0]


def composed(own: tuple[str, bytes, Any], shared: tuple[str, bytes, Any]) -> str:
    return f"{USER}@{composed_digest('sha256:' + own[0][-64:], 'sha256:' + shared[0][-64:])[7:]}"


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path)


@pytest.fixture
def inner() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def both(inner: MemoryBackend) -> ComposingBackend:
    return ComposingBackend(inner, f"{USER}@", f"{TENANT}@")


@pytest.mark.parametrize("shared_first", [False, True])
def test_both_orders_of_arrival_serve_the_same(versions, inner, both, shared_first):
    own, shared = versions.make(USER), versions.make(TENANT, rank=3)
    if shared_first:
        serve(both.shared, shared)
        assert (inner.held, both.served) == ({}, None), "nobody has an own version yet"
    serve(both.own, own)
    if not shared_first:
        assert inner.active == own[0] == both.served
        assert inner.held[own[0]] == own[1], "alone it is served as it is"
        serve(both.shared, shared)
        # The follower lets the own version go that is held alone, under a name of its own adapter.
        assert both.shared.drain(f"{TENANT}@{own[0][-64:]}", 0)
        both.shared.unload(f"{TENANT}@{own[0][-64:]}")
    name = composed(own, shared)
    assert (inner.list(), inner.active, both.served, both.served_with) == ([name], name, name, shared[0])
    served, of_own, of_shared = load(inner.held[name]), load(own[1]), load(shared[1])
    for tensor, axis in ((f"{STEM}.lora_A.weight", 0), (f"{STEM}.lora_B.weight", 1)):
        assert np.array_equal(served[tensor], np.concatenate([of_shared[tensor], of_own[tensor]], axis))
    assert both.own.list() == [own[0]]
    assert both.shared.list() == [shared[0]]


def test_a_newer_version_of_either_side_replaces_what_is_served_and_the_old_ones_leave(versions, inner, both):
    own, shared = versions.make(USER), versions.make(TENANT)
    serve(both.own, own), serve(both.shared, shared)
    newer_shared = versions.make(TENANT)
    serve(both.shared, newer_shared)
    assert inner.active == composed(own, newer_shared)
    assert composed(own, shared) in inner.list(), "requests may still use it"
    inner.busy = {composed(own, shared)}
    assert not both.shared.drain(shared[0], 0)
    with pytest.raises(BackendError, match="still use"):
        both.shared.unload(shared[0])
    assert shared[0] in both.shared.list(), "so nobody acknowledges that it has gone"
    inner.busy = set()
    assert both.shared.drain(shared[0], 0)
    both.shared.unload(shared[0])
    newer_own = versions.make(USER)
    serve(both.own, newer_own)
    assert inner.active == composed(newer_own, newer_shared)
    assert both.own.drain(own[0], 0)
    both.own.unload(own[0])
    for name in both.shared.list():
        if name != newer_shared[0]:
            both.shared.unload(name)
    assert inner.list() == [composed(newer_own, newer_shared)]
    assert both.own.list() == [newer_own[0]]


@pytest.mark.parametrize("deactivated_first", [False, True])
def test_without_its_shared_version_the_own_one_is_served_alone(versions, inner, both, deactivated_first):
    own, shared = versions.make(USER), versions.make(TENANT)
    serve(both.own, own), serve(both.shared, shared)
    if deactivated_first:
        both.shared.deactivate(shared[0])
        assert inner.active == own[0]
    both.shared.unload(shared[0])
    assert (inner.list(), inner.active, both.served_with) == ([own[0]], own[0], None)
    assert both.shared.list() == []
    again = versions.make(TENANT)
    serve(both.shared, again)
    assert inner.active == composed(own, again)


def test_a_revoked_shared_version_leaves_service_also_where_there_is_no_place_for_the_own_one(versions, inner, both):
    own, shared = versions.make(USER), versions.make(TENANT)
    serve(both.shared, shared), serve(both.own, own)
    inner.fails = lambda call, _: call == "load" and len(inner.held) > 0
    with pytest.raises(BackendError):
        both.shared.deactivate(shared[0])
    assert (inner.active, both.served) == (None, None)
    both.shared.unload(shared[0])
    assert (inner.active, inner.list(), both.shared.list()) == (own[0], [own[0]], [])


def test_an_own_version_that_could_not_be_served_alone_is_tried_again(versions, inner, both):
    own, shared = versions.make(USER), versions.make(TENANT)
    serve(both.shared, shared), serve(both.own, own)
    inner.fails = lambda call, _: call == "load"
    both.shared.unload(shared[0])
    assert (inner.list(), both.shared.list()) == ([], []), "an erasure does not wait for the own version"
    both.tend()
    inner.fails = lambda *_: False
    assert both.served is None
    both.tend()
    assert inner.active == both.served == own[0]


def test_a_revoked_own_version_leaves_nothing_in_service(versions, inner, both):
    own, shared = versions.make(USER), versions.make(TENANT)
    serve(both.own, own), serve(both.shared, shared)
    both.own.deactivate(own[0])
    assert (inner.active, both.served) == (None, None)
    both.tend()
    assert inner.active is None
    both.own.unload(own[0])
    assert both.own.list() == []
    newer = versions.make(TENANT)
    serve(both.shared, newer)
    assert inner.active is None, "without an own version nothing is served"
    next_own = versions.make(USER)
    serve(both.own, next_own)
    assert inner.active == composed(next_own, newer)


@pytest.mark.parametrize("side", ["own", "shared"])
@pytest.mark.parametrize("failing", ["load", "warm", "activate"])
def test_what_cannot_be_served_leaves_the_version_before_in_service(versions, inner, both, side, failing):
    own, shared = versions.make(USER), versions.make(TENANT)
    serve(both.own, own), serve(both.shared, shared)
    both.shared.unload(f"{TENANT}@{own[0][-64:]}")
    newer = versions.make(USER if side == "own" else TENANT)
    inner.fails = lambda call, _: call == failing
    sided = getattr(both, side)
    with pytest.raises(BackendError):
        serve(sided, newer)
    sided.unload(newer[0])  # as a subscriber does
    name = composed(own, shared)
    assert (inner.active, inner.list(), both.served) == (name, [name], name)
    assert newer[0] not in sided.list()
    inner.fails = lambda *_: False
    serve(sided, newer)
    assert inner.active == (composed(newer, shared) if side == "own" else composed(own, newer))


def test_versions_of_other_bases_are_not_put_together(versions, inner, both):
    own, shared = versions.make(USER), versions.make(TENANT)
    serve(both.own, own), serve(both.shared, shared)
    with pytest.raises(UnfitVersionError, match="different bases"):
        serve(both.shared, versions.make(TENANT, base_sha256="sha256:" + "1" * 64))
    assert inner.active == composed(own, shared)


def test_what_a_process_before_left_is_kept_and_counts_on_both_sides_until_a_version_is_served(versions, inner, both):
    left = f"{USER}@{'7' * 64}"
    inner.load(left, versions.make(USER)[1], None)
    inner.activate(left)
    inner.load(f"{TENANT}@{'8' * 64}", versions.make(TENANT)[1], None)  # another subscriber's
    seen = f"{TENANT}@{'7' * 64}"
    assert both.own.list() == [left]
    assert both.shared.list() == [seen]
    shared = versions.make(TENANT)
    serve(both.shared, shared)
    assert not both.shared.drain(seen, 0)
    both.shared.deactivate(seen)
    with pytest.raises(BackendError, match="is kept"):
        both.shared.unload(seen)
    assert inner.active == left
    own = versions.make(USER)
    serve(both.own, own)
    assert seen in both.shared.list()
    assert left in both.own.list()
    assert both.shared.drain(seen, 0)
    both.shared.unload(seen)
    assert (both.own.list(), both.shared.list()) == ([own[0]], [shared[0]])
    assert inner.list() == sorted([composed(own, shared), f"{TENANT}@{'8' * 64}"]), "no other subscriber's is touched"


def test_a_restart_with_the_same_pair_takes_over_what_is_in_service(versions, inner, both):
    own, shared = versions.make(USER), versions.make(TENANT)
    serve(both.shared, shared), serve(both.own, own)
    again = ComposingBackend(inner, f"{USER}@", f"{TENANT}@")
    serve(again.shared, shared)
    inner.fails = lambda call, _: call == "warm"
    with pytest.raises(BackendError):
        serve(again.own, own)
    again.own.unload(own[0])
    assert inner.active == composed(own, shared), "what is in service stays there"
    inner.fails = lambda *_: False
    serve(again.own, own)
    assert inner.list() == [composed(own, shared)] == [again.served]
    assert (again.own.list(), again.shared.list()) == ([own[0]], [shared[0]])


def test_an_own_version_that_extends_nothing_is_served_alone_and_the_shared_one_is_dropped(versions, inner, both):
    own, shared = versions.make(USER), versions.make(TENANT)
    serve(both.shared, shared), serve(both.own, own)
    plain = versions.make(USER, extends=None)
    serve(both.own, plain)
    assert (inner.active, both.served_with) == (plain[0], None)
    assert both.needs_shared, "the version before contains it"
    serve(both.shared, versions.make(TENANT))
    assert inner.active == plain[0]
    both.own.unload(own[0])
    assert not both.needs_shared
    both.forget_shared()
    assert (inner.list(), both.shared.list()) == ([plain[0]], [])


def test_sides_have_what_the_backend_within_has(tmp_path, both):
    class Plain:
        base_sha256 = "sha256:" + "5" * 64

    plain = ComposingBackend(Plain(), f"{USER}@", f"{TENANT}@")  # type: ignore[arg-type]
    folders = ComposingBackend(DirectoryBackend(tmp_path / "served"), f"{USER}@", f"{TENANT}@")
    for side in ("own", "shared"):
        assert isinstance(getattr(both, side), Deactivates)
        assert not isinstance(getattr(both, side), HasRoom)
        assert not isinstance(getattr(plain, side), Deactivates)
        assert getattr(plain, side).base_sha256 == Plain.base_sha256
        assert isinstance(getattr(folders, side), HasRoom)


def test_folders_name_both_parts(tmp_path, versions):
    backend = DirectoryBackend(tmp_path / "served")
    both = ComposingBackend(backend, f"{USER}@", f"{TENANT}@")
    own, shared = versions.make(USER), versions.make(TENANT)
    serve(both.own, own), serve(both.shared, shared)
    name = composed(own, shared)
    assert backend.current(USER) == name == both.served
    manifest = type(own[2]).from_bytes((backend.folder_of(name) / "manifest.json").read_bytes())
    assert parts_of(manifest) == ("sha256:" + own[0][-64:], "sha256:" + shared[0][-64:])
    assert manifest.rank == 4
    assert parts_of(own[2]) is None


def test_followers_of_one_shared_adapter_have_names_of_their_own():
    assert follower_name("host-1", USER) == "host-1:user-42"
    names = {follower_name("h" * 256, f"acme/support/user-{number}") for number in range(20)}
    assert len(names) == 20
    assert {len(name) for name in names} == {256}


def test_what_became_the_served_version_since_a_side_listed_it_stays(versions, inner, both):
    own, shared = versions.make(USER), versions.make(TENANT)
    name = composed(own, shared)
    inner.load(name, own[1], own[2])
    assert name in both.own.list()
    stray = next(found for found in both.shared.list() if found.endswith(name[-64:]))
    serve(both.shared, shared)
    serve(both.own, own)
    assert not both.own.drain(name, 0)
    assert not both.shared.drain(stray, 0)
    both.own.unload(name)
    both.shared.unload(stray)
    assert (inner.active, both.served, both.served_with) == (name, name, shared[0])


def test_the_served_name_waits_for_no_load(versions):
    loading, go_on = threading.Event(), threading.Event()

    class Slow(MemoryBackend):
        def load(self, name, weights, manifest):
            if loading.is_set():
                go_on.wait(180)
            super().load(name, weights, manifest)

    both = ComposingBackend(Slow(), f"{USER}@", f"{TENANT}@")
    own, newer = versions.make(USER), versions.make(USER)
    serve(both.own, own)
    loading.set()
    thread = threading.Thread(target=serve, args=(both.own, newer))
    thread.start()
    found = []
    asking = threading.Thread(target=lambda: found.append((both.served, both.served_with)), daemon=True)
    asking.start()
    asking.join(60)
    go_on.set()
    thread.join()
    assert found == [(own[0], None)]
    assert both.served == newer[0]


def test_what_is_held_is_loaded_again_before_it_is_served(versions, both, inner):
    own, first, second = versions.make(USER), versions.make(TENANT), versions.make(TENANT)
    serve(both.own, own)
    serve(both.shared, first)
    serve(both.shared, second)
    inner.calls.clear()
    serve(both.shared, first)  # a rollback, before the version was unloaded
    assert ("load", composed(own, first)) in inner.calls
    assert inner.active == composed(own, first)
