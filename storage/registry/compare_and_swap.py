"""Read, change and replace an object atomically; try again each time another writer was first."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Final, TypeVar

from perennial.storage.errors import ConflictError, NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.records import (
    MAX_RECORD_BYTES,
    AliasKind,
    AliasState,
    GenerationFloor,
    alias_key,
    generation_floor_key,
    parse_record,
)
from perennial.storage.signing.trust import Trust

ATTEMPTS: Final = 64

_T = TypeVar("_T")


def update_object(
    store: ObjectStore,
    key: str,
    load: Callable[[], tuple[_T, str | None]],
    change: Callable[[_T], _T],
    to_bytes: Callable[[_T], bytes],
    *,
    always_create: bool = False,
) -> _T:
    """Apply a change to the object at `key` and return the object as it then is.

    Nothing is written where the change leaves the object as it was.

    Args:
        store: The store that holds the object.
        key: The key of the object.
        load: Return the object as it is now, and its etag. Where none is stored: an empty object, and None.
        change: A pure function of the current object. It is called again after a conflict.
        to_bytes: Return the bytes to store. May raise where they are too many.
        always_create: Write an object that is not stored yet even where `change` leaves it empty.

    Raises:
        ConflictError: Other writers were first at every attempt.
    """
    for _ in range(ATTEMPTS):
        found, etag = load()
        wanted = change(found)
        if wanted == found and not (always_create and etag is None):
            return found
        try:
            store.compare_and_swap(key, to_bytes(wanted), etag)
        except ConflictError:
            continue
        return wanted
    raise ConflictError(
        f"other writers changed {key} at each of {ATTEMPTS} attempts", remedy="run the same command or role again"
    )


class AliasWriter:
    """Replaces aliases in one object store; safe to share among threads.

    Args:
        store: where the aliases are stored.
        nonce: returns a string that was never returned before, so that no two states of an alias have equal bytes.
        now: wall clock.
        trust: signs the aliases, where it has a key.
    """

    def __init__(self, store: ObjectStore, nonce: Callable[[], str], now: Callable[[], datetime], trust: Trust) -> None:
        self._trust = trust
        self._store = store
        self._nonce = nonce
        self._now = now

    def replace(
        self, adapter: str, alias: str, state: AliasState | None, version: str, seq: int, kind: AliasKind, reason: str
    ) -> AliasState | None:
        """Replace an alias and return it; None if another writer was first.

        Args:
            adapter: the adapter.
            alias: the alias.
            state: the alias as it was read; None if it was not set.
            version: the version to point at.
            seq: its sequence number.
            kind: what the alias is from now on.
            reason: shown to people.
        """
        successor = AliasState(
            adapter=adapter,
            alias=alias,
            generation=(state.generation if state else generation_floor(self._store, adapter, alias)) + 1,
            version=version,
            seq=seq,
            kind=kind,
            previous_version=state.version if state else None,
            reason=reason,
            published_at=self._now(),
            nonce=self._nonce(),
        )
        return self._write(successor, state.etag if state else None)

    def resume(self, state: AliasState, etag: str | None) -> AliasState | None:
        """Write an alias of a restored store with the generation that it has, and return it; None after a conflict.

        Args:
            state: the alias as it is to be; it gets a nonce, and the time.
            etag: what a compare-and-swap expects; None if the alias must not be there.
        """
        return self._write(state.model_copy(update={"nonce": self._nonce(), "published_at": self._now()}), etag)

    def raise_floor(self, adapter: str, alias: str, generation: int) -> None:
        """Let an alias that is not there begin above a generation.

        Raises:
            ConflictError: other writers were first at every attempt.
        """

        def load() -> tuple[GenerationFloor, str | None]:
            return _load_floor(self._store, adapter, alias)

        def raised(found: GenerationFloor) -> GenerationFloor:
            return GenerationFloor(generation=max(found.generation, generation))

        update_object(self._store, generation_floor_key(adapter, alias), load, raised, GenerationFloor.to_bytes)

    def _write(self, successor: AliasState, etag: str | None) -> AliasState | None:
        successor = successor.signed(self._trust)
        key = alias_key(successor.adapter, successor.alias)
        try:
            etag = self._store.compare_and_swap(key, successor.to_bytes(), etag)
        except ConflictError:
            return None
        return successor.model_copy(update={"etag": etag})


def generation_floor(store: ObjectStore, adapter: str, alias: str) -> int:
    """Return the generation above which an alias begins that is not there; 0 where none was noted.

    Raises:
        IntegrityError: the object is not readable.
    """
    return _load_floor(store, adapter, alias)[0].generation


def _load_floor(store: ObjectStore, adapter: str, alias: str) -> tuple[GenerationFloor, str | None]:
    key = generation_floor_key(adapter, alias)
    try:
        stored = store.get(key, MAX_RECORD_BYTES)
    except NotFoundError:
        return GenerationFloor(generation=0), None
    return parse_record(GenerationFloor, key, stored.data), stored.etag
