"""Which adapters began with a start that was learned over which others.

An adapter is recorded before the versions that its start is made of are looked up. A forgetting lists the adapters after
the forgotten versions were revoked. So whoever is not listed looks up versions without what was forgotten.
"""

from __future__ import annotations

from perennial.storage.objects.object_store import ObjectStore

PREFIX = "starts/"


def record_start_user(store: ObjectStore, founder: str, user: str) -> None:
    """Record that an adapter may begin with a start that contains a version of a sibling.

    Args:
        store: The store.
        founder: The sibling.
        user: The adapter that begins.

    Raises:
        StoreError: The store failed.
    """
    store.put_if_absent(_key(founder, user), b"{}")


def is_start_user(store: ObjectStore, founder: str, user: str) -> bool:
    """Return whether it is recorded that an adapter may have begun with a start that contains a version of a sibling.

    Raises:
        StoreError: The store failed.
    """
    return store.exists(_key(founder, user))


def start_users(store: ObjectStore, founder: str) -> list[str]:
    """Return the adapters that may have begun with a start that contains a version of this one, sorted.

    Args:
        store: The store.
        founder: The adapter.

    Raises:
        StoreError: The store failed.
    """
    folder = f"{PREFIX}{founder}/@/"
    return [key.removeprefix(folder) for key in store.list(folder)]


def drop_start_user(store: ObjectStore, founder: str, user: str) -> None:
    """Delete the record of an adapter that was rebuilt without its start.

    Raises:
        StoreError: The store failed.
    """
    store.delete(_key(founder, user))


def _key(founder: str, user: str) -> str:
    return f"{PREFIX}{founder}/@/{user}"  # no name of an adapter has an @
