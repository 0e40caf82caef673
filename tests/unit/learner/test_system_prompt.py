"""System prompts: recorded by the cut, trained with, and used again by a rebuild whatever the prompt is by then."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from perennial.learner.model.tokenization import ExampleTokenizer, example_rows
from perennial.learner.roles.scorer import Scorer
from perennial.storage.errors import IntegrityError, StoreError, StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.prompts.system_prompts import (
    CACHED_S,
    SystemPrompts,
    load_system_prompt,
    set_system_prompt,
    system_prompt_key,
)
from perennial.streams.events.models import Batch, ExampleAccepted
from perennial.streams.settings import Settings
from tests import jobs, scratch, tiny
from tests.unit.learner.test_forgetting import erase, forget, quarantined
from tests.unit.learner.test_versions import ADAPTER, local_learner
from tests.unit.streams import test_curate_agent as curate_test

NOW = datetime(2026, 1, 2, tzinfo=UTC)
CODEC = ExampleTokenizer(tiny.tokenizer())


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def corrections(cut: int) -> list[ExampleAccepted]:
    return [tiny.correction(4 * cut + n, f"question {cut} {n}?", f"answer {cut} {n}.") for n in range(4)]


def test_a_prompt_is_set_cleared_and_kept_in_bounds(store):
    assert load_system_prompt(store, ADAPTER).text is None
    first = set_system_prompt(store, ADAPTER, "Be brief.", NOW)
    assert load_system_prompt(store, ADAPTER) == first
    assert set_system_prompt(store, ADAPTER, "Be brief.", NOW) == first
    assert first.digest is not None
    assert set_system_prompt(store, ADAPTER, None, NOW).revision == 2
    assert load_system_prompt(store, ADAPTER).digest is None
    for text in ("", " \n", "x" * (16 * 1024 + 1)):
        with pytest.raises(StoreError):
            set_system_prompt(store, ADAPTER, text, NOW)
    store.put_if_absent(system_prompt_key("acme/other"), b"{}")
    with pytest.raises(IntegrityError):
        load_system_prompt(store, "acme/other")


def test_a_micro_batch_gives_its_prompt_to_its_examples_and_to_nobody_else():
    example = tiny.correction(0, "p", "a")
    body = Batch(adapter=ADAPTER, cut=0, examples=[example], skipped=[], system_prompt="Be brief.").model_dump_json()
    (read,) = Batch.model_validate_json(body).examples
    assert read.system_prompt == "Be brief."
    assert body.count("Be brief.") == 1
    assert "system_prompt" not in read.model_dump_json()
    assert example_rows(read, CODEC, 64) == example_rows(example, CODEC, 64, "Be brief.")
    document = tiny.document(1, "text")
    assert example_rows(document, CODEC, 64, "Be brief.") == example_rows(document, CODEC, 64)
    without = Batch(adapter=ADAPTER, cut=0, examples=[read], skipped=[])
    assert without.examples[0].system_prompt is None
    assert "system_prompt" not in without.model_dump_json()


def test_a_rebuild_trains_with_the_prompts_that_the_updates_had(store, tmp_path):
    """Each of three updates has another prompt; a later change of the setting has no effect on what was trained."""
    learner, prompts = local_learner(store), {0: "Be brief.", 1: None, 2: "Be kind."}
    for cut, prompt in prompts.items():
        done = learner.update(jobs.update(store, cut, corrections(cut), system_prompt=prompt), "live")
        assert done.outcome == "promoted"
    set_system_prompt(store, ADAPTER, "Something else.", NOW)
    rebuilt, _ = forget(local_learner(store), quarantined(store, erase("r1", 0).model_copy(update={
        "selector": None, "example_ids": [corrections(0)[1].example_id]})))  # fmt: skip

    def oracle(recorded: dict[int, str | None]) -> scratch.Scratch:
        cuts = {}
        for cut, prompt in recorded.items():
            kept = [example for example in corrections(cut) if example.example_id != corrections(0)[1].example_id]
            cuts[cut] = Batch(adapter=ADAPTER, cut=cut, examples=kept, skipped=[], system_prompt=prompt)
        folder = DirectoryStore(tmp_path / str(recorded[0]), fsync=False)
        return scratch.train_batches(learner.updater, folder, ADAPTER, cuts)

    assert oracle(prompts).equals(rebuilt.manifest)
    assert not oracle({**prompts, 0: "Something else."}).equals(rebuilt.manifest)


def test_a_cut_records_the_prompt_only_where_it_has_a_conversation(tmp_path):
    store = DirectoryStore(tmp_path, fsync=False)
    agent, _ = curate_test.another_process(store)
    set_system_prompt(store, curate_test.ADAPTER, "Be brief.", NOW)

    def cut_of(example: ExampleAccepted, offset: int) -> Batch:
        async def scenario() -> None:
            await agent.receive(curate_test.delivery_of(example, None, offset))
            await asyncio.sleep(0.1)
            await agent.tick()

        asyncio.run(scenario())
        bodies = [path.read_bytes() for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
        return max((Batch.model_validate_json(body) for body in bodies), key=lambda batch: batch.cut)

    document = curate_test.example(1)
    assert cut_of(document, 1).system_prompt is None
    turn = {"kind": "correction", "text": None, "prompt": "p", "answer": "a"}
    assert cut_of(curate_test.example(2).model_copy(update=turn), 2).system_prompt == "Be brief."
    key = tmp_path / f"{system_prompt_key(curate_test.ADAPTER)}+"
    key.write_bytes(b"{")
    assert cut_of(curate_test.example(3).model_copy(update=turn), 3).system_prompt is None


def test_the_scorer_scores_with_the_adapter_s_prompt():
    settings = Settings.of(rank=4, alpha=8, max_tokens=64, score_batch=2, env_file=None)
    base, example = tiny.base(), tiny.correction(0, "p", "a")
    (plain,) = Scorer(base, settings).score([example], {})
    (prompted,) = Scorer(tiny.base(), settings, None, {example.adapter: "Be brief."}.get).score([example], {})
    assert plain.base_loss_nats != prompted.base_loss_nats
    assert plain.tokens == prompted.tokens


def test_lookups_see_a_change_in_time_and_outlast_a_store_that_is_away(store, monkeypatch):
    now_s = [0.0]
    prompts = SystemPrompts(store, lambda: now_s[0])
    assert prompts(ADAPTER) is None
    set_system_prompt(store, ADAPTER, "Be brief.", NOW)
    assert prompts(ADAPTER) is None
    now_s[0] += CACHED_S
    assert prompts(ADAPTER) == "Be brief."

    def away(*_: object) -> None:
        raise StoreUnavailableError("away")

    monkeypatch.setattr(store, "get", away)
    now_s[0] += CACHED_S
    assert prompts(ADAPTER) == "Be brief."
