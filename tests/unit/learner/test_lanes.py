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
from perennial.learner.roles.lanes import LONG_JOB_S, STOP_GRACE_S, CommitOrder, Lane, WaitingJob, next_job
from perennial.learner.versions.job_result import JobInterruptedError, JobResult
from perennial.streams.kafka.group import ConsumedRecord

SHORT_S, LONG_S = LONG_JOB_S / 2, LONG_JOB_S * 2


def waiting(*adapters: str) -> list[WaitingJob]:
    envelope = lambda adapter: SimpleNamespace(event=SimpleNamespace(adapter=adapter))  # noqa: E731
    return [WaitingJob(record(n), envelope(adapter)) for n, adapter in enumerate(adapters)]  # type: ignore[arg-type]


def record(offset: int, partition: int = 0, epoch: int = 0) -> ConsumedRecord:
    return ConsumedRecord("adapter-jobs", partition, offset, None, b"", [], epoch)


@pytest.mark.parametrize(
    ("adapters", "running_s", "busy", "wanted"),
    [
        ("ab", [], "", 0),
        ("ab", [SHORT_S], "x", None),  # a short job has the machine for itself
        ("ab", [LONG_S], "x", 0),
        ("aab", [LONG_S], "a", 2),  # jobs of one adapter stay in order: the second a does not start, either
        ("aa", [LONG_S], "a", None),
        ("ab", [LONG_S, SHORT_S], "xy", None),
        ("ab", [LONG_S, LONG_S], "xy", 0),
        ("ab", [LONG_S, LONG_S, LONG_S], "xyz", None),
        ("", [], "", None),
    ],
)
def test_attack_n_a_job_starts_beside_long_jobs_of_other_adapters_only(adapters, running_s, busy, wanted):
    assert next_job(waiting(*adapters), running_s, set(busy), lanes=3) == wanted


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
