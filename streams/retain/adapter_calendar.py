"""Look at adapters for what falls due: each when its next example does, and all of them in turn for what is new."""

from __future__ import annotations

import heapq
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from perennial.streams.events.models import ForgetRequested
from perennial.streams.retain.ledger import RequestRecord
from perennial.streams.retain.rules.calendar import expiries, expiry_request, preparation, supersessions
from perennial.streams.retain.rules.in_force import InForce
from perennial.streams.retain.rules.step_facts import Facts

HORIZON_MS: Final = 86_400_000
"""How far ahead of time the index is asked for examples whose life ends."""

ROUND_EVERY_S: Final = 5.0
"""The least time between the beginnings of two rounds over more adapters than MAX_FREQUENT."""
MAX_FREQUENT: Final = 64


@dataclass(frozen=True, slots=True)
class Findings:
    """What is to be done about an adapter.

    Attributes:
        requests: New requests of the calendar; some of them may exist already.
        jobs: Jobs that rebuild ahead of time.
    """

    requests: list[RequestRecord] = field(default_factory=list)
    jobs: list[ForgetRequested] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known of an adapter until its newest version or its holds and policies change."""

    version: str
    rules: tuple[str, ...]
    look_ms: int
    prepared: tuple[str, ...] = ()


class AdapterCalendar:
    """Remembers of each adapter when to look at it again. Not thread-safe.

    An adapter that did not change costs one look at its newest version per round; its examples are read only after a
    change, and when the next of them falls due.

    Args:
        facts: The state of the store.
        lead_ms: How long before examples expire the learner begins to rebuild without them; 0: not before.
    """

    def __init__(self, facts: Facts, lead_ms: int) -> None:
        self._facts = facts
        self._lead_ms = lead_ms
        self._plans: dict[str, _Plan] = {}
        self._due: list[tuple[int, str]] = []
        self._next_adapter = ""
        self._left = 0
        self._round_s = float("-inf")

    def order(self, now_ms: int) -> Iterator[str]:
        """Yield the adapters to look at: first those with something due, then the next ones of the round over all.

        A round goes on where the last call ended, and looks at each adapter once. Where there are many, the next round
        begins ROUND_EVERY_S after the last one did, so that an idle process does not read the store all the time.

        Args:
            now_ms: The guarded time, in milliseconds since 1970.
        """
        while self._due and self._due[0][0] <= now_ms:
            look_ms, adapter = heapq.heappop(self._due)
            plan = self._plans.get(adapter)
            if plan is not None and plan.look_ms == look_ms:
                yield adapter
        names = self._facts.adapters()
        if self._left <= 0:
            if len(names) > MAX_FREQUENT and time.monotonic() - self._round_s < ROUND_EVERY_S:
                return
            self._left, self._round_s = len(names), time.monotonic()
        start = bisect_right(names, self._next_adapter)
        for i in range(min(self._left, len(names))):
            self._next_adapter = names[(start + i) % len(names)]
            self._left -= 1
            yield self._next_adapter

    def look(self, adapter: str, in_force: InForce, *, expiring: bool, now_ms: int) -> Findings:
        """Return what is to be done about an adapter now.

        Args:
            adapter: The adapter.
            in_force: Holds and policies.
            expiring: An expiry of the adapter is open; what falls due in the meantime goes with the next one.
            now_ms: The guarded time, in milliseconds since 1970.
        """
        version, plan = self._facts.newest(adapter), self._plans.get(adapter)
        rules = in_force.ids_on(adapter)
        changed = plan is None or (plan.version, plan.rules) != (version, rules)
        if not changed and plan is not None and now_ms < plan.look_ms:
            return Findings()
        found = Findings()
        if changed or in_force.policies_on(adapter):
            stored = self._facts.examples(adapter)
            found.requests.extend(supersessions(adapter, stored, now_ms))
        else:
            stored = self._facts.due_before(adapter, now_ms + HORIZON_MS)
        ends = expiries(in_force, adapter, stored, now_ms)
        prepared = plan.prepared if plan else ()
        look_ms = now_ms + HORIZON_MS - self._lead_ms if ends.next_ms is None else ends.next_ms
        if ends.due:
            look_ms = now_ms  # until they are gone
            if not expiring:
                found.requests.append(expiry_request(adapter, ends.due, now_ms, ends.end_ms))
        elif ends.next_ms is not None and not expiring and ends.upcoming != prepared:
            if self._lead_ms and ends.next_ms <= now_ms + self._lead_ms:
                found.jobs.append(preparation(adapter, ends.upcoming, ends.next_ms))
                prepared = ends.upcoming
            else:
                look_ms = ends.next_ms - self._lead_ms
        self._plans[adapter] = _Plan(version, rules, look_ms, prepared)
        if not ends.due:
            heapq.heappush(self._due, (look_ms, adapter))
        return found
