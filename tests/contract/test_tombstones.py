"""Tombstones on every store: they only grow, their adapter's alone are listed, and they go when they are lifted."""

from __future__ import annotations

import pytest

from perennial.storage.errors import IntegrityError
from perennial.storage.registry.pending_deletes import (
    extend_tombstone,
    lift_tombstone,
    load_tombstone,
    tombstone_key,
    tombstones,
)

ONE, TWO = ("sha256:" + letter * 64 for letter in "ab")


def test_a_tombstone_grows_and_is_lifted(store):
    assert load_tombstone(store, "acme", "job 1/ä") is None
    extend_tombstone(store, "acme", "job 1/ä", [TWO], {"r1": 2, "r2": 1})
    extend_tombstone(store, "acme", "job 1/ä", [ONE, TWO], {"r1": 1, "r3": 4})
    found = load_tombstone(store, "acme", "job 1/ä")
    assert (found.digests, found.requests) == ([ONE, TWO], {"r1": 2, "r2": 1, "r3": 4})
    lift_tombstone(store, "acme", "job 1/ä")
    lift_tombstone(store, "acme", "job 1/ä")
    assert load_tombstone(store, "acme", "job 1/ä") is None


def test_only_the_adapters_own_are_listed(store):
    extend_tombstone(store, "acme", "a", [ONE])
    extend_tombstone(store, "acme", "b", [TWO])
    extend_tombstone(store, "acme/support", "c", [ONE])
    assert sorted(tombstone.job_id for tombstone in tombstones(store, "acme")) == ["a", "b"]
    assert [tombstone.job_id for tombstone in tombstones(store, "acme/support")] == ["c"]


def test_what_is_no_tombstone_is_refused(store):
    store.put_if_absent(tombstone_key("acme", "a"), b"{}")
    with pytest.raises(IntegrityError):
        load_tombstone(store, "acme", "a")
