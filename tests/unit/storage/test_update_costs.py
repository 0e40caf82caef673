"""What updates cost is recorded beside the manifests: bounded, once per version, and of no consequence if it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.history.update_costs import (
    MAX_COSTS_BYTES,
    MAX_UPDATES,
    UpdateCost,
    costs_key,
    load_costs,
    record_cost,
)

ADAPTER = "acme/support"


def cost(seq: int, tokens: int = 10, joules: float | None = 2.0) -> UpdateCost:
    return UpdateCost(
        version=f"sha256:{seq:064x}", seq=seq, outcome="promoted", tokens=tokens, training_flops=1e9, measuring_flops=1e8,
        seconds=0.5, joules=joules, energy_source="rapl", device="cpu",
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def test_an_adapter_without_a_record_has_no_costs(store):
    assert load_costs(store, ADAPTER).updates == []


def test_costs_are_kept_in_order_and_once_per_version(store):
    for seq, tokens in ((1, 10), (2, 20), (2, 30)):
        record_cost(store, ADAPTER, cost(seq, tokens))
    assert load_costs(store, ADAPTER).updates == [cost(1, 10), cost(2, 30)]
    assert load_costs(store, "acme/other").updates == []


def test_only_the_newest_updates_are_kept_and_they_fit_the_limit(store):
    many = cost(1).model_copy(update={"training_flops": 1.2345678901234567e300, "seconds": 1.2345678901234567e-300})
    for seq in range(1, MAX_UPDATES + 3):
        record_cost(store, ADAPTER, many.model_copy(update={"seq": 10**12 - seq, "version": f"sha256:{seq:064x}"}))
    kept = load_costs(store, ADAPTER).updates
    assert [update.seq for update in kept] == [10**12 - seq for seq in range(3, MAX_UPDATES + 3)]
    assert len(store.get(costs_key(ADAPTER)).data) < MAX_COSTS_BYTES / 4


def test_a_damaged_record_is_said(store):
    store.compare_and_swap(costs_key(ADAPTER), b"[]", None)
    with pytest.raises(IntegrityError):
        load_costs(store, ADAPTER)


@pytest.mark.parametrize("wrong", [{"seconds": -1.0}, {"joules": float("nan")}, {"tokens": -1}])
def test_impossible_amounts_are_refused(wrong):
    with pytest.raises(ValidationError):
        UpdateCost(**{**cost(1).model_dump(), **wrong})
