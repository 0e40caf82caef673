"""Learners and scorers share the work by consumer group: one is added, one is drained, one is killed in mid-run."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import defaultdict
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kafka.partitioner import murmur2

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.registry import Registry
from perennial.streams.events.models import ExampleScored, UpdateRequested
from perennial.streams.kafka.topics import provision
from perennial.streams.settings import Settings
from tests import jobs, tiny
from tests.faults import parts
from tests.faults.report import Row
from tests.integration.learner import learner_kit as kit
from tests.oracle import account

PARTITIONS = 4
ADAPTERS = [f"tenant-{number}/support" for number in (0, 1, 3, 5, 6, 11)]
"""Every partition has one at least: a process that is given a partition without adapters would wait for work for ever."""
SLOW_S = 500.0
"""Seconds that three processes may take to start and to share some work beside other tests."""
PAUSE_S = 0.5
EXAMPLES_PER_CUT = 2
SAME_NATS = 1e-4


@pytest.fixture
def given(broker, topic_prefix, tmp_path) -> Settings:
    made = kit.settings(broker.bootstrap, topic_prefix, tmp_path).replace(partitions=PARTITIONS)
    provision(made)
    return made


def registry(given: Settings) -> Registry:
    return Registry(DirectoryStore(Path(given.store.uri)), nonce=lambda: "n", now=lambda: datetime.now(UTC))


def versions(given: Settings) -> int:
    return sum(1 for adapter in ADAPTERS for _ in registry(given).versions(adapter))


def drain(process: subprocess.Popen[bytes]) -> None:
    """Ask a role to end; it finishes what it has begun. One that is still starting would die of the signal."""
    kit.wait_until(lambda: catches_sigterm(process), "the role handles SIGTERM", SLOW_S)
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 0


def catches_sigterm(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a process has a handler for SIGTERM; see SigCgt in proc_pid_status(5)."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def jobs_of_cut(given: Settings, cut: int) -> list[UpdateRequested]:
    """Return a job of each adapter."""
    numbers = range(EXAMPLES_PER_CUT * cut, EXAMPLES_PER_CUT * (cut + 1))
    store = DirectoryStore(Path(given.store.uri))
    return [
        jobs.update(
            store, cut, [tiny.document(n, f"{adapter} sings {n} at noon", adapter) for n in numbers], adapter=adapter
        )
        for adapter in ADAPTERS
    ]


def test_every_partition_has_an_adapter():
    assert {(murmur2(adapter.encode()) & 0x7FFFFFFF) % PARTITIONS for adapter in ADAPTERS} == set(range(PARTITIONS))


@pytest.mark.slow(60)
def test_learners_come_and_go_in_mid_run(given, record_fault):
    """Whoever leaves, and however: every example is learned once, in the order of its adapter's cuts, and none waits."""
    cuts = 0

    def send_cut() -> None:
        nonlocal cuts
        kit.send(given, *jobs_of_cut(given, cuts))
        cuts += 1

    with ExitStack() as learners:
        first = learners.enter_context(parts.child("learner", given, more=parts.FEW_TEXTS))
        send_cut()
        kit.wait_until(lambda: versions(given) == len(ADAPTERS), "the first learner learns", SLOW_S)
        # It dies while updates of several adapters share a pass.
        dying = learners.enter_context(parts.child("learner", given, "learner.train:3", parts.FEW_TEXTS))
        third = learners.enter_context(parts.child("learner", given, more=parts.FEW_TEXTS))
        deadline = time.monotonic() + SLOW_S
        while dying.poll() is None:
            assert time.monotonic() < deadline, "the learner that was added gets no work"
            if versions(given) >= (cuts - 2) * len(ADAPTERS):  # a slow start of the others must not heap up work
                send_cut()
            time.sleep(PAUSE_S)
        for _ in range(2):
            send_cut()
        drain(first)
        began = time.monotonic()
        kit.wait_until(
            lambda: versions(given) == cuts * len(ADAPTERS), "the learner that is left does the rest", SLOW_S
        )
        recovery_s = time.monotonic() - began
        drain(third)
    stale = parts.stale_publishes(given, registry(given))
    # One by one: the adapters' examples have the same positions.
    learned = {adapter: account(registry(given), [adapter]) for adapter in ADAPTERS}
    lost = EXAMPLES_PER_CUT * cuts * len(ADAPTERS) - sum(len(of_adapter.learned) for of_adapter in learned.values())
    twice = sum(len(of_adapter.learned_twice) for of_adapter in learned.values())
    record_fault(Row("learners added, drained and killed", 3, lost, twice, len(stale), recovery_s))
    assert (lost, twice, stale) == (0, 0, [])
    for adapter in ADAPTERS:
        manifests = [registry(given).manifest(adapter, version) for _, version in registry(given).versions(adapter)]
        assert [manifest.cut for manifest in manifests] == list(range(cuts - 1, -1, -1))


@pytest.mark.slow(30)
def test_scorers_come_and_go_in_mid_run(given, record_fault):
    """What a killed scorer had not committed is scored again by another one; the order in each partition stays."""
    documents = [
        tiny.document(number, f"the parrot {number} sings at noon", ADAPTERS[number % len(ADAPTERS)])
        for number in range(160)
    ]
    half = len(documents) // 2
    with ExitStack() as scorers:
        first = scorers.enter_context(parts.child("scorer", given))
        kit.send(given, *documents[:half])
        kit.wait_until(lambda: len(scored(given)) >= half // 4, "the first scorer scores", SLOW_S)
        scorers.enter_context(parts.child("scorer", given, "scorer.produce:2"))
        third = scorers.enter_context(parts.child("scorer", given))
        kit.send(given, *documents[half:])
        drain(first)
        began = time.monotonic()
        wanted = {document.example_id for document in documents}
        kit.wait_until(
            lambda: {event.example.example_id for event in scored(given)} == wanted, "the rest is scored", SLOW_S
        )
        recovery_s = time.monotonic() - began
        drain(third)
    events = scored(given)
    record_fault(Row("scorers added, drained and killed", 3, 0, 0, 0, recovery_s))
    for adapter in ADAPTERS:
        offsets = [event.example.origin.offset for event in events if event.example.adapter == adapter]
        first_seen = list(dict.fromkeys(offsets))
        assert first_seen == sorted(first_seen)
    losses = defaultdict(list)
    for event in events:
        losses[event.example.example_id].append(event.base_loss_nats)
    for of_example in losses.values():  # each of the three may have scored it: what shares a pass decides the last bits
        assert max(of_example) - min(of_example) < SAME_NATS


def scored(given: Settings) -> list[ExampleScored]:
    found = [envelope.event for envelope in parts.envelopes(given, "scored-examples")]
    assert all(isinstance(event, ExampleScored) for event in found)
    return found  # type: ignore[return-value]
