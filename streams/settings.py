"""All settings, in groups. An environment variable or a line in `.env` sets each field.

The variable of a field is PERENNIAL_ and the field's name in capitals: PERENNIAL_MAX_AGE_S sets
`settings.curate.max_age_s`. Two fields have another variable, because their names say too little without the group:
`kafka.bootstrap` is set by PERENNIAL_KAFKA and `store.uri` by PERENNIAL_STORE. `Settings.of` and `Settings.replace`
take fields by their flat names. A flat name is the variable in small letters without the prefix: `max_age_s`, `kafka`,
`store`. Flat names are unique over all groups.

The group `s3` (PERENNIAL_S3_…, AWS_…) holds credentials, and the group `security` holds keys. They are read from the
same two places. They are not shown or dumped, and `Settings.environment()` leaves them out.

To add a setting: add a field with a description to its group, then run `make schema`, which writes it into the README.
CONTRIBUTING.md says what else the groups of training and gate need.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from perennial.storage.errors import PerennialError
from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.addresses import is_loopback, kafka_servers, without_brackets
from perennial.streams.paths import UnknownHomeError, default_data_dir, expand_path

ENV_PREFIX: Final = "PERENNIAL_"
_ENV_ENCODING: Final = "utf-8-sig"
"""Some editors begin a file with a byte order mark; as plain UTF-8 it would hide the first variable."""
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Secret = Annotated[SecretStr, Field(min_length=32)]


class SettingsError(PerennialError):
    """A setting is not usable."""

    exit_code = 2


def _expanded(path: str | Path) -> Path:
    """Return `expand_path` for a validator, which reports a ValueError."""
    try:
        return expand_path(path)
    except UnknownHomeError as error:
        raise ValueError(f"{error.allowed}") from error


class _Group(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_file=".env",
        env_file_encoding=_ENV_ENCODING,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        # A limit of NaN would refuse nothing: every comparison with it is false.
        allow_inf_nan=False,
    )


class KafkaSettings(_Group):
    """The broker and the topics."""

    bootstrap: str = Field(
        "",
        validation_alias=AliasChoices("PERENNIAL_KAFKA"),
        description="addresses of the broker, host:port[,host:port]; empty: none is set",
    )
    topic_prefix: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="text before the name of every topic and consumer group"
    )
    partitions: PositiveInt = Field(
        4, description="partitions of each topic with a key, when `perennial topics create` creates it"
    )
    replication: PositiveInt = Field(1, description="replication factor of the topics, when they are created")

    @field_validator("bootstrap")
    @classmethod
    def _normalise(cls, bootstrap: str) -> str:
        return ",".join(kafka_servers(bootstrap))

    def require_bootstrap(self) -> str:
        """Return the bootstrap servers as `host:port[,host:port]`, without blanks and schemes.

        Raises:
            SettingsError: the variable is empty.
        """
        if not self.bootstrap:
            raise SettingsError(
                "no broker is set",
                got="PERENNIAL_KAFKA is empty",
                allowed="host:port of a Kafka broker",
                remedy="run `perennial up` and use the address it prints, or set PERENNIAL_KAFKA to a broker of your own",
            )
        return self.bootstrap

    def topic(self, name: str) -> str:
        """Return the full name of a topic or group: the prefix and the name."""
        return f"{self.topic_prefix}{name}"


class StoreSettings(_Group):
    """The object store, and the folder of `perennial up`."""

    uri: str = Field(
        "",
        validation_alias=AliasChoices("PERENNIAL_STORE"),
        description="object store: a folder, or s3://bucket/prefix",
    )
    data_dir: Path = Field(default_factory=default_data_dir, description="folder of `perennial up`: topics and objects")
    keep_versions: Annotated[int, Field(ge=0)] = Field(
        256, description="`perennial gc`: newest versions of an adapter that keep their weights; 0: all do"
    )

    @field_validator("uri")
    @classmethod
    def _expand_uri(cls, uri: str) -> str:
        return str(_expanded(uri)) if uri.startswith("~") else uri

    @field_validator("data_dir", mode="before")
    @classmethod
    def _expand_data_dir(cls, data_dir: object) -> object:
        if data_dir == "":  # a variable that is set to nothing; Path("") would be the working directory
            return default_data_dir()
        return _expanded(data_dir) if isinstance(data_dir, str | Path) else data_dir

    def require_uri(self) -> str:
        """Return the object store's address.

        Raises:
            SettingsError: the variable is empty.
        """
        if not self.uri:
            raise SettingsError(
                "no object store is set",
                got="PERENNIAL_STORE is empty",
                allowed="a folder, or s3://bucket/prefix",
                remedy="set PERENNIAL_STORE; `perennial up` prints the store that it uses",
            )
        return self.uri


class IntakeSettings(_Group):
    """The intake role."""

    dedupe_window: PositiveInt = Field(
        20_000, description="intake: last events per input partition among which a repeated example is dropped"
    )
    intake_batch: PositiveInt = Field(5_000, description="intake: events per fetch, flush and commit")


class CurateSettings(_Group):
    """When the curate agent cuts a micro-batch, and what it keeps per adapter."""

    max_batch_tokens: PositiveInt = Field(768, description="curate: pending tokens that cut a micro-batch")
    max_batch_examples: PositiveInt = Field(256, description="curate: pending examples that cut a micro-batch")
    min_batch_examples: PositiveInt = Field(
        8, description="curate: pending examples below which drift does not cut a micro-batch"
    )
    max_age_s: PositiveFloat = Field(
        30.0, description="curate: seconds after which a pending example cuts a micro-batch"
    )
    cooldown_examples: Annotated[int, Field(ge=0)] = Field(
        32, description="curate: number of examples after each new live version during which drift does not cut"
    )
    detector_window: PositiveInt = Field(
        512, description="curate: last values of each signal that are kept to rebuild the drift detectors"
    )
    max_adapters: PositiveInt = Field(
        10_000,
        description="curate: adapters in memory; a further one replaces the least recently used, which is cut early",
    )
    learn_turns: bool = Field(
        False, description="intake: also learn the response of an interaction that has no correction"
    )


class RetainSettings(_Group):
    """The retain agent."""

    clock_settle_s: PositiveFloat = Field(
        600.0,
        description="retain: seconds after a jump of the wall clock forward until examples expire by the new time",
    )
    forget_window_s: NotNegativeFloat = Field(
        0.0,
        description="retain: seconds for which requests to erase or supersede are gathered, so that one rebuild serves "
        "them; a request with a due time waits no longer than until one hour before it, an emergency not at all",
    )
    expiry_lead_s: NotNegativeFloat = Field(
        600.0,
        description="retain: seconds before examples expire at which the learner begins to rebuild the adapter without "
        "them; 0: only when they expire",
    )


class ModelSettings(_Group):
    """The base model and where it runs."""

    base: str = Field("shipped", description="base model: `shipped`, a folder, or an id on the Hugging Face hub")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of the model; auto: a CUDA GPU if there is one"
    )
    threads: PositiveInt = Field(
        2,
        description="CPU threads of the model; every manifest names them, for they change the last bits of a result",
    )
    max_tokens: PositiveInt = Field(
        256, description="scorer: tokens at the start of an example on which its losses are measured"
    )
    score_batch: PositiveInt = Field(32, description="scorer: examples per forward pass")
    lanes: PositiveInt = Field(
        3, description="learner: jobs that may run at once; a second one starts where the first takes long"
    )


class TrainingSettings(_Group):
    """The recipe of an update. Part of every manifest."""

    rank: PositiveInt = Field(8, description="rank of the LoRA matrices")
    alpha: PositiveInt = Field(16, description="alpha of LoRA: its output is scaled by alpha / rank")
    learning_rate: PositiveFloat = Field(1e-3, description="learning rate of AdamW")
    steps: PositiveInt = Field(
        3, description="least number of optimizer steps per update; there are more if the new rows need them"
    )
    rows: PositiveInt = Field(12, description="rows per optimizer step")
    row_tokens: PositiveInt = Field(128, description="largest number of tokens per row")
    replay_share: Share = Field(0.4, description="share of training rows that come from earlier examples, from 0 to 1")
    general_share: Share = Field(
        0.2, description="share of training rows that come from the base's own kind of text, from 0 to 1"
    )
    replay_size: PositiveInt = Field(1_024, description="earlier examples that each adapter keeps for replay")
    clip_norm: PositiveFloat = Field(
        1.0, description="largest norm of the gradient; a larger gradient is scaled down to it"
    )
    seed: int = Field(0, description="seed of all random choices in training")


class GateSettings(_Group):
    """The measurements that a version must pass before it is promoted. Part of every manifest."""

    held_out_share: Share = Field(
        0.2,
        description="share of a micro-batch, from 0 to 1, that is held out: measured first, and trained on after that",
    )
    anchor_rows: PositiveInt = Field(
        12, description="rows of general text on which the gate measures each update; other rows each time"
    )
    max_general_rise_nats: PositiveFloat = Field(
        0.15,
        description="largest rise of the general loss above the base's, in nats per token; the gate refuses a rise past it",
    )
    min_gain_nats: float = Field(
        0.0,
        description="least fall of the held-out loss, in nats per token; the gate allows for noise of three standard errors",
    )


class SecuritySettings(_Group):
    """Secrets of the roles: shown nowhere, left out of `Settings.environment()`. An empty variable counts as not set."""

    model_config = SettingsConfigDict(env_ignore_empty=True, hide_input_in_errors=True)

    internal_key: Secret | None = Field(
        None,
        description="secret of at least 32 characters that signs the records between the roles, the same for all roles "
        "and the command line; not set: they are not signed",
    )
    internal_key_previous: Secret | None = Field(
        None, description="secret before that one, while it is replaced: what it signed is still accepted"
    )

    def keys(self) -> tuple[bytes, ...]:
        """Return the keys of internal records: the first signs, all are accepted. Empty: records are not signed."""
        found = (self.internal_key, self.internal_key_previous) if self.internal_key else ()
        return tuple(secret.get_secret_value().encode() for secret in found if secret)


class ServingSettings(_Group):
    """Subscribers and the scorer."""

    alias: str = Field("live", description="alias that subscribers and the scorer follow")
    poll_s: PositiveFloat = Field(5.0, description="subscriber and scorer: seconds between two readings of the alias")
    replica_lease_s: Annotated[float, Field(ge=1, le=86_400)] = Field(
        60.0, description="subscriber: seconds for which requests to forget wait for it after its last heartbeat"
    )


class ObserveSettings(_Group):
    """Metrics, health and logs."""

    metrics_port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="port of /metrics and /healthz; 0: off")
    metric_adapters: PositiveInt = Field(100, description="adapters that metrics name; the others add up as `other`")
    metrics_host: str = Field("127.0.0.1", description="address that /metrics and /healthz listen on")
    stall_s: PositiveFloat = Field(
        120.0, description="seconds without progress, while work waits, after which /healthz answers 503"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level of the messages that roles log to stderr"
    )

    @field_validator("metrics_host")
    @classmethod
    def _bare_host(cls, host: str) -> str:
        return without_brackets(host)


class DevstackSettings(_Group):
    """The embedded broker of `perennial up`."""

    maven_url: str = Field(
        "",
        description="Maven repository of the embedded broker's jars, https unless on this machine; empty: Maven Central",
    )

    @field_validator("maven_url")
    @classmethod
    def _check_maven_url(cls, url: str) -> str:
        parts = urlsplit(url)
        safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
        if url and not (safe and parts.hostname):
            raise ValueError("an https:// address, or an http:// one of this machine (localhost, 127.0.0.1)")
        return url.rstrip("/")


class Settings(BaseModel):
    """All settings, in groups.

    `Settings()` reads the environment and `.env`. `Settings.of` also takes single values by their flat names.

    Example:
        >>> settings = Settings.of(kafka="broker:9092", max_age_s=5, env_file=None)
        >>> settings.kafka.bootstrap, settings.curate.max_age_s
        ('broker:9092', 5.0)
        >>> settings.replace(max_age_s=1).curate.max_age_s
        1.0
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
    devstack: DevstackSettings = Field(default_factory=DevstackSettings)
    security: SecuritySettings = Field(default_factory=SecuritySettings)
    s3: S3Settings = Field(default_factory=lambda: _s3_settings(".env"), exclude=True, repr=False)

    @classmethod
    def of(cls, *, env_file: str | None = ".env", **values: Any) -> Self:
        """Return settings from the environment, with some values given here.

        Args:
            env_file: a file with further variables; None: read none. The environment takes precedence over it.
            **values: fields by their flat names, which take precedence over both; `s3` gives that group.

        Raises:
            ValidationError: a value is not allowed.
            TypeError: there is no such setting.
        """
        given = _by_group(values)
        groups = {name: model(_env_file=env_file, **given.get(name, {})) for name, model in _groups()}
        s3 = values.get("s3") or _s3_settings(env_file)
        return cls(**groups, s3=s3)

    def replace(self, **values: Any) -> Self:
        """Return a copy with some values changed.

        Args:
            **values: fields by their flat names; `s3` replaces that group.

        Raises:
            ValidationError: a value is not allowed.
            TypeError: there is no such setting.
        """
        changed: dict[str, Any] = {"s3": values["s3"]} if "s3" in values else {}
        for name, given in _by_group(values).items():
            group: _Group = getattr(self, name)
            fields = {field: getattr(group, field) for field in type(group).model_fields}
            changed[name] = type(group)(_env_file=None, **fields | given)
        return self.model_copy(update=changed)

    def environment(self) -> dict[str, str]:
        """Return the environment variables that give another process the same settings, without the secrets."""
        return {
            f"{ENV_PREFIX}{flat.upper()}": str(value)
            for name, model in _groups()
            if model is not SecuritySettings
            for flat, field in _flat_fields(model)
            for value in [getattr(self, name).model_dump(mode="json")[field]]
        }


def _s3_settings(env_file: str | None) -> S3Settings:
    lines = dotenv_values(env_file, encoding=_ENV_ENCODING) if env_file else {}
    return S3Settings.from_env({**{name: value or "" for name, value in lines.items()}, **os.environ})


def _groups() -> Iterator[tuple[str, type[_Group]]]:
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Group):
            yield name, kind


def _flat_fields(model: type[_Group]) -> Iterator[tuple[str, str]]:
    """Yield the flat name and the name of every field."""
    for field, info in model.model_fields.items():
        yield variable_of(field, info).removeprefix(ENV_PREFIX).lower(), field


def _by_group(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort values with flat names into groups of fields. Raise TypeError if there is no such setting."""
    places = {flat: (name, field) for name, model in _groups() for flat, field in _flat_fields(model)}
    unknown = values.keys() - places.keys() - {"s3"}
    if unknown:
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(places))}, s3")
    groups: dict[str, dict[str, Any]] = {}
    for flat in values.keys() - {"s3"}:
        name, field = places[flat]
        groups.setdefault(name, {})[field] = values[flat]
    return groups


def variable_of(field: str, info: FieldInfo) -> str:
    """Return the environment variable that sets a field."""
    alias = info.validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else f"{ENV_PREFIX}{field.upper()}"


def all_fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield group, variable and field of every setting but those of S3, in the order of the README's table."""
    for name, model in _groups():
        for field, info in model.model_fields.items():
            yield name, variable_of(field, info), info


def load_settings(**values: Any) -> Settings:
    """Return the settings from the environment and `.env`.

    Args:
        **values: fields by their flat names, which take precedence over the environment.

    Raises:
        SettingsError: a value is not usable; the error names its variable.
        TypeError: there is no such setting.
    """
    try:
        return Settings.of(**values)
    except ValidationError as error:
        first = error.errors()[0]
        variable = _variable_at(str(first["loc"][0]) if first["loc"] else "")
        raise SettingsError(
            f"{variable} is not usable",
            got="a secret" if (first["loc"] or ("",))[0] in SecuritySettings.model_fields else first.get("input"),
            allowed=first["msg"].removeprefix("Value error, "),
            remedy=f"correct or unset {variable}",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(
            "the file .env cannot be read", got=f"{Path('.env').absolute()}: {reason}",
            allowed="lines NAME=value in UTF-8", remedy="correct the file, or run in another folder",
        ) from error  # fmt: skip


def _variable_at(location: str) -> str:
    """Return the variable of the field that pydantic names in an error, by its name or by its variable."""
    for _, model in _groups():
        if location in model.model_fields:
            return variable_of(location, model.model_fields[location])
    return location


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the installed version of the project, which is part of every manifest."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("perennial-lm")
    except PackageNotFoundError:
        return "0+unknown"
