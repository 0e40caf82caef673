"""The look-up of refused examples: cached, and it survives a store that is away or an object that is broken."""

from __future__ import annotations

import pytest

from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.refused_examples import add_refused_examples, refused_key
from perennial.streams.intake import refused
from perennial.streams.intake.refused import CACHED_S, RefusedExamplesLookup


class Clock:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s

    def sleep(self, seconds):
        self.s += seconds


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path)


def lookup_of(store, clock):
    return RefusedExamplesLookup(store, clock, clock.sleep, clock)


def test_the_list_is_read_again_after_ten_seconds(store):
    clock = Clock()
    clock.s = 1.0
    lookup = lookup_of(store, clock)
    assert lookup("acme", "a" * 32, 1) is None
    add_refused_examples(store, "acme", ["a" * 32], 7)
    clock.s += CACHED_S - 1
    assert lookup("acme", "a" * 32, 1) is None
    clock.s += 2
    assert (lookup("acme", "a" * 32, 1), lookup("acme", "b" * 32, 1), lookup("other", "a" * 32, 1)) == (7, None, None)


def test_case_20_a_record_that_is_younger_than_the_list_has_it_read_again(store):
    """A document published again right after its forgetting met a list of up to ten seconds ago."""
    clock = Clock()
    clock.s = 100.0
    lookup = lookup_of(store, clock)
    assert lookup("acme", "a" * 32, 99_000) is None
    clock.s = 101.0
    add_refused_examples(store, "acme", ["a" * 32], 100_500)
    assert lookup("acme", "a" * 32, 99_999) is None  # no record of that time can need the newer list
    assert lookup("acme", "a" * 32, 100_600) == 100_500


def test_a_producer_whose_clock_is_ahead_does_not_cause_a_read_per_record(store, monkeypatch):
    clock, reads = Clock(), []
    clock.s = 100.0
    load = refused.load_refused_examples
    monkeypatch.setattr(refused, "load_refused_examples", lambda *given: (reads.append(given), load(*given))[1])
    lookup = lookup_of(store, clock)
    for _ in range(100):
        lookup("acme", "a" * 32, 200_000)
        clock.s += 0.01
    assert len(reads) <= 5


def test_a_broken_list_drops_duplicates_and_stops_nothing(store, caplog):
    store.put_if_absent(refused_key("acme"), b"not json")
    assert RefusedExamplesLookup(store)("acme", "a" * 32, 0) is None
    assert "unreadable" in caplog.text


def test_a_store_that_is_away_is_waited_for(store, monkeypatch):
    clock, failures = Clock(), 3
    load = refused.load_refused_examples

    def failing(*arguments):
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise StoreUnavailableError("away")
        return load(*arguments)

    monkeypatch.setattr(refused, "load_refused_examples", failing)
    add_refused_examples(store, "acme", ["a" * 32], 7)
    assert lookup_of(store, clock)("acme", "a" * 32, 0) == 7
    failures = 10**6
    with pytest.raises(StoreUnavailableError):
        lookup_of(store, clock)("acme", "a" * 32, 0)
