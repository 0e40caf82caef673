"""A stand-in for the parts of vLLM 0.32 that the plugin meets, for tests where vLLM is not installed."""

from __future__ import annotations

import asyncio
import math
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass(eq=False)
class LoRARequest:
    """Requests are one to an engine if their names are equal, as in vLLM."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_name == other.lora_name

    def __hash__(self) -> int:
        return hash(self.lora_name)


class Engine:
    """Reads a folder when an adapter is loaded, and again when one is used that it has dropped."""

    def __init__(self) -> None:
        self.loaded: dict[int, bytes] = {}
        self.output_processor = SimpleNamespace(request_states={})
        self.refuses: set[str] = set()
        self.predicts: dict[bytes, dict[int, float]] = {}
        self.nan_blocks = 0
        self.tasks = ("generate",)
        self.prompts: list[str] = []

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        await asyncio.sleep(0)
        if any(part in lora_request.lora_path for part in self.refuses):
            raise ValueError("LoRA rank 64 is greater than max_lora_rank 16")
        if lora_request.lora_int_id not in self.loaded:
            folder = Path(lora_request.lora_path)
            assert (folder / "adapter_config.json").is_file()
            self.loaded[lora_request.lora_int_id] = (folder / "adapter_model.safetensors").read_bytes()
        return True

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return self.tasks

    async def remove_lora(self, lora_id: int) -> bool:
        await asyncio.sleep(0)
        return self.loaded.pop(lora_id, None) is not None

    async def generate(
        self, prompt: dict[str, str], sampling_params: Any, request_id: str, *, lora_request: LoRARequest | None
    ) -> AsyncIterator[Any]:
        """Yield the next tokens. What NaN leaves behind makes the next answers NaN too, whoever asks."""
        await asyncio.sleep(0)
        self.prompts.append(prompt["prompt"])
        nats = self.predicts.get(self.loaded[lora_request.lora_int_id] if lora_request else b"", {1: -0.5})
        if lora_request and math.isnan(nats[1]):
            self.nan_blocks = 2
        elif self.nan_blocks:
            self.nan_blocks -= 1
            nats = {1: math.nan}
        logged = {token: SimpleNamespace(logprob=each) for token, each in nats.items()}
        yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=[logged])])

    async def answer(self, lora_request: LoRARequest) -> bytes:
        """Return the weights that a request is answered with. Raises where a real engine would end."""
        await self.add_lora(lora_request)
        return self.loaded[lora_request.lora_int_id]


@dataclass
class Counter:
    ids: Any = field(default_factory=lambda: count(1))

    def inc(self, num: int) -> int:
        assert num == 1
        return next(self.ids)


class Server:
    """The table of model names, and how it asks resolvers for those that it does not know."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine = engine
        self.model = model
        self.model_config = SimpleNamespace(max_logprobs=5)
        self.lora_requests: dict[str, LoRARequest] = {}
        self.lora_id_counter = Counter()
        self.lora_resolver_lock: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ask(self, name: str) -> tuple[int, bytes]:
        """Return the status of a request, and the weights that it is answered with."""
        if name not in self.lora_requests:
            status = await self._resolve(name)
            if status != 200:
                return status, b""
        return 200, await self.engine.answer(self.lora_requests[name])

    async def _resolve(self, name: str) -> int:
        async with self.lora_resolver_lock[name]:
            if name in self.lora_requests:
                return 200
            lora_int_id = self.lora_id_counter.inc(1)
            found = False
            for resolver in sys.modules["vllm.lora.resolver"].LoRAResolverRegistry.resolvers.values():
                request = await resolver.resolve_lora(self.model, name)
                if request is None:
                    continue
                found = True
                request.lora_int_id = lora_int_id
                try:
                    await self.engine.add_lora(request)
                except Exception:  # noqa: BLE001 - as vLLM does
                    continue
                self.lora_requests[name] = request
                return 200
            return 400 if found else 404


def install(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let the plugin import the stand-in, and return the resolvers that it registers."""
    resolvers: dict[str, Any] = {}

    class Registry:
        @staticmethod
        def register_resolver(name: str, resolver: Any) -> None:
            resolvers[name] = resolver

    Registry.resolvers = resolvers  # type: ignore[attr-defined]
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": Registry},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return resolvers
