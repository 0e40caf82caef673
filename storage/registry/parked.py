"""Parked adapters: one object `parked/<adapter>` while an adapter waits for an operator.

A job that fails for a reason outside its input (an unreadable object, another base or rank, no space) parks its adapter.
While the object exists, the learner leaves the adapter's update jobs in the store, in order, and goes on with other
adapters. Jobs that forget or roll back are still tried. `perennial adapters unpark` removes the object and publishes the
waiting jobs again.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AwareDatetime, Field

from perennial.storage.errors import IntegrityError, NotFoundError, StoreError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import AdapterName
from perennial.storage.registry.records import MAX_RECORD_BYTES, RegistryRecord, check_adapter, parse_record

OPERATOR = "operator"
"""The reason where a person parked the adapter."""
MISSING_CUT = "missing-cut"
"""The reason where the job of an earlier cut is neither in the store nor settled."""
UNREADABLE_RECORD = "unreadable-record"
"""The reason that is shown where the record itself cannot be read."""
MAX_DETAIL_CHARS = 2000
_PREFIX = "parked/"


class ParkedAdapter(RegistryRecord):
    """Why an adapter waits for an operator.

    Attributes:
        adapter: the adapter.
        reason: short identifier of the reason, such as `unreadable-object`.
        detail: what was found, what is allowed and what to do, for people.
        job_id: the job that could not be done; None where a person parked the adapter.
        cut: that job's cut number; None for other jobs.
        since: when the adapter was parked.
        worker: host and process that parked it.
    """

    adapter: AdapterName
    reason: Annotated[str, Field(min_length=1, max_length=64)]
    detail: Annotated[str, Field(max_length=MAX_DETAIL_CHARS)] = ""
    job_id: str | None = None
    cut: int | None = None
    since: AwareDatetime
    worker: str = ""


def parked_key(adapter: str) -> str:
    """Return the key of an adapter's parked record."""
    return f"{_PREFIX}{check_adapter(adapter)}"


def park_adapter(store: ObjectStore, record: ParkedAdapter) -> ParkedAdapter:
    """Park an adapter and return the record that is stored: where it is parked already, the first reason stays."""
    if store.put_if_absent(parked_key(record.adapter), record.to_bytes()):
        return record
    return load_parked(store, record.adapter) or record


def unpark_adapter(store: ObjectStore, adapter: str) -> bool:
    """Remove an adapter's parked record; return False if there is none. Publishing its jobs again is the caller's."""
    return store.delete(parked_key(adapter))


def load_parked(store: ObjectStore, adapter: str) -> ParkedAdapter | None:
    """Return why an adapter is parked; None if it is not. A record that cannot be read parks the adapter, too."""
    key = parked_key(adapter)
    try:
        return parse_record(ParkedAdapter, key, store.get(key, MAX_RECORD_BYTES).data)
    except NotFoundError:
        return None
    except IntegrityError as error:
        return ParkedAdapter(
            adapter=adapter, reason=UNREADABLE_RECORD, detail=str(error)[:MAX_DETAIL_CHARS],
            since=datetime.fromtimestamp(0, UTC),
        )  # fmt: skip


def list_parked(store: ObjectStore) -> Iterator[ParkedAdapter]:
    """Yield the records of all parked adapters, sorted by adapter."""
    for key in store.list(_PREFIX):
        try:
            record = load_parked(store, key[len(_PREFIX) :])
        except StoreError:
            if store.exists(key):
                raise
            continue
        if record is not None:
            yield record
