"""The contract of backends, and what vLLM alone can do wrong, on a real vLLM server."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from perennial.learner.model.lora import to_safetensors
from perennial.storage.errors import IntegrityError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.client.backend import BackendError, UnfitVersionError
from perennial.streams.client.engines.engine_probe import compare
from perennial.streams.client.engines.vllm_backend import VllmBackend
from perennial.streams.client.failure_kinds import FailureKind, failure_kind
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.settings import Settings
from tests.contract.streams.test_backend import (  # noqa: F401 - the suite runs here on `case` below
    Case,
    test_a_version_comes_into_service_and_leaves_it,
    test_attack_l_a_subscriber_takes_a_revoked_version_out_of_every_backend,
    test_loading_activating_and_unloading_twice_is_no_error,
    test_many_swaps_leave_one_version,
    test_unloading_the_active_version_ends_its_service,
    test_unloading_what_requests_use_changes_nothing,
    test_weights_that_are_no_safetensors_change_nothing,
    test_what_is_not_held_cannot_be_served,
)
from tests.versions import VersionPublisher
from tests.vllm.lora_versions import ADAPTER, Made, VersionMaker
from tests.vllm.vllm_server import MAX_CPU_LORAS, MAX_RANK, VllmServer

pytestmark = pytest.mark.timeout(600)
PROMPT = "The refund for the last order"
RIGHT_NATS = 0.1
"""Mean difference over an answer's tokens that bf16 may make; with another version it is more than twice that."""


@pytest.fixture
def make_backend(server: VllmServer, tmp_path: Path) -> Iterator[Callable[..., VllmBackend]]:
    made: list[VllmBackend] = []

    def make(**changes: Any) -> VllmBackend:
        given = {"max_cpu_loras": MAX_CPU_LORAS, "grace_s": 0.0, "check_s": None, **changes}
        made.append(VllmBackend(server.url, tmp_path / "served", **given))
        return made[-1]

    yield make
    for backend in made:
        for name in backend.list():
            unload_when_drained(backend, name)
        backend.close()
    for card in server.call("/v1/models")[1]["data"]:
        if card["parent"]:
            server.call("/v1/unload_lora_adapter", {"lora_name": card["id"]})


def unload_when_drained(backend: VllmBackend, name: str) -> None:
    end = time.monotonic() + 60
    while not backend.drain(name, 10):
        assert time.monotonic() < end
        time.sleep(0.05)
    backend.unload(name)


@pytest.fixture
def case(make_backend: Callable[..., VllmBackend], maker: VersionMaker, server: VllmServer, tmp_path: Path) -> Case:
    backend = make_backend()
    versions = [made.loaded for made in maker.make(tmp_path / "store", [1, 2])]
    return Case(backend, versions, lambda: backend.active_name(ADAPTER), lambda name: long_request(server, name))


@contextmanager
def long_request(server: VllmServer, name: str) -> Iterator[None]:
    """Keep a request on the version running."""
    thread = threading.Thread(target=ask, args=(server, name), kwargs={"tokens": 250}, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while f'running_lora_adapters="{name}"' not in server.call("/metrics")[1]:
        assert time.monotonic() < end
        time.sleep(0.01)
    yield
    thread.join(120)


def ask(server: VllmServer, model: str, prompt: str = PROMPT, tokens: int = 8) -> tuple[int, dict[str, Any]]:
    return server.call(
        "/v1/completions",
        {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1,
            "ignore_eos": True, "return_tokens_as_token_ids": True,
        },
    )  # fmt: skip


def answer_of(reply: dict[str, Any]) -> tuple[tuple[int, ...], list[float]]:
    """Return the token ids of an answer and their log-probabilities."""
    logprobs = reply["choices"][0]["logprobs"]
    return tuple(int(token.removeprefix("token_id:")) for token in logprobs["tokens"]), logprobs["token_logprobs"]


def difference(maker: VersionMaker, made: Made | None, reply: dict[str, Any], prompt: str = PROMPT) -> float:
    """Return by how much the engine's log-probabilities differ from the version's, in nats in the mean."""
    tokens, nats = answer_of(reply)
    expected = maker.nats_of(made.tensors if made else None, maker.codec.text_ids(prompt), tokens)
    return fmean(abs(one - other) for one, other in zip(nats, expected, strict=True))


def test_the_engine_predicts_what_the_learner_recorded(
    make_backend: Callable[..., VllmBackend], maker: VersionMaker, tmp_path: Path
):
    backend = make_backend()
    one, two = maker.make(tmp_path / "store", [3, 4])
    backend.load(*one.loaded)
    assert compare(one.name, one.manifest, backend.api) < 0.05
    swapped = two.manifest.model_copy(update={"probes": one.manifest.probes})
    backend.activate(one.name)
    with pytest.raises(UnfitVersionError, match="predicts something else"):
        backend.load(two.name, two.weights, swapped)
    assert backend.list() == [one.name]
    assert backend.active_name(ADAPTER) == one.name


def test_a_version_that_the_engine_computes_otherwise_leaves_the_one_before_in_service(
    make_backend: Callable[..., VllmBackend], maker: VersionMaker, tmp_path: Path
):
    backend = make_backend(grace_s=0.0)
    (one,) = maker.make(tmp_path / "store", [5])
    publisher = VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER, maker.base.digest)
    settings = Settings.of(poll_s=0.05, kafka="", env_file=None)
    with Subscriber(ADAPTER, backend, store=publisher.store, settings=settings) as subscriber:
        assert subscriber.wait_for(1, 120)
        bad = to_safetensors(maker.tensors(6))
        publisher.publish(bad, rank=maker.rank, alpha=2 * maker.rank, probes=one.manifest.probes)
        end = time.monotonic() + 60
        while not re.search(rb'subscriber_failures_total{[^}]*kind="version"', subscriber._metrics.exposition()):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert (subscriber.generation, backend.active_name(ADAPTER)) == (1, one.name)


def test_an_adapter_that_overflows_never_serves_and_harms_no_neighbour(
    make_backend: Callable[..., VllmBackend], maker: VersionMaker, server: VllmServer, tmp_path: Path
):
    """Finite weights whose products are not: the engine computes NaN, which stays in recycled blocks of its cache."""
    backend = make_backend()
    healthy, other = maker.make(tmp_path / "store", [7, 8])
    backend.load(*healthy.loaded)
    backend.activate(healthy.name)
    huge = to_safetensors({name: torch.full(shape, 3e38) for name, shape in maker.lora.shapes.items()})
    manifest = other.manifest.model_copy(update={"probes": {}})
    with pytest.raises(UnfitVersionError, match="NaN"):
        backend.load(other.name, huge, manifest)
    not_a_number = to_safetensors({name: torch.full(shape, float("nan")) for name, shape in maker.lora.shapes.items()})
    with pytest.raises(IntegrityError, match="NaN"):
        backend.load(other.name, not_a_number, manifest)
    assert backend.list() == [healthy.name]
    for _ in range(6):
        for made, model in ((healthy, healthy.name), (None, backend.base_name)):
            status, reply = ask(server, model)
            assert status == 200, reply
            assert difference(maker, made, reply) < RIGHT_NATS


def test_the_base_beside_adapters_answers_as_the_base(
    make_backend: Callable[..., VllmBackend], maker: VersionMaker, server: VllmServer, tmp_path: Path
):
    """On CPUs vLLM gives requests without an adapter the one in the last slot, so they get a zero adapter."""
    backend = make_backend()
    made = maker.make(tmp_path / "store", [9, 10])
    for each in made:
        backend.load(*each.loaded)
    asked = [made[0], None, made[1], None] * 4
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda each: ask(server, each.name if each else backend.base_name), asked))
    for each, (status, reply) in zip(asked, replies, strict=True):
        assert status == 200, reply
        assert difference(maker, each, reply) < RIGHT_NATS


def test_the_same_adapter_with_new_bytes_has_no_old_prefix(
    make_backend: Callable[..., VllmBackend], maker: VersionMaker, server: VllmServer, tmp_path: Path
):
    """vLLM reuses cached prefixes by name and path, so a version has a name and a path of its own."""
    backend = make_backend()
    long = "All about refunds and invoices. " * 12
    for made in maker.make(tmp_path / "store", [11, 12, 13]):
        backend.load(*made.loaded)
        backend.activate(made.name)
        for _ in range(2):
            status, reply = ask(server, backend.model_for(ADAPTER), long)
            assert status == 200
            assert reply["model"] == made.name
            assert difference(maker, made, reply, long) < RIGHT_NATS
    again = maker.make(tmp_path / "store", [11])[0]  # the same weights as the first, under a name of their own
    backend.load(*again.loaded)
    assert difference(maker, again, ask(server, again.name, long)[1], long) < RIGHT_NATS


def test_an_unloaded_version_answers_no_more_and_leaves_the_memory(
    make_backend: Callable[..., VllmBackend], maker: VersionMaker, server: VllmServer, tmp_path: Path
):
    """vLLM only forgets the name of what it unloads; see its issue 54839."""
    backend = make_backend()
    one, two = maker.make(tmp_path / "store", [14, 15])
    backend.load(*one.loaded)
    backend.activate(one.name)
    held = server.resident_ids()
    newest = max(held)  # vLLM counts adapters in order of loading
    backend.load(*two.loaded)
    backend.activate(two.name)
    assert backend.drain(one.name, 5)
    backend.unload(one.name)
    status, reply = ask(server, one.name)
    assert (status, "does not exist" in str(reply)) == (404, True)
    assert one.name not in [card["id"] for card in server.call("/v1/models")[1]["data"]]
    assert newest not in server.resident_ids()
    assert not list((tmp_path / "served").rglob(f"*{one.name[-64:]}*"))
    status, reply = ask(server, two.name)
    assert difference(maker, two, reply) < RIGHT_NATS


def test_a_client_that_went_away_holds_no_version(
    make_backend: Callable[..., VllmBackend], maker: VersionMaker, server: VllmServer, tmp_path: Path
):
    """The engine's metric must not go on naming the version of a request that was given up."""
    backend = make_backend()
    (made,) = maker.make(tmp_path / "store", [18])
    backend.load(*made.loaded)
    content = {"model": made.name, "prompt": PROMPT, "max_tokens": 450, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(content), {"Content-Type": "application/json"})
    connection.getresponse().readline()
    assert backend.api.in_use(made.name)
    connection.close()
    unload_when_drained(backend, made.name)
    assert backend.list() == []


def test_what_vllm_refuses_is_told_by_kind(
    make_backend: Callable[..., VllmBackend], maker: VersionMaker, server: VllmServer, tmp_path: Path
):
    (made,) = maker.make(tmp_path / "store", [16])
    elsewhere = make_backend(server_path="/nowhere/that/exists")
    with pytest.raises(BackendError, match="read the folder") as bad_path:
        elsewhere.load(*made.loaded)
    assert failure_kind(bad_path.value).passes
    wide = VersionMaker("shipped", rank=2 * MAX_RANK)
    (large,) = wide.make(tmp_path / "wide", [1], "acme/wide")
    for backend in (make_backend(), make_backend(max_rank=MAX_RANK)):
        with pytest.raises(UnfitVersionError, match="rank"):
            backend.load(*large.loaded)
        assert "acme/wide" not in str(backend.list())
    gone = VllmBackend("http://127.0.0.1:9", tmp_path / "gone", check_s=None)
    with pytest.raises(BackendError, match="does not answer") as away:
        gone.load(*made.loaded)
    assert failure_kind(away.value) is FailureKind.CONNECTION
    with pytest.raises(BackendError, match="not the address"):
        VllmBackend("localhost:8000", tmp_path / "gone")


def test_a_server_that_forgot_its_adapters_gets_them_again(
    make_backend: Callable[..., VllmBackend], maker: VersionMaker, server: VllmServer, tmp_path: Path
):
    backend = make_backend(check_s=0.1)
    (made,) = maker.make(tmp_path / "store", [17])
    backend.load(*made.loaded)
    backend.activate(made.name)
    for name in (made.name, backend.base_name):  # as after a restart
        assert server.call("/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
    end = time.monotonic() + 30
    while {made.name, backend.base_name} - {card["id"] for card in server.call("/v1/models")[1]["data"]}:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert difference(maker, made, ask(server, made.name)[1]) < RIGHT_NATS


@pytest.mark.slow(90)
def test_fifty_swaps_under_load_mix_nothing(
    make_backend: Callable[..., VllmBackend], maker: VersionMaker, server: VllmServer, tmp_path: Path
):
    backend = make_backend(grace_s=2.0)
    made = maker.make(tmp_path / "store", range(100, 150))
    by_name = {each.name: each for each in made}
    backend.load(*made[0].loaded)
    backend.activate(made[0].name)
    replies: list[tuple[str, int, dict[str, Any]]] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            name = backend.model_for(ADAPTER)
            replies.append((name, *ask(server, name)))

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    retired: list[str] = []
    try:
        for before, each in pairwise(made):
            backend.load(*each.loaded)
            backend.warm(each.name)
            backend.activate(each.name)
            retired.append(before.name)
            for name in retired.copy():
                if backend.drain(name, 0):
                    backend.unload(name)
                    retired.remove(name)
            end = time.monotonic() + 60
            while all(
                (name, status) != (each.name, 200) for name, status, _ in replies.copy()
            ):  # each version is to be compared
                assert time.monotonic() < end, "nobody was answered by the new version"
                time.sleep(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    for name in retired:
        unload_when_drained(backend, name)
    assert backend.list() == [made[-1].name]
    # A client that read a name more than the grace time ago is refused, and never answered by another version.
    missed = [reply for _, status, reply in replies if status != 200]
    assert all("does not exist" in str(reply) for reply in missed)
    assert len(missed) < len(replies) / 100
    replies = [reply for reply in replies if reply[1] == 200]
    assert {name for name, _, _ in replies} >= {each.name for each in made[1:]}
    assert all(reply["model"] == name for name, _, reply in replies)
    # One computation for all replies with the same version and tokens: replies differ in the last bits of bf16.
    checked: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    for name, _, reply in replies:
        checked.setdefault((name, answer_of(reply)[0]), []).append(reply)
    for (name, _), same in checked.items():
        position = next(index for index, each in enumerate(made) if each.name == name)
        neighbours = [made[index] for index in (position - 1, position + 1) if 0 <= index < len(made)]
        assert max(difference(maker, by_name[name], reply) for reply in same) < RIGHT_NATS
        assert min(difference(maker, other, same[0]) for other in neighbours) > 2 * RIGHT_NATS
    assert len(server.resident_ids()) <= MAX_CPU_LORAS


@pytest.mark.slow(60)
def test_swaps_fill_no_memory(make_backend: Callable[..., VllmBackend], server: VllmServer, tmp_path: Path):
    """Without load: under load the engine's buffers also grow with the first batch of each shape."""
    backend, wide = make_backend(), VersionMaker("shipped", rank=MAX_RANK)
    publisher = wide.publisher(tmp_path / "store")
    before: Made | None = None
    memory: list[float] = []
    for seed in range(50):
        made = wide.publish(publisher, seed)
        backend.load(*made.loaded)
        backend.activate(made.name)
        if before is not None:
            unload_when_drained(backend, before.name)
        before = made
        memory.append(server.anonymous_mib())
    leaked_mib = 30 * len(made.weights) / 2**20  # if each of the last 30 versions stayed
    assert memory[-1] - memory[19] < leaked_mib / 2, memory
