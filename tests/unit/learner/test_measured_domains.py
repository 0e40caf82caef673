"""The measured matrix of an adapter's page: real versions of a tiny base, over domains that it learned one after another."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli.adapter_page import measured_domains
from perennial.streams.cli.adapter_page.adapter_history import adapter_history
from perennial.streams.cli.adapter_page.measured_domains import measure_domains
from tests import jobs, tiny
from tests.unit.learner.test_forgetting import erase, forget, quarantined
from tests.unit.learner.test_versions import ADAPTER, SETTINGS, local_learner

BIRDS = "the blue parrot sings at noon"
KEYS = "small green boats carry keys"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    base = tiny.base()
    monkeypatch.setattr("perennial.learner.serving.evaluate.load_base", lambda *_: base)
    return DirectoryStore(tmp_path / "store", fsync=False)


def test_each_domain_is_measured_under_the_base_and_under_versions(store, monkeypatch):
    learner = local_learner(store, learning_rate=2e-2, steps=8, replay_share=0.0)
    for cut in range(1, 7):
        text, domain = (BIRDS, "birds") if cut <= 3 else (KEYS, "keys")
        documents = [tiny.document(4 * cut + number, text, domain=domain) for number in range(4)]
        assert learner.update(jobs.update(store, cut, documents), "live").outcome == "promoted"
    monkeypatch.setattr(measured_domains, "MEASURED_VERSIONS", 4)
    found = measure_domains(SETTINGS, learner.registry, ADAPTER)
    assert found is not None
    assert found.domains == ["birds", "keys"]
    assert found.examples == {"birds": 12, "keys": 12}
    assert found.columns == [0, 1, 3, 4, 6]
    birds, keys = found.nats
    assert birds[2] < birds[0] - 0.1, "what was learned first"
    assert keys[4] < keys[2] - 0.1, "what was learned then"
    shown = adapter_history(learner.registry, ADAPTER, "live")
    assert [version.domain for version in shown.versions] == ["birds"] * 3 + ["keys"] * 3
    assert shown.device_seconds is not None


def test_an_adapter_whose_texts_are_gone_has_nothing_to_measure(store):
    learner = local_learner(store)
    learner.update(jobs.update(store, 1, [tiny.document(number, BIRDS) for number in range(4)]), "live")
    for key in list(store.list("blobs/")):
        if store.get(key).data.startswith(b'{"adapter"'):
            store.delete(key)
    for key in list(store.list("history/")):
        store.delete(key)
    assert measure_domains(SETTINGS, learner.registry, ADAPTER) is None


def test_versions_whose_weights_a_forgetting_deleted_are_left_out(store):
    learner = local_learner(store)
    for cut in range(1, 5):
        documents = [tiny.document(4 * cut + number, f"{BIRDS} {cut} {number}", domain="birds") for number in range(4)]
        learner.update(jobs.update(store, cut, documents), "live")
    assert forget(learner, quarantined(store, erase("r1", 9)))[0].outcome == "promoted"
    found = measure_domains(SETTINGS, learner.registry, ADAPTER)
    assert found is not None
    assert found.columns[0] == 0
    assert found.columns[-1] == learner.registry.head(ADAPTER).manifest.seq
    assert all(math.isfinite(nats) for nats in found.nats[0])
