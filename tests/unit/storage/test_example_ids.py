"""Ids of examples in manifests: keyed, comparable with ids of either form, and unreadable without the key."""

from __future__ import annotations

import pytest

from perennial.storage.errors import IntegrityError
from perennial.storage.registry.history.example_ids import (
    ExampleIds,
    TextKeys,
    is_keyed,
    keyed_id,
    keyed_items,
    with_keyed_ids,
)
from perennial.storage.registry.manifest import LearnedExample, Manifest, SkippedExample
from perennial.storage.registry.quarantine import update_quarantine
from perennial.storage.registry.suppressed_texts import load_text_key, text_key_key
from tests.memory_store import MemoryStore
from tests.unit.storage.test_manifest import make

ADAPTER = "acme/support"
KEY, OTHER = bytes(32), bytes([1]) * 32
FIRST, SECOND = "00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100"
AT = {"partition": "c/t/documents/0", "offset": 4}


def plain() -> Manifest:
    return make(
        learned=[
            LearnedExample(example_id=FIRST, tokens=9, **AT),
            LearnedExample(example_id=SECOND, tokens=3, merged_into=FIRST, **AT),
        ],
        skipped=[SkippedExample(example_id=SECOND, reason="duplicate", **AT)],
    )


def test_a_keyed_id_says_so_and_needs_the_key() -> None:
    keyed = keyed_id(KEY, FIRST)
    assert is_keyed(keyed)
    assert not is_keyed(FIRST)
    assert keyed == keyed_id(KEY, FIRST)
    assert len({FIRST, keyed, keyed_id(OTHER, FIRST), keyed_id(KEY, SECOND)}) == 4


def test_a_manifest_gets_keyed_ids_in_place_of_its_own() -> None:
    before = plain()
    keyed = with_keyed_ids(before, KEY)
    again = Manifest.from_bytes(keyed.to_bytes())
    assert (again, again.to_bytes()) == (keyed, keyed.to_bytes())
    assert FIRST.encode() not in keyed.to_bytes()
    assert SECOND.encode() not in keyed.to_bytes()
    first, second = keyed_id(KEY, FIRST), keyed_id(KEY, SECOND)
    assert [(item.example_id, item.merged_into) for item in keyed.learned] == [(first, None), (second, first)]
    assert [(item.example_id, item.reason, item.origin_offset) for item in keyed.skipped] == [
        (second, "duplicate", before.skipped[0].origin_offset)
    ]
    assert before == plain(), "the manifest that was given is as it was"


def test_keyed_ids_are_not_keyed_again() -> None:
    keyed = with_keyed_ids(plain(), KEY)
    assert with_keyed_ids(keyed, KEY) == keyed
    assert with_keyed_ids(keyed, OTHER) == keyed


def test_fields_of_the_next_schema_stay() -> None:
    (item,) = keyed_items(KEY, [LearnedExample.model_validate({"example_id": FIRST, "tokens": 1, "weight": 0.5, **AT})])
    assert item.model_dump()["weight"] == 0.5


@pytest.mark.parametrize("key", [KEY, None])
def test_ids_of_both_forms_are_compared(key: bytes | None) -> None:
    ids, before = ExampleIds(key), plain()
    after = with_keyed_ids(before, KEY)
    forms = ids.forms(FIRST)
    assert before.learned[0].example_id in forms
    same = ids.comparable(before.learned[0].example_id) == ids.comparable(after.learned[0].example_id)
    assert same is (key is not None), "without the key nobody can tell"
    assert (after.learned[0].example_id in forms) is (key is not None)


def test_a_key_is_created_once_and_read_once() -> None:
    store = MemoryStore()
    keys = TextKeys(store)
    assert ExampleIds.load(store, ADAPTER).forms(FIRST) == (FIRST,), "nothing is created where something is looked up"
    assert load_text_key(store, ADAPTER) is None
    key = keys.of(ADAPTER)
    assert key == load_text_key(store, ADAPTER) == TextKeys(store).of(ADAPTER)
    assert keys.of("acme/other") != key
    store.calls.clear()
    assert keys.of(ADAPTER) == key
    assert sum(store.calls.values()) == 0


def test_a_lost_key_of_suppressed_texts_is_not_replaced() -> None:
    store = MemoryStore()
    TextKeys(store).of(ADAPTER)
    update_quarantine(store, ADAPTER, lambda found: found.suppressing(["a" * 32]))
    store.delete(text_key_key(ADAPTER))
    with pytest.raises(IntegrityError, match="text key"):
        TextKeys(store).of(ADAPTER)
