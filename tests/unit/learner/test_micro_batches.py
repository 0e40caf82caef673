"""Rows of earlier micro-batches and their cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.learner.versions import micro_batches
from perennial.learner.versions.micro_batches import BatchRows
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.events.models import ExampleAccepted
from tests import jobs, tiny


def test_a_micro_batch_larger_than_the_cache_is_cached_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(micro_batches, "BATCH_CACHE_TOKENS", 4)
    store, tokenized = DirectoryStore(tmp_path, fsync=False), []

    def rows_of(example: ExampleAccepted) -> list[TokenRow]:
        tokenized.append(example.example_id)
        return [TokenRow(tuple(range(10)))]

    rows = BatchRows(store, rows_of)
    entries = [
        ReplayEntry(example.example_id, jobs.update(store, cut, [example]).batch.digest)
        for cut, example in enumerate([tiny.document(0, "one"), tiny.document(1, "two")])
    ]
    for entry in (entries[0], entries[0], entries[1], entries[1], entries[0]):
        assert rows(entry)
    assert tokenized == [entries[0].example_id, entries[1].example_id, entries[0].example_id]
    rows.drop([entries[0].batch])
    store.delete(f"blobs/sha256/{entries[0].batch[7:]}")
    assert rows(entries[0]) is None
