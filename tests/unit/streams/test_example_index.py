"""Retain's index of examples reads pages of the history index, and no micro-batch that they describe."""

from __future__ import annotations

import pytest

from perennial.storage.objects.keys import blob_key
from perennial.streams.retain.example_index import ExampleIndex
from tests import jobs, tiny
from tests.memory_store import MemoryStore
from tests.synthetic import extend_history, registry_of
from tests.unit.learner.test_versions import ADAPTER, job, local_learner

VERSIONS = 60


class _Counting(MemoryStore):
    """Counts how often micro-batches were read."""

    bodies: frozenset[str] = frozenset()
    bodies_read = 0

    def get(self, key: str, *args: int):
        self.bodies_read += key in self.bodies
        return super().get(key, *args)


@pytest.fixture
def store() -> _Counting:
    store = _Counting()
    local_learner(store).update(job(store, 0, 0), "live")
    extend_history(store, ADAPTER, VERSIONS - 1, retention_class="P30D")
    registry = registry_of(store)
    manifests = [registry.manifest(ADAPTER, version) for _, version in registry.versions(ADAPTER)]
    store.bodies = frozenset(blob_key(manifest.batch.digest) for manifest in manifests if manifest.batch)
    store.calls.clear()
    return store


def test_case_scale_a_cold_start_reads_pages_and_no_body(store: _Counting) -> None:
    stored = ExampleIndex(registry_of(store)).of(ADAPTER)
    assert [item.example.document_id for item in stored] == [f"doc-{n}" for n in range(VERSIONS)]
    assert all(item.learned and item.text_hash and item.example.text is None for item in stored)
    assert store.bodies_read == 0
    assert sum(store.calls.values()) < VERSIONS / 2


def test_case_scale_due_before_reads_no_body_and_keeps_nothing(store: _Counting) -> None:
    index = ExampleIndex(registry_of(store))
    all_ends = index.due_before(ADAPTER, 10**15)
    assert len(all_ends) == VERSIONS - 1, "the first document is permanent"
    published_ms = all_ends[0].example.origin.timestamp_ms
    assert index.due_before(ADAPTER, published_ms) == []
    assert len(index.due_before(ADAPTER, published_ms + 30 * 86_400_000)) == 1
    assert store.bodies_read == 0
    expected = index.of(ADAPTER)
    assert index.due_before(ADAPTER, 10**15) == all_ends == expected[1:], "the same from the cache"


def test_case_scale_eviction_does_not_read_bodies_again(store: _Counting) -> None:
    other = [tiny.document(0, "another text", adapter="other/one")]
    local_learner(store).update(jobs.update(store, 0, other, adapter="other/one"), "live")
    index = ExampleIndex(registry_of(store), max_examples=VERSIONS)
    for _ in range(3):
        assert len(index.of(ADAPTER)) == VERSIONS
        assert len(index.of("other/one")) == 1
    assert store.bodies_read == 0


def test_only_updates_since_are_read_where_an_adapter_is_in_memory(store: _Counting) -> None:
    index = ExampleIndex(registry_of(store))
    index.of(ADAPTER)
    local_learner(store).update(job(store, VERSIONS, VERSIONS), "live")
    store.calls.clear()
    assert len(index.of(ADAPTER)) == VERSIONS + 1
    assert sum(store.calls.values()) <= 8
    assert index.of(ADAPTER) == ExampleIndex(registry_of(store)).of(ADAPTER)
