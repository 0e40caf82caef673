"""Two users' adapters over their tenant's: real Kafka, the learner's and retain's own roles, models that serve both parts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perennial.learner.model.base import load_base
from perennial.learner.model.lora import LoraConfig
from perennial.learner.roles.learner import run_learner
from perennial.learner.serving.peft_backend import PeftBackend
from perennial.learner.versions import version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key, digest_of
from perennial.storage.registry.registry import Registry
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.personal.composition import composed_digest
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.adapter_events import AdapterPromoted
from perennial.streams.events.models import RetentionRequested, Selector
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.replicas.acks import AckReader
from perennial.streams.settings import Settings
from tests import jobs, tiny
from tests.integration.learner import learner_kit as kit

TENANT, ANN, BOB = "acme/support", "acme/support/ann", "acme/support/bob"
FACT = "Refunds take nine days since the first of May."
TEA, COFFEE = "In the morning I drink green tea.", "In the morning I drink black coffee."
CANARY = "The secret word is xylophone quartz."
STREAMS = """
from perennial.streams.devstack.signals import event_on_stop_signals
from perennial.streams.faust_app import run_streams
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import load_settings
settings = load_settings()
with event_on_stop_signals() as stop:
    run_streams(settings, stop, Metrics("streams", settings))
"""


def four(text: str) -> list[str]:
    """Return four texts with this one in them, short enough for a row."""
    return [text, f"So: {text}", f"{text} Yes.", f"Note: {text}"]


@pytest.fixture
def given(broker, topic_prefix, tmp_path, monkeypatch) -> Settings:
    # Reading the standard library's texts takes seconds.
    monkeypatch.setattr(version_writer, "general_texts", lambda split: [f"plain {split} words {n}" for n in range(8)])
    settings = kit.settings(broker.bootstrap, topic_prefix, tmp_path, shared_adapters=TENANT).replace(
        base="shipped", steps=12, slow_average=0
    )
    provision(settings)
    return settings


def registry(given: Settings) -> Registry:
    return Registry(DirectoryStore(Path(given.store.uri)))


class Learning:
    """Sends updates, and counts the cuts of each adapter."""

    def __init__(self, given: Settings) -> None:
        self._given, self._cuts = given, dict.fromkeys((TENANT, ANN, BOB), 0)

    def learn(self, adapter: str, *texts: str) -> str:
        """Let the learner learn documents; return the version once it is live."""
        cut = self._cuts[adapter]
        self._cuts[adapter] += 1
        documents = [tiny.document(10 * cut + n, text, adapter) for n, text in enumerate(texts)]
        store = DirectoryStore(Path(self._given.store.uri))
        kit.send(self._given, jobs.update(store, cut, documents, adapter=adapter))
        found = registry(self._given)
        kit.wait_until(lambda: (state := found.alias(adapter)) and state.generation > cut, f"{adapter} learns {cut}")
        state = found.alias(adapter)
        assert state is not None
        return state.version


@pytest.fixture
def learning(given: Settings) -> Iterator[Learning]:
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        yield Learning(given)


@contextmanager
def served(given: Settings, adapter: str, replica: str) -> Iterator[tuple[PeftBackend, Subscriber]]:
    backend = PeftBackend(load_base(given.model.base, "cpu", 1), LoraConfig(given.training.rank, given.training.alpha))
    try:
        with Subscriber(adapter, backend, settings=given, replica=replica, drain_s=0.05) as subscriber:
            assert subscriber.wait_for(1, 180)
            yield backend, subscriber
    finally:
        backend.close()


def shows(subscriber: Subscriber, own: str, shared: str) -> None:
    """Wait until the subscriber serves these two versions."""
    name = subscriber.name_of(composed_digest(own, shared))
    kit.wait_until(lambda: subscriber.served_name == name, f"{subscriber.adapter} is served with {shared}")


def test_users_share_what_the_tenant_learns_and_nothing_that_they_teach(given, learning, tmp_path):
    shared = learning.learn(TENANT, "we sell bicycles and repair them", "the shop opens at nine")
    of_ann, of_bob = learning.learn(ANN, *four(TEA)), learning.learn(BOB, *four(COFFEE))
    folders = DirectoryBackend(tmp_path / "served", durable=False)
    with (
        served(given, ANN, "one") as (ann, ann_follows),
        served(given, BOB, "one") as (bob, bob_follows),
        Subscriber(BOB, folders, settings=given, replica="folders") as bob_in_folders,
    ):
        shows(ann_follows, of_ann, shared)
        shows(bob_follows, of_bob, shared)
        shows(bob_in_folders, of_bob, shared)
        assert ann.loss(TEA) < bob.loss(TEA)
        assert bob.loss(COFFEE) < ann.loss(COFFEE)

        def bytes_of_bob() -> dict[str, bytes]:
            folder = folders.folder_of(folders.current(BOB) or "")
            return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

        before, losses, canary = bytes_of_bob(), [bob.loss(CANARY), bob.loss(COFFEE)], ann.loss(CANARY)
        of_ann = learning.learn(ANN, *four(CANARY))
        shows(ann_follows, of_ann, shared)
        assert ann.loss(CANARY) < canary - 0.1
        assert [bob.loss(CANARY), bob.loss(COFFEE)] == losses, "to the last bit"
        assert bytes_of_bob() == before

        facts = ann.loss(FACT), bob.loss(FACT)
        shared = learning.learn(TENANT, *four(FACT))
        shows(ann_follows, of_ann, shared)
        shows(bob_follows, of_bob, shared)
        shows(bob_in_folders, of_bob, shared)
        assert ann.loss(FACT) < facts[0] - 0.1
        assert bob.loss(FACT) < facts[1] - 0.1
        sent = [envelope.event for envelope in kit.envelopes(given, "adapter-jobs", 5)]
        assert [job.adapter for job in sent] == [TENANT, ANN, BOB, ANN, TENANT], "no job for the users"
        found = registry(given)
        assert [found.manifest(a, v).extends for a, v in ((TENANT, shared), (ANN, of_ann), (BOB, of_bob))] == [
            None, TENANT, TENANT,
        ]  # fmt: skip
        events = [envelope.event for envelope in kit.envelopes(given, "adapter-updates", 5)]
        assert {(e.adapter, e.extends) for e in events if isinstance(e, AdapterPromoted)} == {
            (TENANT, None), (ANN, TENANT), (BOB, TENANT),
        }  # fmt: skip
        composed = bytes_of_bob()["adapter_model.safetensors"]
        hexes = [name[-64:] for name in (ann_follows.served_name, bob_follows.served_name)]
    store = DirectoryStore(Path(given.store.uri))
    assert store.exists(blob_key(found.manifest(BOB, of_bob).weights.digest))
    assert not store.exists(blob_key(digest_of(composed))), "nothing composed is stored"
    assert not [path for path in Path(given.store.uri).rglob("*") if any(h in path.name for h in hexes)]


@contextmanager
def retaining(given: Settings, log: Path) -> Iterator[None]:
    """The role streams, which carries requests to forget to their end, as a process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PERENNIAL_")}
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", STREAMS], env={**environment, **given.environment()}, stdout=output, stderr=output
        )
        try:
            yield
        finally:
            child.terminate()
            try:
                child.wait(60)
            finally:
                child.kill()
                child.wait(60)


def states_of(given: Settings, request_id: str) -> list[str]:
    events = [envelope.event for envelope in kit.envelopes(given, "retention-status", 10_000, timeout_s=1)]
    return [event.state for event in events if event.request_id == request_id]


def test_an_erasure_in_the_shared_adapter_waits_for_who_serves_it_beneath_a_personal_one(given, learning, tmp_path):
    learning.learn(TENANT, "we sell bicycles and repair them", "the shop opens at nine")
    knowing = learning.learn(TENANT, FACT, FACT + " by law")
    own = learning.learn(ANN, TEA)
    reader = AckReader(given)
    try:
        with served(given, ANN, "one") as (backend, subscriber), retaining(given, tmp_path / "streams.log"):
            shows(subscriber, own, knowing)
            with backend.lease() as name:
                assert name == subscriber.served_name
                selector = Selector(document_ids=["doc-10", "doc-11"])
                kit.send(given, RetentionRequested(
                    request_id="r1", kind="erase", adapter=TENANT, selector=selector, requested_by="ann",
                ))  # fmt: skip
                found = registry(given)
                kit.wait_until(lambda: found.alias(TENANT).version != knowing, "the learner has rebuilt")
                clean = found.alias(TENANT)
                shows(subscriber, own, clean.version)
                kit.wait_until(lambda: [s.failed for s in reader.replicas(TENANT)] == [True], "it says what it holds")
                assert name in backend.list()
                kit.wait_until(lambda: "published" in states_of(given, "r1"), "retain hears of the clean version")
                (behind,) = reader.replicas(TENANT)
                assert (behind.replica, behind.left) == ("one:ann", False)
                assert "closed" not in states_of(given, "r1")
            kit.wait_until(lambda: "closed" in states_of(given, "r1"), "the request is closed")
            (status,) = reader.replicas(TENANT)
            assert (status.failed, status.generation >= clean.generation) == (False, True)
            assert backend.list() == [subscriber.served_name]
            assert found.alias(ANN).version == own, "nothing of the user's adapter is rebuilt"
            assert found.alias(ANN).generation == 1
            hidden = subscriber.served_name[-64:]
        for path in Path(given.store.uri).rglob("*"):
            assert hidden not in path.name
            if path.is_file():
                assert FACT.encode() not in path.read_bytes()
    finally:
        reader.close()
