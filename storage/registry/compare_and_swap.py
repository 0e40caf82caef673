"""Read, change and replace an object atomically; try again each time another writer was first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from perennial.storage.errors import ConflictError
from perennial.storage.objects.object_store import ObjectStore

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
