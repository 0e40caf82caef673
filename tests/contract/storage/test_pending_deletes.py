"""Tombstones on every store: they only grow, their adapter's alone are listed, and they go when they are lifted."""

from __future__ import annotations

import pytest

from perennial.storage.errors import IntegrityError
from perennial.storage.registry.pending_deletes import (
    clear_pending_deletes,
    list_pending_deletes,
    load_pending_deletes,
    pending_deletes_key,
    record_pending_deletes,
)

ONE, TWO = ("sha256:" + letter * 64 for letter in "ab")


def test_a_tombstone_grows_and_is_lifted(store):
    assert load_pending_deletes(store, "acme", "job 1/ä") is None
    record_pending_deletes(store, "acme", "job 1/ä", [TWO], {"r1": 2, "r2": 1})
    record_pending_deletes(store, "acme", "job 1/ä", [ONE, TWO], {"r1": 1, "r3": 4})
    found = load_pending_deletes(store, "acme", "job 1/ä")
    assert (found.digests, found.requests) == ([ONE, TWO], {"r1": 2, "r2": 1, "r3": 4})
    clear_pending_deletes(store, "acme", "job 1/ä")
    clear_pending_deletes(store, "acme", "job 1/ä")
    assert load_pending_deletes(store, "acme", "job 1/ä") is None


def test_only_the_adapters_own_are_listed(store):
    record_pending_deletes(store, "acme", "a", [ONE])
    record_pending_deletes(store, "acme", "b", [TWO])
    record_pending_deletes(store, "acme/support", "c", [ONE])
    assert sorted(tombstone.job_id for tombstone in list_pending_deletes(store, "acme")) == ["a", "b"]
    assert [tombstone.job_id for tombstone in list_pending_deletes(store, "acme/support")] == ["c"]


def test_what_is_no_tombstone_is_refused(store):
    store.put_if_absent(pending_deletes_key("acme", "a"), b"{}")
    with pytest.raises(IntegrityError):
        load_pending_deletes(store, "acme", "a")
