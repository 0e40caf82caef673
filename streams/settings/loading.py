"""All settings, in groups. An environment variable or a line in `.env` sets each field.

The variable of a field is PERENNIAL_ and the field's name in capitals: PERENNIAL_MAX_AGE_S sets
`settings.curate.max_age_s`. Some fields have another variable, because their names say too little without the group:
`kafka.bootstrap` is set by PERENNIAL_KAFKA, `store.uri` by PERENNIAL_STORE, and those of the group `kafka_security` by
PERENNIAL_KAFKA_…, its `protocol` by PERENNIAL_KAFKA_SECURITY. `Settings.of` and `Settings.replace` take fields by their flat names. A flat name is the variable in small letters without the prefix: `max_age_s`, `kafka`,
`store`. Flat names are unique over all groups.

The group `s3` (PERENNIAL_S3_…, AWS_…) holds credentials, and some groups have `secret_fields`. They are read from the
same two places. They are not shown or dumped, and `Settings.environment()` leaves them out.

To add a setting: add a field with a description to its group, then run `make schema`, which writes it into the README.
CONTRIBUTING.md says what else the groups of training and gate need.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar

from dotenv import dotenv_values
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.settings.groups import (
    ENV_ENCODING,
    ENV_PREFIX,
    CurateSettings,
    DevstackSettings,
    IntakeSettings,
    KafkaSettings,
    ObserveSettings,
    RetainSettings,
    SecuritySettings,
    ServingSettings,
    SettingsError,
    SettingsGroup,
    StoreSettings,
)
from perennial.streams.settings.kafka_security_group import KafkaSecuritySettings
from perennial.streams.settings.model_groups import GateSettings, ModelSettings, TrainingSettings
from perennial.streams.settings.presets import preset_of, preset_settings
from perennial.streams.settings.resolver_group import ResolverSettings
from perennial.streams.settings.signing_group import SigningSettings
from perennial.streams.settings.tenant_group import TenantSettings

_S = TypeVar("_S", bound="Settings")


class Settings(BaseModel):
    """All settings, in groups.

    `Settings.of` reads the environment and `.env`, and takes single values by their flat names. What nobody sets has the
    value of the preset for the size of the base; see `presets`.

    Example:
        >>> settings = Settings.of(kafka="broker:9092", max_age_s=5, env_file=None)
        >>> settings.kafka.bootstrap, settings.curate.max_age_s
        ('broker:9092', 5.0)
        >>> settings.replace(max_age_s=1).curate.max_age_s
        1.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    kafka_security: KafkaSecuritySettings = Field(default_factory=KafkaSecuritySettings)
    store: StoreSettings = Field(default_factory=StoreSettings)
    intake: IntakeSettings = Field(default_factory=IntakeSettings)
    curate: CurateSettings = Field(default_factory=CurateSettings)
    retain: RetainSettings = Field(default_factory=RetainSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    gate: GateSettings = Field(default_factory=GateSettings)
    tenants: TenantSettings = Field(default_factory=TenantSettings)
    serving: ServingSettings = Field(default_factory=ServingSettings)
    resolver: ResolverSettings = Field(default_factory=ResolverSettings)
    observe: ObserveSettings = Field(default_factory=ObserveSettings)
    devstack: DevstackSettings = Field(default_factory=DevstackSettings)
    security: SecuritySettings = Field(default_factory=SecuritySettings)
    signing: SigningSettings = Field(default_factory=SigningSettings)
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
        return _with_preset(cls(**groups, s3=s3))

    def replace(self, **values: Any) -> Self:
        """Return a copy with some values changed; another base brings the preset for its size.

        Args:
            **values: fields by their flat names; `s3` replaces that group.

        Raises:
            ValidationError: a value is not allowed.
            TypeError: there is no such setting.
        """
        changed: dict[str, Any] = {"s3": values["s3"]} if "s3" in values else {}
        for name, given in _by_group(values).items():
            group: SettingsGroup = getattr(self, name)
            changed[name] = _changed(group, given, frozenset({*group.model_fields_set, *given}))
        copy = self.model_copy(update=changed)
        return _with_preset(copy) if "base" in values else copy

    def environment(self) -> dict[str, str]:
        """Return the environment variables that give another process the same settings, without the secrets."""
        return {
            f"{ENV_PREFIX}{flat.upper()}": str(value)
            for name, model in _groups()
            for flat, field in _flat_fields(model)
            if field not in model.secret_fields
            for value in [getattr(self, name).model_dump(mode="json")[field]]
        }


def _with_preset(settings: _S) -> _S:
    """Return a copy in which what nobody set has the value of the preset for the base, or else its default."""
    preset = preset_of(settings.model.base)
    values = preset.values if preset else {}
    changed: dict[str, Any] = {}
    for name, flats in _by_group({flat: flat for flat in preset_settings()}).items():
        group: SettingsGroup = getattr(settings, name)
        unset = {
            field: values.get(flat, type(group).model_fields[field].default)
            for field, flat in flats.items()
            if field not in group.model_fields_set
        }
        changed[name] = _changed(group, unset, frozenset(group.model_fields_set))
    return settings.model_copy(update=changed)


def _changed(group: SettingsGroup, values: dict[str, Any], fields_set: frozenset[str]) -> SettingsGroup:
    """Return a copy of a group with other values, checked; `fields_set` are the fields that count as set by somebody."""
    fields = {field: getattr(group, field) for field in type(group).model_fields}
    checked = type(group)(_env_file=None, **fields | values)
    object.__setattr__(checked, "__pydantic_fields_set__", set(fields_set))  # it is frozen
    return checked


def _s3_settings(env_file: str | None) -> S3Settings:
    lines = dotenv_values(env_file, encoding=ENV_ENCODING) if env_file else {}
    return S3Settings.from_env({**{name: value or "" for name, value in lines.items()}, **os.environ})


def _groups() -> Iterator[tuple[str, type[SettingsGroup]]]:
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, SettingsGroup):
            yield name, kind


def _flat_fields(model: type[SettingsGroup]) -> Iterator[tuple[str, str]]:
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
            got="a secret" if not first["loc"] or variable in _secret_variables() else first.get("input"),
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


def _secret_variables() -> set[str]:
    return {variable_of(field, model.model_fields[field]) for _, model in _groups() for field in model.secret_fields}


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the installed version of the project, which is part of every manifest."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("perennial-lm")
    except PackageNotFoundError:
        return "0+unknown"
