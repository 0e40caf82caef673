"""The scorer on a real broker: every example once and in order, through kills, junk and versions that come and go."""

from __future__ import annotations

import json
import threading

import pytest

from perennial.learner.roles import scorer as scorer_module
from perennial.learner.roles.scorer import run_scorer
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.learner.versions.version_writer import make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.streams.events.models import ExampleScored
from perennial.streams.kafka.group import ConfirmingProducer, KafkaLinkError
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from tests import jobs, tiny
from tests.integration.learner import learner_kit as kit

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def given(broker, topic_prefix, tmp_path):
    settings = kit.settings(broker.bootstrap, topic_prefix, tmp_path, score_batch=4)
    provision(settings)
    return settings


def documents(*numbers: int):
    return [tiny.document(n, f"the blue parrot {n} sings at noon") for n in numbers]


def scored(settings, count: int, timeout_s: float = 180) -> list[ExampleScored]:
    events = [envelope.event for envelope in kit.envelopes(settings, "scored-examples", count, timeout_s)]
    assert all(isinstance(event, ExampleScored) for event in events)
    return events  # type: ignore[return-value]


def test_examples_are_scored_in_order_and_committed(given):
    rating = tiny.document(3, "x").model_copy(update={"kind": "rating", "learn": False, "text": None, "rating": -1.0})
    metrics = Metrics("scorer")
    with kit.running(lambda stop: run_scorer(given, stop, metrics)):
        kit.send(given, *documents(0, 1, 2), rating, tiny.correction(4, "why?", "because"), traceparent=TRACE)
        envelopes = kit.envelopes(given, "scored-examples", 5)
        kit.wait_until(lambda: kit.committed(given, "examples", "scorer") == 5, "all are committed")
    events = [envelope.event for envelope in envelopes]
    assert [event.example.origin.offset for event in events] == [0, 1, 2, 3, 4]
    assert [event.base_loss_nats is None for event in events] == [False, False, False, True, False]
    assert events[3].tokens == 0
    assert all(event.live_loss_nats is None for event in events)
    assert {envelope.traceparent for envelope in envelopes} == {TRACE}
    assert len({envelope.id for envelope in envelopes}) == 5
    assert metrics.health.report().healthy


def test_junk_goes_to_dead_letters_and_the_rest_is_scored(given):
    with kit.running(lambda stop: run_scorer(given, stop, Metrics("scorer"))):
        kit.send(given, documents(0)[0], ("examples", b"\xff\xfe"), ("examples", json.dumps({"a": 1}).encode()))
        kit.send(given, documents(1)[0])
        events = scored(given, 2)
        values = [value for _, value in kit.dead_letters(given, 2)]
        kit.wait_until(lambda: kit.committed(given, "examples", "scorer") == 4, "all are committed")
    assert [event.example.origin.offset for event in events] == [0, 1]
    assert values == [b"\xff\xfe", b'{"a": 1}']


def test_the_live_version_is_followed_and_a_missing_one_gives_no_live_loss(given, monkeypatch):
    monkeypatch.setattr(
        "perennial.learner.versions.version_writer.general_texts",
        lambda split: [f"plain {split} {n}" for n in range(8)],
    )
    store = DirectoryStore(given.store.uri)
    learner = UpdateExecutor(make_version_writer(given, store, scorer_module.load_base(given.model.base, "cpu", 1)))
    with kit.running(lambda stop: run_scorer(given, stop, Metrics("scorer"))):
        kit.send(given, documents(0)[0])
        assert scored(given, 1)[0].live_version is None
        first = learner.update(jobs.update(store, 1, documents(0, 1)), given.serving.alias)
        event = last_with(given, lambda event: event.live_version == first.event.version)
        assert event.live_generation == 1
        assert event.live_loss_nats is not None
        second = learner.update(jobs.update(store, 2, documents(2, 3)), given.serving.alias)
        last_with(given, lambda event: event.live_generation == 2)
        third = learner.update(jobs.update(store, 3, documents(4, 5)), given.serving.alias)
        store.delete(blob_key(third.manifest.weights.digest))
        assert second.event.version != third.event.version
        lost = last_with(given, lambda event: event.live_version is None)
        assert lost.live_loss_nats is None
        assert lost.base_loss_nats is not None


def last_with(settings, condition) -> ExampleScored:
    """Send examples until one comes out as it should."""
    count = len(kit.read(settings, "scored-examples", 10**6, timeout_s=1))
    for number in range(count, count + 60):
        kit.send(settings, documents(number)[0])
        event = scored(settings, number + 1)[-1]
        if condition(event):
            return event
    raise TimeoutError("no scored example was as it should be")


def test_what_is_not_acknowledged_is_not_committed(given, monkeypatch):
    def fails(self):
        raise KafkaLinkError("not acknowledged")

    kit.send(given, *documents(0, 1))
    with monkeypatch.context() as broken:
        broken.setattr(ConfirmingProducer, "flush", fails)
        with pytest.raises(KafkaLinkError):
            run_scorer(given, threading.Event(), Metrics("scorer"))
    assert kit.committed(given, "examples", "scorer") == 0
    with kit.running(lambda stop: run_scorer(given, stop, Metrics("scorer"))):
        kit.wait_until(lambda: kit.committed(given, "examples", "scorer") == 2, "both are scored after all")
