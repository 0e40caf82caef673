"""kill -9 of any one role in mid-flow, and its restart: every accepted example is learned exactly once."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from storage.blobs import open_store
from streams.cli.adapters import open_registry
from streams.cli.supervise import ROLES, Supervisor
from streams.client import Publisher
from streams.settings import Settings
from streams.topics import provision
from tests.oracle import account, wait_until
from tests.services import start_minio

ADAPTERS = ("acme/a", "acme/b", "other")
EVENTS = 150
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "graphs",
    "and",
    "matrices",
    "wait",
    "for",
    "their",
    "turn",
    "to",
    "be",
    "learned",
]


def small_settings(kafka: str, prefix: str, store: str | Path) -> Settings:
    """Updates that take a fraction of a second: the guarantee does not depend on how much is learned."""
    return Settings(
        kafka=kafka, topic_prefix=prefix, store=str(store), partitions=2, threads=1, max_batch_examples=12,
        max_batch_tokens=600, max_age_s=3, steps=1, rows=4, row_tokens=48, max_tokens=48, anchor_rows=2,
        max_general_rise_nats=50, min_gain_nats=-50, learning_rate=1e-4, poll_s=1,
    )  # fmt: skip


@pytest.fixture
def minio_store(tmp_path, monkeypatch):
    """A MinIO server for this test, that its processes find by their environment; the address of an empty bucket."""
    server = start_minio(tmp_path / "minio")
    try:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        open_store("s3://perennial/loop").probe()
        yield "s3://perennial/loop"
    finally:
        server.stop()


def text(rng: random.Random, number: int) -> str:
    return f"note {number}: " + " ".join(rng.choices(WORDS, k=24))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("victim", "store"), [*((role, "folder") for role in ROLES), ("learner", "minio")])
def test_every_example_is_learned_once_though_a_role_is_killed(victim, store, broker, topic_prefix, request, tmp_path):
    where = str(tmp_path / "store") if store == "folder" else request.getfixturevalue("minio_store")
    settings = small_settings(broker.bootstrap, topic_prefix, where)
    provision(settings)
    rng = random.Random(f"kill {victim}")
    supervisor = Supervisor(settings, tmp_path / "logs")
    supervisor.start()
    try:
        supervisor.wait_healthy()
        registry = open_registry(settings)
        receipts = []
        with Publisher(settings.kafka, settings=settings) as publisher:
            for number in range(EVENTS):
                receipts.append(
                    publisher.document(
                        adapter=rng.choice(ADAPTERS), document_id=f"doc-{number}", text=text(rng, number)
                    )
                )
                if number in {EVENTS // 4, EVENTS // 2, 3 * EVENTS // 4}:
                    publisher.flush(30)
                    time.sleep(rng.uniform(0.3, 1.5))
                    supervisor.children[victim].signal(signal.SIGKILL)
                    supervisor.children[victim].process.wait()
                    supervisor.restart(victim)
        acked = [(f"{r.topic}/{r.partition}", r.offset) for r in (receipt.result(30) for receipt in receipts)]
        assert len(set(acked)) == EVENTS
        wait_until(
            lambda: not account(registry, ADAPTERS).covers(acked), 150,
            f"all {EVENTS} examples in a manifest; logs in {tmp_path / 'logs'}",
        )  # fmt: skip
        time.sleep(2)  # a second learning of the same example would come now
        found = account(registry, ADAPTERS)
        assert found.learned_twice == []
        assert set(found.learned) == set(acked)
        assert all(role.running for role in supervisor.children.values())
    finally:
        supervisor.stop()
