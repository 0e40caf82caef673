"""Keep language models learning from Kafka, and make them forget on request.

Publish what a model should learn with `Publisher`; serve what it learned with `Subscriber` and a backend. Every name is
imported at its first use, so that `import perennial` and the import of any single module stay cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perennial.extras import MissingExtraError
    from perennial.learner.model.base import load_base as load_base
    from perennial.learner.model.lora import LoraConfig as LoraConfig
    from perennial.learner.serving.peft_backend import PeftBackend as PeftBackend
    from perennial.storage.errors import PerennialError
    from perennial.streams.client.backend import Backend, BackendError, UnfitVersionError
    from perennial.streams.client.base_publisher import Delivery, PublishError, Receipt
    from perennial.streams.client.directory_backend import DirectoryBackend
    from perennial.streams.client.engines.sglang_backend import SglangBackend
    from perennial.streams.client.engines.vllm_backend import VllmBackend
    from perennial.streams.client.following_thread import SubscriberError
    from perennial.streams.client.publisher import Publisher
    from perennial.streams.client.subscriber import Subscriber
    from perennial.streams.client.testing import MemoryBackend
    from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
    from perennial.streams.events.models import RetentionRequested
    from perennial.streams.settings import Settings, load_settings

    __version__: str

# The names of _NEED_WORKER are left out: `from perennial import *` must not fail without the extra `worker`.
__all__ = [
    "Backend",
    "BackendError",
    "Delivery",
    "DirectoryBackend",
    "DocumentObserved",
    "InteractionObserved",
    "MemoryBackend",
    "MissingExtraError",
    "PerennialError",
    "PublishError",
    "Publisher",
    "Receipt",
    "RetentionRequested",
    "Settings",
    "SglangBackend",
    "Subscriber",
    "SubscriberError",
    "UnfitVersionError",
    "VllmBackend",
    "__version__",
    "load_settings",
]

_MODULE_OF = {
    "Backend": "streams.client.backend",
    "BackendError": "streams.client.backend",
    "Delivery": "streams.client.base_publisher",
    "DirectoryBackend": "streams.client.directory_backend",
    "DocumentObserved": "streams.events.input_events",
    "InteractionObserved": "streams.events.input_events",
    "LoraConfig": "learner.model.lora",
    "MemoryBackend": "streams.client.testing",
    "MissingExtraError": "extras",
    "PeftBackend": "learner.serving.peft_backend",
    "PerennialError": "storage.errors",
    "PublishError": "streams.client.base_publisher",
    "Publisher": "streams.client.publisher",
    "Receipt": "streams.client.base_publisher",
    "RetentionRequested": "streams.events.models",
    "Settings": "streams.settings",
    "SglangBackend": "streams.client.engines.sglang_backend",
    "Subscriber": "streams.client.subscriber",
    "SubscriberError": "streams.client.following_thread",
    "UnfitVersionError": "streams.client.backend",
    "VllmBackend": "streams.client.engines.vllm_backend",
    "load_base": "learner.model.base",
    "load_settings": "streams.settings",
}
_NEED_WORKER = frozenset({"LoraConfig", "PeftBackend", "load_base"})


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562).

    Raises:
        AttributeError: The package has no such name.
        MissingExtraError: The name needs the extra `worker`, which is not installed.
    """
    if name == "__version__":
        return _installed_version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _NEED_WORKER:
        from perennial.extras import require_extra

        require_extra("worker", f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("perennial-lm")
    except PackageNotFoundError:
        return "0+unknown"
