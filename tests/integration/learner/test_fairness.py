"""The learner on a real broker, with more jobs than places: whose are next."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.learner.roles.learner import run_learner
from perennial.learner.versions import version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from tests import jobs, tiny
from tests.integration.learner import learner_kit as kit


@pytest.fixture
def given(broker, topic_prefix, tmp_path, monkeypatch):
    """Return settings of a learner with two places."""
    monkeypatch.setattr(version_writer, "general_texts", lambda split: [f"plain {split} words {n}" for n in range(8)])
    settings = kit.settings(broker.bootstrap, topic_prefix, tmp_path, pass_adapters=2)
    provision(settings)
    return settings


def test_a_flood_of_one_tenant_does_not_keep_another_waiting(given):
    """The flood was published first; the other tenant's small batch is among the first that are served."""
    store = DirectoryStore(Path(given.store.uri))

    def update_of(adapter: str, number: int):
        document = tiny.document(number, f"the parrot {number} sings at noon", adapter=adapter)
        return jobs.update(store, 1, [document], adapter=adapter)

    flood = [update_of(f"flood/user-{number}", number) for number in range(24)]
    metrics = Metrics("learner")
    kit.send(given, *flood, update_of("small/user", 99))
    with kit.running(lambda stop: run_learner(given, stop, metrics)):
        order = [found.event.adapter for found in kit.envelopes(given, "adapter-updates", 25)]
    assert len(set(order)) == 25
    assert order.index("small/user") < 6
    assert 'perennial_tenant_hour_tokens{role="learner",tenant="flood"}' in metrics.exposition().decode()
