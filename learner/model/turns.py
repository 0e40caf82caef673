"""A fair lock on the base, and how several threads train on it in turns."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import Self

import torch


class FairLock:
    """A reentrant lock that waiters get in the order in which they asked for it.

    With a plain lock, a thread that releases it and asks for it again usually gets it before a waiter wakes up, so one
    training job could keep every other user of the base waiting until its end.
    """

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._waiters: deque[tuple[int, threading.Lock]] = deque()

    def acquire(self) -> None:
        """Take the lock; wait behind those that asked before."""
        me = threading.get_ident()
        with self._state:
            if self._owner == me or (self._owner is None and not self._waiters):
                self._owner, self._depth = me, self._depth + 1
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiters.append((me, gate))
        gate.acquire()  # `release` hands the lock over, then opens the gate

    def release(self) -> None:
        """Give the lock to the waiter that asked first.

        Raises:
            RuntimeError: This thread does not have the lock.
        """
        with self._state:
            if self._owner != threading.get_ident():
                raise RuntimeError("release of a lock that another thread has")
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._waiters:
                self._owner, gate = self._waiters.popleft()
                self._depth = 1
                gate.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.release()


class ComputeTurns:
    """One training thread's use of the shared lock: every turn computes with the thread count that this thread needs.

    Hazard: torch's thread count belongs to the process, and it decides the last bits. A rebuild that repeats updates of
    another thread count must not change the bits of a job that trains in the turns between.

    Args:
        lock: The lock that all users of the base share.
        threads: CPU threads that an operation may use.
    """

    def __init__(self, lock: FairLock, threads: int) -> None:
        self.lock = lock
        self.threads = threads

    def __enter__(self) -> Self:
        self.lock.acquire()
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.lock.release()
