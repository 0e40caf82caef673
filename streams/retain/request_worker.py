"""Carry retention requests on: accept them, take their steps adapter by adapter, and run the calendar.

All of it comes in slices of bounded work. Whoever drives it (streams/retain/service.py) performs a slice before it asks
for the next one: apply the changes of quarantines, send the events, save. A crash at any point repeats the slice, which
does no harm: changes are idempotent, and the jobs have the same ids again.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import ClassVar, Final

from perennial.storage.registry.quarantine import Quarantine, update_quarantine
from perennial.streams.events.fields import PERMANENT
from perennial.streams.events.models import RetentionKind, RetentionRequested
from perennial.streams.events.tenants import may_end
from perennial.streams.events.wire_error import PURE_ERRORS, WireError
from perennial.streams.retain.adapter_calendar import AdapterCalendar
from perennial.streams.retain.ended_requests import EndedRequests
from perennial.streams.retain.ledger import (
    AdapterProgress,
    Approval,
    PageSummary,
    RequestRecord,
    by_page,
    covers,
    page_of,
    patterns_over,
)
from perennial.streams.retain.request_cache import RequestCache, StoredRequest
from perennial.streams.retain.request_store import KEEP_MS, RequestStore, hash_of
from perennial.streams.retain.rules.approvals import ApprovalRules, expired_text, waiting_text
from perennial.streams.retain.rules.calendar import earlier_ids_of, require_outside_id
from perennial.streams.retain.rules.jobs import QuarantineChange
from perennial.streams.retain.rules.state_machine import (
    MAX_DETAIL_CHARS,
    RequestProcessor,
    with_progress,
)
from perennial.streams.retain.rules.step_facts import Facts
from perennial.streams.retain.rules.transitions import OPEN_PHASES
from perennial.streams.retain.work_slice import SLICE_ADAPTERS, Slice
from perennial.streams.retention.kinds import KINDS, is_pattern, refusal_of

log = logging.getLogger("perennial.retain")

CALENDAR_BUDGET_S: Final = 1.0
"""About how long one tick may look at adapters for the calendar; the next tick goes on from there."""
_MIN_ADAPTERS_PER_TICK: Final = 16
TICK_BUDGET_S: Final = 2.0
"""About how long one tick goes on with open requests; the next tick goes on from there."""


class RequestWorker:
    """Accepts retention requests and carries them on, in slices. Not thread-safe.

    Args:
        store: Where requests and quarantines are stored.
        facts: The state of the store and of the replicas.
        at: Returns the time that published states carry.
        on_save: Called with a request as it was (None where it is new) and as it was stored.
        gather_ms: How long requests are gathered, so that one rebuild serves them, in milliseconds.
        lead_ms: How long before examples expire the learner begins to rebuild without them, in milliseconds.
        approvals: Which requests wait for a second approver.
        tenants: Tenants that have topics of their own.

    Attributes:
        cache: The requests that something can still change.
    """

    def __init__(
        self,
        store: RequestStore,
        facts: Facts,
        at: Callable[[], datetime],
        on_save: Callable[[RequestRecord | None, RequestRecord], None] = lambda *_: None,
        *,
        gather_ms: int = 0,
        lead_ms: int = 0,
        approvals: ApprovalRules | None = None,
        tenants: Sequence[str] = (),
    ) -> None:
        self.cache = RequestCache(store, on_save)
        self._store = store
        self._facts = facts
        self._at = at
        self._gather_ms = gather_ms
        self._approvals, self._tenants = approvals or ApprovalRules(), tenants
        self._calendar = AdapterCalendar(facts, lead_ms)
        self._looked_at: set[str] = set()
        self._waiting_pages: dict[str, set[str]] = {}  # pages of patterns with adapters that are new, by request
        self._begun: dict[str, Iterator[Slice]] = {}  # requests that did not end within the budget of a tick
        self._turn: deque[str] = deque()
        self._ended = EndedRequests(store, self.cache)

    # ---- accepting requests

    def receive(
        self, request: RetentionRequested, received_ms: int, now_ms: int, signed: RetentionRequested | None = None
    ) -> Iterator[Slice]:
        """Accept or refuse a request and take its first step; of a redelivered one only publish the state again.

        Args:
            request: The request, with the id by which retain knows it.
            received_ms: When the broker took it, in milliseconds since 1970.
            now_ms: The guarded time, in milliseconds since 1970.
            signed: The request as it came from the topic, where the two differ.

        Raises:
            WireError: Another request had the same id, the id is reserved, or a record approves nothing.
        """
        require_outside_id(request.request_id)
        self._facts.begin()
        self.cache.refresh_in_force()
        name, processor = hash_of(request.request_id), self._processor(now_ms)
        found = self.cache.load(name)
        wanted = before = found.record if found else None
        if request.approved_by is not None:
            wanted = self._approvals.approved(before, signed or request, received_ms)
        elif before is not None and before.request != request:
            raise WireError("bad-field", "request_id", got=request.request_id, allowed="an id not used before")
        if found is not None and wanted is before:
            processor.publish_state(found.record)
            yield Slice(events=processor.events)
            self.cache.announce(in_force=found.record.in_force)  # it may have been saved and not announced
            if KINDS[request.kind].job is not None or found.record.state != "accepted":
                return
        elif wanted is not None:
            yield self._saving(processor, self._started(processor, wanted), found)
        else:
            approval = self._approvals.needed(signed or request, received_ms)
            yield self._saving(processor, self._accepted(processor, request, received_ms, approval), None)
        if not (is_pattern(request.adapter) and (KINDS[request.kind].job is not None or request.kind == "hold")):
            yield from self._guarded(name, now_ms)  # what has to reach many adapters is for the ticks

    def _accepted(
        self, processor: RequestProcessor, request: RetentionRequested, received_ms: int, approval: Approval | None
    ) -> RequestRecord:
        record = RequestRecord.of(request, received_ms)
        refusal = refusal_of(request, received_ms)
        if refusal:
            processor.publish_state(record)
            return processor.set_state(record, "failed", refusal, processor.now_ms)
        if approval is not None:
            record = record.model_copy(update={"approval": approval})
            return processor.set_state(record, "unapproved", waiting_text(record))
        return self._started(processor, record)

    def _started(self, processor: RequestProcessor, record: RequestRecord) -> RequestRecord:
        """Return an accepted request with the adapters and the requests that it reaches, and publish its state."""
        request, ends = record.request, list[str]()
        pages: dict[str, PageSummary] = {}
        if request.kind in {"policy", "release"}:
            like = self.cache.in_force.like("policy" if request.kind == "policy" else "hold", request)
            ends = [other for other in like if may_end(request.request_id, other, self._tenants)]
        if KINDS[request.kind].job is not None and record.is_pattern:
            for page, adapters in by_page(self._covered(request.adapter)).items():
                pages[page] = PageSummary(phases={"waiting": len(adapters)})
        record = record.model_copy(
            update={"ends": ends, "pages": pages, "state": "accepted", "detail": "", "ended_ms": None}
        )
        processor.publish_state(record)
        return record

    def _covered(self, pattern: str) -> list[str]:
        return [adapter for adapter in self._facts.adapters() if covers(pattern, adapter)]

    # ---- going on with open requests

    def tick(self, now_ms: int) -> Iterator[Slice]:
        """Run the calendar, go on with open requests, and remove requests that ended long ago.

        Args:
            now_ms: The guarded time, in milliseconds since 1970.

        Raises:
            KafkaUnavailableError: The acknowledgements of replicas cannot be read; the next tick goes on.
        """
        self._facts.begin()
        self.cache.refresh_in_force()
        for pattern in self.cache.refresh_open():
            self._looked_at -= {adapter for adapter in self._looked_at if covers(pattern, adapter)}
        for _, name in self.cache.hold_ends[: bisect_right(self.cache.hold_ends, (now_ms, "~"))]:
            yield from self._end_hold(name, "its due_at is reached", now_ms)
        yield from self._run_calendar(now_ms)
        yield from self._advance(now_ms)
        yield from self._ended.prune(now_ms)

    def _run_calendar(self, now_ms: int) -> Iterator[Slice]:
        """Do what the calendar says of some adapters; the next tick goes on with the adapters after them."""
        began = time.monotonic()
        for number, adapter in enumerate(self._calendar.order(now_ms), 1):
            if adapter not in self._looked_at:
                yield from self._look_at_new(adapter, now_ms)
            expiring = adapter in self.cache.expiring
            try:
                found = self._calendar.look(adapter, self.cache.in_force, expiring=expiring, now_ms=now_ms)
            except PURE_ERRORS:  # one adapter's example must not stop the calendar of every other adapter
                log.exception("the examples of %s cannot be examined: none of them expires", adapter)
                continue
            if found.jobs:
                yield Slice(events=list(found.jobs))
            for record in found.requests:
                if not self._exists(record):
                    processor = self._processor(now_ms)
                    processor.publish_state(record)
                    yield self._saving(processor, record, None)
            if number >= _MIN_ADAPTERS_PER_TICK and time.monotonic() - began > CALENDAR_BUDGET_S:
                return
            if number % SLICE_ADAPTERS == 0:
                yield Slice()

    def _look_at_new(self, adapter: str, now_ms: int) -> Iterator[Slice]:
        """Bring holds and requests over patterns to an adapter that this process sees for the first time.

        retain writes an entry of each request over a pattern into the quarantine of every adapter that it covers. So an
        adapter without the entry was not there when the request came.
        """
        quarantine = self._facts.quarantine(adapter)
        for pattern in patterns_over(adapter):
            for name in self.cache.patterns.get(pattern, ()):
                found = self.cache.get(name)
                if found is None or quarantine.entry(found.record.request.request_id) is not None:
                    continue
                # An example from before the request is in no topic any more once the request would have been removed.
                if found.record.open or now_ms < found.record.until_ms + KEEP_MS:
                    self._waiting_pages.setdefault(name, set()).add(page_of(adapter))
        if quarantine.holds != self.cache.in_force.holds_on(adapter):
            yield Slice(changes=[QuarantineChange(adapter)])
        self._looked_at.add(adapter)

    def _exists(self, record: RequestRecord) -> bool:
        request_id = record.request.request_id
        if self.cache.get(hash_of(request_id)) is not None:
            return True
        earlier = (self.cache.get(hash_of(one)) for one in earlier_ids_of(request_id))
        return any(found is not None and found.record.until_ms == record.until_ms for found in earlier)

    def _advance(self, now_ms: int) -> Iterator[Slice]:
        """Go on with open requests, in turn, until the budget of the tick is used up."""
        deadline = time.monotonic() + TICK_BUDGET_S
        can_move = {n for n, found in self.cache.open.items() if not found.record.is_early(now_ms)}
        can_move |= self._waiting_pages.keys()
        self._turn = deque(name for name in self._turn if name in can_move)
        self._turn.extend(sorted(can_move.difference(self._turn), key=self._received_ms))
        for _ in range(len(self._turn)):
            name = self._turn[0]
            self._turn.rotate(-1)
            work = self._begun.pop(name, None) or self._guarded(name, now_ms)
            for piece in work:
                yield piece
                if time.monotonic() > deadline:
                    self._begun[name] = work
                    break
            else:
                yield Slice()
            if time.monotonic() > deadline:
                return

    def _received_ms(self, name: str) -> int:
        found = self.cache.get(name)
        return found.record.received_ms if found else 0

    def _guarded(self, name: str, now_ms: int) -> Iterator[Slice]:
        """Go on with one request; if that fails by what the request or an example says, only this request fails."""
        try:
            yield from self._go_on(name, now_ms)
        except PURE_ERRORS as error:
            log.exception("request %s cannot go on", name)
            found = self.cache.load(name)
            if found is not None and found.record.open and KINDS[found.record.request.kind].job is not None:
                processor = self._processor(now_ms)
                detail = f"internal error, please report it: {type(error).__name__}: {error}"[:MAX_DETAIL_CHARS]
                yield self._saving(processor, processor.set_state(found.record, "failed", detail, now_ms), found)

    def _go_on(self, name: str, now_ms: int) -> Iterator[Slice]:
        """Do whatever can be done now for one request."""
        found = self.cache.get(name)
        if found is not None and found.record.open and found.record.unapproved:
            yield from self._await_approval(name, now_ms)
            return
        if found is None:
            self._waiting_pages.pop(name, None)
            return
        record, rules = found.record, KINDS[found.record.request.kind]
        if rules.job is None:
            if record.open:
                yield from self._WITHOUT_JOB[record.request.kind](self, name, now_ms)
        elif record.is_pattern:
            yield from self._advance_pages(name, now_ms)
        elif record.open and not record.is_early(now_ms):
            yield from self._advance_one(found, now_ms)

    def _await_approval(self, name: str, now_ms: int) -> Iterator[Slice]:
        """End a request that nobody approved in time; note that a process with another partition took the approval."""
        found = self.cache.reload(name)
        if found is None or not found.record.open:
            return
        record = found.record
        if not record.unapproved:  # adapters that this process looked at meanwhile may be new to the request
            self._looked_at -= {adapter for adapter in self._looked_at if covers(record.request.adapter, adapter)}
        elif record.approval is not None and record.approval.until_ms < now_ms:
            processor = self._processor(now_ms)
            yield self._saving(processor, processor.set_state(record, "failed", expired_text(record), now_ms), found)

    def _advance_one(self, found: StoredRequest, now_ms: int) -> Iterator[Slice]:
        record, processor = found.record, self._processor(now_ms)
        adapter = record.request.adapter
        before = record.adapters.get(adapter, AdapterProgress(phase="waiting"))
        adapters = {adapter: processor.step(record, adapter, before)}
        wanted = processor.settle(with_progress(record.model_copy(update={"adapters": adapters}), adapters))
        removals: list[QuarantineChange] = []
        if wanted.state == "closed" and wanted.example_ids:
            # The examples are at or below the high-water marks, so they cannot be learned again and the entry can go.
            # Hazard: it goes after the request is stored. Without it, an open request would never learn how it ended.
            removals.append(QuarantineChange(adapter, drop=(record.request.request_id,)))
        if wanted != record:
            yield replace(self._saving(processor, wanted, found), removals=removals)

    # ---- requests over a pattern

    def _advance_pages(self, name: str, now_ms: int) -> Iterator[Slice]:
        """Go on with the adapters of a request over a pattern, page by page."""
        found = self.cache.get(name)
        new = self._waiting_pages.pop(name, set())
        if found is None or not (found.record.open or new):
            return
        if new:
            yield from self._reopen(found, new, now_ms)
            found = self.cache.get(name)
        if found is None or found.record.is_early(now_ms):
            return
        if not found.record.pages:  # the pattern covers nothing
            processor = self._processor(now_ms)
            yield self._saving(processor, processor.settle(found.record), found)
            return
        covered = by_page(self._covered(found.record.request.adapter))
        for page in [page for page, summary in found.record.pages.items() if OPEN_PHASES & summary.phases.keys()]:
            yield from self._advance_page(name, page, covered.get(page, []), now_ms)

    def _reopen(self, found: StoredRequest, new: Iterable[str], now_ms: int) -> Iterator[Slice]:
        """Note that pages have adapters that the request did not reach yet, before anything is done about them."""
        record, pages = found.record, dict(found.record.pages)
        covered = by_page(self._covered(record.request.adapter))
        for page in new:
            summary = pages.get(page, PageSummary(phases={}))
            waiting = summary.phases.get("waiting", 0)
            reached = sum(summary.phases.values()) - waiting
            # At least one, also where one that it reached has left the store: only pages with one that waits are worked on.
            phases = summary.phases | {"waiting": max(1, waiting, len(covered.get(page, ())) - reached)}
            pages[page] = summary.model_copy(update={"phases": phases})
        processor = self._processor(now_ms)
        wanted = processor.settle(record.model_copy(update={"pages": pages, "ended_ms": None}))
        yield self._saving(processor, wanted, found)

    def _advance_page(self, name: str, page: str, covered: list[str], now_ms: int) -> Iterator[Slice]:
        cursor = ""
        while True:
            found = self.cache.get(name)
            if found is None or not found.record.open:
                return
            content, etag = self._store.load_page(name, page)
            grows = KINDS[found.record.request.kind].job == "forget"
            if not (grows or content.adapters):  # which adapters a revocation is for is settled once
                waiting = dict.fromkeys(covered, AdapterProgress(phase="waiting"))
                content = content.model_copy(update={"adapters": waiting})
            names = sorted({*content.adapters, *(covered if grows else ())})
            chunk = [adapter for adapter in names if adapter > cursor][:SLICE_ADAPTERS]
            processor, changed = self._processor(now_ms), {}
            for adapter in chunk:
                before = content.adapters.get(adapter, AdapterProgress(phase="waiting"))
                after = processor.step(found.record, adapter, before)
                if after != content.adapters.get(adapter):
                    changed[adapter] = after
            cursor = chunk[-1] if chunk else ""
            content = content.model_copy(update={"adapters": content.adapters | changed})
            summary = content.summary()
            if len(names) > len(content.adapters):  # adapters of later chunks, so that the request stays open
                left = summary.phases.get("waiting", 0) + len(names) - len(content.adapters)
                summary = summary.model_copy(update={"phases": summary.phases | {"waiting": left}})
            pages = found.record.pages | {page: summary}
            wanted = with_progress(found.record.model_copy(update={"pages": pages}), changed)
            wanted = processor.settle(wanted)
            saves: list[Callable[[], None]] = []
            if changed:
                saves.append(partial(self._store.save_page, name, page, content, etag))
            if wanted != found.record:
                saves.append(partial(self.cache.save, wanted, found))
            yield Slice(processor.changes, processor.events, saves)  # also an empty one ends the turn of this request
            if len(chunk) < SLICE_ADAPTERS:
                return

    # ---- kinds without a job

    def _policy(self, name: str, now_ms: int) -> Iterator[Slice]:
        found = self.cache.get(name)
        if found is None:
            return
        processor = self._processor(now_ms)
        record, request = found.record, found.record.request
        for other_id in record.ends:
            other = self.cache.get(hash_of(other_id))
            if other is not None and other.record.open:
                ended = processor.set_state(other.record, "closed", f"replaced by {request.request_id}", now_ms)
                yield self._saving(processor, ended, other)
                processor = self._processor(now_ms)
        if request.time_to_live == PERMANENT:
            wanted = processor.set_state(record, "closed", "the policy with this adapter and selector is ended", now_ms)
        else:
            wanted = processor.set_state(record, "executed", "in force until another policy replaces it")
        yield self._saving(processor, wanted, found)

    def _hold(self, name: str, now_ms: int) -> Iterator[Slice]:
        """Bring a hold to the quarantines of its adapters, or take it from them where it ends."""
        found = self.cache.get(name)
        if found is None:
            return
        pattern = found.record.request.adapter
        adapters = self._covered(pattern) if found.record.is_pattern else [pattern]
        for start in range(0, len(adapters), SLICE_ADAPTERS):
            chunk = adapters[start : start + SLICE_ADAPTERS]
            holds_on = self.cache.in_force.holds_on
            yield Slice([QuarantineChange(a) for a in chunk if self._facts.quarantine(a).holds != holds_on(a)])
        found = self.cache.get(name)
        if found is None or not found.record.open:
            return
        processor = self._processor(now_ms)
        if found.record.ending:
            wanted = processor.set_state(found.record, "closed", found.record.ending, now_ms)
        else:
            wanted = processor.set_state(found.record, "executed", "in force until it is released")
        yield self._saving(processor, wanted, found)

    def _release(self, name: str, now_ms: int) -> Iterator[Slice]:
        found = self.cache.get(name)
        if found is None:
            return
        processor, request = self._processor(now_ms), found.record.request
        released = found.record.ends
        if not released:
            holds = self.cache.in_force.all("hold")
            listed = ", ".join(sorted(hold.request.request_id for hold in holds)[:10]) or "none"
            wanted = processor.set_state(
                found.record, "failed",
                "no hold in force has this adapter and selector; a release must name both as the hold named them; "
                f"holds in force: {listed}",
                now_ms,
            )  # fmt: skip
        else:
            for hold_id in released:
                yield from self._end_hold(hash_of(hold_id), f"released by {request.request_id}", now_ms)
            text = f"released {len(released)} hold{'' if len(released) == 1 else 's'}"
            wanted = processor.set_state(found.record, "closed", text, now_ms)
        yield self._saving(processor, wanted, found)

    def _end_hold(self, name: str, why: str, now_ms: int) -> Iterator[Slice]:
        found = self.cache.load(name)
        if found is None or not found.record.open:
            return
        if not found.record.ending:
            yield self._saving(self._processor(now_ms), found.record.model_copy(update={"ending": why}), found)
        if not found.record.is_pattern:  # the next ticks take the hold from the many quarantines of a pattern
            yield from self._hold(name, now_ms)

    _WITHOUT_JOB: ClassVar[dict[RetentionKind, Callable[[RequestWorker, str, int], Iterator[Slice]]]] = {
        "policy": _policy, "hold": _hold, "release": _release,
    }  # fmt: skip
    """The functions that carry out the kinds whose `job` is None."""

    # ---- helpers

    def apply(self, change: QuarantineChange) -> None:
        """Change a quarantine, so that it also lists exactly the holds that are on the adapter.

        The holds are looked up after the quarantine was read, at each attempt. A process that adds a hold stores it
        first and then changes the quarantine, so either this attempt sees the hold or its compare-and-swap fails.
        """

        def changed(found: Quarantine) -> Quarantine:
            self.cache.refresh_in_force()
            return change.apply(found, self.cache.in_force.holds_on(change.adapter))

        self._facts.changed(update_quarantine(self._store.objects, change.adapter, changed))

    def drop_begun(self) -> None:
        """Begin every request anew in the next tick, because one of their slices could not be performed."""
        self._begun.clear()

    def _processor(self, now_ms: int) -> RequestProcessor:
        return RequestProcessor(self._facts, self.cache.in_force, now_ms, self._at(), self._gather_ms)

    def _saving(self, processor: RequestProcessor, record: RequestRecord, before: StoredRequest | None) -> Slice:
        return Slice(processor.changes, processor.events, [partial(self.cache.save, record, before)])
