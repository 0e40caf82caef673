"""Every setting: groups of fields, each an environment variable PERENNIAL_<FIELD> or a line in a .env file.

A field's variable is its name in capitals; `bootstrap` and `uri`, which would say nothing there, are PERENNIAL_KAFKA and
PERENNIAL_STORE. Names are unique over all groups, so that a variable needs no group in its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from perennial.storage.errors import PerennialError
from perennial.storage.objects.s3_settings import S3Settings

ENV_PREFIX = "PERENNIAL_"
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class SettingsError(PerennialError):
    """A setting is not usable."""

    exit_code = 2


def _home(kind: str, fallback: str) -> Path:
    return Path(os.environ.get(kind) or Path.home() / fallback) / "perennial"


def default_data_dir() -> Path:
    """Return the folder in which `perennial up` keeps topics and objects."""
    return _home("XDG_DATA_HOME", ".local/share")


def cache_dir() -> Path:
    """Return the folder that keeps downloads: jars and server binaries."""
    return _home("XDG_CACHE_HOME", ".cache")


class _Group(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_file=".env", extra="ignore", frozen=True, populate_by_name=True
    )


class KafkaSettings(_Group):
    """The broker and the topics."""

    bootstrap: str = Field(
        "",
        validation_alias=AliasChoices("PERENNIAL_KAFKA"),
        description="bootstrap servers, host:port[,host:port]; empty: no broker is set",
    )
    topic_prefix: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="put before every topic and group name"
    )
    partitions: Positive = Field(4, description="partitions of each keyed topic that `topics create` makes")
    replication: Positive = Field(1, description="replication factor of the topics")

    def require_bootstrap(self) -> str:
        """Return the bootstrap servers.

        Raises:
            SettingsError: none is set.
        """
        if not self.bootstrap:
            raise SettingsError(
                "no broker is set",
                got="PERENNIAL_KAFKA is empty",
                allowed="host:port of a Kafka broker",
                remedy="run `perennial up` and use the address it prints, or point PERENNIAL_KAFKA at a broker of your own",
            )
        return self.bootstrap

    def topic(self, name: str) -> str:
        """Return the full name of a topic or group: the prefix and the name."""
        return f"{self.topic_prefix}{name}"


class StoreSettings(_Group):
    """Where objects live."""

    uri: str = Field(
        "",
        validation_alias=AliasChoices("PERENNIAL_STORE"),
        description="object store: a folder, or s3://bucket/prefix",
    )
    data_dir: Path = Field(default_factory=default_data_dir, description="folder of `perennial up`: topics and objects")

    def require_uri(self) -> str:
        """Return the object store's address.

        Raises:
            SettingsError: none is set.
        """
        if not self.uri:
            raise SettingsError(
                "no object store is set",
                got="PERENNIAL_STORE is empty",
                allowed="a folder, or s3://bucket/prefix",
                remedy="set PERENNIAL_STORE; `perennial up` prints the one it uses",
            )
        return self.uri


class IntakeSettings(_Group):
    """The intake role."""

    dedupe_window: Positive = Field(
        20_000, description="intake: events per origin partition in which a repeat is dropped"
    )
    intake_batch: Positive = Field(5_000, description="intake: events per fetch, flush and commit")


class CurateSettings(_Group):
    """When curate cuts a micro-batch, and what it keeps per adapter."""

    max_batch_tokens: Positive = Field(768, description="curate: tokens that cut a micro-batch")
    max_batch_examples: Positive = Field(256, description="curate: examples that cut a micro-batch")
    min_batch_examples: Positive = Field(8, description="curate: examples below which drift does not cut")
    max_age_s: Seconds = Field(30.0, description="curate: age of the oldest pending example that cuts a micro-batch")
    cooldown_examples: Annotated[int, Field(ge=0)] = Field(
        32, description="curate: examples after a swap in which drift does not cut"
    )
    detector_window: Positive = Field(512, description="curate: last values per signal kept to rebuild detectors from")
    max_adapters: Positive = Field(10_000, description="curate: adapters with state in memory")
    learn_turns: bool = Field(False, description="learn bare turns too, not only corrections")


class RetainSettings(_Group):
    """The retain agent."""

    clock_settle_s: Seconds = Field(
        600.0, description="retain: how long a clock must have stayed set forward before anything expires by it"
    )


class ModelSettings(_Group):
    """The base model and where it runs."""

    base: str = Field("shipped", description="base model: `shipped`, a folder, or a hub id")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    threads: Positive = Field(2, description="CPU threads of the model; part of a version's recipe")
    max_tokens: Positive = Field(256, description="tokens per training row and per scored example")
    score_batch: Positive = Field(32, description="scorer: examples per forward pass")


class TrainingSettings(_Group):
    """The recipe of an update; part of every manifest."""

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


class GateSettings(_Group):
    """What a version must show before it is promoted; part of every manifest."""

    held_out_share: Share = Field(0.2, description="share of a micro-batch that the gate measures before it is learned")
    anchor_rows: Positive = Field(12, description="general rows that the gate measures per update, rotating")
    max_general_rise_nats: Seconds = Field(
        0.15, description="rise of general loss over the base's that the gate refuses"
    )
    min_gain_nats: float = Field(0.0, description="fall of held-out loss below which the gate refuses")


class ServingSettings(_Group):
    """Subscribers and the scorer."""

    alias: str = Field("live", description="the name that subscribers follow")
    poll_s: Seconds = Field(5.0, description="subscriber and scorer: how often the alias itself is read")


class ObserveSettings(_Group):
    """Metrics, health and logs."""

    metrics_port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="port of /metrics and /healthz; 0: off")
    metrics_host: str = Field("127.0.0.1", description="address of /metrics and /healthz")
    stall_s: Seconds = Field(120.0, description="/healthz turns red when work waits and nothing moved for so long")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what roles write to stderr")


class Settings(BaseModel):
    """What an operator may set, in groups. The README's configuration table is generated from here.

    `Settings()` reads the environment and `.env`; `Settings.of` takes single values by their flat names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    store: StoreSettings = Field(default_factory=StoreSettings)
    intake: IntakeSettings = Field(default_factory=IntakeSettings)
    curate: CurateSettings = Field(default_factory=CurateSettings)
    retain: RetainSettings = Field(default_factory=RetainSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    gate: GateSettings = Field(default_factory=GateSettings)
    serving: ServingSettings = Field(default_factory=ServingSettings)
    observe: ObserveSettings = Field(default_factory=ObserveSettings)
    s3: S3Settings = Field(default_factory=S3Settings.from_env, exclude=True, repr=False)

    @classmethod
    def of(cls, *, env_file: str | None = ".env", **values: Any) -> Self:
        """Settings from the environment, some of them given here.

        Args:
            env_file: file with further variables; None: none is read.
            **values: fields by their flat names (`kafka`, `store`, `max_age_s`, ...).

        Raises:
            ValidationError: a value is not allowed, or there is no such field.
        """
        groups: dict[str, Any] = {}
        for name, model in _groups():
            mine = {field: values.pop(flat) for flat, field in _flat_fields(model) if flat in values}
            groups[name] = model(_env_file=env_file, **mine)
        return cls(**groups, **values)

    def replace(self, **values: Any) -> Self:
        """Return a copy with some fields changed, by their flat names; `s3` replaces that group."""
        changed: dict[str, Any] = {"s3": values.pop("s3")} if "s3" in values else {}
        for name, model in _groups():
            mine = {field: values.pop(flat) for flat, field in _flat_fields(model) if flat in values}
            if mine:
                changed[name] = getattr(self, name).model_copy(update=mine)
        if values:
            raise TypeError(f"no such settings: {', '.join(sorted(values))}")
        return self.model_copy(update=changed)

    def environment(self) -> dict[str, str]:
        """Return the variables that give another process the same settings; those of S3 are not among them."""
        return {
            f"{ENV_PREFIX}{flat.upper()}": str(value)
            for name, model in _groups()
            for flat, field in _flat_fields(model)
            for value in [getattr(self, name).model_dump(mode="json")[field]]
        }


def _groups() -> Iterator[tuple[str, type[_Group]]]:
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Group):
            yield name, kind


def _flat_fields(model: type[_Group]) -> Iterator[tuple[str, str]]:
    """Yield (flat name, field name): the flat name is that of the variable, in small letters and without the prefix."""
    for field, info in model.model_fields.items():
        yield variable_of(field, info).removeprefix(ENV_PREFIX).lower(), field


def variable_of(field: str, info: FieldInfo) -> str:
    """Return the environment variable that sets a field."""
    alias = info.validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else f"{ENV_PREFIX}{field.upper()}"


def all_fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield (group, variable, field) of every setting, in the order of the configuration table."""
    for name, model in _groups():
        for field, info in model.model_fields.items():
            yield name, variable_of(field, info), info


def load_settings(**values: Any) -> Settings:
    """Read the settings from the environment and `.env`.

    Args:
        **values: fields by their flat names, before what the environment says.

    Raises:
        SettingsError: a value is not usable; the error names its variable.
    """
    try:
        return Settings.of(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        variable = name if name.startswith(ENV_PREFIX) else f"{ENV_PREFIX}{name.upper()}"
        raise SettingsError(
            f"{variable} is not usable",
            got=first.get("input"),
            allowed=first["msg"],
            remedy=f"correct or unset {variable}",
        ) from error


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the installed version of the project, which is part of every manifest."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("perennial-lm")
    except PackageNotFoundError:
        return "0+unknown"
