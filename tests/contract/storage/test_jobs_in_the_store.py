"""Waiting jobs, parked adapters and refused examples on every store."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from perennial.storage.errors import ConflictError, IntegrityError, StoreError
from perennial.storage.registry import refused_examples, waiting_jobs
from perennial.storage.registry.parked import (
    UNREADABLE_RECORD,
    ParkedAdapter,
    list_parked,
    load_parked,
    park_adapter,
    parked_key,
    unpark_adapter,
)
from perennial.storage.registry.refused_examples import (
    add_refused_examples,
    load_refused_examples,
    refused_key,
    remove_refused_examples,
)
from perennial.storage.registry.waiting_jobs import (
    MAX_CUT,
    count_jobs,
    delete_job,
    give_up_cut,
    job_key,
    list_jobs,
    load_given_up,
    load_job,
    load_job_versions,
    put_job,
    record_job_version,
)

ONE, TWO = ("sha256:" + letter * 64 for letter in "ab")


def test_jobs_are_listed_by_cut_and_adapter(store):
    for adapter, cut in (("acme", 10), ("acme", 2), ("acme/000000000002", 7), ("acme/b", 0)):
        put_job(store, adapter, cut, f"{adapter} {cut}".encode())
    assert list(list_jobs(store, "acme")) == [2, 10]
    assert list(list_jobs(store, "acme/000000000002")) == [7]
    assert count_jobs(store) == {"acme": 2, "acme/000000000002": 1, "acme/b": 1}
    assert load_job(store, "acme", 2).data == b"acme 2"
    delete_job(store, "acme", 2)
    delete_job(store, "acme", 2)
    assert load_job(store, "acme", 2) is None
    assert list(list_jobs(store, "acme")) == [10]


def test_a_cut_is_stored_once(store):
    put_job(store, "acme", 0, b"first")
    with pytest.raises(ConflictError):
        put_job(store, "acme", 0, b"second")
    assert load_job(store, "acme", 0).data == b"first"


def test_a_cut_number_that_no_key_can_hold(store):
    assert load_job(store, "acme", MAX_CUT + 1) is None
    with pytest.raises(StoreError):
        job_key("acme", MAX_CUT + 1)


def test_the_newest_given_up_cuts_are_kept(store, monkeypatch):
    monkeypatch.setattr(waiting_jobs, "MAX_GIVEN_UP", 2)
    for cut in (3, 1, 2):
        give_up_cut(store, "acme", cut, f"job {cut}")
    assert load_given_up(store, "acme") == {2: "job 2", 3: "job 3"}
    assert load_given_up(store, "acme/b") == {}


def test_the_versions_of_a_job_are_kept_in_order(store):
    for version in (TWO, ONE, TWO):
        record_job_version(store, "acme", "job 1/ä", version)
    assert load_job_versions(store, "acme", "job 1/ä") == [TWO, ONE]
    assert load_job_versions(store, "acme", "job 2") == []


def parked(adapter: str, reason: str = "no-space") -> ParkedAdapter:
    return ParkedAdapter(adapter=adapter, reason=reason, since=datetime(2026, 1, 1, tzinfo=UTC))


def test_an_adapter_stays_parked_for_the_first_reason(store):
    assert park_adapter(store, parked("acme")).reason == "no-space"
    assert park_adapter(store, parked("acme", "operator")).reason == "no-space"
    park_adapter(store, parked("acme/b", "operator"))
    assert [record.adapter for record in list_parked(store)] == ["acme", "acme/b"]
    assert unpark_adapter(store, "acme")
    assert not unpark_adapter(store, "acme")
    assert load_parked(store, "acme") is None


def test_a_record_that_cannot_be_read_parks_the_adapter_too(store):
    store.put_if_absent(parked_key("acme"), b"{}")
    assert load_parked(store, "acme").reason == UNREADABLE_RECORD
    assert unpark_adapter(store, "acme")


def test_the_newest_refused_examples_are_kept(store, monkeypatch):
    monkeypatch.setattr(refused_examples, "MAX_REFUSED_EXAMPLES", 3)
    add_refused_examples(store, "acme", ["b", "a"], 2000)
    add_refused_examples(store, "acme", ["a", "c"], 1000)
    assert load_refused_examples(store, "acme") == {"a": 2000, "b": 2000, "c": 1000}
    add_refused_examples(store, "acme", ["d", "a"], 3000)
    assert load_refused_examples(store, "acme") == {"a": 3000, "b": 2000, "d": 3000}
    remove_refused_examples(store, "acme", ["a", "x"])
    assert load_refused_examples(store, "acme") == {"b": 2000, "d": 3000}
    assert load_refused_examples(store, "acme/b") == {}


def test_refused_examples_that_cannot_be_read_are_an_error(store):
    store.put_if_absent(refused_key("acme"), b"{")
    with pytest.raises(IntegrityError):
        load_refused_examples(store, "acme")
