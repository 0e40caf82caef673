"""What the updates of an adapter cost: tokens, operations, seconds and joules.

One object per adapter, `costs/<adapter>`, replaced by compare-and-swap. It stands beside the manifests and not in them: a
manifest holds no measured time, because the same job must give the same bytes. Nothing depends on the object. It may be
missing or behind, where the learner ended between publishing a version and writing it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.compare_and_swap import update_object
from perennial.storage.registry.manifest import AdapterName, Digest, Outcome, Seq
from perennial.storage.registry.records import RegistryRecord, check_adapter, parse_record

MAX_UPDATES = 256
"""Newest updates that are kept: about 80 KB."""
MAX_COSTS_BYTES = 1 << 20

_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=2**63 - 1)]


class UpdateCost(RegistryRecord):
    """What one update cost, its measurements for the gate included.

    Attributes:
        version: the version that it made.
        seq: the version's sequence number.
        outcome: the gate's verdict.
        tokens: trained tokens, in all steps.
        training_flops: floating-point operations of training, by formula; see docs/economics.md.
        measuring_flops: those of the gate's measurements.
        seconds: time of the device; of a pass that several adapters shared, this one's share.
        joules: energy of the device in that time, or this adapter's share; None where it was not measured.
        energy_source: `nvml`, `rapl`, or nothing.
        device: kind of device: `cpu` or `cuda`.
    """

    version: Digest
    seq: Seq
    outcome: Outcome
    tokens: _Count
    training_flops: _Amount
    measuring_flops: _Amount
    seconds: _Amount
    joules: _Amount | None = None
    energy_source: Annotated[str, Field(max_length=64)] = ""
    device: Annotated[str, Field(max_length=64)] = ""


class AdapterCosts(RegistryRecord):
    """What the updates of one adapter cost.

    Attributes:
        adapter: the adapter.
        updates: the newest updates, oldest first.
    """

    adapter: AdapterName
    updates: list[UpdateCost] = Field(default_factory=list)


def costs_key(adapter: str) -> str:
    """Return the key of an adapter's costs."""
    return f"costs/{check_adapter(adapter)}"


def load_costs(store: ObjectStore, adapter: str) -> AdapterCosts:
    """Return what is recorded of an adapter's updates; nothing where no learner of this release updated it.

    Raises:
        IntegrityError: the object is not readable.
    """
    return _load(store, adapter)[0]


def record_cost(store: ObjectStore, adapter: str, cost: UpdateCost) -> None:
    """Add an update, or replace what is recorded of the same version.

    Raises:
        ConflictError: other writers were first at every attempt.
        IntegrityError: the object is not readable.
    """

    def extended(found: AdapterCosts) -> AdapterCosts:
        kept = [*(other for other in found.updates if other.version != cost.version), cost]
        return found.model_copy(update={"updates": kept[-MAX_UPDATES:]})

    update_object(store, costs_key(adapter), lambda: _load(store, adapter), extended, AdapterCosts.to_bytes)


def _load(store: ObjectStore, adapter: str) -> tuple[AdapterCosts, str | None]:
    key = costs_key(adapter)
    try:
        stored = store.get(key, MAX_COSTS_BYTES)
    except NotFoundError:
        return AdapterCosts(adapter=adapter), None
    return parse_record(AdapterCosts, key, stored.data), stored.etag
