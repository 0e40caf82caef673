"""Topics that change under the roles, forged records, oversized and short-lived documents, and replicas that are gone.

All roles run on one broker. Each test leaves the flow in order, and each counts everything that was acknowledged so far.
"""

from __future__ import annotations

import gc
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewPartitions

from perennial.storage.registry.waiting_jobs import list_jobs
from perennial.streams.events.models import RetentionRequested, Selector
from perennial.streams.kafka.installation import load_installation
from perennial.streams.kafka.topics import identify
from perennial.streams.retain.request_store import load_requests
from tests.faults import parts
from tests.faults.flow import Flow, started
from tests.faults.report import Row
from tests.faults.service_watch import ServiceWatch, start_replica
from tests.integration.streams.test_intake_logs import cut_tail
from tests.integration.streams.topic_kit import create_again
from tests.integration.test_exactly_once import ADAPTERS

pytestmark = [
    pytest.mark.slow(280),
    pytest.mark.timeout(900),
    # kafka-python leaves the socket of every refused connection to the garbage collector.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]

LONG_S = 600.0
"""Seconds that a document of a thousand steps may take beside other tests."""
FAR = 2**63 - 1
LONG = "x" * 2_000


@pytest.fixture(scope="module")
def flow(broker_jars, tmp_path_factory) -> Iterator[Flow]:
    with started(tmp_path_factory.mktemp("flow")) as flow:
        flow.publish(12)
        flow.settle()
        yield flow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def check(flow, record_fault) -> Callable[..., None]:
    """Return a function that records a fault and fails where something was lost, learned twice or published wrongly."""

    def checked(fault: str, recovery_s: float, *, runs: int = 1, service_gap_s: float = 0.0) -> None:
        row, wrong = flow.row(fault, recovery_s, runs, service_gap_s)
        record_fault(row)
        assert wrong == []
        assert row.service_gap_s == 0

    return checked


def test_case_10_the_input_topic_is_created_again_under_load(flow, check):
    """Records of a topic that was deleted and created again were skipped up to the old position, without a word."""
    name = flow.settings.kafka.topic("documents")
    old = identify(flow.settings).topic_ids[name]
    before = set(flow.publish(30))
    flow.until(
        lambda: before <= {event.document_id for event in flow.examples()}, "intake has read what is deleted next"
    )
    create_again(flow.settings, "documents", 2)
    flow.publish(80)
    recovery_s = flow.settle()
    new = identify(flow.settings).topic_ids[name]
    assert sum(event.origin.topic_id == new for event in flow.examples()) == 80
    assert load_installation(flow.store).known_topic_ids("documents") == (old, new)
    check("input topic created again under load", recovery_s)


def test_a_restart_of_the_broker_raises_the_leader_epochs(flow, check):
    """Later epochs alone make no example new, and none old."""
    before = {(e.origin.partition, e.origin.leader_epoch) for e in flow.examples()}
    for _ in range(2):
        flow.publish(15)
        flow.broker.stop()
        flow.broker.start()
        flow.publish(15)
    recovery_s = flow.settle()
    after = {(e.origin.partition, e.origin.leader_epoch) for e in flow.examples()} - before
    assert after, "no record has a later epoch"
    check("leader epochs rise: broker restarted", recovery_s, runs=2)


def test_attack_k_the_tail_of_the_input_log_is_lost(flow, check):
    """New documents in the place of lost ones were dropped: their offsets were at or below the mark."""
    flow.publish(16, one_by_one=True)
    flow.settle()
    flow.broker.stop()
    cut_tail(flow.folder / "kafka", flow.settings.kafka.topic("documents"), 5)
    flow.broker.start()
    began = time.monotonic()
    flow.publish(40)
    flow.settle()
    recovery_s = time.monotonic() - began
    epochs: dict[tuple[str, int], set[int]] = {}
    for event in flow.examples():
        epochs.setdefault((event.origin.partition_key(), event.origin.offset), set()).add(event.origin.leader_epoch)
    assert sum(len(found) > 1 for found in epochs.values()) >= 5, "no offset came again under a later epoch"
    check("tail of the input log lost", recovery_s)


def test_case_14_partitions_are_added_by_kafkas_own_tool_while_jobs_wait(flow, check):
    """Later cuts in new partitions overtook those that waited, which were then dropped as done."""
    wanted = load_installation(flow.store).topics["adapter-jobs"].partitions + 3
    with flow.crew.held("learner"):
        flow.publish(60)
        flow.until(lambda: sum(len(list(list_jobs(flow.store, a))) for a in ADAPTERS) >= 4, "jobs wait")
        admin = AdminClient({"bootstrap.servers": flow.settings.kafka.bootstrap})
        name = flow.settings.kafka.topic("adapter-jobs")
        for future in admin.create_partitions([NewPartitions(name, wanted)]).values():
            future.result()
        flow.publish(30)
    remedy = f"perennial topics repartition adapter-jobs --partitions {wanted}"
    flow.until(lambda: remedy in flow.crew.log("learner").read_text("utf-8", "replace"), "the learner says the remedy")
    began = time.monotonic()
    flow.command(*remedy.split()[1:], "--yes")
    flow.settle()
    recovery_s = time.monotonic() - began
    for adapter in ADAPTERS:
        versions = [flow.registry.manifest(adapter, version) for _, version in sorted(flow.registry.versions(adapter))]
        cuts = [manifest.cut for manifest in versions if manifest.cut is not None]
        assert cuts == sorted(cuts)
    check("partitions added while jobs wait, then repartitioned", recovery_s)


def test_case_14_a_topic_is_repartitioned_under_load(flow, check):
    """The command pauses the writers, waits until the topic is read, adds the partitions and lets them go on."""
    flow.publish(60)
    before = load_installation(flow.store).topics["examples"].partitions
    began = time.monotonic()
    flow.command("topics", "repartition", "examples", "--partitions", str(before + 2), "--yes")
    flow.publish(30)
    flow.settle()
    recovery_s = time.monotonic() - began
    assert load_installation(flow.store).topics["examples"].partitions == before + 2
    check("`perennial topics repartition` under load", recovery_s)


def test_attacks_a_and_b_forged_records_on_the_internal_topics(flow, check):
    """One forged record ended a role at each start, or raised a mark that hid everything after it."""
    restarts = flow.crew.restarts
    producer = Producer({"bootstrap.servers": flow.settings.kafka.bootstrap})
    forged = 0
    for topic in ("examples", "scored-examples", "adapter-jobs"):
        model = parts.read_to_end(flow.settings, topic)[-1]
        for value in forgeries(topic, json.loads(model.value)):
            producer.produce(
                flow.settings.kafka.topic(topic), json.dumps(value).encode(), model.key, partition=model.partition,
                headers=model.headers,
            )  # fmt: skip
            forged += 1
    producer.flush(30)
    began = time.monotonic()
    flow.publish(45)
    flow.settle()
    recovery_s = time.monotonic() - began
    check("forged records on internal topics", recovery_s, runs=forged)
    letters = parts.read_to_end(flow.settings, "dead-letters")
    assert len(letters) >= forged
    assert flow.crew.restarts == restarts, "a role ended"


def forgeries(topic: str, value: dict) -> list[dict]:
    """Return records that are like a real one and that no role can have written."""
    if topic == "adapter-jobs":
        (key, _), *_ = value["marks"].items()
        cluster, _, rest = key.partition("/")
        later = {**value, "job_id": "forged", "cut": value["cut"] + 1}
        return [
            {**later, "marks": {key: FAR}},
            {**later, "marks": {f"{LONG}/{rest}": 1}},
            {**later, "marks": {f"{cluster}/{rest.replace('documents', 'elsewhere')}": 1}},
            {**later, "cut": FAR},
        ]
    example = value["example"] if topic == "scored-examples" else value
    made = []
    for origin in ({"offset": FAR}, {"cluster_id": LONG}, {"cluster_id": "another"}, {"topic_id": "another"},
                   {"leader_epoch": FAR}, {"partition": 2**31 - 1}):  # fmt: skip
        changed = {**example, "example_id": f"{len(made):032x}", "origin": {**example["origin"], **origin}}
        made.append({**value, "example": changed} if topic == "scored-examples" else changed)
    return made


def test_case_12_an_oversized_document_beside_small_ones(flow, check):
    """One document of 256 KiB kept every other adapter waiting for minutes."""
    big = flow.publish(1, "other", text="parrot " * 37_000)
    flow.until(lambda: bool(list(list_jobs(flow.store, "other"))), "the oversized document is cut")
    small = set(flow.publish(24, "acme/a"))
    began = time.monotonic()
    flow.until(lambda: small.isdisjoint(flow.missing()), "the small documents are learned", LONG_S)
    recovery_s = time.monotonic() - began
    assert big[0] in flow.missing(), "the small ones did not overtake it"
    flow.settle(LONG_S)
    check("oversized document beside small ones", recovery_s)


def test_attack_g_documents_expire_under_load(flow, record_fault):
    """The adapter was out of service for the length of every rebuild that an expiry needs."""
    with ServiceWatch(flow.registry, ADAPTERS, flow.settings) as watch:
        expiring = set(flow.publish(4, "acme/b", retention_class="PT15S"))
        for _ in range(6):
            flow.publish(6)
            time.sleep(0.5)
        flow.settle()

        def forgotten() -> bool:
            found = load_requests(flow.store).values()
            ended = sum(
                len(each.example_ids) for each in found if each.request.kind == "expire" and each.state == "closed"
            )
            return ended >= len(expiring)

        recovery_s = flow.until(forgotten, "what has expired is forgotten")
        flow.publish(12)
        flow.settle()
    found, stale = flow.account(), parts.stale_publishes(flow.settings, flow.registry)
    record_fault(Row(
        "expiry under load", len(expiring), len(flow.missing()), len(found.learned_twice), len(stale), recovery_s, watch.gap_s
    ))  # fmt: skip
    assert watch.looks > 20
    assert (flow.missing(), found.learned_twice, stale, watch.gaps) == ([], [], [], [])


@pytest.mark.parametrize(("name", "lease_s", "due_s"), [("gone-by-lease", 4, None), ("gone-by-due-time", 600, 12)])
def test_attack_l_a_replica_that_is_gone_for_good_keeps_no_request_open(flow, check, name, lease_s, due_s):
    """A subscriber that was killed kept every erasure open for ever; now its lease or the due time ends the wait."""
    (document,) = flow.publish(1, "acme/a")
    flow.settle()
    replica = start_replica(flow.settings.replace(replica_lease_s=lease_s), "acme/a", name, flow.folder)
    try:
        flow.until(
            lambda: any(each.event.replica == name for each in parts.envelopes(flow.settings, "adapter-acks")),
            "the replica has acknowledged a version",
        )
        replica.send_signal(signal.SIGKILL)
        replica.wait()
        began = time.monotonic()
        flow.request(
            RetentionRequested(
                request_id=name, kind="erase", adapter="acme/a", selector=Selector(document_ids=[document]),
                requested_by="test", due_at=datetime.now(UTC) + timedelta(seconds=due_s) if due_s else None,
            )
        )  # fmt: skip
        flow.until(lambda: flow.state_of(name) == "closed", "the request is closed")
        recovery_s = time.monotonic() - began
    finally:
        replica.kill()
        replica.wait()
    record = load_requests(flow.store)[name]
    check("replica gone for good", recovery_s)
    assert name in record.detail
    assert record.exceptions == (due_s is not None)
