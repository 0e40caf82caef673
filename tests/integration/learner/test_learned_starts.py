"""A new user's adapter begins with its siblings' mean, and an erasure in one of them reaches it: real Kafka, learner, retain."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.learner.model.base import load_base
from perennial.learner.model.lora import LoraConfig
from perennial.learner.roles.learner import run_learner
from perennial.learner.serving.peft_backend import PeftBackend
from perennial.learner.versions import version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.history.dependants import dependants
from perennial.storage.registry.manifest import Manifest, Start
from perennial.storage.registry.registry import Registry
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.models import ForgetRequested, RetentionRequested, Selector
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests import jobs, tiny
from tests.integration.learner import learner_kit as kit
from tests.integration.learner.test_personal_adapters import retaining, states_of

SHARED = "acme/support"
FOUNDERS = [f"{SHARED}/{name}" for name in ("ann", "bob", "cay", "dan")]
ZOE, YAN = f"{SHARED}/zoe", f"{SHARED}/yan"
SECRET = "xylophone quartz"


@pytest.fixture
def given(broker, topic_prefix, tmp_path, monkeypatch) -> Settings:
    # Reading the standard library's texts takes seconds.
    monkeypatch.setattr(version_writer, "general_texts", lambda split: [f"plain {split} words {n}" for n in range(8)])
    settings = kit.settings(
        broker.bootstrap, topic_prefix, tmp_path, shared_adapters=SHARED, learned_starts=SHARED
    ).replace(replay_size=64)
    provision(settings)
    return settings


def learned(given: Settings, adapter: str, cut: int, *texts: str) -> Manifest:
    """Let the learner learn documents; return the version once it is live."""
    found = Registry(DirectoryStore(Path(given.store.uri)))
    documents = [tiny.document(10 * cut + n, text, adapter) for n, text in enumerate(texts)]
    kit.send(given, jobs.update(found.store, cut, documents, adapter=adapter))
    kit.wait_until(lambda: (state := found.alias(adapter)) and state.generation > cut, f"{adapter} learns {cut}")
    state = found.alias(adapter)
    assert state is not None
    return found.manifest(adapter, state.version)


def test_an_erasure_in_a_founder_waits_for_all_who_began_with_it_and_for_who_serves_them(given, tmp_path):
    found = Registry(DirectoryStore(Path(given.store.uri)))
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        for adapter in FOUNDERS:
            who = adapter.rpartition("/")[2]
            secret = [f"it is {SECRET}"] if adapter == FOUNDERS[1] else []
            learned(given, adapter, 0, *secret, *(f"{who} says parrots sing at {n}" for n in range(9)))
        begun = [learned(given, ZOE, 0, "zoe likes tea"), learned(given, YAN, 0, "yan likes rain")]
        for made in begun:
            assert made.start is not None
            assert [founder.adapter for founder in made.start.founders] == FOUNDERS
        assert dependants(found.store, FOUNDERS[1]) == [YAN, ZOE]
        backend = PeftBackend(
            load_base(given.model.base, "cpu", 1), LoraConfig(given.training.rank, given.training.alpha)
        )
        with (
            Subscriber(ZOE, backend, settings=given, replica="one", drain_s=0.05) as subscriber,
            retaining(given, tmp_path / "streams.log"),
        ):
            assert subscriber.wait_for(1, 180)
            with backend.lease() as name:
                assert name == subscriber.served_name
                kit.send(given, RetentionRequested(
                    request_id="r1", kind="erase", adapter=FOUNDERS[1], selector=Selector(document_ids=["doc-0"]),
                    requested_by="ann",
                ))  # fmt: skip
                for adapter, before in zip((ZOE, YAN), begun, strict=True):
                    kit.wait_until(
                        lambda adapter=adapter, before=before: found.is_revoked(adapter, before.seq),
                        f"{adapter} is rebuilt",
                    )
                    state = found.alias(adapter)
                    assert found.manifest(adapter, state.version).start == Start(shared=SHARED)
                kit.wait_until(lambda: "published" in states_of(given, "r1"), "retain waits for who serves them")
                assert "closed" not in states_of(given, "r1"), f"{name} is in use"
            kit.wait_until(lambda: "closed" in states_of(given, "r1"), "the request is closed")
            assert name not in backend.list()
        backend.close()
    for made in begun:
        assert made.start is not None
        assert made.start.weights is not None
        for ref in (made.start.weights, made.weights):
            assert not found.store.exists(blob_key(ref.digest))

    assert [found.manifest(each, found.alias(each).version).kind for each in FOUNDERS] == [
        "update", "forget", "update", "update",
    ]  # fmt: skip
    sent = [envelope.event for envelope in kit.envelopes(given, "adapter-jobs", 9)]
    asked = [job.adapter for job in sent if isinstance(job, ForgetRequested)]
    assert asked[0] == FOUNDERS[1]
    assert sorted(asked[1:]) == [YAN, ZOE]
    for path in Path(given.store.uri).rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()
