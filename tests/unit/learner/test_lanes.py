"""Lanes: which job starts, what may be committed, whose turn it is, and how a stopping role ends a long job."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perennial.learner.model.turns import ComputeTurns, FairLock
from perennial.learner.roles.fair_queue import FairQueue
from perennial.learner.roles.job_figures import figures_of
from perennial.learner.roles.lanes import (
    LONG_JOB_S,
    STOP_GRACE_S,
    CommitOrder,
    Lane,
    RunningState,
    open_places,
)
from perennial.learner.versions.job_result import JobInterruptedError, JobResult
from perennial.streams.events.cloudevents import Envelope
from perennial.streams.events.models import ForgetRequested, UpdateRequested
from perennial.streams.kafka.group import ConsumedRecord

SHORT_S, LONG_S = LONG_JOB_S / 2, LONG_JOB_S * 2


def next_job(adapters: str, jobs: list[tuple[str, float]], pass_adapters: int) -> int | None:
    """Return the index of the job that starts next beside the running ones.

    Args:
        adapters: updates of adapters named by small letters, and forget jobs of those named by capital ones; the oldest
            example of each is older than that of the next.
        jobs: running jobs by the same letters, and their seconds.
        pass_adapters: the most updates that may run at once.
    """
    queue: FairQueue[int] = FairQueue()
    for number, adapter in enumerate(adapters):
        queue.add(number, figures_of(envelope(adapter).event)._replace(adapter=f"t/{adapter.lower()}", oldest_s=number))
    running = [RunningState(f"t/{adapter.lower()}", adapter.islower(), running_s) for adapter, running_s in jobs]
    places = open_places(running, 3, pass_adapters)
    entry = queue.next({job.adapter for job in running}, 0, **places._asdict())
    return None if entry is None else entry.job


def envelope(adapter: str) -> Envelope:
    job = UpdateRequested if adapter.islower() else ForgetRequested
    return Envelope(
        "", "", "", None, job.model_construct(adapter=adapter.lower(), tokens=1, oldest_ms=0, drift=None), None
    )


def record(offset: int, partition: int = 0, epoch: int = 0) -> ConsumedRecord:
    return ConsumedRecord("adapter-jobs", partition, offset, None, b"", [], epoch)


@pytest.mark.parametrize(
    ("adapters", "jobs", "wanted"),
    [
        ("AB", [], 0),
        ("AB", [("X", SHORT_S)], None),  # a short job has the machine for itself
        ("ab", [("X", SHORT_S)], None),
        ("AB", [("X", LONG_S)], 0),
        ("ab", [("X", LONG_S)], 0),
        ("AAB", [("A", LONG_S)], 2),  # jobs of one adapter stay in order: the second a does not start, either
        ("aa", [("A", LONG_S)], None),
        ("AB", [("X", LONG_S), ("Y", SHORT_S)], None),
        ("AB", [("X", LONG_S), ("Y", LONG_S)], 0),
        ("AB", [("X", LONG_S), ("Y", LONG_S), ("Z", LONG_S)], None),
        ("", [], None),
    ],
)
def test_attack_n_a_job_starts_beside_long_jobs_of_other_adapters_only(adapters, jobs, wanted):
    assert next_job(adapters, jobs, pass_adapters=4) == wanted


@pytest.mark.parametrize(
    ("adapters", "jobs", "pass_adapters", "wanted"),
    [
        ("ab", [("x", SHORT_S)], 4, 0),  # updates train together
        ("ab", [("x", SHORT_S), ("y", LONG_S), ("z", SHORT_S)], 4, 0),
        ("ab", [("w", SHORT_S), ("x", SHORT_S), ("y", SHORT_S), ("z", SHORT_S)], 4, None),
        ("aab", [("a", SHORT_S)], 4, 2),
        ("aA", [("a", SHORT_S)], 4, None),  # a forget job keeps its place behind its adapter's update
        ("aAb", [("a", SHORT_S)], 4, 2),
        ("Ab", [("x", SHORT_S)], 4, None),  # and is not kept waiting by a stream of short updates
        ("Ab", [("x", LONG_S)], 4, 0),
        ("ab", [("x", SHORT_S)], 1, None),  # without shared passes short updates run one by one
        ("ab", [("x", LONG_S)], 1, 0),
        ("ab", [("X", LONG_S), ("Y", LONG_S), ("Z", LONG_S)], 4, 0),  # forgettings do not take the updates' places
        ("Ab", [("X", LONG_S), ("Y", LONG_S), ("Z", LONG_S)], 4, 1),  # also where another one waits for a lane
    ],
)
def test_updates_of_several_adapters_start_together(adapters, jobs, pass_adapters, wanted):
    assert next_job(adapters, jobs, pass_adapters) == wanted


@given(st.permutations(range(12)), st.integers(1, 3))
def test_nothing_is_committed_before_everything_below_it_is_done(ends, partitions):
    """Whatever order jobs end in: a committed offset has only handled ones below it, and in the end all are committed."""
    order, done, last = CommitOrder(), set(), {}
    records = [record(n // partitions, n % partitions) for n in range(12)]
    for each in records:
        order.add(each)
    for index in ends:
        done.add((records[index].partition, records[index].offset))
        found = order.complete(records[index])
        if found is not None:
            assert {(found.partition, n) for n in range(found.offset + 1)} <= done
            assert found.offset > last.get(found.partition, -1)
            last[found.partition] = found.offset
    assert last == {p: max(r.offset for r in records if r.partition == p) for p in range(partitions)}


def test_a_partition_that_comes_back_is_committed_by_what_was_read_since():
    order = CommitOrder()
    order.add(record(5))
    order.add(record(5, epoch=1))
    assert order.complete(record(5, epoch=1)).epoch == 1
    assert order.complete(record(5)).epoch == 0


def test_case_27_what_was_read_of_a_lost_partition_is_not_kept():
    """A learner whose group rebalances often kept every record that it had read and not committed by then."""
    order = CommitOrder()
    for epoch in range(100):
        for each in (record(5, epoch=epoch), record(6, epoch=epoch), record(5, 1)):
            order.add(each)
        order.complete(record(6, epoch=epoch))
        order.complete(record(5, 1))
        order.drop_lost(lambda each, epoch=epoch: each.partition == 1 or each.epoch == epoch + 1)
        assert order.complete(record(5, epoch=epoch)) is None  # its job was running when the partition was taken away
    assert len(order) == 0
    assert order._completed == set()


def test_waiters_get_the_lock_in_the_order_in_which_they_asked():
    lock, order = FairLock(), []
    lock.acquire()
    lock.acquire()  # reentrant
    threads = []
    for number in range(4):
        thread = threading.Thread(target=lambda n=number: (lock.acquire(), order.append(n), lock.release()))
        thread.start()
        threads.append(thread)
        while len(lock._waiters) <= number:
            pass
    lock.release()
    assert order == []
    lock.release()
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3]
    with pytest.raises(RuntimeError):
        lock.release()


def test_a_thread_that_asks_again_at_once_waits_for_its_turn():
    """The holder releases and asks again, as a training loop does; the waiter comes first."""
    lock, order = FairLock(), []
    lock.acquire()
    waiter = threading.Thread(target=lambda: (lock.acquire(), order.append("waiter"), lock.release()))
    waiter.start()
    while not lock._waiters:
        pass
    lock.release()
    with lock:
        order.append("holder")
    waiter.join(10)
    assert order == ["waiter", "holder"]


def test_every_turn_computes_with_its_own_thread_count():
    before = torch.get_num_threads()
    try:
        lock = FairLock()
        one, two = ComputeTurns(lock, 1), ComputeTurns(lock, 2)
        for turns, wanted in ((one, 1), (two, 2), (one, 1)):
            with turns:
                assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


def test_a_stopping_role_ends_a_long_job_after_its_grace():
    now_s, stop, ticks = [0.0], threading.Event(), []
    writer = SimpleNamespace(threads=1, on_step=None)
    lane = Lane(0, writer, lambda *_: None, print, lambda: ticks.append(1), stop, lambda: now_s[0])  # type: ignore[arg-type]
    try:
        writer.on_step()
        stop.set()
        writer.on_step()
        now_s[0] = STOP_GRACE_S
        writer.on_step()
        now_s[0] += 1
        with pytest.raises(JobInterruptedError):
            writer.on_step()
        assert len(ticks) == 4
    finally:
        lane.close()


def test_a_role_that_fails_does_not_wait_for_the_job_of_another_lane():
    """The lane kept health green by its steps, for as long as its rebuild took, while nobody read the topic any more."""
    writer = SimpleNamespace(threads=1, on_step=None)
    lane = Lane(0, writer, lambda *_: None, print, lambda: None, threading.Event(), time.monotonic)  # type: ignore[arg-type]
    ended = threading.Event()

    def rebuild(*_: object) -> JobResult:
        while not ended.wait(0.005):
            writer.on_step()
        return JobResult("unchanged", None, None)

    result = lane.start(SimpleNamespace(traceparent=None), rebuild)  # type: ignore[arg-type]
    closing = threading.Thread(target=lane.close)
    closing.start()
    try:
        closing.join(60)
        assert not closing.is_alive()
        assert isinstance(result.exception(), JobInterruptedError)
    finally:
        ended.set()
        closing.join(60)
