"""A real vLLM that was just started, with the plugin installed from the wheel, on a store in MinIO."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from perennial.learner.model.lora import Lora, LoraConfig, to_safetensors
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.s3_settings import S3Settings
from tests.services import missing_service, start_minio
from tests.versions import VersionPublisher
from tests.vllm.lora_versions import ADAPTER, VersionMaker
from tests.vllm.vllm_server import VllmServer
from tools.vllm_env import vllm_python

pytestmark = [pytest.mark.slow(150), pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
RANK, ALPHA = 8, 16
PROMPT = "The refund policy changed in March, and invoices are sent on Mondays. " * 3
CLOSE_NATS = 2e-3
"""vLLM computes in fp32 here, as the trainer does; sums in another order differ by less."""


@dataclass
class Answer:
    """A completion: the model that the reply names, the tokens, and their log-probabilities."""

    model: str
    tokens: list[int]
    nats: list[float]


def ask(server: VllmServer, model: str, ids: list[int], max_tokens: int = 8) -> Answer | int:
    """Return the answer to a prompt, or the status of the refusal."""
    body = {
        "model": model, "prompt": ids, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1,
        "return_tokens_as_token_ids": True, "ignore_eos": True,
    }  # fmt: skip
    status, answer = server.call("/v1/completions", body)
    if status != 200:
        return status
    logged = answer["choices"][0]["logprobs"]
    tokens = [int(token.removeprefix("token_id:")) for token in logged["tokens"]]
    return Answer(answer["model"], tokens, logged["token_logprobs"])


def data_of(maker: VersionMaker, seed: int) -> bytes:
    return to_safetensors(maker.tensors(seed))


def wait_for(server: VllmServer, is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline, f"{what}\n{server.log.read_text(errors='replace')[-4000:]}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def store_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    minio = start_minio(tmp_path_factory.mktemp("minio"))
    try:
        yield {**minio.environment(), "PERENNIAL_STORE": f"s3://perennial-{uuid.uuid4().hex[:12]}/some/prefix"}
    finally:
        minio.stop()


@pytest.fixture(scope="module")
def publisher(store_environment: dict[str, str], maker: VersionMaker) -> Callable[[str], VersionPublisher]:
    store = open_store(store_environment["PERENNIAL_STORE"], S3Settings.from_env(store_environment))
    store.probe()
    return lambda adapter: VersionPublisher(store, adapter, maker.base.digest)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own: the environment of vLLM is shared and stays as it is."""
    folder = tmp_path_factory.mktemp("plugin")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder / "built")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (wheel,) = (folder / "built").glob("*.whl")
    uv = Path(sys.executable).with_name("uv")
    words = [
        str(uv),
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--offline",
        "--target",
        str(folder / "site"),
        str(wheel),
    ]
    subprocess.run([*words, "--python", str(vllm_python())], check=True, capture_output=True, timeout=120)
    return folder / "site"


@pytest.fixture(scope="module")
def fresh(
    tmp_path_factory: pytest.TempPathFactory,
    store_environment: dict[str, str],
    maker: VersionMaker,
    request: pytest.FixtureRequest,
) -> Iterator[VllmServer]:
    """A server that nobody loaded an adapter into."""
    python = vllm_python()
    if python is None:
        missing_service("no environment with vLLM; `make vllm-env` builds it")
        return
    folder = tmp_path_factory.mktemp("vllm")
    environment = store_environment | {
        "PYTHONPATH": str(request.getfixturevalue("plugin")), "VLLM_PLUGINS": "perennial",
        "PERENNIAL_SERVED_BASE": maker.base.digest, "PERENNIAL_RESOLVER_DIR": str(folder / "adapters"),
        "PERENNIAL_POLL_S": "0.5",
    }  # fmt: skip
    arguments = ("--dtype", "float32", "--max-loras", "4", "--max-cpu-loras", "8")
    started = VllmServer(python, maker.folder, folder / "vllm.log", arguments, environment).start()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def ids(maker: VersionMaker) -> list[int]:
    return maker.base.tokenizer(PROMPT)["input_ids"]


def test_a_new_server_answers_as_the_trainer_and_follows_the_alias(fresh, publisher, maker, ids):
    versions = publisher(ADAPTER)
    old = versions.publish(data_of(maker, 0), rank=RANK, alpha=ALPHA).version
    asked = [ask(fresh, ADAPTER, ids), ask(fresh, f"{ADAPTER}@{old[7:]}", ids)]
    for answer in asked:
        assert isinstance(answer, Answer), fresh.log.read_text(errors="replace")[-4000:]
        assert answer.nats == pytest.approx(maker.nats_of(maker.tensors(0), ids, answer.tokens), abs=CLOSE_NATS)
    assert [answer.model for answer in asked] == [f"{ADAPTER}#live@{old[7:]}", f"{ADAPTER}@{old[7:]}"]
    plain = ask(fresh, "base", ids)
    assert plain.nats != pytest.approx(asked[0].nats, abs=0.05)

    for seed in (1, 2):
        version = versions.publish(data_of(maker, seed), rank=RANK, alpha=ALPHA).version
        name = f"{ADAPTER}#live@{version[7:]}"
        wait_for(fresh, lambda name=name: ask(fresh, ADAPTER, ids).model == name, "the name does not follow its alias")
        answer = ask(fresh, ADAPTER, ids)
        assert answer.nats == pytest.approx(maker.nats_of(maker.tensors(seed), ids, answer.tokens), abs=CLOSE_NATS)
    still = ask(fresh, f"{ADAPTER}@{old[7:]}", ids)
    assert still.nats == pytest.approx(asked[1].nats, abs=CLOSE_NATS)
    assert 'perennial_resolver_refreshes_total{outcome="replaced"}' in fresh.call("/metrics")[1]
    listed = [model["id"] for model in fresh.call("/v1/models")[1]["data"]]
    assert {"base", f"{ADAPTER}#live@{version[7:]}", f"{ADAPTER}@{old[7:]}"} <= set(listed)


def test_a_personal_adapter_answers_with_both_parts_and_follows_the_shared_one(fresh, publisher, maker, ids):
    user = "acme/shared/user-42"
    wide = VersionMaker("shipped", rank=2 * RANK)
    users, shared_versions = publisher(user), publisher("acme/shared")
    weights = data_of(maker, 20)
    made = users.manifest(weights, rank=RANK, alpha=ALPHA, probes=maker.probes(20))
    own = made.model_copy(update={"extends": "acme/shared"})
    users.registry.publish(own, [weights], lambda _: None)
    alone = ask(fresh, user, ids)
    assert isinstance(alone, Answer), fresh.log.read_text(errors="replace")[-4000:]
    assert alone.model == f"{user}#live@{own.digest()[7:]}"
    assert alone.nats == pytest.approx(maker.nats_of(maker.tensors(20), ids, alone.tokens), abs=CLOSE_NATS)

    for seed in (21, 22):
        version = shared_versions.publish(data_of(maker, seed), rank=RANK, alpha=ALPHA).version
        name = f"{user}#live@{own.digest()[7:]}+{version[7:]}"
        wait_for(
            fresh, lambda name=name: ask(fresh, user, ids).model == name, "the name does not follow the shared part"
        )
        answer = ask(fresh, user, ids)
        parts = maker.tensors(seed), maker.tensors(20)
        both = {each: torch.cat([part[each] for part in parts], 0 if ".lora_A." in each else 1) for each in parts[0]}
        assert answer.nats == pytest.approx(wide.nats_of(both, ids, answer.tokens), abs=CLOSE_NATS)
        for part in parts:
            one = maker.nats_of(part, ids, answer.tokens)
            assert answer.nats != pytest.approx(one, abs=0.05), "one part alone answers"
    asked_again = ask(fresh, answer.model, ids)
    assert asked_again.model == f"{user}@{own.digest()[7:]}+{version[7:]}"
    assert asked_again.nats == pytest.approx(answer.nats, abs=CLOSE_NATS)


def test_a_revoked_version_is_answered_with_404(fresh, publisher, maker, ids):
    versions = publisher("acme/revoked")
    version = versions.publish(data_of(maker, 7), rank=RANK, alpha=ALPHA).version
    names = ["acme/revoked", f"acme/revoked@{version[7:]}"]
    assert all(isinstance(ask(fresh, name, ids), Answer) for name in names)
    versions.registry.revoke("acme/revoked", version, "wrong")
    for name in names:
        wait_for(fresh, lambda name=name: ask(fresh, name, ids) == 404, "a revoked version stays in service")
    assert ask(fresh, f"acme/revoked#live@{version[7:]}", ids) == 404


def test_a_damaged_blob_is_refused(fresh, publisher, maker, ids):
    versions = publisher("acme/damaged")
    weights = data_of(maker, 8)
    manifest = versions.manifest(weights, rank=RANK, alpha=ALPHA)
    versions.registry.publish(manifest, [weights], lambda _: None)
    store: Any = versions.store
    damaged = weights[:-4] + bytes(4)
    name = store._name(blob_key(manifest.weights.digest))
    store._client.put_object(store._bucket, name, io.BytesIO(damaged), len(damaged))
    assert ask(fresh, "acme/damaged", ids) == 404
    assert "the weights are not those that the manifest names" in fresh.log.read_text(errors="replace")


def test_weights_with_nan_are_refused_and_others_go_on(fresh, publisher, maker, ids):
    state = maker.tensors(9)
    next(iter(state.values()))[0, 0] = float("nan")
    publisher("acme/nan").publish(to_safetensors(state), rank=RANK, alpha=ALPHA)
    assert ask(fresh, "acme/nan", ids) == 404
    assert isinstance(ask(fresh, "base", ids), Answer)


def test_what_the_engine_computes_otherwise_than_the_learner_is_refused(fresh, publisher, maker, ids):
    """The weights are whole, and the engine's predictions are not those that the learner recorded, or not finite."""
    weights = data_of(maker, 10)
    version = publisher("acme/probed").publish(weights, rank=RANK, alpha=ALPHA, probes=maker.probes(10)).version
    assert isinstance(ask(fresh, "acme/probed", ids), Answer)
    publisher("acme/other").publish(weights, rank=RANK, alpha=ALPHA, probes=maker.probes(11))
    assert ask(fresh, "acme/other", ids) == 404
    assert "predicts something else" in fresh.log.read_text(errors="replace")
    state = {name: 1e20 * tensor for name, tensor in maker.tensors(12).items()}  # finite, and their product is not
    publisher("acme/overflow").publish(to_safetensors(state), rank=RANK, alpha=ALPHA)
    assert ask(fresh, "acme/overflow", ids) == 404
    assert "computes NaN or infinity" in fresh.log.read_text(errors="replace")
    for _ in range(3):
        assert isinstance(ask(fresh, f"acme/probed@{version[7:]}", ids), Answer), "a NaN reached another adapter"


def test_a_rank_that_the_server_has_no_room_for_is_refused_and_the_server_goes_on(fresh, publisher, maker, ids):
    wide = Lora(maker.base, LoraConfig(32, 64), slot="wide")
    publisher("acme/wide").publish(to_safetensors(wide.weights()), rank=32, alpha=64)
    assert ask(fresh, "acme/wide", ids) == 404
    assert "greater than max_lora_rank" in fresh.log.read_text(errors="replace")
    assert isinstance(ask(fresh, "base", ids), Answer)


@pytest.mark.parametrize("name", ["../x", "acme/../../etc", "acme/nobody", "a" * 5000, "acme/support#live@x", "acme\0"])
def test_other_names_are_answered_with_404(fresh, ids, name):
    begin_s = time.monotonic()
    assert ask(fresh, name, ids) == 404
    assert time.monotonic() - begin_s < 10


def test_every_answer_is_of_the_version_that_it_names_while_names_move_and_memory_is_short(
    fresh, publisher, maker, ids
):
    """Six adapters on four slots and eight places in memory, each refreshed while clients wait for long answers."""
    adapters = [f"acme/busy-{number}" for number in range(6)]
    seeds: dict[str, int] = {}

    def publish(adapter: str, seed: int) -> None:
        version = publisher(adapter).publish(data_of(maker, seed), rank=RANK, alpha=ALPHA).version
        seeds[f"{adapter}#live@{version[7:]}"] = seed

    for number, adapter in enumerate(adapters):
        publish(adapter, 100 + number)
    done = threading.Event()

    def client(number: int) -> list[tuple[list[int], Answer | int]]:
        answers = []
        for turn in itertools.takewhile(lambda _: not done.is_set(), itertools.count()):
            prompt = ids[: len(ids) - (turn + number) % 5]
            answers.append((prompt, ask(fresh, adapters[(turn * 5 + number) % 6], prompt, max_tokens=32)))
        return answers

    with ThreadPoolExecutor(5) as pool:
        asking = [pool.submit(client, number) for number in range(5)]
        try:
            for seed in range(4):
                for number, adapter in enumerate(adapters):
                    publish(adapter, 200 + 10 * seed + number)
                    time.sleep(0.4)
        finally:
            done.set()
        answered = [each for future in asking for each in future.result()]
    assert all(isinstance(answer, Answer) for _, answer in answered), "no request is refused while names move"
    assert len({answer.model for _, answer in answered}) > len(adapters), "names moved meanwhile"
    wrong = []
    for prompt, answer in sorted(answered, key=lambda each: each[1].model):
        nats = maker.nats_of(maker.tensors(seeds[answer.model.partition("=")[0]]), prompt, answer.tokens)
        if answer.nats != pytest.approx(nats, abs=CLOSE_NATS):
            wrong.append((answer.model, max(abs(a - b) for a, b in zip(answer.nats, nats, strict=True))))
    assert wrong == [], f"{len(wrong)} of {len(answered)}"


def test_the_server_is_well_after_all_this(fresh, ids):
    assert isinstance(ask(fresh, "base", ids), Answer)
    assert fresh.process.poll() is None
    assert "/vllm_plugin/" not in fresh.log.read_text(errors="replace"), "an error of the plugin reached the server"
