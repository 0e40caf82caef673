"""The group of settings of the plugin of vLLM, which finds adapters by name. See `loading` for how they are set."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from perennial.streams.paths import cache_dir
from perennial.streams.settings.groups import PositiveFloat, SettingsGroup, expanded


class ResolverSettings(SettingsGroup):
    """The plugin of vLLM."""

    served_base: str = Field(
        "",
        pattern=r"^([^:]*|sha256:[0-9a-f]{64})$",
        description="vLLM plugin: base that the server has, as the digest (`sha256:…`) or the name that manifests give "
        "it; empty: the server's own name for its model",
    )
    resolver_dir: str = Field(
        "",
        description="vLLM plugin: folder for the adapters that a server has loaded, which all its workers see; empty: "
        "one in perennial's cache folder",
    )
    resolve_timeout_s: PositiveFloat = Field(
        30.0, description="vLLM plugin: longest time for finding a version, and for fetching it, in seconds"
    )
    resolver_keep_h: PositiveFloat = Field(
        24.0, description="vLLM plugin: hours after which a name is given up until the next request for it"
    )
    resolver_max_gib: PositiveFloat = Field(
        16.0, description="vLLM plugin: most GiB of weights in the folder of a server; further versions are refused"
    )

    trial_tolerance_nats: PositiveFloat = Field(
        0.15,
        description="vLLM plugin: largest mean difference of the server's predictions from those that the learner "
        "recorded, in nats; a version past it is refused",
    )

    @field_validator("resolver_dir")
    @classmethod
    def _expand(cls, resolver_dir: str) -> str:
        return str(expanded(resolver_dir)) if resolver_dir.startswith("~") else resolver_dir

    def folder(self) -> Path:
        """Return the folder for the adapters that servers have loaded."""
        return Path(self.resolver_dir).absolute() if self.resolver_dir else cache_dir() / "vllm-adapters"
