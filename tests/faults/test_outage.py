"""Broker, disk and store fail and come back while all roles run: what was acknowledged is learned once."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from perennial.learner.roles import learner as worker
from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.objects.s3_settings import S3Settings
from perennial.storage.registry.registry import Registry
from perennial.streams.client.base_publisher import PublishError, Receipt
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker
from perennial.streams.devstack.minio_server import STORE_URI, MinioServer
from perennial.streams.devstack.supervisor import Supervisor
from perennial.streams.kafka.topics import provision
from perennial.streams.settings import Settings
from perennial.testing import MemoryBackend
from tests import jobs, tiny
from tests.faults import parts
from tests.faults.report import Row
from tests.integration.learner import learner_kit as kit
from tests.integration.test_exactly_once import ADAPTERS, small_settings, text
from tests.oracle import account
from tests.services import minio_binary, missing_service

pytestmark = [
    pytest.mark.slow(300),
    pytest.mark.timeout(900),
    # kafka-python leaves the socket of every refused connection to the garbage collector.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]

STORE_AWAY_S = 60.0
BROKER_AWAY_S = 3.0
SETTLED_S = 240.0


@dataclass
class Flow:
    """A broker, a store, every role, a subscriber, and what the broker acknowledged.

    Attributes:
        broker: The broker.
        disk: The small disk with its data.
        server: The store's server.
        settings: Of all roles.
        store: The store.
        supervisor: Runs the roles.
        registry: The adapters' versions.
        served: Generation and version of each alias that the subscriber activated, in order.
        acked: Positions of the acknowledged documents.
        published: How many documents were published, acknowledged or not.
        rng: Determines the documents.
    """

    broker: EmbeddedBroker
    disk: Path
    server: MinioServer
    settings: Settings
    store: ObjectStore
    supervisor: Supervisor
    registry: Registry
    served: list[tuple[int, str]] = field(default_factory=list)
    acked: list[tuple[str, int]] = field(default_factory=list)
    published: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random("outage"))

    def publish(self, publisher: Publisher, count: int) -> list[Receipt]:
        receipts = []
        for _ in range(count):
            number = self.published = self.published + 1
            try:
                receipts.append(
                    publisher.document(
                        adapter=self.rng.choice(ADAPTERS), document_id=f"doc-{number}", text=text(self.rng, number)
                    )
                )
            except PublishError:
                break  # the next would wait as long
        return receipts

    def count(self, receipts: list[Receipt]) -> int:
        """Record what was acknowledged, and return how many receipts were not."""
        failed = 0
        for receipt in receipts:
            try:
                found = receipt.result(120)
            except PublishError:
                failed += 1
            else:
                self.acked.append(
                    (f"{found.topic.removeprefix(self.settings.kafka.topic_prefix)}/{found.partition}", found.offset)
                )
        return failed

    def missing(self) -> list[tuple[str, int]]:
        """Return what was acknowledged and is in no manifest; all of it while the store does not answer."""
        try:
            return account(self.registry, ADAPTERS).missing(self.acked)
        except StoreUnavailableError:
            return self.acked

    def settle(self) -> float:
        """Wait until every acknowledged event is in a manifest, and return the seconds it took."""
        return parts.seconds_until(
            lambda: not self.missing(), SETTLED_S,
            f"{len(self.acked)} events in manifests; logs in {self.supervisor.log_dir}", self.supervisor.tend,
        )  # fmt: skip

    def row(self, fault: str, recovery_s: float) -> tuple[Row, list[str]]:
        found = account(self.registry, ADAPTERS)
        stale = parts.stale_publishes(self.settings, self.registry)
        generations = [generation for generation, _ in self.served]
        stale += [f"{later} served after {before}" for before, later in pairwise(generations) if later <= before]
        lost = found.missing(self.acked)
        return Row(fault, 1, len(lost), len(found.learned_twice), len(stale), recovery_s), stale


@pytest.fixture(scope="module")
def flow(broker_jars, tmp_path_factory) -> Iterator[Flow]:
    if minio_binary() is None:
        missing_service("no minio binary on PATH or in the cache folder")
    root = tmp_path_factory.mktemp("outage")
    with ExitStack() as stack:
        disk = stack.enter_context(parts.small_disk(root / "disk", 512)) if os.geteuid() == 0 else root / "disk"
        kafka = EmbeddedBroker(disk / "kafka").start()
        stack.callback(kafka.stop)
        server = MinioServer(root / "minio")
        server.start()
        stack.callback(server.stop)
        environment = server.environment()
        settings = small_settings(kafka.bootstrap, "", STORE_URI)
        store = open_store(STORE_URI, S3Settings.from_env(environment))
        store.probe()
        provision(settings)
        supervisor = Supervisor(settings, root / "logs", environment=environment)
        supervisor.start()
        stack.callback(supervisor.stop)
        supervisor.wait_healthy()
        registry = Registry(store, nonce=lambda: "n", now=worker._now)
        flow = Flow(kafka, disk, server, settings, store, supervisor, registry)
        subscriber = Subscriber(
            ADAPTERS[0], MemoryBackend(None), settings=settings, store=store,
            on_activate=lambda state, _: flow.served.append((state.generation, state.version)),
        )  # fmt: skip
        stack.enter_context(subscriber)
        yield flow
    with warnings.catch_warnings():
        # Collect here, or the warnings would appear in some other test.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def check(flow: Flow, fault: str, recovery_s: float, record_fault: Callable[[Row], None]) -> None:
    time.sleep(2)  # a second learning of an example would show now
    found, stale = flow.row(fault, recovery_s)
    record_fault(found)
    assert stale == []
    assert (found.lost, found.learned_twice) == (0, 0)


def test_a_broker_that_is_killed_and_comes_back(flow, record_fault):
    with Publisher(flow.settings.kafka.bootstrap, settings=flow.settings) as publisher:
        receipts = flow.publish(publisher, 40)
        publisher.flush(30)
        receipts += flow.publish(publisher, 20)
        flow.broker.kill()
        receipts += flow.publish(publisher, 10)
        time.sleep(BROKER_AWAY_S)
        flow.broker.start()
        back = time.monotonic()
        flow.count(receipts)
        assert flow.count(flow.publish(publisher, 20)) == 0, "the same publisher publishes again"
        with pytest.raises(PublishError) if len(flow.acked) < flow.published else nullcontext():
            publisher.close()
    flow.settle()
    recovery_s = time.monotonic() - back
    assert len(flow.acked) >= 60
    check(flow, "broker killed and restarted", recovery_s, record_fault)


def test_a_publisher_closed_over_a_broker_that_hangs_ends_every_promise_and_its_thread(flow):
    publisher = Publisher(flow.settings.kafka.bootstrap, settings=flow.settings, timeout_s=2)
    assert flow.count(flow.publish(publisher, 1)) == 0
    sender = publisher._producer._sender
    os.kill(flow.broker.pid, signal.SIGSTOP)
    try:
        receipt = publisher.document(
            adapter=ADAPTERS[0], document_id="late", text="it may arrive when the broker goes on"
        )
        time.sleep(0.5)
        with pytest.raises(PublishError):
            publisher.close()
        sender.join(120)
        assert receipt.done
        assert not sender.is_alive()
    finally:
        os.kill(flow.broker.pid, signal.SIGCONT)


def test_a_store_that_is_down_for_a_minute(flow, record_fault):
    with Publisher(flow.settings.kafka.bootstrap, settings=flow.settings) as publisher:
        receipts = flow.publish(publisher, 40)
        publisher.flush(30)
        os.killpg(flow.server._process.pid, signal.SIGKILL)
        until = time.monotonic() + STORE_AWAY_S
        while time.monotonic() < until:
            receipts += flow.publish(publisher, 3)
            flow.supervisor.tend()
            time.sleep(3)
        assert flow.count(receipts) == 0, "the broker takes what the store cannot yet"
    flow.server.tend()
    recovery_s = flow.settle()
    check(flow, "store down for a minute", recovery_s, record_fault)


def test_a_disk_that_is_full_under_the_broker(flow, record_fault):
    if os.geteuid() != 0:
        missing_service("a small disk can be mounted by root alone")
    before = len(flow.acked)
    publisher = Publisher(flow.settings.kafka.bootstrap, settings=flow.settings)
    ballast = parts.fill(flow.disk, 64 * 1024)
    receipts = flow.publish(publisher, 400)
    failed = flow.count(receipts) + 400 - len(receipts)
    with pytest.raises(PublishError):
        publisher.close()
    ballast.unlink()
    flow.broker.stop()
    flow.broker.start()
    with Publisher(flow.settings.kafka.bootstrap, settings=flow.settings) as again:
        assert flow.count(flow.publish(again, 10)) == 0
    recovery_s = flow.settle()
    check(flow, "disk full under the broker", recovery_s, record_fault)
    assert failed > 0, "the disk never was full"
    assert len(flow.acked) >= before + 10


def test_a_disk_that_is_full_under_the_directory_store(broker, topic_prefix, tmp_path, record_fault):
    """The learner waits for free space; what it was about to publish is published whole or not at all."""
    with parts.small_disk(tmp_path / "disk", 8) as disk:
        given = kit.settings(broker.bootstrap, topic_prefix, tmp_path).replace(store=str(disk / "store"))
        provision(given)
        store = DirectoryStore(Path(given.store.uri))
        cuts = [
            jobs.update(store, cut, [tiny.document(n, f"parrot {n} sings") for n in range(4 * cut, 4 * cut + 4)])
            for cut in range(3)
        ]
        with parts.child("learner", given, more=parts.FEW_TEXTS) as learner:
            kit.send(given, cuts[0])
            kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 1, "the first job is done")
            ballast = parts.fill(disk, 0)
            kit.send(given, cuts[1])
            time.sleep(3)
            assert kit.committed(given, "adapter-jobs", "learner") == 1
            assert learner.poll() is None
            ballast.unlink()
            began = time.monotonic()
            kit.send(given, cuts[2])
            kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 3, "all jobs are done")
            recovery_s = time.monotonic() - began
        registry = Registry(store, nonce=lambda: "n", now=worker._now)
        found = account(registry, ["acme/support"])
        lost = found.missing([("documents/0", n) for n in range(12)])
        stale = parts.stale_publishes(given, registry)
        record_fault(
            Row("disk full under the directory store", 1, len(lost), len(found.learned_twice), len(stale), recovery_s)
        )
        assert (lost, found.learned_twice, stale) == ([], [], [])
        assert list((disk / "store" / ".tmp").iterdir()) == []
