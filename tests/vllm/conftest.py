"""One server for all tests of this folder; skip them where the environment with vLLM was not built."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services import missing_service
from tests.vllm.lora_versions import VersionMaker
from tests.vllm.vllm_server import VllmServer
from tools.vllm_env import vllm_python


@pytest.fixture(scope="session")
def maker() -> VersionMaker:
    return VersionMaker("shipped")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, maker: VersionMaker) -> Iterator[VllmServer]:
    python = vllm_python()
    if python is None:
        missing_service("no environment with vLLM; `make vllm-env` builds it")
        return
    started = VllmServer(python, maker.folder, tmp_path_factory.mktemp("vllm") / "vllm.log").start()
    try:
        yield started
    finally:
        started.stop()
