"""The embedded broker with real Kafka clients: what it keeps, and that it never outlives its owner."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType

from perennial.streams.devstack.embedded_kafka.kafka_broker import BrokerError, EmbeddedBroker
from perennial.streams.devstack.process_guard import alive, start_time

if TYPE_CHECKING:
    from tests.conftest import TestBroker

pytestmark = pytest.mark.usefixtures("broker_jars")

OWNER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker
broker = EmbeddedBroker(Path(sys.argv[1]) if sys.argv[1] else None).start()
try:
    print(broker.pid, broker.log_path.parent, flush=True)
    time.sleep(120)
except KeyboardInterrupt:
    assert broker.running, "Ctrl-C reached the broker before its owner"
    broker.stop()
    print("stopped", flush=True)
"""


@contextmanager
def admin_of(bootstrap: str) -> Iterator[Any]:
    with closing(KafkaAdminClient(bootstrap_servers=bootstrap)) as admin:
        yield admin


def create(bootstrap: str, topic: str, **configs: str) -> None:
    with admin_of(bootstrap) as admin:
        admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 1, "configs": configs}})


def produce(bootstrap: str, topic: str, values: list[bytes]) -> None:
    with closing(KafkaProducer(bootstrap_servers=bootstrap)) as producer:
        for value in values:
            producer.send(topic, key=b"k", value=value)
        producer.flush()


def consume(bootstrap: str, topic: str, count: int) -> list[bytes]:
    found: list[bytes] = []
    deadline = time.monotonic() + 120
    with closing(
        KafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", group_id=None)
    ) as consumer:
        while len(found) < count and time.monotonic() < deadline:
            for records in consumer.poll(timeout_ms=500).values():
                found += [record.value for record in records]
    return found


def eventually(holds: Callable[[], bool], within_s: float = 120) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def owner_process(data_dir: str) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    root = Path(__file__).parents[3]
    owner = subprocess.Popen([sys.executable, "-c", OWNER, data_dir], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        yield owner, int(pid), Path(folder)
    finally:
        owner.kill()
        owner.communicate()


def test_what_is_produced_is_consumed_in_order(broker: TestBroker, topic_prefix: str):
    values = [b"%d" % n for n in range(500)]
    create(broker.bootstrap, f"{topic_prefix}in")
    produce(broker.bootstrap, f"{topic_prefix}in", values)
    assert consume(broker.bootstrap, f"{topic_prefix}in", 500) == values


def test_topic_configs_are_honoured(broker: TestBroker, topic_prefix: str):
    topic = f"{topic_prefix}state"
    create(broker.bootstrap, topic, **{"cleanup.policy": "compact", "retention.ms": "1234567"})
    with admin_of(broker.bootstrap) as admin:
        configs = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])["topic"][topic]
    assert configs["cleanup.policy"]["value"] == "compact"
    assert configs["retention.ms"]["value"] == "1234567"


def test_a_mistyped_topic_is_not_made(broker: TestBroker, topic_prefix: str):
    with closing(KafkaConsumer(bootstrap_servers=broker.bootstrap, group_id=None)) as consumer:
        assert not consumer.partitions_for_topic(f"{topic_prefix}mistyped")
    with admin_of(broker.bootstrap) as admin:
        assert f"{topic_prefix}mistyped" not in admin.list_topics()


@pytest.mark.slow(18)
def test_a_data_folder_keeps_everything_over_stop_and_kill(tmp_path: Path, topic_prefix: str):
    said: list[str] = []
    topic = f"{topic_prefix}kept"
    keeper = EmbeddedBroker(tmp_path / "data with é", on_progress=said.append)
    with keeper:
        create(keeper.bootstrap, topic, **{"cleanup.policy": "compact"})
        produce(keeper.bootstrap, topic, [b"1", b"2"])
        with admin_of(keeper.bootstrap) as admin:
            cluster = admin.describe_cluster()["cluster_id"]
        first, first_pid = keeper.bootstrap, keeper.pid
    assert not keeper.running
    assert any("format" in line for line in said)

    said.clear()
    keeper.start()
    assert keeper.bootstrap == first, "the port was not remembered"
    assert keeper.pid != first_pid
    assert not any("format" in line for line in said)
    produce(keeper.bootstrap, topic, [b"3"])
    keeper.kill()
    assert not keeper.running
    assert not alive(first_pid, None)

    keeper.start()
    try:
        assert consume(keeper.bootstrap, topic, 3) == [b"1", b"2", b"3"]
        with admin_of(keeper.bootstrap) as admin:
            assert admin.describe_cluster()["cluster_id"] == cluster
            configs = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])["topic"][topic]
            assert configs["cleanup.policy"]["value"] == "compact"
    finally:
        keeper.stop()
        keeper.stop()


@pytest.mark.slow(10)
def test_one_folder_one_broker_and_a_started_one_is_not_started_again(tmp_path: Path):
    with EmbeddedBroker(tmp_path) as keeper:
        with pytest.raises(BrokerError, match=rf"got: process {keeper.pid}"):
            EmbeddedBroker(tmp_path).start()
        with pytest.raises(BrokerError, match="already started"):
            keeper.start()
        assert keeper.running
        assert 20_000 <= int(keeper.bootstrap.rpartition(":")[2]) < 32_000
        with pytest.raises(BrokerError, match=r"port \d+ of 127.0.0.1 is taken"):
            EmbeddedBroker(port=int(keeper.bootstrap.rpartition(":")[2])).start()


def test_a_failed_start_says_what_the_log_says_and_leaves_nothing(tmp_path: Path):
    failing = EmbeddedBroker(tmp_path, settings={"num.io.threads": "none"})
    with pytest.raises(BrokerError, match=r"(?s)num\.io\.threads.*remedy: "):
        failing.start()
    assert not failing.running
    with EmbeddedBroker(tmp_path) as repaired:
        assert repaired.running


def test_a_temporary_folder_goes_with_the_broker():
    with EmbeddedBroker() as passing:
        folder, pid = passing.log_path.parent, passing.pid
        assert "serv" in passing.log_path.read_text(encoding="utf-8").lower(), "the log is empty"
    assert not folder.exists()
    assert not alive(pid, None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="127.0.0.2 is an address on Linux alone")
@pytest.mark.skipif("PERENNIAL_KAFKA" in os.environ, reason="the broker is not the embedded one")
def test_only_loopback_is_bound(broker: TestBroker):
    port = int(broker.bootstrap.rpartition(":")[2])
    with socket.socket() as other:  # free on another address of this machine: the broker does not listen on all
        other.bind(("127.0.0.2", port))


def test_a_thread_that_ends_does_not_take_the_broker_along():
    started: list[EmbeddedBroker] = []
    thread = threading.Thread(target=lambda: started.append(EmbeddedBroker().start()))
    thread.start()
    thread.join()
    with started[0] as keeper:
        time.sleep(1.0)  # longer than the supervisor's look at its owner
        assert keeper.running
        with admin_of(keeper.bootstrap) as admin:
            assert len(admin.describe_cluster()["brokers"]) == 1


@pytest.mark.parametrize("kept", [False, True], ids=["temporary", "kept"])
def test_the_broker_ends_when_its_owner_is_killed(tmp_path: Path, kept: bool):
    with owner_process(str(tmp_path / "data") if kept else "") as (owner, pid, folder):
        born = start_time(pid)
        assert alive(pid, born)
        owner.send_signal(signal.SIGKILL)
        assert eventually(lambda: not alive(pid, born)), "the broker outlived its owner"
    if kept:
        with EmbeddedBroker(folder) as again:
            assert again.running
    else:
        assert eventually(lambda: not folder.exists())


def test_the_broker_ends_when_its_supervisor_is_killed():
    keeper = EmbeddedBroker().start()
    pid, born = keeper.pid, start_time(keeper.pid)
    keeper._process.kill()  # type: ignore[union-attr]
    try:
        assert eventually(lambda: not alive(pid, born))
    finally:
        keeper.stop()


def test_ctrl_c_reaches_the_owner_first(tmp_path: Path):
    with owner_process(str(tmp_path)) as (owner, pid, _folder):
        born = start_time(pid)
        assert os.getpgid(pid) != os.getpgid(owner.pid)
        owner.send_signal(signal.SIGINT)
        said, _ = owner.communicate(timeout=120)
        assert said.split() == ["stopped"]
        assert owner.returncode == 0
        assert not alive(pid, born)
