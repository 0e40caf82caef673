"""Kill each role while events flow, and restart it: every accepted example is learned exactly once."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from perennial.streams.cli.adapters import open_registry
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.supervisor import ROLES, Supervisor
from perennial.streams.kafka.topics import provision
from perennial.streams.settings import Settings
from tests.oracle import account, wait_until

ADAPTERS = ("acme/a", "acme/b", "other")
EVENTS_BETWEEN = 30
WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "graphs", "and", "matrices", "wait", "for",
    "their", "turn", "to", "be", "learned",
]  # fmt: skip


def small_settings(kafka: str, prefix: str, store: str | Path) -> Settings:
    """Return settings for updates that take a fraction of a second: the guarantee does not depend on their size."""
    return Settings.of(
        kafka=kafka, topic_prefix=prefix, store=str(store), partitions=2, threads=1, max_batch_examples=12,
        max_batch_tokens=600, max_age_s=3, steps=1, rows=4, row_tokens=48, max_tokens=48, anchor_rows=2,
        max_general_rise_nats=50, min_gain_nats=-50, learning_rate=1e-4, poll_s=1,
    )  # fmt: skip


def text(rng: random.Random, number: int) -> str:
    return f"note {number}: " + " ".join(rng.choices(WORDS, k=24))


@pytest.mark.slow(40)
@pytest.mark.timeout(600)
def test_every_example_is_learned_once_though_each_role_is_killed_in_turn(broker, topic_prefix, tmp_path):
    """Kills at random times instead of failpoints, with several adapters and partitions, and a folder as the store."""
    settings = small_settings(broker.bootstrap, topic_prefix, tmp_path / "store")
    provision(settings)
    rng = random.Random("kill")
    supervisor = Supervisor(settings, tmp_path / "logs")
    supervisor.start()
    try:
        supervisor.wait_healthy()
        registry = open_registry(settings)
        receipts = []
        with Publisher(settings.kafka.bootstrap, settings=settings) as publisher:
            for part, victim in enumerate((*ROLES, None)):
                for number in range(part * EVENTS_BETWEEN, (part + 1) * EVENTS_BETWEEN):
                    adapter, document = rng.choice(ADAPTERS), f"doc-{number}"
                    receipts.append(publisher.document(adapter=adapter, document_id=document, text=text(rng, number)))
                publisher.flush(30)
                if victim:
                    time.sleep(rng.uniform(0.3, 1.5))
                    supervisor.children[victim].signal(signal.SIGKILL)
                    supervisor.children[victim].process.wait()
                    supervisor.restart(victim)
        acked = [(f"{r.topic}/{r.partition}", r.offset) for r in (receipt.result(120) for receipt in receipts)]
        assert len(set(acked)) == len(receipts) == EVENTS_BETWEEN * (len(ROLES) + 1)
        wait_until(
            lambda: not account(registry, ADAPTERS).missing(acked), 240,
            f"all {len(acked)} examples in a manifest; logs in {tmp_path / 'logs'}",
        )  # fmt: skip
        time.sleep(2)  # a second learning of an example would show now
        found = account(registry, ADAPTERS)
        assert found.learned_twice == []
        assert set(found.learned) == set(acked)
        assert all(role.running for role in supervisor.children.values())
    finally:
        supervisor.stop()
