"""Repaired high-water marks: what an operator put in the place of a mark beyond the end of its log.

A manifest cannot be changed. So the object `marks/<adapter>` says which mark of which origin partition counts as which
other one. A repair applies to that one wrong value, whatever version holds it: versions that a learner publishes at the
same moment are repaired alike, and a right mark is never lowered. The object is also the record of who repaired what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import AwareDatetime, Field

from perennial.storage.errors import NotFoundError, StoreError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.compare_and_swap import update_object
from perennial.storage.registry.manifest import AdapterName
from perennial.storage.registry.records import RegistryRecord, check_adapter, parse_record

MAX_REPAIRS = 1000
MAX_REPAIRS_BYTES = 1 << 20
_Count = Annotated[int, Field(ge=0, le=2**63 - 1)]


class MarkRepair(RegistryRecord):
    """One repair.

    Attributes:
        partition: origin partition key.
        wrong_epoch: leader epoch of the mark that is wrong.
        wrong_offset: its offset.
        epoch: leader epoch of the mark that counts instead.
        offset: its offset; None: nothing of the partition counts as covered.
        at: when it was repaired.
        by: who repaired it.
        reason: why.
    """

    partition: Annotated[str, Field(min_length=1, max_length=1024)]
    wrong_epoch: _Count
    wrong_offset: _Count
    epoch: _Count = 0
    offset: _Count | None = None
    at: AwareDatetime
    by: Annotated[str, Field(max_length=256)]
    reason: Annotated[str, Field(max_length=1024)] = ""


class MarkRepairs(RegistryRecord):
    """All repairs of an adapter's marks, oldest first."""

    adapter: AdapterName
    repairs: list[MarkRepair] = Field(default_factory=list, max_length=MAX_REPAIRS)


def mark_repairs_key(adapter: str) -> str:
    """Return the key of an adapter's repaired marks."""
    return f"marks/{check_adapter(adapter)}"


def load_mark_repairs(store: ObjectStore, adapter: str) -> list[MarkRepair]:
    """Return the repairs of an adapter's marks, oldest first.

    Raises:
        IntegrityError: the object is not readable.
    """
    return list(_load(store, adapter)[0].repairs)


def add_mark_repair(store: ObjectStore, adapter: str, repair: MarkRepair) -> None:
    """Record a repair. It replaces an earlier one of the same wrong mark, so that it can be corrected.

    Raises:
        ConflictError: other writers were first at every attempt.
        IntegrityError: the object is not readable.
        StoreError: the adapter's marks were repaired more than MAX_REPAIRS times.
    """

    def added(found: MarkRepairs) -> MarkRepairs:
        others = [each for each in found.repairs if _wrong(each) != _wrong(repair)]
        if len(others) >= MAX_REPAIRS:
            raise StoreError(
                f"the marks of {adapter} were repaired too often", got=len(others), allowed=MAX_REPAIRS,
                remedy=f"find out what writes wrong marks, then shorten {mark_repairs_key(adapter)}",
            )  # fmt: skip
        return found.model_copy(update={"repairs": [*others, repair]})

    key = mark_repairs_key(adapter)
    update_object(store, key, lambda: _load(store, adapter), added, lambda wanted: wanted.to_bytes())


def repaired_marks(
    offsets: Mapping[str, int], epochs: Mapping[str, int], repairs: Iterable[MarkRepair]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return marks with every wrong one replaced.

    Args:
        offsets: offsets of the marks by origin partition key.
        epochs: their leader epochs; a partition that is missing has epoch 0.
        repairs: the repairs, oldest first.

    Returns:
        Offsets and epochs; an epoch that is 0 is left out.
    """
    found = {partition: (epochs.get(partition, 0), offset) for partition, offset in offsets.items()}
    for repair in repairs:
        if found.get(repair.partition) == (repair.wrong_epoch, repair.wrong_offset):
            del found[repair.partition]
            if repair.offset is not None:
                found[repair.partition] = (repair.epoch, repair.offset)
    return (
        {partition: offset for partition, (_, offset) in found.items()},
        {partition: epoch for partition, (epoch, _) in found.items() if epoch},
    )


def _wrong(repair: MarkRepair) -> tuple[str, int, int]:
    return repair.partition, repair.wrong_epoch, repair.wrong_offset


def _load(store: ObjectStore, adapter: str) -> tuple[MarkRepairs, str | None]:
    key = mark_repairs_key(adapter)
    try:
        stored = store.get(key, MAX_REPAIRS_BYTES)
    except NotFoundError:
        return MarkRepairs(adapter=adapter), None
    return parse_record(MarkRepairs, key, stored.data), stored.etag
