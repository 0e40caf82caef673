"""Ids of examples as manifests record them: keyed under the adapter's text key.

The id of an example is a hash of its adapter, kind, document id and text, made without a key: intake has none. Events,
micro-batches and the quarantine hold it, and all of them end. Manifests stay for ever, so a manifest holds "k:" and
HMAC-SHA256(text key, "example id 1", 0, id) instead. Once `keys/<adapter>` is deleted, nobody can find out from a manifest
whether a guessed text was learned.

Manifests of earlier releases hold the ids themselves. Each id says its own form, because an earlier release that rebuilds
an adapter beside this one copies some records of a manifest and makes others. To find the record of an example that is at
hand, compare origins, or the forms of its id (`ExampleIds.forms`).
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from cachetools import LRUCache

from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import LearnedExample, Manifest, SkippedExample
from perennial.storage.registry.quarantine import ensure_text_key
from perennial.storage.registry.suppressed_texts import load_text_key

KEYED_PREFIX: Final = "k:"
"""What a keyed id begins with. Intake's own ids are hex digits."""
_LABEL: Final = b"example id 1\0"
_ID_CHARS: Final = 32
_CACHED_KEYS: Final = 4096

_Item = TypeVar("_Item", LearnedExample, SkippedExample)


def keyed_id(key: bytes, example_id: str) -> str:
    """Return the id that a manifest holds in place of an example's own.

    Args:
        key: The adapter's text key.
        example_id: The example's id.

    >>> keyed_id(bytes(32), "00112233445566778899aabbccddeeff")
    'k:3e89be98619afdb035ec92be168d7083'
    """
    return KEYED_PREFIX + hmac.digest(key, _LABEL + example_id.encode(), "sha256").hex()[:_ID_CHARS]


def is_keyed(example_id: str) -> bool:
    """Return whether an id that a manifest holds is a keyed one."""
    return example_id.startswith(KEYED_PREFIX)


def keyed_items(key: bytes, items: Iterable[_Item]) -> list[_Item]:
    """Return a manifest's records of examples with keyed ids in place of the examples' own, `merged_into` included.

    Records that are keyed already stay as they are, also those under a key that was lost.
    """
    return [item if is_keyed(item.example_id) else item.model_copy(update=_keyed_fields(key, item)) for item in items]


def with_keyed_ids(manifest: Manifest, key: bytes) -> Manifest:
    """Return a manifest in which every id of an example is keyed.

    Args:
        manifest: The manifest. One that is stored keeps its id only as it is: copy its records, never store it again.
        key: The adapter's text key.
    """
    return manifest.model_copy(
        update={"learned": keyed_items(key, manifest.learned), "skipped": keyed_items(key, manifest.skipped)}
    )


def _keyed_fields(key: bytes, item: LearnedExample | SkippedExample) -> dict[str, Any]:
    fields = {"example_id": keyed_id(key, item.example_id)}
    if isinstance(item, LearnedExample) and item.merged_into is not None:
        fields["merged_into"] = keyed_id(key, item.merged_into)
    return fields


class TextKeys:
    """The text keys of adapters, created where there are none. Those used last stay in memory. Thread-safe.

    Args:
        store: The store.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._keys: LRUCache[str, bytes] = LRUCache(_CACHED_KEYS)
        self._lock = threading.Lock()

    def of(self, adapter: str) -> bytes:
        """Return the adapter's text key.

        Raises:
            IntegrityError: The key was lost, and texts are suppressed under it.
        """
        with self._lock:
            key = self._keys.get(adapter)
        if key is None:
            key = ensure_text_key(self._store, adapter)
            with self._lock:
                self._keys[adapter] = key
        return key


class ExampleIds:
    """Compares the ids of an adapter's manifests with each other and with those of examples. Nothing is written.

    Args:
        key: The adapter's text key; None where it has none: then only ids of the same form are found to be equal.
    """

    def __init__(self, key: bytes | None) -> None:
        self._key = key

    @classmethod
    def load(cls, store: ObjectStore, adapter: str) -> ExampleIds:
        """Read the adapter's text key.

        Raises:
            IntegrityError: The object is not the adapter's text key.
        """
        return cls(load_text_key(store, adapter))

    def forms(self, example_id: str) -> tuple[str, ...]:
        """Return what manifests may hold as the id of an example.

        Args:
            example_id: The example's own id.
        """
        return (example_id,) if self._key is None else (example_id, keyed_id(self._key, example_id))

    def comparable(self, example_id: str) -> str:
        """Return the keyed form of an id that a manifest holds, so that ids of both forms can be compared."""
        if self._key is None or is_keyed(example_id):
            return example_id
        return keyed_id(self._key, example_id)
