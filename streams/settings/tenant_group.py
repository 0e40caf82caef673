"""The group of settings of tenants: their topics, and weights and budgets at the learner. See `loading` for how they are set.

A tenant is the first segment of an adapter's name: `acme` of `acme/support`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Self, TypeVar

from pydantic import Field, field_validator, model_validator

from perennial.storage.errors import PerennialError
from perennial.streams.settings.groups import SettingsError, SettingsGroup

EVERY_TENANT = "*"
UNLIMITED = "unlimited"
RESERVED = "perennial"
MAX_TENANT_CHARS = 100
"""So that the names of its topics, with a prefix, are no longer than Kafka allows."""
MAX_WEIGHT = 1_000_000
MAX_TOKENS_PER_HOUR = 10**15
_T = TypeVar("_T")
_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SHARED = re.compile(rf"{_TENANT.pattern}(/{_TENANT.pattern}){{0,2}}")
MAX_ADAPTER_CHARS = 200


class OtherTenantError(PerennialError):
    """The adapter belongs to another tenant."""

    exit_code = 2


class TenantSettings(SettingsGroup):
    """Which tenants have topics of their own, and how the learner divides its time among tenants.

    Example:
        >>> tenants = TenantSettings(tenant_weights="acme=4", tenant_tokens_per_hour="acme=unlimited, *=200000")
        >>> tenants.weight("acme"), tenants.weight("globex")
        (4.0, 1.0)
        >>> tenants.tokens_per_hour("acme"), tenants.tokens_per_hour("globex")
        (None, 200000)
        >>> TenantSettings(tenants="acme, globex").names
        ('acme', 'globex')
    """

    tenants: str = Field(
        "",
        description="tenants that have topics of their own, `acme,globex`: documents.acme, interactions.acme and "
        "retention.acme address adapters below acme/ only; the same for all roles; empty: none",
    )
    tenant: str = Field(
        "",
        description="the tenant of a program: publisher, `perennial publish` and `perennial forget` write to its topics, "
        "subscriber, `perennial subscribe` and vLLM's plugin serve its adapters only; empty: none",
    )

    tenant_weights: str = Field(
        "",
        description="learner: share of each tenant while several wait, `acme=4,*=1`; a tenant is the first segment of an "
        "adapter's name, `*` every tenant that is not named; empty: all have the same",
    )
    tenant_tokens_per_hour: str = Field(
        "",
        description="learner: tokens of micro-batches that each tenant may have trained in any 60 minutes before its jobs "
        "wait for those of others, `acme=200000,*=1000000`; they wait no longer than until the hour's tokens are below the "
        "budget again, and not at all while no other tenant's jobs wait; per learner process; empty or `unlimited`: no limit",
    )

    shared_adapters: str = Field(
        "",
        description="learner: adapters whose users have adapters of their own, `acme/support,acme/sales`: each adapter one "
        "segment below, such as acme/support/user-42, is served together with the one above it; empty: none",
    )
    train_over_shared: str = Field(
        "",
        description="learner: those of PERENNIAL_SHARED_ADAPTERS over whose live version users' adapters are trained, "
        "`acme/support`: they need fewer examples and harm general text less, and an erasure in the shared adapter trains "
        "each of them again; empty: over the base alone",
    )
    learned_starts: str = Field(
        "",
        description="learner: those of PERENNIAL_SHARED_ADAPTERS whose users' adapters may be learned from, `acme/support`: "
        "a new one begins with the mean of four or more that have learned eight examples; what one user taught is in it "
        "until it is forgotten; empty: none",
    )

    @field_validator("shared_adapters")
    @classmethod
    def _check_shared_adapters(cls, text: str) -> str:
        _shared_adapters(text)
        return text

    @field_validator("tenants")
    @classmethod
    def _check_tenants(cls, text: str) -> str:
        _names(text)
        return text

    @field_validator("tenant")
    @classmethod
    def _check_tenant(cls, text: str) -> str:
        if len(_names(text)) > 1:
            raise ValueError(f"one tenant, or none; got {text[:80]!r}")
        return text.strip()

    @model_validator(mode="after")
    def _check_own(self) -> Self:
        if self.tenant and self.names and self.tenant not in self.names:
            raise SettingsError(
                "PERENNIAL_TENANT is none of the tenants", got=self.tenant, allowed=", ".join(self.names),
                remedy="correct PERENNIAL_TENANT or PERENNIAL_TENANTS: nobody reads the topics of another tenant",
            )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _check_shared_of_tenants(self) -> Self:
        alone = sorted(name for name in _shared_adapters(self.shared_adapters) if "/" not in name)
        if alone and (self.names or self.tenant):
            raise SettingsError(
                "PERENNIAL_SHARED_ADAPTERS names an adapter that no client of a tenant may serve", got=alone[0],
                allowed="adapters below the tenant's name, such as acme/support",
                remedy="name a shared adapter of two or three segments, or unset PERENNIAL_TENANTS and PERENNIAL_TENANT",
            )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _check_below_shared(self) -> Self:
        shared = _shared_adapters(self.shared_adapters)
        given = {"LEARNED_STARTS": self.learned_starts, "TRAIN_OVER_SHARED": self.train_over_shared}
        for name, text in given.items():
            alone = sorted(_shared_adapters(text) - shared)
            if alone:
                raise SettingsError(
                    f"PERENNIAL_{name} names an adapter that is not shared", got=alone[0],
                    allowed=", ".join(sorted(shared)) or "none: no adapter is shared",
                    remedy="name it in PERENNIAL_SHARED_ADAPTERS, too",
                )  # fmt: skip
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The tenants that have topics of their own."""
        return _names(self.tenants)

    def require_own(self, adapter: str) -> None:
        """Check that a program of one tenant addresses an adapter of this tenant; without a tenant it may be any.

        It finds mistakes. What a program can read or write, the ACLs and the store's policies decide.

        Args:
            adapter: Name of the adapter, or a pattern.

        Raises:
            OtherTenantError: The adapter is not below `<PERENNIAL_TENANT>/`.

        >>> TenantSettings(tenant="acme").require_own("acme/support")
        >>> TenantSettings(tenant="acme").require_own("acmes/support")
        Traceback (most recent call last):
        perennial.streams.settings.tenant_group.OtherTenantError: the adapter is none of the tenant acme; got: ...
        """
        if self.tenant and not adapter.startswith(f"{self.tenant}/"):
            raise OtherTenantError(
                f"the adapter is none of the tenant {self.tenant}", got=adapter, allowed=f"adapters below {self.tenant}/",
                remedy="correct the adapter or PERENNIAL_TENANT",
            )  # fmt: skip

    def extended_by(self, adapter: str) -> str | None:
        """Return the shared adapter that an adapter extends; None where it extends none.

        >>> TenantSettings(shared_adapters="acme/support").extended_by("acme/support/user-42")
        'acme/support'
        """
        return _shared_above(adapter, self.shared_adapters)

    def learned_from(self, adapter: str) -> str | None:
        """Return the shared adapter whose users' adapters may be learned from, for one of these; else None.

        >>> tenants = TenantSettings(shared_adapters="acme/support", learned_starts="acme/support")
        >>> tenants.learned_from("acme/support/user-42")
        'acme/support'
        """
        return _shared_above(adapter, self.learned_starts)

    def trained_over(self, adapter: str) -> str | None:
        """Return the shared adapter over which an adapter is trained; None: over the base alone.

        >>> tenants = TenantSettings(shared_adapters="acme/support", train_over_shared="acme/support")
        >>> tenants.trained_over("acme/support/user-42")
        'acme/support'
        """
        return _shared_above(adapter, self.train_over_shared)

    @field_validator("tenant_weights")
    @classmethod
    def _check_weights(cls, text: str) -> str:
        _weights(text)
        return text

    @field_validator("tenant_tokens_per_hour")
    @classmethod
    def _check_budgets(cls, text: str) -> str:
        _budgets(text)
        return text

    def weight(self, tenant: str) -> float:
        """Return the tenant's weight, 1 where none is set."""
        weights = _weights(self.tenant_weights)
        return weights.get(tenant, weights.get(EVERY_TENANT, 1.0))

    def tokens_per_hour(self, tenant: str) -> int | None:
        """Return the tenant's budget in tokens per hour; None where it has no limit."""
        budgets = _budgets(self.tenant_tokens_per_hour)
        return budgets.get(tenant, budgets.get(EVERY_TENANT))


@lru_cache(maxsize=8)
def _names(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    for name in names:
        if not _TENANT.fullmatch(name) or len(name) > MAX_TENANT_CHARS:
            raise ValueError(
                f"tenants as the first segment of an adapter's name, at most {MAX_TENANT_CHARS} characters; got {name[:80]!r}"
            )
        if name == RESERVED:
            raise ValueError(f"tenants but {RESERVED!r}: retain's own requests have ids that begin so")
    # Kafka takes two topics for one whose names differ in `.` and `_` alone, and the variables of the store's accounts
    # have `_` for every such character.
    if len({re.sub("[^a-z0-9]", "_", name.lower()) for name in names}) < len(names):
        raise ValueError(
            f"each tenant once, and none that differs from another in case, `.`, `-` and `_` alone; got {text[:80]!r}"
        )
    return names


@lru_cache(maxsize=8)
def _shared_adapters(text: str) -> frozenset[str]:
    names = [part for part in (part.strip() for part in text.split(",")) if part]
    for name in names:
        if not _SHARED.fullmatch(name) or len(name) > MAX_ADAPTER_CHARS:
            raise ValueError(
                f"names of adapters with 1 to 3 segments, `acme/support`, at most {MAX_ADAPTER_CHARS} characters; got {name[:80]!r}"
            )
        if name.rpartition("/")[0] in names:
            raise ValueError(f"no adapter that itself extends another one; {name[:80]!r} lies below another name")
    return frozenset(names)


def _shared_above(adapter: str, text: str) -> str | None:
    """Return the adapter one segment above, if the text of a setting names it; else None."""
    parent = adapter.rpartition("/")[0]
    return parent if parent in _shared_adapters(text) else None


@lru_cache(maxsize=8)
def _weights(text: str) -> Mapping[str, float]:
    return _by_tenant(text, _weight)


@lru_cache(maxsize=8)
def _budgets(text: str) -> Mapping[str, int | None]:
    return _by_tenant(text, _budget)


def _by_tenant(text: str, parse: Callable[[str], _T]) -> Mapping[str, _T]:
    """Return the value of each tenant that the text names; a value without a name is that of every tenant."""
    found: dict[str, _T] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, given, value = (piece.strip() for piece in part.rpartition("="))
        tenant = name if given else EVERY_TENANT
        if tenant != EVERY_TENANT and not _TENANT.fullmatch(tenant):
            raise ValueError(f"tenants as the first segment of an adapter's name, or `*`; got {tenant[:80]!r}")
        if tenant in found:
            raise ValueError(f"each tenant once; {tenant[:80]!r} is named twice")
        found[tenant] = parse(value)
    return MappingProxyType(found)


def _weight(value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT:
        raise ValueError(f"weights from {1 / MAX_WEIGHT:g} to {MAX_WEIGHT:g}, `acme=4,*=1`; got {value[:80]!r}")
    return weight


def _budget(value: str) -> int | None:
    if value == UNLIMITED:
        return None
    if not (value.isascii() and value.isdigit() and 1 <= len(value) <= 16 and 1 <= int(value) <= MAX_TOKENS_PER_HOUR):
        raise ValueError(
            f"whole numbers of tokens from 1 to {MAX_TOKENS_PER_HOUR:g}, or `{UNLIMITED}`, `acme=200000,*=1000000`; "
            f"got {value[:80]!r}"
        )
    return int(value)
