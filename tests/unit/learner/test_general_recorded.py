"""Versions name the general text that they were trained with, and a rebuild trains with that text again."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.learner.model.general_items import GeneralItem, GeneralItems
from perennial.learner.training import general_choice
from perennial.learner.training.general_choice import GeneralTextChoice
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.manifest import Manifest
from perennial.streams.events.models import RollbackRequested
from tests import jobs
from tests.local_learner import LocalLearner
from tests.unit.learner.test_forgetting import documents, erase, forget, head, learn, quarantined
from tests.unit.learner.test_versions import ADAPTER, local_learner


def machine(store: DirectoryStore, words: str) -> LocalLearner:
    """A learner on a machine whose sample of the base has these words."""
    learner = local_learner(store)
    codec, base = learner.updater.codec, learner.base.digest
    choice = GeneralTextChoice(store, codec, 32, lambda: learner.updater.general, report=lambda _: None)
    items = GeneralItems("sample", base, tuple(GeneralItem(f"{words} number {n}") for n in range(8)))
    choice._sample = items.to_bytes()
    learner._general_choice = choice
    return learner


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    monkeypatch.setattr(general_choice, "cache_dir", lambda: tmp_path / "cache")
    return DirectoryStore(tmp_path / "store", fsync=False)


def test_an_adapter_keeps_its_general_text_on_another_machine(store: DirectoryStore) -> None:
    cuts = documents(3, 12)
    one, two = machine(store, "cloud"), machine(store, "stone")
    first = one.update(jobs.update(store, 0, cuts[0]), "live").manifest
    second = two.update(jobs.update(store, 1, cuts[1]), "live").manifest
    assert first is not None
    assert second is not None
    assert first.general is not None
    assert second.general == first.general
    assert first.general in first.blobs()
    two.rollback(RollbackRequested(job_id="back", adapter=ADAPTER, requested_by="ann"))
    third = two.update(jobs.update(store, 2, cuts[2]), "live").manifest
    assert third is not None
    assert third.general == first.general


def test_the_general_text_changes_what_an_update_learns(store: DirectoryStore, tmp_path: Path) -> None:
    cut = documents(3, 4)[0]
    other = DirectoryStore(tmp_path / "other", fsync=False)
    made = [
        machine(place, words).update(jobs.update(place, 0, cut), "live").manifest
        for place, words in ((store, "cloud"), (other, "stone"))
    ]
    assert len({manifest.weights.digest for manifest in made if manifest}) == 2


def test_a_rebuild_takes_the_recorded_text_also_of_an_older_release_and_deletes_none(
    store: DirectoryStore, tmp_path: Path
) -> None:
    cuts = documents(1, 16)
    old = local_learner(store)  # an older release: docstrings, and no word of them in the manifest
    assert [done.manifest.general for done in learn(old, {0: cuts[0], 1: cuts[1]})] == [None, None]
    learned = learn(machine(store, "cloud"), {2: cuts[2], 3: cuts[3]})
    ref = learned[-1].manifest.general
    done, _ = forget(machine(store, "stone"), quarantined(store, erase("r1", 1)))
    assert done.manifest is not None
    assert store.exists(blob_key(ref.digest))
    assert done.manifest.general == ref

    # The same cuts without the example, by the same two releases.
    clean = DirectoryStore(tmp_path / "clean", fsync=False)
    cuts[0] = [example for example in cuts[0] if example.document_id != "doc-1"]
    learn(local_learner(clean), {0: cuts[0], 1: cuts[1]})
    learn(machine(clean, "cloud"), {2: cuts[2], 3: cuts[3]})
    assert head(machine(clean, "cloud").registry).weights == done.manifest.weights


def test_a_version_without_a_general_text_keeps_its_bytes(store: DirectoryStore) -> None:
    learner = local_learner(store)
    manifest = learn(learner, documents(1, 4))[0].manifest
    assert b'"general"' not in manifest.to_bytes()
    with_text = manifest.model_copy(update={"general": manifest.weights})
    assert Manifest.from_bytes(with_text.to_bytes()) == with_text
