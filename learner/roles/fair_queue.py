"""Which waiting job starts next: a weighted fair queue over tenants. No I/O; the clock is an argument.

A tenant is the first segment of an adapter's name. The rules, in this order:

1. Jobs of one adapter start in the order in which they were added, which is the order of its cuts, and never while
   another job of the adapter runs.
2. Jobs that forget, roll back or revoke are not held back: between two of them start no more updates than a pass has
   places. Updates of the same adapter that were added before such a job take every other start, so that it comes soon.
3. Tenants within their budget come before those that used up theirs in the last 60 minutes. Those wait no longer than
   until the hour's tokens are below the budget again, and not at all while nobody else's job may start.
4. Among these, tenants take turns by the tokens that they started, divided by their weight (start-time fair queueing:
   Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996). A tenant that was idle is next, and gains no credit for
   the time in which it was idle. So a flood of one tenant delays another's job by what is already running, and by no
   more tokens than the other tenant itself started just before.
5. Within a tenant the job with the oldest example is first. An update that is expected to lower the loss much has a
   head start of `HEAD_START_S_PER_NAT` seconds per nat, of at most `MAX_HEAD_START_S`. So no update is overtaken by
   examples that are published later than that after its own.

A call takes O(log n) steps over what waits, and one for each job that runs and each tenant without a budget left.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from perennial.learner.roles.job_figures import JobFigures, tenant_of

T = TypeVar("T")

HEAD_START_S_PER_NAT = 30.0
"""A fall of the loss by one nat per token is worth as many seconds of age. Curate lets an example wait as long."""
MAX_HEAD_START_S = 30.0
HOUR_MIN = 60
MAX_GAINS = 10_000
"""Adapters whose last gain is remembered."""
SWEEP_EVERY = 1_024
"""Starts between two searches for tenants that need not be remembered any more."""


@dataclass(eq=False, slots=True)
class QueueEntry(Generic[T]):
    """A job that waits.

    Attributes:
        job: what `add` was given.
        figures: its figures.
        seq: how many jobs were added before it.
        due_s: the publication time of its oldest example, less its head start.
    """

    job: T
    figures: JobFigures
    seq: int
    due_s: float

    @property
    def adapter(self) -> str:
        """The adapter that the job changes."""
        return self.figures.adapter


class TenantUsage(NamedTuple):
    """The figures of one tenant.

    Attributes:
        hour_tokens: tokens of the updates that started in the last 60 minutes.
        budget: tokens that may start in 60 minutes; None: no limit.
        waiting: updates that wait.
        over_budget: True where the tenant used up its budget, so that its updates wait for those of others.
    """

    hour_tokens: int
    budget: int | None
    waiting: int
    over_budget: bool


@dataclass(eq=False, slots=True)
class _Tenant:
    """A tenant's turn, budget and updates that may start.

    Attributes:
        name: the tenant's name.
        weight: its weight.
        budget: tokens per hour; None: no limit.
        finish: virtual time, in tokens per weight, at which what it started ends.
        start: virtual time at which its next update starts; fixed when the tenant begins to wait.
        heads: heap of (due_s, seq, entry): the first update of each of its adapters that does not run.
        listed: its item in the queue's heap of turns, if it stands there; others of it are outdated.
        over: it stands among those that used up their budget.
        minutes: (minute, tokens started in it) of the last hour, ascending.
        hour_tokens: sum of `minutes`.
        waiting: its updates that wait, including those of adapters whose job runs.
    """

    name: str
    weight: float
    budget: int | None
    finish: float = 0.0
    start: float | None = None
    heads: list[tuple[float, int, QueueEntry[Any]]] = field(default_factory=list)
    listed: tuple[float, float, int, _Tenant] | None = None
    over: bool = False
    minutes: deque[tuple[int, int]] = field(default_factory=deque)
    hour_tokens: int = 0
    waiting: int = 0

    def charge(self, tokens: int, now_s: float) -> None:
        """Count tokens that start now."""
        minute = int(now_s // 60)
        if self.minutes and self.minutes[-1][0] >= minute:
            self.minutes[-1] = (self.minutes[-1][0], self.minutes[-1][1] + tokens)
        else:
            self.minutes.append((minute, tokens))
        self.hour_tokens += tokens

    def slide(self, now_s: float) -> None:
        """Forget what started more than an hour ago."""
        minute = int(now_s // 60)
        while self.minutes and self.minutes[0][0] <= minute - HOUR_MIN:
            self.hour_tokens -= self.minutes.popleft()[1]

    def used_up(self) -> bool:
        """Return whether the tokens of the last hour reach the budget."""
        return self.budget is not None and self.hour_tokens >= self.budget

    def within_again_s(self) -> float:
        """Return when a tenant that used up its budget is within it again, if nothing of it starts until then."""
        left, minute = self.hour_tokens, 0
        for minute, tokens in self.minutes:  # noqa: B007 - the last one is what is wanted
            left -= tokens
            if self.budget is None or left < self.budget:
                break
        return (minute + HOUR_MIN) * 60.0


class FairQueue(Generic[T]):
    """The waiting jobs of a learner; see the module's docstring for the rules.

    Ask `next` which job may start, and call `start` if it does start. Not thread-safe.

    Args:
        weight: returns a tenant's weight, above 0.
        tokens_per_hour: returns a tenant's budget; None: no limit.
        places: updates of a pass: so many may start between two jobs of another kind, if both kinds wait.

    Example:
        >>> queue = FairQueue[str]()
        >>> for number in range(3):
        ...     _ = queue.add(f"flood {number}", JobFigures("acme/a", tokens=700, oldest_s=number))
        >>> queue.start(queue.next(busy=(), now_s=0), now_s=0)
        >>> _ = queue.add("small", JobFigures("globex/a", tokens=10, oldest_s=9))
        >>> queue.next(busy=(), now_s=1).job
        'small'
    """

    def __init__(
        self,
        weight: Callable[[str], float] = lambda _: 1.0,
        tokens_per_hour: Callable[[str], int | None] = lambda _: None,
        places: int = 1,
    ) -> None:
        self._weight = weight
        self._tokens_per_hour = tokens_per_hour
        self._gains: OrderedDict[str, float] = OrderedDict()
        self._tenants: dict[str, _Tenant] = {}
        self._virtual = 0.0  # the start of the update that started last
        self._last_finish = 0.0
        self._seq = 0
        self._starts = 0
        self._updates = 0
        self._places = places
        self._owed = 0  # starts of updates before a job that is no update, or one that stands before it, comes next
        self._clear()

    def _clear(self) -> None:
        """Forget the waiting jobs; the figures of tenants stay."""
        self._by_adapter: dict[str, deque[QueueEntry[T]]] = {}
        self._held: set[str] = set()  # adapters whose first update is in no heap, because a job of them runs
        self._turns: list[tuple[float, float, int, _Tenant]] = []  # heap of (start, due_s, seq, tenant)
        self._over: dict[str, _Tenant] = {}  # tenants with updates that may start, and no budget left
        self._within_again: list[tuple[float, str]] = []  # heap of (time in seconds, tenant)
        self._urgent: dict[int, QueueEntry[T]] = {}  # jobs that are no updates, by seq
        self._urgent_adapters: dict[str, int] = {}  # how many of them each adapter has
        self._size = 0

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return self._size

    def __iter__(self) -> Iterator[QueueEntry[T]]:
        """Return the entries of all waiting jobs, those of one adapter in order."""
        return (entry for entries in self._by_adapter.values() for entry in entries)

    def add(self, job: T, figures: JobFigures) -> QueueEntry[T]:
        """Add a job behind those of its adapter.

        Args:
            job: the job.
            figures: its figures; see `figures_of`.
        """
        gain = max(figures.drift_nats, self._gains.get(figures.adapter, 0.0))
        head_start_s = min(MAX_HEAD_START_S, HEAD_START_S_PER_NAT * gain)
        entry = QueueEntry(job, figures, self._seq, figures.oldest_s - head_start_s)
        self._seq += 1
        self._insert(entry)
        return entry

    def _insert(self, entry: QueueEntry[T]) -> None:
        entries = self._by_adapter.setdefault(entry.adapter, deque())
        entries.append(entry)
        self._size += 1
        if entry.figures.is_update:
            self._tenant(entry.adapter).waiting += 1
        else:
            self._urgent[entry.seq] = entry
            self._urgent_adapters[entry.adapter] = self._urgent_adapters.get(entry.adapter, 0) + 1
        if len(entries) == 1 and entry.adapter not in self._held:
            self._offer(entry.adapter)

    def _tenant(self, adapter: str) -> _Tenant:
        name = tenant_of(adapter)
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = _Tenant(name, max(self._weight(name), 1e-9), self._tokens_per_hour(name))
            self._tenants[name] = tenant
        return tenant

    def _offer(self, adapter: str) -> None:
        """Let the first job of an adapter wait for its tenant's turn, if it is an update."""
        entries = self._by_adapter.get(adapter)
        if not entries or not entries[0].figures.is_update:
            return
        tenant, entry = self._tenant(adapter), entries[0]
        heapq.heappush(tenant.heads, (entry.due_s, entry.seq, entry))
        if tenant.start is None:
            tenant.start = max(self._virtual, tenant.finish)
        self._list(tenant)

    def _list(self, tenant: _Tenant) -> None:
        """Put the tenant where its turn comes from: the heap of turns, or those without a budget."""
        waits = tenant.start is not None and bool(tenant.heads)
        if tenant.over and waits:
            self._over[tenant.name] = tenant
        else:
            self._over.pop(tenant.name, None)
        if tenant.start is None or not waits or tenant.over:
            tenant.listed = None
            return
        due_s, seq, _ = tenant.heads[0]
        turn = (tenant.start, due_s, seq, tenant)
        if tenant.listed != turn:
            tenant.listed = turn
            heapq.heappush(self._turns, turn)

    def next(
        self, busy: Collection[str], now_s: float, *, updates: bool = True, others: bool = True, hold: bool = False
    ) -> QueueEntry[T] | None:
        """Return the job that is to start next; None if none may. It goes on waiting until `start` is called.

        Args:
            busy: adapters of which a job runs.
            now_s: monotonic clock, in seconds.
            updates: False where no update may start now.
            others: False where no job that forgets, rolls back or revokes may start now.
            hold: such a job may start once what runs has ended: where its turn has come, no update starts before it.
                Otherwise a stream of short updates could keep it waiting for ever.
        """
        for adapter in [adapter for adapter in self._held if adapter not in busy]:
            self._held.discard(adapter)
            self._offer(adapter)
        self._end_of_waiting_for_budget(now_s)
        urgent = self._next_urgent(busy, updates, others or hold)
        if urgent is not None and not self._owed:
            return urgent if urgent.figures.is_update or others else None
        fair = self._next_in_turn(busy) or self._next_over(busy) if updates else None
        return fair or (urgent if urgent is None or urgent.figures.is_update or others else None)

    def _next_urgent(self, busy: Collection[str], updates: bool, others: bool) -> QueueEntry[T] | None:
        """Return the first job of the adapter whose job that is no update was added first, of the kinds that may start."""
        for waiting in self._urgent.values():
            first = self._by_adapter[waiting.adapter][0]
            if waiting.adapter not in busy and (updates if first.figures.is_update else others):
                return first
        return None

    def _next_in_turn(self, busy: Collection[str]) -> QueueEntry[T] | None:
        while self._turns:
            turn = self._turns[0]
            tenant = turn[3]
            if tenant.listed is not turn:
                heapq.heappop(self._turns)
                continue
            entry = self._first(tenant, busy)
            if entry is not None and (entry.due_s, entry.seq) == turn[1:3]:
                return entry
            heapq.heappop(self._turns)
            tenant.listed = None
            self._list(tenant)  # with another first job, or, where every adapter's job runs, not at all
        return None

    def _next_over(self, busy: Collection[str]) -> QueueEntry[T] | None:
        """Return the job of the tenant whose turn it is among those without a budget."""
        found: tuple[float, float, int, QueueEntry[T]] | None = None
        for tenant in list(self._over.values()):
            entry = self._first(tenant, busy)
            if entry is None:
                self._list(tenant)
                continue
            # A tenant without a budget gains no credit while it waits: others of its kind may have come since.
            start = max(self._virtual, tenant.start or 0.0)
            candidate = (start, entry.due_s, entry.seq, entry)
            if found is None or candidate[:3] < found[:3]:
                found = candidate
        return found[3] if found else None

    def _first(self, tenant: _Tenant, busy: Collection[str]) -> QueueEntry[T] | None:
        """Return the tenant's first update that may start; set aside adapters whose job runs."""
        while tenant.heads:
            entry = tenant.heads[0][2]
            entries = self._by_adapter.get(entry.adapter)
            if entries and entries[0] is entry:
                if entry.adapter not in busy:
                    return entry
                self._held.add(entry.adapter)
            heapq.heappop(tenant.heads)
        tenant.start = None
        return None

    def start(self, entry: QueueEntry[T], now_s: float) -> None:
        """Take a job out of the queue because it starts, and charge its tokens to its tenant.

        Args:
            entry: what `next` returned.
            now_s: monotonic clock, in seconds.

        Raises:
            ValueError: the job does not wait, or an earlier one of its adapter does.
        """
        entries = self._by_adapter.get(entry.adapter)
        if not entries or entries[0] is not entry:
            raise ValueError(f"only the first waiting job of {entry.adapter} can start")
        entries.popleft()
        self._size -= 1
        urgent = entry.adapter in self._urgent_adapters
        if urgent:
            self._owed = 1 if entry.figures.is_update else self._places
        else:
            self._owed = max(0, self._owed - 1)
        if entries:
            self._held.add(entry.adapter)
        else:
            del self._by_adapter[entry.adapter]
        if entry.figures.is_update:
            self._charge(entry, urgent, now_s)
        else:
            del self._urgent[entry.seq]
            self._urgent_adapters[entry.adapter] -= 1
            if not self._urgent_adapters[entry.adapter]:
                del self._urgent_adapters[entry.adapter]
        if not self._size:  # nobody waits, so nobody is owed a turn
            self._virtual = max(self._virtual, self._last_finish)
        self._starts += 1
        if self._starts % SWEEP_EVERY == 0:
            self._sweep(now_s)

    def _charge(self, entry: QueueEntry[T], urgent: bool, now_s: float) -> None:
        tenant, tokens = self._tenant(entry.adapter), max(1, entry.figures.tokens)
        start = max(self._virtual, tenant.finish if tenant.start is None else tenant.start)
        if not urgent:  # such a job may start before the turn of others, who must not lose it
            self._virtual = start
        tenant.finish = start + tokens / tenant.weight
        self._last_finish = max(self._last_finish, tenant.finish)
        tenant.waiting -= 1
        tenant.charge(tokens, now_s)
        tenant.slide(now_s)
        if tenant.used_up() and not tenant.over:
            tenant.over = True
            heapq.heappush(self._within_again, (tenant.within_again_s(), tenant.name))
        while tenant.heads and not self._is_first(tenant.heads[0][2]):
            heapq.heappop(tenant.heads)
        tenant.start = tenant.finish if tenant.heads else None
        self._list(tenant)

    def _is_first(self, entry: QueueEntry[Any]) -> bool:
        entries = self._by_adapter.get(entry.adapter)
        return entries is not None and entries[0] is entry

    def _end_of_waiting_for_budget(self, now_s: float) -> None:
        while self._within_again and self._within_again[0][0] <= now_s:
            _, name = heapq.heappop(self._within_again)
            tenant = self._tenants.get(name)
            if tenant is None or not tenant.over:
                continue
            tenant.slide(now_s)
            tenant.over = tenant.used_up()
            if tenant.over:
                heapq.heappush(self._within_again, (tenant.within_again_s(), name))
                continue
            if tenant.start is not None:
                tenant.start = max(self._virtual, tenant.start)
            self._list(tenant)

    def learned(self, adapter: str, gain_nats: float) -> None:
        """Remember by how much an update of an adapter lowered the loss, for the head start of its next ones.

        Args:
            adapter: the adapter.
            gain_nats: the fall of the loss on the new text, in nats per token; 0 where the gate refused the version.
        """
        before = self._gains.pop(adapter, gain_nats)
        self._gains[adapter] = (before + max(0.0, gain_nats)) / 2
        if len(self._gains) > MAX_GAINS:
            self._gains.popitem(last=False)

    def keep(self, wanted: Callable[[T], bool]) -> None:
        """Drop the jobs that are not wanted any more, because another process reads them.

        Args:
            wanted: returns whether a job goes on waiting.
        """
        entries = sorted(self, key=lambda entry: entry.seq)
        kept = [entry for entry in entries if wanted(entry.job)]
        if len(kept) == len(entries):
            return
        self._clear()
        for tenant in self._tenants.values():
            tenant.heads, tenant.listed, tenant.waiting = [], None, 0
            if tenant.over:
                self._within_again.append((tenant.within_again_s(), tenant.name))
        heapq.heapify(self._within_again)
        for entry in kept:
            self._insert(entry)
        for tenant in self._tenants.values():
            if not tenant.heads:
                tenant.start = None

    def usage(self, now_s: float) -> dict[str, TenantUsage]:
        """Return the figures of every tenant that has updates waiting, or started some in the last 60 minutes."""
        self._end_of_waiting_for_budget(now_s)
        found = {}
        for tenant in self._tenants.values():
            tenant.slide(now_s)
            if tenant.waiting or tenant.minutes:
                found[tenant.name] = TenantUsage(tenant.hour_tokens, tenant.budget, tenant.waiting, tenant.over)
        return found

    def _sweep(self, now_s: float) -> None:
        """Forget tenants that have nothing waiting, nothing to pay back and no tokens in the last hour."""
        for tenant in list(self._tenants.values()):
            tenant.slide(now_s)
            if not tenant.over and not tenant.waiting and not tenant.minutes and tenant.finish <= self._virtual:
                del self._tenants[tenant.name]
