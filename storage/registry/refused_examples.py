"""Examples that were accepted, are not learned, and may be published again as they are.

The gate refused their update, its job went to the dead letters, or a request removed them without suppressing their text.

One object per adapter, `refused/<adapter>`, replaced by compare-and-swap. It holds example ids and times, no text. The
learner adds ids and removes those that are learned or erased. Intake reads it: it drops what it accepted before as a
duplicate, unless the example is listed here; so what was refused can be published again as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from pydantic import Field

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.compare_and_swap import update_object
from perennial.storage.registry.manifest import AdapterName
from perennial.storage.registry.records import RegistryRecord, check_adapter, parse_record

MAX_REFUSED_EXAMPLES = 20_000
MAX_REFUSED_BYTES = 8 << 20


class RefusedExamples(RegistryRecord):
    """The refused examples of one adapter.

    Attributes:
        adapter: the adapter.
        refused_at_ms: when each example was refused last, in milliseconds since 1970, by example id.
    """

    adapter: AdapterName
    refused_at_ms: dict[str, int] = Field(default_factory=dict)


def refused_key(adapter: str) -> str:
    """Return the key of an adapter's refused examples."""
    return f"refused/{check_adapter(adapter)}"


def load_refused_examples(store: ObjectStore, adapter: str) -> dict[str, int]:
    """Return when each refused example was refused last, in milliseconds since 1970, by example id.

    Raises:
        IntegrityError: the object is not readable.
    """
    return dict(_load(store, adapter)[0].refused_at_ms)


def add_refused_examples(store: ObjectStore, adapter: str, example_ids: Iterable[str], at_ms: int) -> None:
    """Record that examples were refused; the newest `MAX_REFUSED_EXAMPLES` are kept.

    Args:
        store: the store.
        adapter: the adapter.
        example_ids: the examples.
        at_ms: when, in milliseconds since 1970; a later time that is recorded already stays.

    Raises:
        ConflictError: other writers were first at every attempt.
        IntegrityError: the object is not readable.
    """
    added = dict.fromkeys(example_ids, at_ms)

    def extended(found: RefusedExamples) -> RefusedExamples:
        times = dict(found.refused_at_ms)
        for example_id, at in added.items():
            times[example_id] = max(at, times.get(example_id, at))
        newest = sorted(times.items(), key=lambda item: (item[1], item[0]))[-MAX_REFUSED_EXAMPLES:]
        return found.model_copy(update={"refused_at_ms": dict(newest)})

    if added:
        _update(store, adapter, extended)


def remove_refused_examples(store: ObjectStore, adapter: str, example_ids: Collection[str]) -> None:
    """Remove examples that were learned or forgotten; nothing is written where none of them is listed.

    Raises:
        ConflictError: other writers were first at every attempt.
        IntegrityError: the object is not readable.
    """
    removed = frozenset(example_ids)

    def reduced(found: RefusedExamples) -> RefusedExamples:
        if removed.isdisjoint(found.refused_at_ms):
            return found
        kept = {example_id: at for example_id, at in found.refused_at_ms.items() if example_id not in removed}
        return found.model_copy(update={"refused_at_ms": kept})

    if removed:
        _update(store, adapter, reduced)


def _update(store: ObjectStore, adapter: str, change: Callable[[RefusedExamples], RefusedExamples]) -> None:
    update_object(store, refused_key(adapter), lambda: _load(store, adapter), change, lambda wanted: wanted.to_bytes())


def _load(store: ObjectStore, adapter: str) -> tuple[RefusedExamples, str | None]:
    key = refused_key(adapter)
    try:
        stored = store.get(key, MAX_REFUSED_BYTES)
    except NotFoundError:
        return RefusedExamples(adapter=adapter), None
    return parse_record(RefusedExamples, key, stored.data), stored.etag
