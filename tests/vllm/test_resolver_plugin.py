"""A real vLLM that was just started, with the plugin installed from the wheel, on a store in MinIO."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from perennial.learner.bases.sources import SHIPPED_FOLDER
from perennial.learner.model.base import Base, load_base
from perennial.learner.model.lora import Lora, LoraConfig, from_safetensors, to_safetensors
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.addresses import direct_opener
from tests.services import free_port, missing_service, start_minio
from tests.versions import VersionPublisher
from tools.vllm_env import vllm_python

pytestmark = [pytest.mark.slow(150), pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "acme/support"
RANK, ALPHA = 8, 16
PROMPT = "The refund policy changed in March, and invoices are sent on Mondays. " * 3
START_S = 400.0
CLOSE_NATS = 2e-3
"""vLLM computes in fp32 here, as the trainer does; sums in another order differ by less."""


@dataclass
class Answer:
    """A completion: the model that the reply names, the tokens, and their log-probabilities."""

    model: str
    tokens: list[int]
    nats: list[float]


@dataclass
class Server:
    """vLLM as a child process."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    publishers: dict[str, VersionPublisher] = field(default_factory=dict)

    def get(self, path: str) -> str:
        with direct_opener().open(f"http://127.0.0.1:{self.port}{path}", timeout=60) as reply:
            return reply.read().decode()

    def ask(self, model: str, ids: list[int], max_tokens: int = 8) -> Answer | int:
        """Return the answer to a prompt, or the status of the refusal."""
        body = {
            "model": model, "prompt": ids, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1,
            "return_tokens_as_token_ids": True, "ignore_eos": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with direct_opener().open(request, timeout=120) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        logged = answer["choices"][0]["logprobs"]
        tokens = [int(token.removeprefix("token_id:")) for token in logged["tokens"]]
        return Answer(answer["model"], tokens, logged["token_logprobs"])

    def wait_for(self, is_true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not is_true():
            assert time.monotonic() < deadline, f"{what}\n{self.log.read_text(errors='replace')[-4000:]}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("shipped", "cpu", 2)


@pytest.fixture(scope="module")
def lora(base: Base) -> Lora:
    return Lora(base, LoraConfig(RANK, ALPHA), slot="resolver")


def trained(lora: Lora, seed: int) -> bytes:
    """Weights that change the model's answers much, each seed in another way."""
    generator = torch.Generator().manual_seed(seed)
    return to_safetensors({name: 0.1 * torch.randn(shape, generator=generator) for name, shape in lora.shapes.items()})


def expected_nats(lora: Lora, weights: bytes, ids: list[int], tokens: list[int]) -> list[float]:
    """Return the log-probabilities that the trainer's model gives to the tokens after the prompt."""
    lora.load(from_safetensors(weights, lora.shapes))
    lora.select()
    with torch.no_grad():
        logits = lora.model(torch.tensor([ids + tokens])).logits[0].float().log_softmax(-1)
    return [float(logits[len(ids) - 1 + place, token]) for place, token in enumerate(tokens)]


@pytest.fixture(scope="module")
def store_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    minio = start_minio(tmp_path_factory.mktemp("minio"))
    try:
        yield {**minio.environment(), "PERENNIAL_STORE": f"s3://perennial-{uuid.uuid4().hex[:12]}/some/prefix"}
    finally:
        minio.stop()


@pytest.fixture(scope="module")
def publisher(store_environment: dict[str, str], base: Base) -> Callable[[str], VersionPublisher]:
    store = open_store(store_environment["PERENNIAL_STORE"], S3Settings.from_env(store_environment))
    store.probe()
    return lambda adapter: VersionPublisher(store, adapter, base.digest)


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
def server(
    tmp_path_factory: pytest.TempPathFactory,
    store_environment: dict[str, str],
    base: Base,
    request: pytest.FixtureRequest,
) -> Iterator[Server]:
    python = vllm_python()
    if python is None:
        missing_service("no environment with vLLM: run `make vllm-env`")
    folder = tmp_path_factory.mktemp("vllm")
    plugin = request.getfixturevalue("plugin")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PERENNIAL_")}
    environment |= store_environment | {
        "PYTHONPATH": str(plugin), "VLLM_PLUGINS": "perennial", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "NO_PROXY": "*", "no_proxy": "*",
        "PERENNIAL_SERVED_BASE": base.digest, "PERENNIAL_RESOLVER_DIR": str(folder / "adapters"),
        "PERENNIAL_POLL_S": "0.5",
    }  # fmt: skip
    port = free_port()
    words = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(SHIPPED_FOLDER), "--dtype", "float32",
        "--served-model-name", "base", "--enable-lora", "--max-loras", "4", "--max-cpu-loras", "8", "--max-lora-rank",
        "16", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    log = folder / "vllm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    made = Server(port, process, log)
    try:
        deadline = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < deadline:
            try:
                made.get("/health")
            except OSError:
                time.sleep(0.5)
                continue
            yield made
            return
        pytest.fail(f"vLLM did not start: {log.read_text(errors='replace')[-4000:]}")
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its engine's process, where that was left


@pytest.fixture(scope="module")
def ids(base: Base) -> list[int]:
    return base.tokenizer(PROMPT)["input_ids"]


def test_a_new_server_answers_as_the_trainer_and_follows_the_alias(server, publisher, lora, ids):
    versions = publisher(ADAPTER)
    weights = [trained(lora, seed) for seed in range(3)]
    old = versions.publish(weights[0], rank=RANK, alpha=ALPHA).version
    asked = [server.ask(ADAPTER, ids), server.ask(f"{ADAPTER}@{old[7:]}", ids)]
    for answer in asked:
        assert isinstance(answer, Answer), server.log.read_text(errors="replace")[-4000:]
        assert answer.nats == pytest.approx(expected_nats(lora, weights[0], ids, answer.tokens), abs=CLOSE_NATS)
    assert [answer.model for answer in asked] == [f"{ADAPTER}#live@{old[7:]}", f"{ADAPTER}@{old[7:]}"]
    plain = server.ask("base", ids)
    assert plain.nats != pytest.approx(asked[0].nats, abs=0.05)

    for new in weights[1:]:
        version = versions.publish(new, rank=RANK, alpha=ALPHA).version
        name = f"{ADAPTER}#live@{version[7:]}"
        server.wait_for(lambda name=name: server.ask(ADAPTER, ids).model == name, "the name does not follow its alias")
        answer = server.ask(ADAPTER, ids)
        assert answer.nats == pytest.approx(expected_nats(lora, new, ids, answer.tokens), abs=CLOSE_NATS)
    still = server.ask(f"{ADAPTER}@{old[7:]}", ids)
    assert still.nats == pytest.approx(asked[1].nats, abs=CLOSE_NATS)
    assert 'perennial_resolver_refreshes_total{outcome="replaced"}' in server.get("/metrics")
    listed = [model["id"] for model in json.loads(server.get("/v1/models"))["data"]]
    assert {"base", f"{ADAPTER}#live@{version[7:]}", f"{ADAPTER}@{old[7:]}"} <= set(listed)


def test_a_revoked_version_is_answered_with_404(server, publisher, lora, ids):
    versions = publisher("acme/revoked")
    version = versions.publish(trained(lora, 7), rank=RANK, alpha=ALPHA).version
    names = ["acme/revoked", f"acme/revoked@{version[7:]}"]
    assert all(isinstance(server.ask(name, ids), Answer) for name in names)
    versions.registry.revoke("acme/revoked", version, "wrong")
    for name in names:
        server.wait_for(lambda name=name: server.ask(name, ids) == 404, "a revoked version stays in service")
    assert server.ask(f"acme/revoked#live@{version[7:]}", ids) == 404


def test_a_damaged_blob_is_refused(server, publisher, lora, ids):
    versions = publisher("acme/damaged")
    weights = trained(lora, 8)
    manifest = versions.manifest(weights, rank=RANK, alpha=ALPHA)
    versions.registry.publish(manifest, [weights], lambda _: None)
    store: Any = versions.store
    damaged = weights[:-4] + bytes(4)
    name = store._name(blob_key(manifest.weights.digest))
    store._client.put_object(store._bucket, name, io.BytesIO(damaged), len(damaged))
    assert server.ask("acme/damaged", ids) == 404
    assert "the weights are not those that the manifest names" in server.log.read_text(errors="replace")


def test_weights_with_nan_are_refused_and_others_go_on(server, publisher, lora, ids):
    state = from_safetensors(trained(lora, 9), lora.shapes)
    next(iter(state.values()))[0, 0] = float("nan")
    publisher("acme/nan").publish(to_safetensors(state), rank=RANK, alpha=ALPHA)
    assert server.ask("acme/nan", ids) == 404
    assert isinstance(server.ask("base", ids), Answer)


def test_a_rank_that_the_server_has_no_room_for_is_refused_and_the_server_goes_on(server, publisher, base, ids):
    wide = Lora(base, LoraConfig(32, 64), slot="wide")
    publisher("acme/wide").publish(trained(wide, 1), rank=32, alpha=64)
    assert server.ask("acme/wide", ids) == 400
    assert isinstance(server.ask("base", ids), Answer)


@pytest.mark.parametrize("name", ["../x", "acme/../../etc", "acme/nobody", "a" * 5000, "acme/support#live@x", "acme\0"])
def test_other_names_are_answered_with_404(server, ids, name):
    begin_s = time.monotonic()
    assert server.ask(name, ids) == 404
    assert time.monotonic() - begin_s < 10


def test_every_answer_is_of_the_version_that_it_names_while_names_move_and_memory_is_short(
    server, publisher, lora, ids
):
    """Six adapters on four slots and eight places in memory, each refreshed while clients wait for long answers."""
    adapters = [f"acme/busy-{number}" for number in range(6)]
    weights: dict[str, bytes] = {}

    def publish(adapter: str, seed: int) -> None:
        data = trained(lora, seed)
        version = publisher(adapter).publish(data, rank=RANK, alpha=ALPHA).version
        weights[f"{adapter}#live@{version[7:]}"] = data

    for number, adapter in enumerate(adapters):
        publish(adapter, 100 + number)
    done = threading.Event()

    def client(number: int) -> list[tuple[list[int], Answer | int]]:
        answers = []
        for turn in itertools.takewhile(lambda _: not done.is_set(), itertools.count()):
            prompt = ids[: len(ids) - (turn + number) % 5]
            answers.append((prompt, server.ask(adapters[(turn * 5 + number) % 6], prompt, max_tokens=32)))
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
        nats = expected_nats(lora, weights[answer.model.partition("=")[0]], prompt, answer.tokens)
        if answer.nats != pytest.approx(nats, abs=CLOSE_NATS):
            wrong.append((answer.model, max(abs(a - b) for a, b in zip(answer.nats, nats, strict=True))))
    assert wrong == [], f"{len(wrong)} of {len(answered)}"


def test_the_server_is_well_after_all_this(server, ids):
    assert isinstance(server.ask("base", ids), Answer)
    assert server.process.poll() is None
    assert "/vllm_plugin/" not in server.log.read_text(errors="replace"), "an error of the plugin reached the server"
