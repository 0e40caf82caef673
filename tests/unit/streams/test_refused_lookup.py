"""The look-up of refused examples: cached, and it survives a store that is away or an object that is broken."""

from __future__ import annotations

import pytest

from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.refused_examples import add_refused_examples, refused_key
from perennial.streams.intake import refused
from perennial.streams.intake.refused import CACHED_S, RefusedExamplesLookup
from perennial.streams.intake.validation import REFUSED_BEFORE_MS


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


def test_the_list_is_read_again_after_ten_seconds(store):
    clock = Clock()
    lookup = RefusedExamplesLookup(store, clock, clock.sleep)
    assert lookup("acme", "a" * 32) is None
    add_refused_examples(store, "acme", ["a" * 32], 7)
    clock.s = CACHED_S - 1
    assert lookup("acme", "a" * 32) is None
    clock.s = CACHED_S + 1
    assert (lookup("acme", "a" * 32), lookup("acme", "b" * 32), lookup("other", "a" * 32)) == (7, None, None)
    # A list that is late by this much changes no decision.
    assert CACHED_S * 1000 < REFUSED_BEFORE_MS


def test_a_broken_list_drops_duplicates_and_stops_nothing(store, caplog):
    store.put_if_absent(refused_key("acme"), b"not json")
    assert RefusedExamplesLookup(store)("acme", "a" * 32) is None
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
    assert RefusedExamplesLookup(store, clock, clock.sleep)("acme", "a" * 32) == 7
    failures = 10**6
    with pytest.raises(StoreUnavailableError):
        RefusedExamplesLookup(store, clock, clock.sleep)("acme", "a" * 32)
