"""curate against a real broker, in child processes: every example in exactly one job, whatever ends the process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer

from storage.blobs import DirectoryStore, get_blob
from streams.events import Batch, ExampleAccepted, ExampleScored, Origin, UpdateRequested
from streams.settings import Settings
from streams.topics import provision
from streams.wire import decode, encode, parse_dead_letter

RUN = """
import signal, threading
from streams.agents import run_streams
from streams.metrics import Metrics
from streams.settings import load_settings
stop = threading.Event()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.set())
settings = load_settings()
run_streams(settings, stop, Metrics("curate", settings))
"""
TOKENS = 10
PATIENCE_S = 90


def scored(number: int, adapter: str = "acme/a", loss: float = 3.0, text: str = "", learn: bool = True):
    example = ExampleAccepted(
        adapter=adapter, example_id=f"{number:032x}"[::-1], kind="document" if learn else "rating",
        document_id=f"d{number}", learn=learn, text=text or f"text {number}" if learn else None,
        rating=None if learn else -1.0,
        origin=Origin(cluster_id="c", topic="documents", topic_id="t", partition=0, offset=number, timestamp_ms=number),
    )  # fmt: skip
    return ExampleScored(
        example=example, tokens=TOKENS if learn else 0,
        base_loss_nats=loss if learn else None, live_loss_nats=loss if learn else None,
    )  # fmt: skip


@dataclass
class Bench:
    """One test's topics, store and child processes."""

    settings: Settings
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    log: Path = Path()

    def start(self, failpoint: str = "") -> subprocess.Popen[bytes]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("PERENNIAL_")}
        for name in self.settings.model_fields_set:
            env[f"PERENNIAL_{name.upper()}"] = str(getattr(self.settings, name))
        if failpoint:
            env["PERENNIAL_FAILPOINT"] = failpoint
        with self.log.open("ab") as log:
            child = subprocess.Popen([sys.executable, "-c", RUN], env=env, stderr=log, stdout=log)
        self.children.append(child)
        return child

    def publish(self, events) -> None:
        producer = KafkaProducer(bootstrap_servers=self.settings.kafka, acks="all")
        topic = self.settings.topic("scored-examples")
        for event in events:
            if isinstance(event, bytes):
                producer.send(topic, key=b"acme/a", value=event)
                continue
            record = encode(event, id=event.example.example_id, source="test", time=datetime.now(UTC))
            producer.send(topic, key=record.key, value=record.value, headers=record.headers)
        producer.flush(30)
        producer.close()

    def read(self, name: str) -> list:
        consumer = KafkaConsumer(
            self.settings.topic(name), bootstrap_servers=self.settings.kafka, auto_offset_reset="earliest",
            enable_auto_commit=False, consumer_timeout_ms=1500, group_id=None,
        )  # fmt: skip
        records = list(consumer)
        consumer.close()
        return records

    def jobs(self) -> list[UpdateRequested]:
        """The distinct jobs, by job id, in the order of adapter and cut."""
        found = {}
        for record in self.read("adapter-jobs"):
            event = decode(record.value, record.headers, "adapter-jobs").event
            found[event.job_id] = event
        return sorted(found.values(), key=lambda job: (job.adapter, job.cut))

    def batches(self) -> list[Batch]:
        store = DirectoryStore(Path(self.settings.store))
        return [Batch.model_validate_json(get_blob(store, job.batch.digest)) for job in self.jobs()]

    def learned(self) -> Counter[str]:
        return Counter(example.document_id for batch in self.batches() for example in batch.examples)

    def wait(self, condition) -> None:
        """Until the condition holds; the assertion after it says what is wrong if it never does."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not condition():
            time.sleep(0.3)

    def stop(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait(10)


@pytest.fixture
def bench(broker, topic_prefix, tmp_path):
    made = Bench(
        Settings(
            kafka=broker.bootstrap, topic_prefix=topic_prefix, store=str(tmp_path / "store"), partitions=2,
            max_batch_tokens=TOKENS * 20, max_age_s=3.0, min_batch_examples=4,
        ),
        log=tmp_path / "curate.log",
    )  # fmt: skip
    provision(made.settings)
    yield made
    made.stop()


def test_size_cuts_cover_every_example_once_and_in_order(bench):
    child = bench.start()
    bench.publish(scored(n) for n in range(60))
    bench.wait(lambda: sum(bench.learned().values()) >= 60)
    batches = bench.batches()
    assert [[e.document_id for e in batch.examples] for batch in batches] == [
        [f"d{n}" for n in range(start, start + 20)] for start in (0, 20, 40)
    ], bench.log.read_text()
    assert [job.reason for job in bench.jobs()] == ["size"] * 3
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 0, bench.log.read_text()
