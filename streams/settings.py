"""The one settings class: every field is an environment variable PERENNIAL_<FIELD>, or a line in a .env file."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from perennial.storage.errors import PerennialError

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class SettingsError(PerennialError):
    """A setting is not usable."""

    exit_code = 2


def _home(kind: str, fallback: str) -> Path:
    return Path(os.environ.get(kind) or Path.home() / fallback) / "perennial"


def default_data_dir() -> Path:
    """Where `perennial up` keeps topics and objects."""
    return _home("XDG_DATA_HOME", ".local/share")


def cache_dir() -> Path:
    """Where downloads are kept: jars and server binaries."""
    return _home("XDG_CACHE_HOME", ".cache")


class Settings(BaseSettings):
    """What an operator may set. The README's configuration table is generated from here."""

    model_config = SettingsConfigDict(env_prefix="PERENNIAL_", env_file=".env", extra="ignore", frozen=True)

    kafka: str = Field("", description="bootstrap servers, host:port[,host:port]; empty: no broker is set")
    topic_prefix: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="put before every topic and group name"
    )
    partitions: Positive = Field(4, description="partitions of each keyed topic that `topics create` makes")
    replication: Positive = Field(1, description="replication factor of the topics")
    store: str = Field("", description="object store: a folder, or s3://bucket/prefix")
    data_dir: Path = Field(default_factory=default_data_dir, description="folder of `perennial up`: topics and objects")

    dedupe_window: Positive = Field(
        20_000, description="intake: events per origin partition in which a repeat is dropped"
    )
    intake_batch: Positive = Field(5_000, description="intake: events per fetch, flush and commit")

    max_batch_tokens: Positive = Field(768, description="curate: tokens that cut a micro-batch")
    max_batch_examples: Positive = Field(256, description="curate: examples that cut a micro-batch")
    min_batch_examples: Positive = Field(8, description="curate: examples below which drift does not cut")
    max_age_s: Seconds = Field(30.0, description="curate: age of the oldest pending example that cuts a micro-batch")
    cooldown_examples: Annotated[int, Field(ge=0)] = Field(
        32, description="curate: examples after a swap in which drift does not cut"
    )
    detector_window: Positive = Field(512, description="curate: last values per signal kept to rebuild detectors from")
    clock_settle_s: Seconds = Field(
        600.0, description="retain: how long a clock must have stayed set forward before anything expires by it"
    )
    max_adapters: Positive = Field(10_000, description="curate: adapters with state in memory")
    learn_turns: bool = Field(False, description="learn bare turns too, not only corrections")

    base: str = Field("shipped", description="base model: `shipped`, a folder, or a hub id")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    threads: Positive = Field(2, description="CPU threads of the model; part of a version's recipe")
    max_tokens: Positive = Field(256, description="tokens per training row and per scored example")
    score_batch: Positive = Field(32, description="scorer: examples per forward pass")

    rank: Positive = Field(8, description="LoRA rank")
    alpha: Positive = Field(16, description="LoRA alpha")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="AdamW learning rate")
    steps: Positive = Field(3, description="optimizer steps per update, at least; every new row is trained once")
    rows: Positive = Field(12, description="rows per optimizer step")
    row_tokens: Positive = Field(128, description="tokens per row")
    replay_share: Share = Field(0.4, description="share of rows replayed from earlier examples")
    general_share: Share = Field(0.2, description="share of rows from the base's own kind of text")
    replay_size: Positive = Field(1_024, description="examples kept for replay per adapter")
    clip_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradient norm above which it is clipped")
    seed: int = Field(0, description="seed of everything random in training")
    held_out_share: Share = Field(0.2, description="share of a micro-batch that the gate measures before it is learned")
    anchor_rows: Positive = Field(12, description="general rows that the gate measures per update, rotating")
    max_general_rise_nats: Seconds = Field(
        0.15, description="rise of general loss over the base's that the gate refuses"
    )
    min_gain_nats: float = Field(0.0, description="fall of held-out loss below which the gate refuses")

    alias: str = Field("live", description="the name that subscribers follow")
    poll_s: Seconds = Field(5.0, description="subscriber and scorer: how often the alias itself is read")
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="port of /metrics and /healthz; 0: off")
    metrics_host: str = Field("127.0.0.1", description="address of /metrics and /healthz")
    stall_s: Seconds = Field(120.0, description="/healthz turns red when work waits and nothing moved for so long")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what roles write to stderr")

    def require_kafka(self) -> str:
        """The bootstrap servers. Raises SettingsError where none is set."""
        if not self.kafka:
            raise SettingsError(
                "no broker is set",
                got="PERENNIAL_KAFKA is empty",
                allowed="host:port of a Kafka broker",
                remedy="run `perennial up` and use the address it prints, or point PERENNIAL_KAFKA at a broker of your own",
            )
        return self.kafka

    def require_store(self) -> str:
        """The object store's address. Raises SettingsError where none is set."""
        if not self.store:
            raise SettingsError(
                "no object store is set",
                got="PERENNIAL_STORE is empty",
                allowed="a folder, or s3://bucket/prefix",
                remedy="set PERENNIAL_STORE; `perennial up` prints the one it uses",
            )
        return self.store

    def topic(self, name: str) -> str:
        """A topic's (or group's) full name."""
        return f"{self.topic_prefix}{name}"


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment. Raises SettingsError that names the variable."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks the values
    except ValidationError as error:
        first = error.errors()[0]
        name = "PERENNIAL_" + "_".join(str(part) for part in first["loc"]).upper()
        raise SettingsError(
            f"{name} is not usable", got=first.get("input"), allowed=first["msg"], remedy=f"mend or unset {name}"
        ) from error


@lru_cache(maxsize=1)
def code_version() -> str:
    """The installed version of the project, part of every manifest."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("perennial-lm")
    except PackageNotFoundError:
        return "0+unknown"


def settings_table() -> str:
    """All settings as a Markdown table: what the README shows."""
    lines = ["| variable | default | what it is for |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = (
            "`~/.local/share/perennial`"
            if name == "data_dir"
            else f"`{field.default!r}`"
            if field.default != ""
            else ""
        )
        lines.append(f"| `PERENNIAL_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def write_settings_table(readme: Path) -> bool:
    """Put the table into the README between its marks; True where it differed."""
    text = readme.read_text("utf-8")
    before, _, rest = text.partition("<!-- settings -->\n")
    _, mark, after = rest.partition("<!-- /settings -->")
    fresh = f"{before}<!-- settings -->\n{settings_table()}{mark}{after}"
    if fresh != text:
        readme.write_text(fresh, "utf-8")
    return fresh != text


if __name__ == "__main__":
    write_settings_table(Path("README.md"))
