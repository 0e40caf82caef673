"""A store, and a server with the plugin that is a stand-in for vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.client.vllm_plugin import registration, resolver_metrics
from perennial.streams.client.vllm_plugin.name_refresher import NameRefresher
from perennial.streams.client.vllm_plugin.name_resolver import NameResolver
from perennial.streams.client.vllm_plugin.version_folders import VersionFolders
from perennial.streams.settings import Settings
from perennial.streams.settings.signing_group import SigningSettings
from tests.versions import VersionPublisher
from tests.vllm_stand_in import Engine, LoRARequest, Server, install

ADAPTER = "acme/support"
DAY_S = 86_400.0


class World:
    """A store with one adapter, and a server with the plugin."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.versions = VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER)
        self.folders = VersionFolders(
            lambda: self.versions.registry,
            tmp_path / "folders",
            alias="live",
            served_base="",
            max_bytes=1 << 30,
            signing=SigningSettings(_env_file=None),
        )
        self.metrics = resolver_metrics.ResolverMetrics(CollectorRegistry())
        self.resolver = NameResolver(self.folders, 30.0, LoRARequest, self.metrics, clock=lambda: self.now_s)
        self.engine = Engine()
        self.server = Server(self.engine, "shipped")
        monkeypatch.setattr(registration, "shared_resolver", lambda: self.resolver)
        install(monkeypatch)
        registration.register()
        trial = registration.RefreshPlugin._trial(
            self.engine, self.server, Settings.of(env_file=None), self.resolver.clock
        )
        self.resolver.try_out = trial.run
        self.refresher = NameRefresher(self.resolver, self.server, self.engine, poll_s=0.01, keep_s=DAY_S)

    async def poll(self, after_s: float = 5.0) -> None:
        self.now_s += after_s
        await self.refresher.refresh_all()
        await self.refresher.give_back()

    async def served(self, name: str = ADAPTER) -> bytes | int:
        status, weights = await self.server.ask(name)
        return weights if status == 200 else status

    def laid_down(self) -> set[str]:
        return {path.parent.name for path in self.folders._root.rglob("adapter_model.safetensors")}


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))
