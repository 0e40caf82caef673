"""Programs that serve versions, with PERENNIAL_TENANT: the adapters of another tenant are refused before anything is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from perennial.learner.versions.alias_events import alias_event
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.signing.trust import Trust
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.client.subscriber_kafka import Updates
from perennial.streams.events.cloudevents import encode
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from perennial.streams.settings.kafka_security_group import KafkaSecuritySettings
from perennial.streams.settings.tenant_group import OtherTenantError
from perennial.testing import MemoryBackend
from tests.versions import VersionPublisher

OTHERS = ["globex/support", "acme", "acmes/support", "acme.eu/support"]
WAIT_S = 180.0


class Unread:
    """A store that nobody may ask for anything."""

    def __getattr__(self, name: str) -> object:
        pytest.fail(f"the store was asked: {name}")


def settings_of(tenant: str) -> Settings:
    return Settings.of(tenant=tenant, kafka="", poll_s=0.05, env_file=None)


@pytest.mark.parametrize("adapter", OTHERS)
def test_a_subscriber_of_a_tenant_refuses_another_tenants_adapter_and_reads_nothing(adapter):
    with pytest.raises(OtherTenantError) as raised:
        Subscriber(adapter, MemoryBackend(), store=Unread(), settings=settings_of("acme"))
    error = raised.value
    assert (error.got, error.allowed) == (adapter, "adapters below acme/")
    assert "PERENNIAL_TENANT" in error.remedy


@pytest.mark.parametrize(("tenant", "adapter"), [("acme", "acme/support"), ("", "globex/support")])
def test_a_subscriber_follows_an_adapter_of_its_tenant_and_without_a_tenant_any(tmp_path: Path, tenant, adapter):
    store = DirectoryStore(tmp_path / "store", fsync=False)
    state = VersionPublisher(store, adapter).publish()
    with Subscriber(adapter, MemoryBackend(), store=store, settings=settings_of(tenant)) as subscriber:
        assert subscriber.wait_for(1, WAIT_S)
        assert subscriber.current.version == state.version


def test_a_subscriber_skips_what_adapter_updates_says_of_other_tenants(tmp_path: Path):
    """They may lie in its partition; neither their generations nor what they hold reaches it."""
    metrics = Metrics("subscriber")
    updates = Updates("", KafkaSecuritySettings(), "adapter-updates", "acme/support#live", metrics, Trust())

    def record(adapter: str, key: str) -> SimpleNamespace:
        publisher = VersionPublisher(DirectoryStore(tmp_path / key / adapter, fsync=False), adapter)
        event = alias_event(publisher.registry, publisher.publish())
        encoded = encode(event, event_id="e", source="learner", occurred_at=event.published_at)
        return SimpleNamespace(key=key.encode(), value=encoded.value, headers=encoded.headers)

    def count(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"perennial_{name}_total", {"role": "subscriber", **labels})

    assert updates._generation(record("acme/support", "acme/support#live")) == 1
    assert updates._generation(record("globex/support", "globex/support#live")) == 0
    assert updates._generation(record("globex/support", "acme/support#live")) == 0
    assert count("events_in", topic="adapter-updates") == 2
    unreadable = {"value": b"{", "headers": []}
    assert updates._generation(SimpleNamespace(key=b"globex/support#live", **unreadable)) == 0
    assert count("refused", reason="missing-attribute") is None, "it is not decoded"
    assert updates._generation(SimpleNamespace(key=b"acme/support#live", **unreadable)) == 0
    assert count("refused", reason="missing-attribute") == 1
