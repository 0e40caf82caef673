"""The quarantine object: idempotent changes that survive races, and what its entries, holds and hashes block."""

from __future__ import annotations

import re
import threading

import pytest

from perennial.storage.errors import ConflictError, IntegrityError, StoreError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.quarantine import (
    LegalHold,
    Quarantine,
    QuarantineEntry,
    RequestOutcome,
    finish_entry,
    load_quarantine,
    quarantine_key,
    update_quarantine,
)
from perennial.streams.events.models import ExampleAccepted, Origin
from perennial.streams.retention.quarantine_filter import QuarantineFilter, blocks, text_hash

ADAPTER = "acme/support"


def example(number: int = 1, at_ms: int = 1000, **fields: object) -> ExampleAccepted:
    given = {"kind": "document", "document_id": f"d{number}", "learn": True, "text": f"text {number}", **fields}
    return ExampleAccepted(
        adapter=ADAPTER,
        example_id=f"{number:032x}",
        origin=Origin(cluster_id="c", topic="documents", topic_id="t", partition=0, offset=number, timestamp_ms=at_ms),
        **given,
    )


def entry(request_id: str = "r1", **fields: object) -> QuarantineEntry:
    given = {"kind": "erase", "until_ms": 5000, "selector": {"document_ids": ["d1"]}, **fields}
    return QuarantineEntry(request_id=request_id, job_id=f"job-{request_id}", **given)


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path, fsync=False)


def test_an_adapter_without_quarantine_has_an_empty_one(store):
    assert load_quarantine(store, ADAPTER) == Quarantine(adapter=ADAPTER)
    assert not store.exists(quarantine_key(ADAPTER))


def test_changes_are_idempotent_and_write_only_what_is_new(store):
    first = update_quarantine(store, ADAPTER, lambda q: q.with_entry(entry()))
    again = update_quarantine(store, ADAPTER, lambda q: q.with_entry(entry(until_ms=9)))
    assert again == first == load_quarantine(store, ADAPTER)
    assert first.revision == 1


def test_the_first_end_of_an_entry_stands(store):
    update_quarantine(store, ADAPTER, lambda q: q.with_entry(entry()))
    finish_entry(store, ADAPTER, "r1", RequestOutcome(at_ms=1, examples=3, version="sha256:" + "a" * 64, generation=4))
    finish_entry(store, ADAPTER, "r1", RequestOutcome(at_ms=2))
    found = load_quarantine(store, ADAPTER).entry("r1")
    assert found is not None
    assert found.done is not None
    assert found.done.examples == 3


def test_finishing_what_has_no_entry_changes_nothing(store):
    finish_entry(store, ADAPTER, "nobody", RequestOutcome(at_ms=1))
    assert not store.exists(quarantine_key(ADAPTER))


def test_a_state_that_comes_back_has_other_bytes(store):
    before = update_quarantine(store, ADAPTER, lambda q: q.with_holds([LegalHold(request_id="h")]))
    update_quarantine(store, ADAPTER, lambda q: q.with_holds([]))
    after = update_quarantine(store, ADAPTER, lambda q: q.with_holds([LegalHold(request_id="h")]))
    assert before.to_bytes() != after.to_bytes()


def test_writers_at_once_lose_nothing(store):
    def write(name: str) -> None:
        for number in range(8):
            update_quarantine(store, ADAPTER, lambda q, n=number: q.with_entry(entry(f"{name}{n}")))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(load_quarantine(store, ADAPTER).entries) == 24


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"adapter":"acme/support","x":1}', b"\xff"])
def test_junk_is_refused(store, data):
    store.put_if_absent(quarantine_key(ADAPTER), data)
    with pytest.raises(IntegrityError):
        load_quarantine(store, ADAPTER)


def test_another_adapters_object_is_refused(store):
    store.put_if_absent(quarantine_key(ADAPTER), Quarantine(adapter="acme/other").to_bytes())
    with pytest.raises(IntegrityError, match="another adapter"):
        load_quarantine(store, ADAPTER)


def test_a_name_that_is_no_adapter_is_refused(store):
    with pytest.raises(StoreError):
        load_quarantine(store, "../x")


def test_an_entry_blocks_what_was_published_up_to_its_time():
    quarantine = Quarantine(adapter=ADAPTER, entries=[entry()])
    assert blocks(quarantine, example(1, at_ms=5000))
    assert not blocks(quarantine, example(1, at_ms=5001))
    assert not blocks(quarantine, example(2))


def test_an_entry_by_ids_blocks_those_alone():
    quarantine = Quarantine(adapter=ADAPTER, entries=[entry(selector=None, example_ids=[f"{2:032x}"])])
    assert blocks(quarantine, example(2))
    assert not blocks(quarantine, example(1))


def test_an_entry_that_is_done_still_blocks_what_comes_late():
    done = entry().model_copy(update={"done": RequestOutcome(at_ms=6000)})
    assert blocks(Quarantine(adapter=ADAPTER, entries=[done]), example(1))


def test_a_hold_exempts_from_entries_but_not_from_suppression():
    hold = LegalHold(request_id="h", selector={"subjects": ["ann"]})
    quarantine = Quarantine(adapter=ADAPTER, entries=[entry()], holds=[hold])
    assert not blocks(quarantine, example(1, subjects=["ann", "bob"]))
    assert blocks(quarantine, example(1, subjects=["bob"]))
    assert QuarantineFilter(quarantine).held_by(example(1, subjects=["ann"])) == "h"
    suppressed = quarantine.suppressing([text_hash(example(1)) or ""])
    assert blocks(suppressed, example(1, subjects=["ann"]))


def test_a_hold_without_selector_holds_everything():
    quarantine = Quarantine(adapter=ADAPTER, entries=[entry()], holds=[LegalHold(request_id="h")])
    assert not blocks(quarantine, example(1))


def test_a_suppressed_text_is_blocked_under_any_id_at_any_time():
    quarantine = Quarantine(adapter=ADAPTER).suppressing([text_hash(example(1)) or ""])
    assert blocks(quarantine, example(7, text="text 1", at_ms=10**15))
    assert not blocks(quarantine, example(7))


def test_the_hash_of_a_text_tells_prompt_from_answer():
    turn = {"kind": "correction", "text": None}
    assert text_hash(example(1, prompt="ab", answer="c", **turn)) != text_hash(
        example(1, prompt="a", answer="bc", **turn)
    )
    assert text_hash(example(1, kind="rating", text=None, rating=1.0)) is None


def test_a_writer_that_is_never_first_gives_up(store, monkeypatch):
    def taken(*_: object) -> str:
        raise ConflictError

    monkeypatch.setattr(store, "compare_and_swap", taken)
    with pytest.raises(ConflictError, match=re.escape(quarantine_key(ADAPTER))):
        update_quarantine(store, ADAPTER, lambda q: q.with_entry(entry()))
