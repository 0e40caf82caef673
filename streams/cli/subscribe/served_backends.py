"""Make the backend that the options of `perennial subscribe` name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from perennial.extras import require_extra
from perennial.streams.client.backend import Backend
from perennial.streams.paths import expand_path
from perennial.streams.settings import Settings, SettingsError

_DEFAULT_URLS = {"vllm": "http://127.0.0.1:8000", "sglang": "http://127.0.0.1:30000"}


class BackendKind(StrEnum):
    """What can serve versions."""

    VLLM = "vllm"
    SGLANG = "sglang"
    DIRECTORY = "directory"
    PEFT = "peft"


@dataclass(frozen=True)
class BackendChoice:
    """The options that decide about the backend.

    Attributes:
        kind: What serves the versions.
        folder: Folder for the versions; None for peft.
        url: Address of the engine; empty for its default port on this machine.
        server_folder: The folder as the engine sees it; empty for the same.
        base_model: Name of the base in `adapter_config.json`; empty for the one in the manifest.
        base_sha256: Digest of the base that versions must have; empty for that of the first version in the folder.
        max_cpu_loras: Adapters that vLLM keeps in memory, or more.
        grace_s: Seconds for which a version is kept after another one became active.
    """

    kind: BackendKind
    folder: Path | None = None
    url: str = ""
    server_folder: str = ""
    base_model: str = ""
    base_sha256: str = ""
    max_cpu_loras: int = 8
    grace_s: float = 2.0


def make_backend(choice: BackendChoice, adapters: list[str], settings: Settings) -> Backend:
    """Return the backend; it is shared by the subscribers of all adapters.

    Raises:
        SettingsError: The options do not fit the kind of backend.
        BackendError: The address is not one of HTTP.
        MissingExtraError: The extra `worker` is not installed, and the kind is `peft`.
    """
    if choice.kind is BackendKind.PEFT:
        return _peft(adapters, settings)
    if choice.folder is None:
        raise SettingsError(
            "no folder for the versions", got=f"--backend {choice.kind}", allowed="--folder PATH",
            remedy="name a folder that the server can read",
        )  # fmt: skip
    folder = expand_path(choice.folder)
    base_sha256, base_model_name = choice.base_sha256 or None, choice.base_model or None
    if choice.kind is BackendKind.DIRECTORY:
        from perennial.streams.client.directory_backend import DirectoryBackend

        return DirectoryBackend(
            folder, base_sha256=base_sha256, base_model_name=base_model_name, grace_s=choice.grace_s
        )
    url, server_path = choice.url or _DEFAULT_URLS[choice.kind], choice.server_folder or None
    if choice.kind is BackendKind.VLLM:
        from perennial.streams.client.engines.vllm_backend import VllmBackend

        return VllmBackend(
            url, folder, server_path=server_path, base_sha256=base_sha256, base_model_name=base_model_name,
            grace_s=choice.grace_s, max_cpu_loras=choice.max_cpu_loras, api_key=os.environ.get("VLLM_API_KEY"),
        )  # fmt: skip
    from perennial.streams.client.engines.sglang_backend import SglangBackend

    return SglangBackend(
        url, folder, server_path=server_path, base_sha256=base_sha256, base_model_name=base_model_name,
        grace_s=choice.grace_s, api_key=os.environ.get("SGLANG_API_KEY"),
    )  # fmt: skip


def _peft(adapters: list[str], settings: Settings) -> Backend:
    require_extra("worker", "`perennial subscribe --backend peft`")
    if len(adapters) > 1:
        raise SettingsError(
            "a model in this process serves one adapter", got=", ".join(adapters), allowed="one adapter",
            remedy="run one `perennial subscribe` for each adapter, or use another backend",
        )  # fmt: skip
    from perennial.learner.model.base import load_base
    from perennial.learner.model.lora import LoraConfig
    from perennial.learner.serving.peft_backend import PeftBackend

    base = load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
    return PeftBackend(base, LoraConfig(settings.training.rank, settings.training.alpha))
