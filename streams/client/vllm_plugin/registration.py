"""The entry points that vLLM loads: the resolver in every process, and the refresher in the API server.

vLLM loads the group `vllm.general_plugins` wherever the package is installed, and `vllm.endpoint_plugins` only where
VLLM_PLUGINS names the plugin. Without the second one a name stays at the version that it was resolved to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from perennial.storage.errors import PerennialError
from perennial.storage.objects.factory import open_store
from perennial.storage.registry.registry import Registry
from perennial.streams.client.vllm_plugin.engine_trial import EngineTrial
from perennial.streams.client.vllm_plugin.name_refresher import NameRefresher
from perennial.streams.client.vllm_plugin.name_resolver import NameResolver, log
from perennial.streams.client.vllm_plugin.resolver_metrics import resolver_metrics
from perennial.streams.client.vllm_plugin.version_folders import VersionFolders
from perennial.streams.settings import Settings, load_settings

NAME = "perennial"
_GIB = 1 << 30
_LOGPROBS = 20
"""vLLM's default of --max-logprobs."""


def register() -> None:
    """Register the resolver with vLLM. Does nothing where PERENNIAL_STORE is not set or a setting is wrong."""
    found = shared_resolver()
    if found is None:
        return
    resolver = found
    try:
        from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
    except ImportError:
        log.exception("no adapter is found by name: this vLLM has no resolvers for LoRA")
        return

    class PerennialResolver(LoRAResolver):  # type: ignore[misc]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            return await resolver.resolve(base_model_name, lora_name)

    LoRAResolverRegistry.register_resolver(NAME, PerennialResolver())


@lru_cache(maxsize=1)
def shared_resolver() -> NameResolver | None:
    """Return the resolver of this process. None where there is none; then the log says why."""
    try:
        from vllm.lora.request import LoRARequest

        settings = load_settings()
        if not settings.store.uri:
            log.info("no adapter is found by name: PERENNIAL_STORE is empty; allowed: a folder, or s3://bucket/prefix")
            return None
        return NameResolver(
            _folders(settings), settings.resolver.resolve_timeout_s, LoRARequest, resolver_metrics(),
            require_own=settings.tenants.require_own,
        )  # fmt: skip
    except PerennialError as error:
        log.error("no adapter is found by name: %s", error)
    except Exception:  # noqa: BLE001 - a server without adapters is better than none
        log.exception("no adapter is found by name")
    return None


def _folders(settings: Settings) -> VersionFolders:
    def open_registry() -> Registry:
        store = open_store(settings.store.uri, settings.s3)
        return Registry(store)

    return VersionFolders(
        open_registry,
        settings.resolver.folder(),
        alias=settings.serving.alias,
        served_base=settings.resolver.served_base,
        max_bytes=int(settings.resolver.resolver_max_gib * _GIB),
        signing=settings.signing,
        require_own=settings.tenants.require_own,
    )


class RefreshPlugin:
    """The endpoint plugin: it has no endpoint, but vLLM hands it the engine and the table of names.

    Attributes:
        name: Name of the plugin in VLLM_PLUGINS.
        required_tasks: The tasks of a server that the plugin is loaded for. None: any.
    """

    name = NAME
    required_tasks: tuple[str, ...] | None = None

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def attach_router(self, app: Any) -> None:
        """Add no routes."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:  # noqa: ARG002 - of the protocol
        """Start to refresh the names, in a task of the server's event loop."""
        resolver = shared_resolver()
        models: Any = getattr(state, "openai_serving_models", None)
        if resolver is None or engine_client is None:
            return
        needed = ("lora_requests", "lora_id_counter", "lora_resolver_lock")
        missing = [name for name in needed if not hasattr(models, name)]
        if missing:
            log.error(
                "names stay at the version that they are resolved to: this vLLM's table of names has no %s",
                ", ".join(missing),
            )
            return
        settings = load_settings()
        if await _generates(engine_client):
            trial = self._trial(engine_client, models, settings, resolver.clock)
            resolver.try_out = trial.run if trial else None
        refresher = NameRefresher(
            resolver, models, engine_client,
            poll_s=settings.serving.poll_s, keep_s=settings.resolver.resolver_keep_h * 3600,
        )  # fmt: skip
        self._task = asyncio.create_task(refresher.run(), name="perennial refresher")
        log.info("names of adapters follow %s, every %g s", settings.store.uri, settings.serving.poll_s)

    @staticmethod
    def _trial(engine: Any, models: Any, settings: Settings, clock: Callable[[], float]) -> EngineTrial | None:
        try:
            from vllm import SamplingParams
            from vllm.lora.request import LoRARequest

            allowed = int(getattr(models.model_config, "max_logprobs", _LOGPROBS))  # below 0: any number
            sampling = SamplingParams(
                max_tokens=1, temperature=0.0, logprobs=_LOGPROBS if allowed < 0 else min(_LOGPROBS, allowed)
            )
        except Exception:  # noqa: BLE001 - a server that tries nothing is better than none
            log.exception("versions are served without a trial")
            return None
        return EngineTrial(
            engine,
            lambda name, lora_int_id, path: LoRARequest(lora_name=name, lora_int_id=lora_int_id, lora_path=path),
            lambda: int(models.lora_id_counter.inc(1)),
            sampling,
            settings.resolver.trial_tolerance_nats,
            clock,
        )


async def _generates(engine: Any) -> bool:
    """Return whether the server generates text: one that only embeds cannot be asked for the learner's probes."""
    try:
        return "generate" in await engine.get_supported_tasks()
    except AttributeError:
        return True
