"""Which adapters have versions that depend on versions of which others.

A user's adapter may begin with the mean of siblings' versions, and may be trained over versions of the shared adapter. What
one of these forgets has to follow to it. So an adapter is recorded as a dependant before the other one's live version is
looked up, and a forgetting lists the dependants after the forgotten versions were revoked: whoever is not listed looks up
versions without what was forgotten.

Records stay, also of an adapter that was rebuilt since and depends on nothing: another request may be about to list it, and
has to wait until its replicas have unloaded what it was before.
"""

from __future__ import annotations

from perennial.storage.objects.object_store import ObjectStore

PREFIX = "dependants/"


def record_dependant(store: ObjectStore, other: str, adapter: str) -> None:
    """Record that an adapter may depend on a version of another one.

    Args:
        store: The store.
        other: The adapter that it may depend on.
        adapter: The adapter.

    Raises:
        StoreError: The store failed.
    """
    store.put_if_absent(_key(other, adapter), b"{}")


def dependants(store: ObjectStore, other: str) -> list[str]:
    """Return the adapters that may depend on a version of this one, sorted.

    Args:
        store: The store.
        other: The adapter that they may depend on.

    Raises:
        StoreError: The store failed.
    """
    folder = f"{PREFIX}{other}/@/"
    return [key.removeprefix(folder) for key in store.list(folder)]


def _key(other: str, adapter: str) -> str:
    return f"{PREFIX}{other}/@/{adapter}"  # no name of an adapter has an @
