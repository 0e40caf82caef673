"""An adapter moves to a new base on a real broker: it waits, is learned anew by the operator's command, and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils.logging import disable_progress_bar

from perennial.learner.model.base import digest_of_folder
from perennial.learner.roles.learner import run_learner
from perennial.learner.versions import version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.parked import load_parked
from perennial.streams.cli.rebase.rebase_adapter import rebase_adapter
from perennial.streams.events.models import UpdateRequested
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from tests import jobs, tiny
from tests.integration.learner import learner_kit as kit
from tests.integration.learner.test_learner import ADAPTER, learned, registry
from tests.oracle import read_adapter


@pytest.fixture(autouse=True)
def _few_general_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_writer, "general_texts", lambda split: [f"plain {split} words {n}" for n in range(8)])


def other_base(folder: Path) -> Path:
    """Save another tiny base, and return its folder."""
    made = tiny.base(seed=1)
    disable_progress_bar()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def cut(store: DirectoryStore, number: int) -> UpdateRequested:
    examples = [tiny.document(n, f"the blue parrot {n} sings at noon") for n in range(4 * number, 4 * number + 4)]
    return jobs.waiting(store, jobs.update(store, number, examples))


def test_an_adapter_moves_to_a_new_base(broker, topic_prefix, tmp_path, monkeypatch, capsys):
    given = kit.settings(broker.bootstrap, topic_prefix, tmp_path)
    provision(given)
    store = DirectoryStore(Path(given.store.uri))
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        kit.send(given, cut(store, 0), cut(store, 1))
        kit.envelopes(given, "adapter-updates", 2)
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 2, "both jobs are committed")
    old = registry(given).alias(ADAPTER)
    for name, value in given.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    upgraded = given.replace(base=str(other_base(tmp_path / "other")))
    with kit.running(lambda stop: run_learner(upgraded, stop, Metrics("learner"))):
        kit.send(upgraded, cut(store, 2))
        kit.wait_until(lambda: load_parked(store, ADAPTER) is not None, "the adapter waits for its base")
        assert load_parked(store, ADAPTER).reason == "base-mismatch"
        assert registry(given).alias(ADAPTER) == old
        code = rebase_adapter(ADAPTER, min_learned_share=0.9, reason="bigger base", wait_s=180, as_json=True)
        said = json.loads(capsys.readouterr().out)
        assert (code, said["rebased"], said["rebase_of"]) == (0, True, old.version), said
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 4, "all jobs are committed")
        assert load_parked(store, ADAPTER) is None
        events = [envelope.event for envelope in kit.envelopes(given, "adapter-updates", 4)]
    new = digest_of_folder(tmp_path / "other")
    # The last one is told again at the end of the job, as it is the latest then.
    assert list(dict.fromkeys(event.generation for event in events)) == [1, 2, 3, 4]
    assert {event.base.sha256 for event in events if event.generation > 2} == {new}
    line = registry(given)
    before, rebased, newest = (
        line.manifest(ADAPTER, v) for v in (old.version, said["version"], line.head(ADAPTER).version)
    )
    assert None not in {before.general, rebased.general}
    assert before.general != rebased.general == newest.general, "general text is sampled from the new base"
    assert learned(given) == list(range(12))
    record = read_adapter(registry(given), ADAPTER)
    assert (len(record.learned), record.learned_twice()) == (12, [])
