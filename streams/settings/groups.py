"""Groups of settings: the broker, the store, the roles, serving, metrics and secrets. See `loading` for how they are set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from perennial.storage.errors import PerennialError
from perennial.streams.addresses import is_loopback, kafka_servers, without_brackets
from perennial.streams.paths import UnknownHomeError, default_data_dir, expand_path

ENV_PREFIX: Final = "PERENNIAL_"
ENV_ENCODING: Final = "utf-8-sig"
"""Some editors begin a file with a byte order mark; as plain UTF-8 it would hide the first variable."""
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
MAX_APPROVAL_WAIT_S: Final = 29 * 86_400
"""A day less than an ended request is kept, whatever a signer's clock says: a signed request that still counts must be known
when it is sent again."""
Secret = Annotated[SecretStr, Field(min_length=32)]


class SettingsError(PerennialError):
    """A setting is not usable."""

    exit_code = 2


def expanded(path: str | Path) -> Path:
    """Return `expand_path` for a validator, which reports a ValueError."""
    try:
        return expand_path(path)
    except UnknownHomeError as error:
        raise ValueError(f"{error.allowed}") from error


OptionalPath = Annotated[str, AfterValidator(lambda path: str(expanded(path)) if path else "")]
"""A path, in which `~` stands for the home folder; empty for none."""
OptionalSecret = Annotated[SecretStr | None, BeforeValidator(lambda value: value or None)]
"""A secret; None where its variable is set to nothing."""


class SettingsGroup(BaseSettings):
    """A group of settings: each field is set by its environment variable or a line in `.env`.

    Attributes:
        secret_fields: Fields that are shown nowhere and that `Settings.environment()` leaves out.
    """

    secret_fields: ClassVar[frozenset[str]] = frozenset()
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_file=".env",
        env_file_encoding=ENV_ENCODING,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        # A limit of NaN would refuse nothing: every comparison with it is false.
        allow_inf_nan=False,
    )


class KafkaSettings(SettingsGroup):
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


class StoreSettings(SettingsGroup):
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
        return str(expanded(uri)) if uri.startswith("~") else uri

    @field_validator("data_dir", mode="before")
    @classmethod
    def _expand_data_dir(cls, data_dir: object) -> object:
        if data_dir == "":  # a variable that is set to nothing; Path("") would be the working directory
            return default_data_dir()
        return expanded(data_dir) if isinstance(data_dir, str | Path) else data_dir

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


class IntakeSettings(SettingsGroup):
    """The intake role."""

    dedupe_window: PositiveInt = Field(
        20_000, description="intake: last events per input partition among which a repeated example is dropped"
    )
    intake_batch: PositiveInt = Field(5_000, description="intake: events per fetch, flush and commit")


class CurateSettings(SettingsGroup):
    """When the curate agent cuts a micro-batch, and what it keeps per adapter."""

    max_batch_tokens: PositiveInt = Field(768, description="curate: pending tokens that cut a micro-batch")
    max_batch_examples: PositiveInt = Field(256, description="curate: pending examples that cut a micro-batch")
    min_batch_examples: PositiveInt = Field(
        8, description="curate: pending examples below which drift does not cut a micro-batch"
    )
    max_age_s: PositiveFloat = Field(
        30.0, description="curate: seconds after which a pending example cuts a micro-batch"
    )
    min_batch_tokens: Annotated[int, Field(ge=0)] = Field(
        0,
        description="curate: pending tokens below which a micro-batch waits for up to four times `PERENNIAL_MAX_AGE_S`, "
        "unless a person corrected something; 0: age alone decides",
    )
    cooldown_examples: Annotated[int, Field(ge=0)] = Field(
        32, description="curate: number of examples after each new live version during which drift does not cut"
    )
    drift_threshold: PositiveFloat = Field(
        4.3,
        description="curate: standard errors by which the mean loss before and after a change must differ to be drift; a "
        "larger one finds changes later and raises fewer false alarms",
    )
    drift_patience_updates: PositiveInt = Field(
        3,
        description="curate: updates in a row that the gate refuses or that gain nothing, from which drift needs twice the "
        "pending examples to cut, and twice as many again with each further one",
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


class RetainSettings(SettingsGroup):
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
    second_approver: Literal["patterns", "off"] = Field(
        "patterns",
        description="retain: which requests that destroy wait for the approval of a second person: those over a pattern "
        "such as `acme/*` or `*`; off: none",
    )
    approval_wait_s: Annotated[float, Field(gt=0, le=MAX_APPROVAL_WAIT_S)] = Field(
        604_800.0,
        description="retain: seconds for which a request waits for its second approver before it fails, at most 2505600",
    )


class SecuritySettings(SettingsGroup):
    """Secrets of the roles: shown nowhere, left out of `Settings.environment()`. An empty variable counts as not set."""

    model_config = SettingsConfigDict(env_ignore_empty=True, hide_input_in_errors=True)
    secret_fields: ClassVar[frozenset[str]] = frozenset({"internal_key", "internal_key_previous"})

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


class ServingSettings(SettingsGroup):
    """Subscribers and the scorer."""

    alias: str = Field("live", description="alias that subscribers, the scorer and vLLM's plugin follow")
    poll_s: PositiveFloat = Field(
        5.0, description="subscriber, scorer, vLLM plugin: seconds between two readings of the alias"
    )
    replica_lease_s: Annotated[float, Field(ge=1, le=86_400)] = Field(
        60.0, description="subscriber: seconds for which requests to forget wait for it after its last heartbeat"
    )


class ObserveSettings(SettingsGroup):
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


class DevstackSettings(SettingsGroup):
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
