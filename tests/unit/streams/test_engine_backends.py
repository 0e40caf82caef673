"""`VllmBackend` and `SglangBackend` against doubles of the engines' HTTP interfaces.

The contract suite and what only an engine can show are in tests/vllm.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.safetensors_check import check_safetensors
from perennial.storage.registry.manifest import Manifest, Probes
from perennial.streams.client.backend import BackendError, UnfitVersionError
from perennial.streams.client.engines.engine_backend import EngineBackend
from perennial.streams.client.engines.sglang_backend import SglangBackend
from perennial.streams.client.engines.vllm_backend import VllmBackend
from perennial.streams.client.engines.zero_adapter import smallest_zero_weights, zero_weights
from perennial.streams.client.failure_kinds import FailureKind, failure_kind
from perennial.streams.client.personal.composition import composed_digest
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.client.testing import small_weights
from perennial.streams.settings import Settings
from tests.engine_doubles import EngineDouble, SglangDouble, VllmDouble, error
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
PROBES: Probes = {"sentence-1": {"1": -0.5, "2": -1.0}, "passage-1": {"1": -0.5, "2": -1.0}}
Version = tuple[str, bytes, Manifest]
Make = Callable[..., EngineBackend]


@pytest.fixture(params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest) -> Iterator[EngineDouble]:
    with (VllmDouble() if request.param == "vllm" else SglangDouble()).serving() as double:
        yield double


@pytest.fixture
def vllm() -> Iterator[VllmDouble]:
    double = VllmDouble()
    with double.serving():
        yield double


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[EngineBackend] = []

    def build(engine: EngineDouble, **changes: Any) -> EngineBackend:
        given = {"grace_s": 0.0, "check_s": None, **changes}
        if isinstance(engine, VllmDouble):
            made.append(VllmBackend(engine.url, tmp_path / "served", **{"max_cpu_loras": 4, **given}))
        else:
            made.append(SglangBackend(engine.url, tmp_path / "served", **given))
        return made[-1]

    yield build
    for backend in made:
        backend.close()


@pytest.fixture
def versions(tmp_path: Path) -> list[Version]:
    publisher = VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER)
    found = []
    for seed in (1, 2):
        weights = small_weights(seed)
        version = publisher.publish(weights, probes=PROBES).version
        found.append((f"{ADAPTER}@{version[7:]}", weights, publisher.registry.manifest(ADAPTER, version)))
    return found


def test_a_version_is_loaded_compared_served_and_removed(make: Make, engine: EngineDouble, versions: list[Version]):
    (one, two), backend = versions, make(engine)
    assert backend.model_for(ADAPTER) == "base"
    backend.load(*one)
    backend.warm(one[0])
    assert backend.active_name(ADAPTER) is None
    backend.activate(one[0])
    backend.load(*two)
    backend.activate(two[0])
    assert backend.list() == sorted([one[0], two[0]])
    assert backend.drain(one[0], 1)
    backend.unload(one[0])
    assert backend.list() == [two[0]]
    assert one[0] not in {**engine.adapters}
    assert one[0] not in engine.resident
    asked = two[0] if isinstance(engine, VllmDouble) else f"base:{two[0]}"
    assert backend.model_for(ADAPTER) == asked
    with pytest.raises(BackendError, match="not held"):
        backend.activate(one[0])
    backend.unload(two[0])
    assert backend.model_for(ADAPTER) == backend.base_name


def test_no_name_stands_for_two_paths_or_other_bytes(make: Make, engine: EngineDouble, versions: list[Version]):
    one, backend = versions[0], make(engine)
    backend.load(*one)
    backend.load(*one)
    assert engine.loads.count(one[0]) == 1
    engine.adapters[one[0]] = "/somewhere/else"  # another process used the name
    assert backend.list() == [one[0]]
    backend.load(*one)
    assert engine.adapters[one[0]].endswith(f"@{one[0][-64:]}")
    foreign = {"their/adapter": "/data/theirs", f"their/adapter@{'0' * 64}": "/data/other", "odd@name": "/x"}
    engine.adapters.update(foreign)
    assert backend.list() == [one[0]]


def test_an_engine_that_predicts_otherwise_serves_nothing(make: Make, engine: EngineDouble, versions: list[Version]):
    (one, two), backend = versions, make(engine)
    backend.load(*one)
    backend.activate(one[0])
    asked: list[str] = []

    def other(name: str, text: str) -> dict[int, float]:
        asked.append(text)
        return {1: -0.5, 2: -1.4 if name == two[0] and len(text) > 500 else -1.0}

    engine.predicts = other
    with pytest.raises(UnfitVersionError, match=r"0\.200 nats in the mean after passage-1"):
        backend.load(*two)
    assert any(len(text.split()) > 128 for text in asked)
    assert (backend.list(), backend.active_name(ADAPTER)) == ([one[0]], one[0])
    make(engine, tolerance_nats=0.3).load(*two)


@pytest.mark.parametrize("answer", [{}, {9: -1.7}, {1: -0.5}])
def test_tokens_that_the_engine_does_not_return_count(
    make: Make, engine: EngineDouble, versions: list[Version], answer: dict[int, float]
):
    engine.predicts = lambda _name, _text: answer
    if answer == {1: -0.5}:  # the second token may be as probable as the least one that was returned
        make(engine).load(*versions[0])
    else:
        with pytest.raises(UnfitVersionError):
            make(engine).load(*versions[0])


def test_nan_in_weights_or_answers_never_serves(make: Make, engine: EngineDouble, versions: list[Version]):
    (one, two), backend = versions, make(engine)
    backend.load(*one)
    backend.activate(one[0])
    (header_bytes,) = struct.unpack_from("<Q", two[1])
    poisoned = two[1][: 8 + header_bytes] + b"\xff" * (len(two[1]) - 8 - header_bytes)
    with pytest.raises(IntegrityError, match="NaN"):
        backend.load(two[0], poisoned, two[2])
    assert two[0] not in engine.loads
    failures = ["Out of range float values are not JSON compliant"] * 3

    def predicts(name: str, text: str) -> dict[int, float] | str:
        if name == two[0]:
            return failures[0]
        return failures.pop() if failures and name != one[0] else {1: -0.5, 2: -1.0}

    engine.predicts = predicts
    with pytest.raises(UnfitVersionError):
        backend.load(*two)
    assert (backend.list(), backend.active_name(ADAPTER)) == ([one[0]], one[0])
    if isinstance(engine, VllmDouble):
        assert not failures  # the zero adapter was asked until nothing of the NaN was left


def test_requests_under_way_keep_a_version(make: Make, vllm: VllmDouble, versions: list[Version]):
    (one, two), backend = versions, make(vllm)
    for each in versions:
        backend.load(*each)
        backend.activate(each[0])
    vllm.busy = {one[0], "another"}
    begin = time.monotonic()
    assert not backend.drain(one[0], 0.2)
    assert time.monotonic() - begin < 5
    with pytest.raises(BackendError, match="still use"):
        backend.unload(one[0])
    assert backend.list() == sorted([one[0], two[0]])
    assert one[0] in vllm.adapters
    vllm.busy = set()
    assert backend.drain(one[0], 1)
    backend.unload(one[0])
    assert backend.list() == [two[0]]


def test_a_request_that_had_looked_the_name_up_keeps_the_weights_readable(
    make: Make, vllm: VllmDouble, versions: list[Version], tmp_path: Path
):
    """It reaches the engine after the unload; the engine may have to read the weights again for it."""
    one, backend = versions[0], make(vllm)
    backend.load(*one)
    answered = vllm.call

    def late(path: str, content: dict[str, Any] | None) -> Any:
        if path == "/v1/unload_lora_adapter" and content and content["lora_name"] == one[0]:
            vllm.busy = {one[0]}
        return answered(path, content)

    vllm.call = late  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="still use"):
        backend.unload(one[0])
    assert (tmp_path / "served" / ADAPTER / f"@{one[0][-64:]}" / "adapter_model.safetensors").exists()
    assert backend.list() == [one[0]]  # so a subscriber tries again
    vllm.call = answered  # type: ignore[method-assign]
    vllm.busy = set()
    backend.unload(one[0])
    assert backend.list() == []


def test_a_version_is_kept_for_clients_that_have_just_read_its_name(
    make: Make, engine: EngineDouble, versions: list[Version]
):
    now = [100.0]
    backend = make(engine, grace_s=3.0, clock=lambda: now[0])
    for each in versions:
        backend.load(*each)
        backend.activate(each[0])
    assert not backend.drain(versions[0][0], 0)
    now[0] += 3
    assert backend.drain(versions[0][0], 0)


def test_an_engine_that_was_started_anew_gets_what_is_active(
    make: Make, engine: EngineDouble, versions: list[Version], tmp_path: Path
):
    backend = make(engine, check_s=0.02)
    for each in versions:
        backend.load(*each)
    backend.activate(versions[1][0])
    engine.adapters.clear()
    engine.resident.clear()
    end = time.monotonic() + 20
    while versions[1][0] not in engine.adapters:
        assert time.monotonic() < end
        time.sleep(0.01)
    backend.close()
    expected = {versions[1][0]} | ({backend.base_name} if isinstance(engine, VllmDouble) else set())
    assert set(engine.adapters) == expected
    engine.adapters.clear()
    weights = tmp_path / "served" / ADAPTER / f"@{versions[1][0][-64:]}" / "adapter_model.safetensors"
    weights.write_bytes(b"x")
    with pytest.raises(IntegrityError, match="damaged"):
        backend.heal()


def test_the_next_process_finds_what_the_last_one_served(make: Make, engine: EngineDouble, versions: list[Version]):
    before = make(engine)
    before.load(*versions[0])
    before.activate(versions[0][0])
    again = make(engine)
    assert again.list() == [versions[0][0]]
    assert again.active_name(ADAPTER) == versions[0][0]
    engine.adapters.clear()
    assert again.heal() == (versions[0][0],)
    again.unload(versions[0][0])
    assert again.list() == []


def test_refusals_say_whether_they_pass(make: Make, vllm: VllmDouble, versions: list[Version], tmp_path: Path):
    one, backend = versions[0], make(vllm)
    with pytest.raises(BackendError, match="read the folder") as caught:
        make(vllm, server_path="/not/mounted").load(*one)
    assert failure_kind(caught.value).passes
    for reply, kind in (
        (error(500, "LoRA rank 64 is greater than max_lora_rank 16."), FailureKind.VERSION),
        (error(500, "modules_to_save is not supported"), FailureKind.VERSION),
        (error(500, "EngineCore encountered an issue."), FailureKind.OTHER),
        ((404, {"detail": "Not Found"}), FailureKind.OTHER),
        ((503, "overloaded"), FailureKind.OTHER),
    ):
        vllm.refuses = lambda _name, reply=reply: reply  # type: ignore[misc]
        with pytest.raises(BackendError) as refused:
            backend.load(*one)
        assert failure_kind(refused.value) is kind
        assert (backend.list(), vllm.adapters) == ([], {})
    vllm.refuses = lambda _name: None
    with pytest.raises(UnfitVersionError, match="rank"):
        make(vllm, max_rank=1).load(*one)
    vllm.key = "secret"
    with pytest.raises(BackendError, match="refuses the key"):
        backend.load(*one)
    make(vllm, api_key="secret").load(*one)


def test_an_engine_that_is_away_is_asked_again(make: Make, versions: list[Version]):
    with VllmDouble().serving() as double:
        backend = make(double)
    with pytest.raises(BackendError, match="does not answer") as away:
        backend.load(*versions[0])
    assert failure_kind(away.value) is FailureKind.CONNECTION
    for wrong in ("127.0.0.1:8000", "ftp://host", "http://"):
        with pytest.raises(BackendError, match="not the address"):
            VllmBackend(wrong, "unused")


def test_what_is_in_service_stays_when_loading_it_again_fails(make: Make, vllm: VllmDouble, versions: list[Version]):
    one, backend = versions[0], make(vllm)
    backend.load(*one)
    backend.activate(one[0])
    vllm.predicts = lambda _name, _text: "EngineCore encountered an issue."
    with pytest.raises(BackendError):
        backend.load(*one)
    assert backend.active_name(ADAPTER) == one[0]
    assert one[0] in vllm.adapters


def test_a_subscriber_keeps_the_version_before_and_reports_the_unfit_one(
    make: Make, engine: EngineDouble, tmp_path: Path
):
    publisher = VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER)
    backend = make(engine)
    settings = Settings.of(poll_s=0.02, kafka="", env_file=None)
    first = publisher.publish(small_weights(1), probes=PROBES)
    with Subscriber(ADAPTER, backend, store=publisher.store, settings=settings) as subscriber:
        assert subscriber.wait_for(1, 30)
        publisher.publish(small_weights(2), probes={"sentence-1": {"7": -0.01}})
        end = time.monotonic() + 30
        while not re.search(rb'subscriber_failures_total{[^}]*kind="version"', subscriber._metrics.exposition()):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert backend.active_name(ADAPTER) == subscriber.name_of(first.version)
        publisher.publish(small_weights(3), probes=PROBES)
        assert subscriber.wait_for(3, 30)


def test_a_zero_adapter_has_the_shapes_and_changes_nothing():
    weights = small_weights(3)
    zeros = zero_weights(weights)
    (header_bytes,) = struct.unpack_from("<Q", weights)
    assert len(zeros) == len(weights)
    assert zeros[: 8 + header_bytes] == weights[: 8 + header_bytes]
    assert set(zeros[8 + header_bytes :]) == {0}
    with pytest.raises(IntegrityError):
        zero_weights(b"junk")


def test_the_adapter_that_displaces_others_is_one_pair_of_zeros(make: Make, vllm: VllmDouble, versions: list[Version]):
    """vLLM counts adapters and not bytes: the whole zero adapter of a large base took a tenth of a second to load."""
    (one, two), backend = versions, make(vllm)
    tiny = smallest_zero_weights(one[1])
    check_safetensors(tiny)
    (header_bytes,) = struct.unpack_from("<Q", tiny)
    names = list(json.loads(tiny[8 : 8 + header_bytes]))
    assert [name.rpartition(".lora_")[2] for name in names] == ["A.weight", "B.weight"]
    assert set(tiny[8 + header_bytes :]) == {0}
    for each in (one, two):
        backend.load(*each)
        backend.activate(each[0])
    paths: list[str] = []
    vllm.refuses = lambda name: paths.append(name) if name.startswith("evict-") else None
    backend.unload(one[0])
    assert len(paths) == 2
    assert one[0] not in vllm.resident
    spares = [folder for folder in (backend._folders.path / ".zero").iterdir() if folder.name.startswith("spare-")]
    assert [(folder / "adapter_model.safetensors").read_bytes() for folder in spares] == [tiny]
    with pytest.raises(IntegrityError):
        smallest_zero_weights(b"junk")


def test_clients_are_told_the_name_that_stands_for_both_adapters_and_a_new_engine_gets_it_again(engine, make, tmp_path):
    store, personal = DirectoryStore(tmp_path / "store", fsync=False), f"{ADAPTER}/user-42"
    tenant, user = VersionPublisher(store, ADAPTER), VersionPublisher(store, personal, extends=ADAPTER)
    shared, own = tenant.publish(probes=PROBES).version, user.publish(probes=PROBES).version
    backend = make(engine)
    settings = Settings.of(poll_s=0.05, kafka="", env_file=None)
    with Subscriber(personal, backend, store=store, settings=settings) as subscriber:
        assert subscriber.wait_for(1, 180)
        name = subscriber.served_name
        assert name == f"{personal}@{composed_digest(own, shared)[7:]}" == backend.active_name(personal)
        assert backend.model_for(personal) == backend.api.model_of(name)
        assert name in engine.adapters
    engine.adapters.clear()  # an engine that was started anew
    again = make(engine)
    assert again.heal() == (name,)
    assert name in engine.adapters
    path = again._folders.folder_of(name) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(own[7:].encode(), shared[7:].encode()))
    engine.adapters.clear()
    with pytest.raises(IntegrityError, match="damaged"):
        again.heal()
