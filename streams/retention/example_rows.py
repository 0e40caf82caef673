"""The rows of the history index: stored examples without their texts."""

from __future__ import annotations

import secrets
from hashlib import sha256
from typing import Any

from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.history.index import HistoryIndex
from perennial.storage.registry.history.pages import ExampleRow
from perennial.storage.registry.quarantine import ensure_text_key
from perennial.storage.registry.registry import Registry
from perennial.storage.registry.suppressed_texts import load_text_key
from perennial.streams.events.models import Batch, ExampleAccepted
from perennial.streams.retention.quarantine_filter import text_hash

_TEXTS = {"text", "history", "prompt", "answer"}


class ExampleRows:
    """Describes micro-batches of one adapter. Reads or creates the adapter's text key when it is first needed.

    Args:
        store: The store.
        adapter: The adapter.
        read_only: Never write to the store: where there is no text key, hash under a random one that is not stored.
            Then use no hash.
    """

    def __init__(self, store: ObjectStore, adapter: str, *, read_only: bool = False) -> None:
        self._store = store
        self._adapter = adapter
        self._read_only = read_only
        self._key: bytes | None = None

    @property
    def key(self) -> bytes:
        """The adapter's text key."""
        if self._key is None and self._read_only:
            self._key = load_text_key(self._store, self._adapter) or secrets.token_bytes()
        if self._key is None:
            self._key = ensure_text_key(self._store, self._adapter)
        return self._key

    def key_check(self) -> str:
        """See `BatchDescriber`."""
        return key_check(self.key)

    def rows(self, body: bytes) -> list[ExampleRow]:
        """See `BatchDescriber`."""
        return [self._row(example) for example in Batch.model_validate_json(body).examples]

    def _row(self, example: ExampleAccepted) -> dict[str, Any]:
        row = example.model_dump(mode="json", exclude=_TEXTS, exclude_defaults=True)
        return {**row, "text_hash": text_hash(example, self.key)}


def key_check(key: bytes) -> str:
    """Return what tells a text key from any other, and does not reveal it."""
    return sha256(b"text key of the history index" + key).hexdigest()[:16]


def history_index(registry: Registry, adapter: str) -> HistoryIndex:
    """Return the history index of an adapter.

    Args:
        registry: The adapter's versions.
        adapter: The adapter.
    """
    return HistoryIndex(registry, adapter, ExampleRows(registry.store, adapter))


def bare_example(row: ExampleRow) -> ExampleAccepted:
    """Return the example of a row, without its text."""
    return ExampleAccepted.model_validate({name: value for name, value in row.items() if name != "text_hash"})
