"""Pending deletes on every store: they only grow, one adapter's are listed alone, and clearing removes them."""

from __future__ import annotations

import pytest

from perennial.storage.errors import IntegrityError
from perennial.storage.registry.pending_deletes import (
    PendingDeletes,
    clear_pending_deletes,
    list_pending_deletes,
    load_pending_deletes,
    pending_deletes_key,
    record_pending_deletes,
)

ONE, TWO = ("sha256:" + letter * 64 for letter in "ab")


def test_pending_deletes_grow_until_they_are_cleared(store):
    assert load_pending_deletes(store, "acme", "job 1/ä") is None
    record_pending_deletes(store, "acme", "job 1/ä", [TWO], {"r1": 2, "r2": 1})
    record_pending_deletes(store, "acme", "job 1/ä", [ONE, TWO], {"r1": 1, "r3": 4})
    found = load_pending_deletes(store, "acme", "job 1/ä")
    assert (found.digests, found.requests) == ([ONE, TWO], {"r1": 2, "r2": 1, "r3": 4})
    clear_pending_deletes(store, "acme", "job 1/ä")
    clear_pending_deletes(store, "acme", "job 1/ä")
    assert load_pending_deletes(store, "acme", "job 1/ä") is None


def test_only_those_of_the_adapter_are_listed(store):
    record_pending_deletes(store, "acme", "a", [ONE])
    record_pending_deletes(store, "acme", "b", [TWO])
    record_pending_deletes(store, "acme/support", "c", [ONE])
    assert sorted(found.job_id for found in list_pending_deletes(store, "acme")) == ["a", "b"]
    assert [found.job_id for found in list_pending_deletes(store, "acme/support")] == ["c"]


def test_an_unreadable_object_is_refused(store):
    store.put_if_absent(pending_deletes_key("acme", "a"), b"{}")
    with pytest.raises(IntegrityError):
        load_pending_deletes(store, "acme", "a")


def test_a_job_without_blobs_still_leaves_a_record(store):
    record_pending_deletes(store, "acme", "a", [])
    assert load_pending_deletes(store, "acme", "a") == PendingDeletes(adapter="acme", job_id="a")


def test_a_refused_job_stays_refused(store):
    record_pending_deletes(store, "acme", "a", [ONE], refused=True)
    record_pending_deletes(store, "acme", "a", [TWO])
    found = load_pending_deletes(store, "acme", "a")
    assert found is not None
    assert found.refused
