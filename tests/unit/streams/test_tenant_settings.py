"""Weights and budgets of tenants: what may be written, whom it is for, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from perennial.streams.settings import Settings, SettingsError


def test_every_tenant_is_equal_and_unlimited_where_nothing_is_set():
    tenants = Settings.of(env_file=None).tenants
    assert tenants.weight("acme") == 1.0
    assert tenants.tokens_per_hour("acme") is None


@pytest.mark.parametrize(
    ("text", "acme", "others"),
    [("acme=4", 4, 1), ("acme=4,*=.5", 4, 0.5), (" acme = 4 , * = 2 ,", 4, 2), ("3", 3, 3), ("*=2,acme=1", 1, 2)],
)
def test_a_weight_is_for_the_tenant_that_is_named_and_a_star_for_the_rest(text, acme, others):
    tenants = Settings.of(env_file=None, tenant_weights=text).tenants
    assert (tenants.weight("acme"), tenants.weight("globex")) == (acme, others)


def test_a_budget_may_lift_the_limit_of_one_tenant():
    tenants = Settings.of(env_file=None, tenant_tokens_per_hour="acme=unlimited,*=200000").tenants
    assert tenants.tokens_per_hour("acme") is None
    assert tenants.tokens_per_hour("globex") == 200_000


@pytest.mark.parametrize(
    "text",
    ["acme=0", "acme=-1", "acme=nan", "acme=inf", "acme=", "acme=x", "acme=1e9", "acme", "a/b=1", "A=1", "a=1,a=2"],
)
def test_a_weight_that_cannot_be_meant_is_refused(text):
    with pytest.raises(ValidationError, match=r"tenant|weights"):
        Settings.of(env_file=None, tenant_weights=text)


@pytest.mark.parametrize("text", ["acme=0", "acme=1.5", "acme=-1", "acme=9" + "9" * 20, "acme=², *=1", "*=1,2"])
def test_a_budget_that_cannot_be_meant_is_refused(text):
    with pytest.raises(ValidationError, match=r"tenant|tokens"):
        Settings.of(env_file=None, tenant_tokens_per_hour=text)


def test_adapters_one_segment_below_a_shared_one_extend_it():
    tenants = Settings.of(env_file=None, shared_adapters=" acme/support, globex/eu/sales ,").tenants
    assert tenants.extended_by("acme/support/user-42") == "acme/support"
    assert tenants.extended_by("globex/eu/sales/u") == "globex/eu/sales"
    for other in ("acme/support", "acme/support/team/user", "acme/sales/user-42", "globex/eu", "initech"):
        assert tenants.extended_by(other) is None


@pytest.mark.parametrize(
    "text", ["acme/", "/acme", "Acme", "a/b/c/d", "acme/*", "a,a/b", "a/b,a/b/c", "a/" + "a" * 200]
)
def test_a_shared_adapter_that_cannot_be_meant_is_refused(text):
    with pytest.raises(ValidationError, match=r"adapters?"):
        Settings.of(env_file=None, shared_adapters=text)


@pytest.mark.parametrize("of_tenants", [{"tenants": "acme"}, {"tenant": "acme"}])
def test_a_shared_adapter_lies_below_its_tenants_name(of_tenants):
    assert Settings.of(env_file=None, shared_adapters="acme").tenants.extended_by("acme/user-42") == "acme"
    Settings.of(env_file=None, shared_adapters="acme/support", **of_tenants)
    with pytest.raises(SettingsError, match="PERENNIAL_SHARED_ADAPTERS"):
        Settings.of(env_file=None, shared_adapters="acme", **of_tenants)


def test_starts_are_learned_below_shared_adapters_alone():
    tenants = Settings.of(
        env_file=None, shared_adapters="acme/support,acme/sales", learned_starts="acme/support"
    ).tenants
    assert tenants.learned_from("acme/support/user-42") == "acme/support"
    for other in ("acme/support", "acme/sales/user-42", "acme/support/team/user"):
        assert tenants.learned_from(other) is None
    with pytest.raises(SettingsError, match="PERENNIAL_LEARNED_STARTS") as raised:
        Settings.of(env_file=None, shared_adapters="acme/sales", learned_starts="acme/support")
    assert (raised.value.got, raised.value.allowed) == ("acme/support", "acme/sales")
    with pytest.raises(SettingsError, match="no adapter is shared"):
        Settings.of(env_file=None, learned_starts="acme/support")
