"""The requests that something can still change, in memory; read again when another process added one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from perennial.storage.errors import ConflictError, IntegrityError
from perennial.streams.retain.ledger import RequestRecord, epoch_ms
from perennial.streams.retain.request_store import RequestStore, Revisions, hash_of, indexes_of
from perennial.streams.retain.rules.in_force import InForce
from perennial.streams.retention.kinds import KINDS

log = logging.getLogger("perennial.retain")


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A request as it was read or written last.

    Attributes:
        record: The request.
        etag: The etag that a compare-and-swap expects.
    """

    record: RequestRecord
    etag: str


class RequestCache:
    """Open requests, patterns, holds and policies in memory. Not thread-safe.

    A process that did not see another one's change finds out when it saves: the compare-and-swap fails, and the cache
    has the request as it is now.

    Args:
        store: Where the requests are stored.
        on_save: Called with a request as it was (None where it is new) and as it was stored.

    Attributes:
        store: The same.
        in_force: The holds and policies in force.
        hold_ends: When holds end by themselves, in milliseconds since 1970, and their hashes; sorted.
        open: Open requests that retain has to go on with, by hash.
        patterns: Requests that also are for adapters that appear later: hashes by pattern.
        expiring: The open expiries that the calendar made, hashes by adapter; without those that only wait for dependants
            of the adapter.
    """

    def __init__(
        self, store: RequestStore, on_save: Callable[[RequestRecord | None, RequestRecord], None] = lambda *_: None
    ) -> None:
        self.store = store
        self._on_save = on_save
        self.in_force = InForce()
        self.hold_ends: list[tuple[int, str]] = []
        self.open: dict[str, StoredRequest] = {}
        self.patterns: dict[str, set[str]] = {}
        self.expiring: dict[str, str] = {}
        self._pattern_requests: dict[str, StoredRequest] = {}
        self._in_force_requests: dict[str, RequestRecord] = {}
        self._known = Revisions(open=-1, in_force=-1)

    def refresh_in_force(self) -> None:
        """Read holds and policies again if a process added or ended one.

        Raises:
            IntegrityError: One of them is not readable. Nothing may be forgotten then: it may be a hold.
        """
        revision = self.store.revisions().in_force
        if revision == self._known.in_force:
            return
        names = set(self.store.names_in("in-force"))
        found = {name: record for name, record in self._in_force_requests.items() if name in names}
        for name in names - found.keys():
            loaded = self.store.load(name)
            if loaded is not None and loaded[0].in_force:
                found[name] = loaded[0]
        self._set_in_force(found)
        self._known = self._known.model_copy(update={"in_force": revision})

    def refresh_open(self) -> set[str]:
        """Read open requests and patterns again if a process added one; return the patterns that are new here."""
        revision = self.store.revisions().open
        if revision == self._known.open:
            return set()
        patterns_before = set(self.patterns)
        names = {*self.store.names_in("open"), *self.store.names_in("patterns")}
        for name in {*self.open, *self._pattern_requests} - names:
            self._place(name, None)
        for name in names - self.open.keys() - self._pattern_requests.keys():
            try:
                self._place(name, self.load(name))
            except IntegrityError as error:  # one bad object must not stop all other requests
                log.error("%s", error)  # noqa: TRY400 - the error says all; a traceback would hide it
        self._known = self._known.model_copy(update={"open": revision})
        return set(self.patterns) - patterns_before

    def get(self, name: str) -> StoredRequest | None:
        """Return a request: from memory where it is open or over a pattern, otherwise from the store."""
        found = self.open.get(name) or self._pattern_requests.get(name)
        return found or self.load(name)

    def load(self, name: str) -> StoredRequest | None:
        """Return a request as the store has it now; None where there is none."""
        loaded = self.store.load(name)
        return StoredRequest(*loaded) if loaded else None

    def reload(self, name: str) -> StoredRequest | None:
        """Read a request again that another process may have changed, and return it."""
        found = self.load(name)
        self._place(name, found)
        return found

    def save(self, record: RequestRecord, before: StoredRequest | None) -> None:
        """Store a request and keep it here if something can still change it.

        Args:
            record: The request as it is to be.
            before: The request as it was; None where it is new.

        Raises:
            ConflictError: Another process changed it first. The cache then has it as it is in the store.
        """
        name = hash_of(record.request.request_id)
        try:
            saved = StoredRequest(
                *self.store.save(record, before.record if before else None, before.etag if before else None)
            )
        except ConflictError:
            self._place(name, self.load(name))
            raise
        self._place(name, saved)
        had = indexes_of(before.record) if before else set()
        has = indexes_of(saved.record)
        in_force_changed = ("in-force" in had) != ("in-force" in has)
        if in_force_changed:
            others = {other: found for other, found in self._in_force_requests.items() if other != name}
            self._set_in_force(others | ({name: saved.record} if saved.record.in_force else {}))
        self._on_save(before.record if before else None, saved.record)
        if in_force_changed or (has - had) & {"open", "patterns"}:
            self.announce(in_force=in_force_changed)

    def remove(self, record: RequestRecord) -> None:
        """Delete a request that ended."""
        self.store.remove(record)
        self._place(hash_of(record.request.request_id), None)

    def announce(self, *, in_force: bool) -> None:
        """Let other processes read the indexes again.

        Args:
            in_force: Also the index of holds and policies.
        """
        revisions = self.store.bump(open_=True, in_force=in_force)
        known = self._known
        if revisions.open == known.open + 1:  # nobody else added anything in the meantime
            self._known = self._known.model_copy(update={"open": revisions.open})
        if in_force and revisions.in_force == known.in_force + 1:
            self._known = self._known.model_copy(update={"in_force": revisions.in_force})

    def _set_in_force(self, found: dict[str, RequestRecord]) -> None:
        self._in_force_requests = found
        self.in_force = InForce(found.values())
        self.hold_ends = sorted(
            (end_ms, name)
            for name, record in found.items()
            if KINDS[record.request.kind].due_at == "end" and (end_ms := epoch_ms(record.request.due_at)) is not None
        )

    def _place(self, name: str, found: StoredRequest | None) -> None:
        """Keep a request, or drop it where nothing can change it any more."""
        indexes = indexes_of(found.record) if found else set()
        known = self.open.pop(name, None) or self._pattern_requests.pop(name, None) or found
        self._pattern_requests.pop(name, None)
        if known is not None:
            adapter = known.record.request.adapter
            self.patterns.get(adapter, set()).discard(name)
            if not self.patterns.get(adapter, True):
                del self.patterns[adapter]
            if self.expiring.get(adapter) == name:
                del self.expiring[adapter]
        if found is None:
            return
        request = found.record.request
        if "open" in indexes:
            self.open[name] = found
            if found.record.example_ids and not any(p.dependants for p in found.record.adapters.values()):
                self.expiring[request.adapter] = name
        if "patterns" in indexes:
            self._pattern_requests[name] = found
            self.patterns.setdefault(request.adapter, set()).add(name)
