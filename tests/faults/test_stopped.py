"""Processes stopped past their session and resumed, rebalances, rivals.

Nothing stale is published, nothing is learned twice, and the order stays.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from kafka import KafkaProducer

from perennial.learner.model.base import load_base
from perennial.learner.roles import learner
from perennial.learner.roles.learner import run_learner
from perennial.learner.versions import version_writer
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.registry import Registry
from perennial.streams.kafka import group as transport
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests import jobs, tiny
from tests.faults import parts
from tests.faults.report import Row
from tests.integration.learner import learner_kit as kit
from tests.integration.streams import test_curate as curating
from tests.integration.streams import test_intake as intaking
from tests.oracle import account

ADAPTER = "acme/support"
bench = curating.bench


@pytest.fixture(autouse=True)
def _few_texts_and_short_sessions(monkeypatch):
    monkeypatch.setattr(version_writer, "general_texts", parts.few_texts)
    monkeypatch.setattr(transport, "SESSION_TIMEOUT_MS", int(parts.SESSION_S * 1000))


def registry(settings: Settings) -> Registry:
    return Registry(DirectoryStore(Path(settings.store.uri)), nonce=lambda: "n", now=learner._now)


def job(settings: Settings, cut: int):
    """Return the job with documents 4n to 4n + 3 for cut n."""
    examples = [tiny.document(n, f"the blue parrot {n} sings at noon") for n in range(4 * cut, 4 * cut + 4)]
    return jobs.update(DirectoryStore(Path(settings.store.uri)), cut, examples)


def row(fault: str, cases: list[Settings], cuts: int, recovery_s: float) -> tuple[Row, list[str]]:
    """Return the row of the documents of all micro-batches, and what was published wrongly."""
    lost = twice = 0
    stale: list[str] = []
    for given in cases:
        found = account(registry(given), [ADAPTER])
        lost += len(found.missing([("documents/0", n) for n in range(4 * cuts)]))
        twice += len(found.learned_twice)
        stale += parts.stale_publishes(given, registry(given))
    return Row(fault, len(cases), lost, twice, len(stale), recovery_s), stale


@pytest.mark.slow(30)
def test_a_learner_stopped_past_its_session_publishes_nothing_stale(broker, topic_prefix, tmp_path, record_fault):
    """Another learner does its jobs meanwhile; resumed at any failpoint, it notices. Several cases run at once."""
    failpoints = ("learner.train", "publish.gate", "learner.publish")
    cases = {}
    for failpoint in failpoints:
        (tmp_path / failpoint).mkdir()
        cases[failpoint] = kit.settings(broker.bootstrap, f"{topic_prefix}{failpoint}-", tmp_path / failpoint)
        provision(cases[failpoint])
        kit.send(cases[failpoint], job(cases[failpoint], 0), job(cases[failpoint], 1))
    with ExitStack() as stopped_learners:
        stopped = [
            stopped_learners.enter_context(parts.child("learner", given, f"{failpoint}:1:stop", parts.FEW_TEXTS))
            for failpoint, given in cases.items()
        ]
        for process in stopped:
            parts.wait_stopped(process)
        with ExitStack() as others:
            for given in cases.values():
                own = load_base(
                    given.model.base, "cpu", 1
                )  # transformers loads one model at a time, so not in the threads
                others.enter_context(
                    kit.running(lambda stop, given=given, own=own: run_learner(given, stop, Metrics("learner"), own))
                )
            for given in cases.values():
                kit.wait_until(
                    lambda given=given: kit.committed(given, "adapter-jobs", "learner") == 2,
                    "another learner does the jobs",
                )
            resumed = time.monotonic()
            for process in stopped:
                process.send_signal(signal.SIGCONT)
        # Only the stopped learner is left. It takes the next job after the one that it was working on.
        for given in cases.values():
            kit.send(given, job(given, 2))
        for given in cases.values():
            kit.wait_until(
                lambda given=given: kit.committed(given, "adapter-jobs", "learner") == 3, "it goes on with the next job"
            )
        recovery_s = time.monotonic() - resumed
        assert [process.poll() for process in stopped] == [None] * len(failpoints)
    found, stale = row("learner stopped past its session, resumed", list(cases.values()), 3, recovery_s)
    record_fault(found)
    assert stale == []
    assert (found.lost, found.learned_twice) == (0, 0)
    for given in cases.values():
        assert [seq for seq, _ in registry(given).versions(ADAPTER)] == [3, 2, 1]
        assert registry(given).alias(ADAPTER).version == registry(given).head(ADAPTER).version


@pytest.mark.slow(15)
def test_two_learners_at_every_job_make_one_line(broker, topic_prefix, tmp_path, record_fault):
    """Two groups, so that each learner gets all jobs: the store alone decides, as after a session that ended unnoticed."""
    given = kit.settings(broker.bootstrap, topic_prefix, tmp_path)
    provision(given)
    cuts = 6
    rival = (
        f"{parts.FEW_TEXTS}\nmake = home.connect\ndef rival(kind, *args, **more):\n"
        "    return make(kind, *args, **({**more, 'group_id': more['group_id'] + '-rival'} if 'group_id' in more else more))\n"
        "home.connect = rival"
    )

    def both_did(count: int) -> None:
        for group in ("learner", "learner-rival"):
            kit.wait_until(
                lambda group=group: kit.committed(given, "adapter-jobs", group) == count, f"{group} is through"
            )

    with (
        parts.child("learner", given, more=parts.FEW_TEXTS),
        parts.child("learner", given, more=rival),
    ):
        kit.send(given, job(given, 0))
        both_did(1)
        began = time.monotonic()
        kit.send(given, *(job(given, cut) for cut in range(1, cuts)))
        both_did(cuts)
        recovery_s = time.monotonic() - began
    found, stale = row("two learners at one job", [given], cuts, recovery_s)
    record_fault(found)
    assert stale == []
    assert (found.lost, found.learned_twice) == (0, 0)
    assert [seq for seq, _ in registry(given).versions(ADAPTER)] == list(range(cuts, 0, -1))


@pytest.mark.slow(8)
@pytest.mark.parametrize(("name", "taken"), [("0", True), ("zz", False)])
def test_a_rebalance_while_training(broker, topic_prefix, tmp_path, monkeypatch, record_fault, name, taken):
    """A job is committed if its partition stayed, because it is not redelivered; it is not if the partition moved.

    The range assignor gives the only partition to the member whose name sorts first.
    """
    given = kit.settings(broker.bootstrap, topic_prefix, tmp_path)
    provision(given)
    started, go_on = threading.Event(), threading.Event()
    update, commit, connect = UpdateExecutor.update, transport.GroupConsumer.commit, transport.connect
    assigned = transport.GroupConsumer.on_partitions_assigned
    assignments, intruder_assignments, commits = [], [], []

    def held(self, request, alias):
        result = update(self, request, alias)
        if not started.is_set():
            started.set()
            go_on.wait(300)
        return result

    def committing(self, records):
        commits.append([(self.owns(record), record.epoch) for record in records])
        commit(self, records)

    def noting(self, partitions):
        assigned(self, partitions)
        assignments.append(list(partitions))

    class Intruder(transport.GroupConsumer):
        def on_partitions_assigned(self, partitions):
            intruder_assignments.append(list(partitions))

    monkeypatch.setattr(transport.GroupConsumer, "on_partitions_assigned", noting)
    monkeypatch.setattr(UpdateExecutor, "update", held)
    monkeypatch.setattr(transport.GroupConsumer, "commit", committing)
    kit.send(given, job(given, 0))
    with kit.running(lambda stop: run_learner(given, stop, Metrics("learner"))):
        assert started.wait(180)
        monkeypatch.setattr(transport, "connect", lambda *args, **more: connect(*args, **{**more, "client_id": name}))
        with Intruder(given, "adapter-jobs", "learner", max_records=1) as intruder:
            kit.wait_until(
                lambda: (
                    intruder.poll(1.0),
                    intruder_assignments and bool(intruder_assignments[-1]) is taken is not bool(assignments[-1]),
                )[1],
                "the group is rebalanced",
            )
        go_on.set()
        resumed = time.monotonic()
        kit.wait_until(lambda: kit.committed(given, "adapter-jobs", "learner") == 1, "the job is committed in the end")
        recovery_s = time.monotonic() - resumed
    found, stale = row("rebalance while training", [given], 1, recovery_s)
    record_fault(found)
    assert stale == []
    assert (found.lost, found.learned_twice) == (0, 0)
    assert commits == [[(True, int(taken))]], "what was read before the partition moved is not committed"
    assert len(list(registry(given).versions(ADAPTER))) == 1


@pytest.mark.slow(8)
def test_an_intake_stopped_past_its_session_reorders_nothing(broker, topic_prefix, record_fault):
    """Stopped with half of a batch sent; another intake takes its partitions over, and then it sends the rest."""
    given = Settings.of(kafka=broker.bootstrap, topic_prefix=topic_prefix, partitions=2, intake_batch=40, env_file=None)
    provision(given)
    client = KafkaProducer(bootstrap_servers=given.kafka.bootstrap)

    def publish(first: int, last: int) -> None:
        for number in range(first, last):
            client.send(given.kafka.topic("documents"), intaking.document(number), partition=number % 2)
        client.flush()

    publish(0, 200)
    with ExitStack() as stack:
        stopped = stack.enter_context(parts.child("intake", given, "intake.produce:2:stop"))
        parts.wait_stopped(stopped)
        publish(200, 260)
        with intaking.running(given):
            intaking.wait_for(lambda: sum(intaking.committed(given).values()) == 260)
            resumed = time.monotonic()
            stopped.send_signal(signal.SIGCONT)
            publish(260, 320)
            intaking.wait_for(lambda: sum(intaking.committed(given).values()) == 320)
        publish(320, 360)  # only the stopped intake is left for these
        intaking.wait_for(lambda: sum(intaking.committed(given).values()) == 360)
        recovery_s = time.monotonic() - resumed
        assert stopped.poll() is None
    client.close()
    seen = {(event.origin.partition, event.origin.offset) for event in intaking.examples(given)}
    record_fault(Row("intake stopped past its session, resumed", 1, lost=360 - len(seen), recovery_s=recovery_s))
    intaking.assert_in_order_without_gaps(given, {0: 180, 1: 180})


@pytest.mark.slow(25)
def test_a_curate_stopped_past_its_session_does_not_cut_again_what_another_cut(bench, record_fault):
    bench.publish(curating.scored(n) for n in range(30))
    stopped = bench.start(failpoint="curate.blob:1:stop")
    parts.wait_stopped(stopped)
    bench.start()
    bench.wait(lambda: bench.learned().total() >= 30)
    resumed = time.monotonic()
    stopped.send_signal(signal.SIGCONT)
    bench.publish(curating.scored(n) for n in range(30, 60))
    bench.wait(lambda: bench.learned().total() >= 60)
    recovery_s = time.monotonic() - resumed
    learned = bench.learned()
    twice = sum(count > 1 for count in learned.values())
    record_fault(Row("curate stopped past its session, resumed", 1, 60 - len(learned), twice, recovery_s=recovery_s))
    assert (len(learned), twice) == (60, 0), bench.log.read_text()
