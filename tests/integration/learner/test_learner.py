"""The learner on a real broker: announces and commits, survives its own death, keeps its membership, refuses junk."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from perennial.learner.model import general_text
from perennial.learner.model.base import load_base
from perennial.learner.roles import lanes
from perennial.learner.roles import learner as worker
from perennial.learner.roles.learner import run_learner
from perennial.learner.roles.scorer import run_scorer
from perennial.learner.versions import version_writer
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.registry import Registry
from perennial.streams.cli import adapters
from perennial.streams.events.adapter_events import AdapterPromoted, AdapterRolledBack
from perennial.streams.events.models import ExampleScored, RollbackRequested
from perennial.streams.kafka import group as transport
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests import jobs, tiny
from tests.integration.learner import learner_kit as kit
from tests.local_learner import same_text_key

ADAPTER = "acme/support"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def _few_general_texts(monkeypatch):
    """Reading the standard library's texts takes seconds; the fault tests kill processes that do it for real."""
    monkeypatch.setattr(version_writer, "general_texts", lambda split: [f"plain {split} words {n}" for n in range(8)])
    assert general_text.general_texts


@pytest.fixture
def given(broker, topic_prefix, tmp_path):
    settings = kit.settings(broker.bootstrap, topic_prefix, tmp_path)
    provision(settings)
    return settings


def registry(settings: Settings) -> Registry:
    return Registry(DirectoryStore(Path(settings.store.uri)), nonce=lambda: "n", now=worker._now)


def documents(*numbers: int):
    return [tiny.document(n, f"the blue parrot {n} sings at noon") for n in numbers]


def job(settings: Settings, cut: int, *numbers: int, **more):
    return jobs.update(DirectoryStore(Path(settings.store.uri)), cut, documents(*numbers), **more)


def learned(settings: Settings) -> list[int]:
    line = registry(settings)
    return sorted(
        example.offset for _, version in line.versions(ADAPTER) for example in line.manifest(ADAPTER, version).learned
    )


def test_a_job_is_learned_announced_and_committed(given):
    metrics = Metrics("learner")
    with kit.running(lambda stop: run_learner(given, stop, metrics)):
        kit.send(given, job(given, 1, 0, 1, 2, 3), job(given, 2, 4, 5), traceparent=TRACE)
        first, second = kit.envelopes(given, "adapter-updates", 2)
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 2, "both jobs are committed")
    assert isinstance(first.event, AdapterPromoted)
    assert isinstance(second.event, AdapterPromoted)
    assert (first.event.generation, second.event.generation) == (1, 2)
    assert second.event.previous_version == first.event.version
    assert first.traceparent == TRACE
    assert registry(given).alias(ADAPTER).version == second.event.version
    assert learned(given) == [0, 1, 2, 3, 4, 5]
    text = metrics.exposition().decode()
    assert 'outcome="promoted"' in text
    assert metrics.health.report().healthy


def test_updates_of_several_adapters_train_in_the_same_passes(given):
    """Each is announced and committed by itself, in the order of its adapter's cuts; one that is broken fails alone."""
    names = [f"tenant-{number}/support" for number in range(4)]
    store, metrics = DirectoryStore(Path(given.store.uri)), Metrics("learner")
    sent = [
        jobs.update(store, cut, [tiny.document(4 * cut + n, f"{name} sings {n} at noon", name) for n in range(4)],
                    adapter=name)
        for cut in range(1, 4) for name in names
    ]  # fmt: skip
    store.delete(blob_key(sent[1].batch.digest))
    kit.send(given, *sent)
    with kit.running(lambda stop: run_learner(given, stop, metrics)):
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == len(sent), "all jobs are committed")
        events = [envelope.event for envelope in kit.envelopes(given, "adapter-updates", len(sent) - 1)]
        ((reason, _),) = kit.dead_letters(given, 1)
    assert reason == "missing-batch"
    for name in names:
        generations = [event.generation for event in events if event.adapter == name]
        assert generations == list(range(1, 3 if name == names[1] else 4))
    manifests = [
        registry(given).manifest(name, version) for name in names for _, version in registry(given).versions(name)
    ]
    assert sum(len(manifest.learned) for manifest in manifests) == 4 * (len(sent) - 1)
    assert max(manifest.pass_adapters for manifest in manifests) > 1
    count, total = (
        metrics.registry.get_sample_value(f"perennial_pass_adapters_{part}", {"role": "learner"})
        for part in ("count", "sum")
    )
    assert count
    assert total
    assert total > count


def test_what_cannot_be_done_goes_to_dead_letters_and_the_next_job_is_learned(given):
    missing = job(given, 1, 8, 9)
    DirectoryStore(Path(given.store.uri)).delete(blob_key(missing.batch.digest))
    strange = job(given, 1, 0, 1).model_copy(update={"cut": 7, "batch": job(given, 2, 2, 3).batch})
    back = RollbackRequested(job_id="r", adapter="nobody/here", requested_by="ann")
    bad = (missing, ("adapter-jobs", b"{not json"), ("adapter-jobs", b'{"a":1}'), strange, back)
    kit.send(given, *bad, job(given, 3, 4, 5))
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        (event,) = kit.envelopes(given, "adapter-updates", 1)
        reasons = [reason for reason, _ in kit.dead_letters(given, len(bad))]
    jobs_of_one_adapter = [
        reason for reason in reasons if reason not in {"missing-attribute", "nothing-to-roll-back-to"}
    ]
    assert jobs_of_one_adapter == ["missing-batch", "wrong-adapter"]
    assert len(reasons) == len(bad)
    assert isinstance(event.event, AdapterPromoted)
    assert learned(given) == [4, 5]


def test_a_refused_version_is_not_announced(given):
    strict = given.replace(min_gain_nats=50.0)
    kit.send(given, job(given, 1, 0, 1, 2, 3))
    with kit.running(lambda stop: run_learner(strict, stop, Metrics("learner"))):
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 1, "the job is committed")
    head = registry(given).head(ADAPTER)
    assert (head.manifest.outcome, head.manifest.reason) == ("refused", "no-gain")
    assert registry(given).alias(ADAPTER) is None
    assert kit.read(given, "adapter-updates", 1, timeout_s=2) == []


def test_a_rollback_is_announced_as_one(given):
    kit.send(given, job(given, 1, 0, 1), job(given, 2, 2, 3))
    kit.send(given, RollbackRequested(job_id="r", adapter=ADAPTER, requested_by="ann", reason="worse"))
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        events = [envelope.event for envelope in kit.envelopes(given, "adapter-updates", 3)]
    assert isinstance(events[2], AdapterRolledBack)
    assert events[2].weights_sha256 == events[0].weights_sha256
    assert events[2].reason == "worse"


def test_attack_j_a_parked_adapter_goes_on_after_the_command(given, monkeypatch, capsys):
    """Attack J on a broker: the adapter is parked, another one learns on, and `adapters unpark` loses nothing."""
    store = DirectoryStore(Path(given.store.uri))
    cuts = [jobs.waiting(store, job(given, cut, 2 * cut, 2 * cut + 1)) for cut in range(4)]
    kit.send(given, cuts[0])
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 1, "the first job is committed")
    weights = store.root / blob_key(registry(given).head(ADAPTER).manifest.weights.digest)
    whole = weights.read_bytes()
    weights.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    monkeypatch.setenv("PERENNIAL_KAFKA", given.kafka.bootstrap)
    monkeypatch.setenv("PERENNIAL_STORE", given.store.uri)
    monkeypatch.setenv("PERENNIAL_TOPIC_PREFIX", given.kafka.topic_prefix)
    other = jobs.update(store, 0, [tiny.document(90, "the parrot sings", adapter="acme/other")], adapter="acme/other")
    kit.send(given, *cuts[1:], jobs.waiting(store, other))
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 5, "all jobs are committed")
        assert registry(given).alias("acme/other").generation == 1
        unpark = partial(adapters.unpark, ADAPTER, without_missing=False, wait_s=60, as_json=True)
        assert unpark() == 1
        assert json.loads(capsys.readouterr().out)["parked"]["reason"] == "unreadable-object"
        weights.write_bytes(whole)
        assert unpark() == 0
        kit.wait_until(lambda: registry(given).alias(ADAPTER).generation == 4, "all that waited is learned")
    assert learned(given) == list(range(8))
    assert kit.read(given, "dead-letters", 1, timeout_s=2) == []


@pytest.mark.slow(15)
def test_membership_is_kept_while_training_takes_longer_than_the_poll_interval(given, monkeypatch):
    monkeypatch.setattr(transport, "MAX_POLL_INTERVAL_MS", 3_000)
    monkeypatch.setattr(transport, "SESSION_TIMEOUT_MS", 6_000)
    trained, expelled = [], []
    update, lost = UpdateExecutor.update, transport.GroupConsumer.on_partitions_lost

    def slow(self, request, alias):
        trained.append(request.cut)
        time.sleep(8)
        return update(self, request, alias)

    def watched(self, partitions):
        expelled.extend(partitions)
        lost(self, partitions)

    monkeypatch.setattr(UpdateExecutor, "update", slow)
    monkeypatch.setattr(transport.GroupConsumer, "on_partitions_lost", watched)
    kit.send(given, job(given, 1, 0, 1))
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        kit.wait_until(lambda: trained, "training began")
        kit.wait_until(lambda: kit.read(given, "adapter-updates", 1, 1), "the version is announced")
        kit.send(given, job(given, 2, 2, 3))
        kit.wait_until(lambda: kit.read(given, "adapter-updates", 2, 1), "the next one, too")
    assert expelled == []
    assert trained == [1, 2], "nothing was handed out a second time"
    assert learned(given) == [0, 1, 2, 3]


def test_a_store_that_stays_away_ends_the_role_and_nothing_is_lost(given, monkeypatch):
    monkeypatch.setattr(worker, "RETRY_S", (0.01, 0.01))
    tries = []

    def away(self, request, alias):
        tries.append(request.cut)
        raise StoreUnavailableError("the store does not answer")

    kit.send(given, job(given, 1, 0, 1))
    with monkeypatch.context() as broken:
        broken.setattr(UpdateExecutor, "update", away)
        with pytest.raises(StoreUnavailableError):
            run_learner(given, threading.Event(), Metrics("learner"))
    assert tries == [1, 1, 1]
    assert kit.committed(given, "adapter-jobs", "learner") == 0
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 1, "the job is done after all")
    assert learned(given) == [0, 1]


def test_both_roles_share_one_base_in_one_process(given):
    shared, lock = load_base(given.model.base, "cpu", 1), threading.RLock()
    other = given.replace(store=given.store.uri + "-alone", topic_prefix=given.kafka.topic_prefix + "x")
    same_text_key(*(DirectoryStore(Path(each.store.uri)) for each in (given, other)), adapter=ADAPTER)
    examples = documents(*range(8))
    kit.send(given, *examples)
    learner = partial(run_learner, given, metrics=Metrics("learner"), base=shared, lock=lock)
    scorer = partial(run_scorer, given, metrics=Metrics("scorer"), base=shared, lock=lock)
    with kit.running(lambda stop: learner(stop=stop)), kit.running(lambda stop: scorer(stop=stop)):
        kit.send(given, job(given, 1, 0, 1, 2, 3), job(given, 2, 4, 5, 6, 7))
        updates = kit.envelopes(given, "adapter-updates", 2)
        kit.send(given, *documents(*range(8, 12)))
        kit.wait_until(lambda: kit.read(given, "scored-examples", 12, 5), "all are scored")
        scored = [envelope.event for envelope in kit.envelopes(given, "scored-examples", 12)]
    assert [event.example.origin.offset for event in scored] == list(range(12))
    assert all(isinstance(event, ExampleScored) and event.base_loss_nats for event in scored)
    alone = registry(given)
    assert len(updates) == 2
    # What a shared base computes is what a base of its own would have computed.
    provision(other)
    kit.send(other, job(other, 1, 0, 1, 2, 3), job(other, 2, 4, 5, 6, 7))
    with kit.running(lambda stop: run_learner(other, stop, Metrics("learner"))):
        kit.envelopes(other, "adapter-updates", 2)
    assert alone.head(ADAPTER).version == registry(other).head(ADAPTER).version


@pytest.mark.slow(12)
def test_case_12_an_oversized_document_holds_up_no_other_adapter(given, monkeypatch):
    """The neighbour's document, sent after the oversized one, is live first; health stays green; the bits stay the same."""
    monkeypatch.setattr(lanes, "LONG_JOB_S", 0.2)
    given = given.replace(shared_passes=False)  # what shares a pass decides the last bits
    store = DirectoryStore(Path(given.store.uri))
    big = jobs.update(store, 1, [tiny.document(0, "the blue parrot sings at noon " * 4000)])
    neighbour = tiny.document(1, "the green heron sleeps at night").model_copy(update={"adapter": "acme/other"})
    small = jobs.update(store, 1, [neighbour], adapter="acme/other")
    metrics = Metrics("learner", given.replace(stall_s=2))
    stalled = []
    with kit.running(lambda stop: run_learner(given, stop, metrics)):
        kit.send(given, big, small)
        while len(events := kit.envelopes(given, "adapter-updates", 2, timeout_s=1)) < 2:
            stalled.append(metrics.health.report().status == "stalled")
    assert [envelope.event.adapter for envelope in events] == ["acme/other", ADAPTER]
    assert not any(stalled)
    kept = registry(given).head(ADAPTER).manifest.weights
    alone = given.replace(store=str(Path(given.store.uri).parent / "alone"))
    again = jobs.update(
        DirectoryStore(Path(alone.store.uri)), 1, [tiny.document(0, "the blue parrot sings at noon " * 4000)]
    )
    writer = version_writer.make_version_writer(
        alone, DirectoryStore(Path(alone.store.uri)), load_base(given.model.base, "cpu", 1)
    )
    UpdateExecutor(writer).update(again, "live")
    assert registry(alone).head(ADAPTER).manifest.weights == kept
