"""Records that somebody else writes between the roles: refused, told, and nothing else is harmed. All roles run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kafka import KafkaProducer

from perennial.learner.model.base import load_base
from perennial.learner.model.turns import FairLock
from perennial.learner.roles.learner import run_learner
from perennial.learner.roles.scorer import run_scorer
from perennial.learner.versions import version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.marks.mark_rows import mark_rows
from perennial.streams.client.publisher import Publisher
from perennial.streams.events.cloudevents import encode
from perennial.streams.events.fields import Event
from perennial.streams.events.models import ExampleAccepted, ExampleScored, Origin
from perennial.streams.intake.service import run_intake
from perennial.streams.kafka.installation import provision_recorded
from perennial.streams.kafka.origin_check import OriginCheck
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.kafka.topics import identify
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests.integration.learner import learner_kit as kit

VICTIM = "victim/a"
STREAMS = """
from perennial.streams.devstack.signals import event_on_stop_signals
from perennial.streams.faust_app import run_streams
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import load_settings
settings = load_settings()
with event_on_stop_signals() as stop:
    run_streams(settings, stop, Metrics("curate", settings))
"""


@pytest.fixture(params=[None, "k" * 40], ids=["unsigned", "signed"])
def given(request, broker, topic_prefix, tmp_path, monkeypatch) -> Settings:
    monkeypatch.setattr(version_writer, "general_texts", lambda split: [f"plain {split} words {n}" for n in range(8)])
    if request.param:
        monkeypatch.setenv("PERENNIAL_INTERNAL_KEY", request.param)
    settings = kit.settings(broker.bootstrap, topic_prefix, tmp_path, max_age_s=1.0)
    provision_recorded(settings, DirectoryStore(Path(settings.store.uri)))
    return settings


@pytest.fixture
def streams(given: Settings, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        ExitStack() as roles,
        (tmp_path / "streams.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-c", STREAMS], env={**os.environ, **given.environment()}, stdout=log, stderr=log
        ) as child,
    ):
        roles.enter_context(kit.running(lambda stop: run_intake(given, stop, Metrics("intake"))))
        base, lock = load_base(given.model.base, "cpu", 1), FairLock()
        roles.enter_context(kit.running(lambda stop: run_scorer(given, stop, Metrics("scorer"), base, lock)))
        roles.enter_context(kit.running(lambda stop: run_learner(given, stop, Metrics("learner"), base, lock)))
        try:
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(60)


def publish(given: Settings, adapter: str, numbers: range) -> None:
    with Publisher(settings=given) as publisher:
        for n in numbers:
            publisher.document(adapter=adapter, document_id=f"d{n}", text=f"the blue parrot {n} sings at noon")


def registry_of(given: Settings) -> Registry:
    return Registry(DirectoryStore(Path(given.store.uri)), nonce=lambda: "n", now=lambda: datetime.now(UTC))


def learned(given: Settings, adapter: str) -> list[str]:
    registry = registry_of(given)
    manifests = [registry.manifest(adapter, version) for _, version in registry.versions(adapter)]
    return [example.example_id for manifest in manifests for example in manifest.learned]


def write(given: Settings, events: list[Event], signer: RecordSigner | None = None) -> None:
    """Write events as somebody who may write to the topics between the roles."""
    producer = KafkaProducer(bootstrap_servers=given.kafka.bootstrap, acks="all")
    for number, event in enumerate(events):
        record = encode(event, event_id=f"forged-{number}", source="elsewhere", occurred_at=datetime.now(UTC))
        headers = signer.sign(event.topic, record.key, record.value, record.headers) if signer else record.headers
        producer.send(given.kafka.topic(event.topic), key=record.key, value=record.value, headers=headers)
    producer.flush(30)
    producer.close()


def signal_of(given: Settings, number: int, **changes: object) -> ExampleAccepted:
    """A rating that nobody gave, with an origin as no broker gives it."""
    ids = identify(given, ["documents"])
    topic = given.kafka.topic("documents")
    origin = Origin(
        cluster_id=ids.cluster_id, topic=topic, topic_id=ids.topic_ids[topic], partition=0, offset=0, timestamp_ms=1
    ).model_copy(update=changes)
    return ExampleAccepted(
        adapter=VICTIM, example_id=f"{number:032x}"[::-1], kind="rating", document_id=f"forged-{number}", learn=False,
        rating=-1.0, origin=Origin.model_construct(**dict(origin)),
    )  # fmt: skip


def reasons(given: Settings, count: int) -> Counter[str]:
    return Counter(reason for reason, _ in kit.dead_letters(given, count))


def test_attack_a_and_b_forged_records_are_dead_letters_and_all_that_follows_is_learned(given, streams):
    """A: four signals with the offset 2^63 - 1. B, end to end: origins that no job can carry."""
    publish(given, VICTIM, range(12))
    kit.wait_until(lambda: len(learned(given, VICTIM)) == 12, "the first documents are learned")
    huge = {"offset": 2**63 - 1}
    forged = [signal_of(given, n, **huge) for n in range(3)]
    behind_the_scorer = ExampleScored.model_construct(
        example=signal_of(given, 3, **huge), tokens=0, base_loss_nats=None, live_loss_nats=None, live_version=None,
        live_generation=0,
    )  # fmt: skip
    pill = signal_of(given, 4, cluster_id="x" * 2000)
    pill_behind_the_scorer = behind_the_scorer.model_copy(update={"example": signal_of(given, 5, topic="x" * 2000)})
    everything = [*forged, behind_the_scorer, pill, pill_behind_the_scorer]
    write(given, everything)
    expected = {"implausible-origin": 4, "bad-field": 2}
    if given.security.keys():
        assert reasons(given, 6) == {"bad-signature": 6}
        write(given, everything, RecordSigner(given))  # a role that was taken over signs what it likes
        assert reasons(given, 12) == {"bad-signature": 6} | expected
    else:
        assert reasons(given, 6) == expected
    publish(given, VICTIM, range(12, 52))
    publish(given, "other/b", range(5))
    kit.wait_until(lambda: len(learned(given, VICTIM)) == 52, "all documents of the victim are learned")
    kit.wait_until(lambda: len(learned(given, "other/b")) == 5, "all documents of the neighbour are learned")
    assert len(set(learned(given, VICTIM))) == 52
    assert streams.poll() is None, "the role ended"
    with OriginCheck.of(given, registry_of(given).store) as check:
        (row,) = mark_rows(given, registry_of(given), VICTIM, check)
    assert row.problem is None
    assert row.curate == row.manifest == (row.log.epoch, 51)
    assert (row.log.end, row.committed) == (57, 57)
    assert len(kit.read(given, "dead-letters", 100, timeout_s=3)) == (12 if given.security.keys() else 6)
