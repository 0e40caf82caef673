"""The objects of retention requests: one object per request, and indexes of those that something can still change.

    retention/requests/<hash>             one request with its state; the hash is of its id
    retention/progress/<hash>/<page>      progress of a request over a pattern, in 256 pages by the adapter's name
    retention/index/open/<hash>           the request is open and retain has to go on with it
    retention/index/in-force/<hash>       the request is a hold or a policy in force
    retention/index/patterns/<hash>       the request also is for adapters that do not exist yet
    retention/index/unapproved/<hash>     the request waits for a second approver
    retention/index/failed/<hash>         the request failed in some adapter: it stays until a person removes it
    retention/index/ended/<time>/<hash>   the request ended; it is removed at that time
    retention/revisions                   two numbers that grow when the indexes of open requests and of those in force do

An index is a list of empty objects. An entry is added before the request's own object is written, and removed after
it. So an index may name a request that does not belong to it any more, and never misses one; whoever reads an
index looks at the request. Every object is replaced by compare-and-swap, so a process that was believed dead and goes
on cannot undo what another one stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Final, Literal, TypeVar

from pydantic import ValidationError

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.compare_and_swap import update_object
from perennial.streams.retain.ledger import AdapterProgress, LedgerPart, ProgressPage, RequestRecord
from perennial.streams.retain.rules.calendar import CALENDAR
from perennial.streams.retain.rules.in_force import InForce
from perennial.streams.retention.kinds import KINDS

REQUESTS: Final = "retention/requests/"
PROGRESS: Final = "retention/progress/"
INDEX: Final = "retention/index/"
REVISIONS_KEY: Final = "retention/revisions"
KEEP_MS: Final = 30 * 86_400_000
"""Time for which an ended request is kept: longer than an example published before it can wait, at a week per topic."""
KEEP_OWN_MS: Final = 86_400_000
"""Time for which a closed expiry of the calendar is kept. On an endless stream a policy makes one after another."""
_MAX_BYTES: Final = 64 << 20
_T = TypeVar("_T", bound=LedgerPart)

Index = Literal["open", "in-force", "patterns", "failed", "unapproved"]


class Revisions(LedgerPart):
    """Numbers that tell other processes that an index has grown."""

    open: int = 0
    in_force: int = 0


def hash_of(request_id: str) -> str:
    """Return the name of a request's object."""
    return sha256(request_id.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def indexes_of(record: RequestRecord) -> set[str]:
    """Return the indexes that name a request, as keys below INDEX without the hash."""
    if record.open and record.unapproved:
        return {"open", "unapproved"}
    rules, found = KINDS[record.request.kind], set()
    if record.in_force:
        found.add("in-force")
    if record.open and (rules.job is not None or record.ending or record.state == "accepted"):
        found.add("open")
    if record.is_pattern and rules.job == "forget" and record.state != "failed":
        found.add("patterns")
    if record.ended_ms is not None:
        if record.state == "failed" and (record.adapters or record.pages):
            found.add("failed")
        else:
            found.add(f"ended/{record.ended_ms + keep_ms(record):014d}")
    return found


def keep_ms(record: RequestRecord) -> int:
    """Return for how long a request is kept after its end, in milliseconds.

    The quarantine entries of the calendar's own requests go when they are closed, and an example that comes due again is
    a new request.
    """
    own = record.request.requested_by == CALENDAR and bool(record.example_ids)
    return KEEP_OWN_MS if own and record.state == "closed" else KEEP_MS


class RequestStore:
    """Reads and writes the objects of retention requests.

    Args:
        store: The object store.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.objects = store

    def load(self, request_hash: str) -> tuple[RequestRecord, str] | None:
        """Return a request and its etag; None where there is none.

        Raises:
            IntegrityError: The object is not a request of this version.
        """
        return self._load(f"{REQUESTS}{request_hash}", RequestRecord)

    def save(self, record: RequestRecord, before: RequestRecord | None, etag: str | None) -> tuple[RequestRecord, str]:
        """Store a request and keep its indexes; return it as stored, and its etag.

        Args:
            record: The request as it is to be.
            before: The request as it was read; None where it is new.
            etag: The etag that belongs to `before`.

        Raises:
            ConflictError: Another process changed the request first.
        """
        name = hash_of(record.request.request_id)
        wanted = indexes_of(record)
        had = indexes_of(before) if before else set()
        self._add(name, wanted - had)
        record = record.model_copy(update={"revision": record.revision + 1})
        etag = self.objects.compare_and_swap(f"{REQUESTS}{name}", record.to_bytes(), etag)
        for index in sorted(had - wanted):
            self.objects.delete(f"{INDEX}{index}/{name}")
        return record, etag

    def add_to_indexes(self, record: RequestRecord) -> None:
        """Write the index entries that a stored request lacks."""
        self._add(hash_of(record.request.request_id), indexes_of(record))

    def remove(self, record: RequestRecord) -> None:
        """Delete a request that ended, its pages and its indexes."""
        name = hash_of(record.request.request_id)
        for key in list(self.objects.list(f"{PROGRESS}{name}/")):
            self.objects.delete(key)
        self.objects.delete(f"{REQUESTS}{name}")
        for index in sorted(indexes_of(record)):
            self.objects.delete(f"{INDEX}{index}/{name}")

    def load_page(self, request_hash: str, page: str) -> tuple[ProgressPage, str | None]:
        """Return a page of a request's progress and its etag; an empty one and None where none was written."""
        return self._load(f"{PROGRESS}{request_hash}/{page}", ProgressPage) or (ProgressPage(), None)

    def save_page(self, request_hash: str, page: str, content: ProgressPage, etag: str | None) -> None:
        """Store a page of a request's progress.

        Raises:
            ConflictError: Another process changed the page first.
        """
        content = content.model_copy(update={"revision": content.revision + 1})
        self.objects.compare_and_swap(f"{PROGRESS}{request_hash}/{page}", content.to_bytes(), etag)

    def pages(self, request_hash: str) -> Iterator[dict[str, AdapterProgress]]:
        """Yield the pages of a request's progress."""
        for key in self.objects.list(f"{PROGRESS}{request_hash}/"):
            yield self.load_page(request_hash, key.rpartition("/")[2])[0].adapters

    def names_in(self, index: Index) -> list[str]:
        """Return the hashes of the requests that an index names; look at each, for it may not belong there any more."""
        prefix = f"{INDEX}{index}/"
        return [key.removeprefix(prefix) for key in self.objects.list(prefix)]

    def to_remove(self, now_ms: int) -> Iterator[str]:
        """Yield the index entries, below INDEX, of ended requests whose time to be removed has come."""
        for key in self.objects.list(f"{INDEX}ended/"):
            entry = key.removeprefix(INDEX)
            if entry > f"ended/{now_ms:014d}/~":
                return
            yield entry

    def delete_entry(self, entry: str) -> None:
        """Delete an index entry whose request is gone or not in that index any more."""
        self.objects.delete(f"{INDEX}{entry}")

    def revisions(self) -> Revisions:
        """Return the revisions of the indexes."""
        return self._revisions()[0]

    def bump(self, *, open_: bool, in_force: bool) -> Revisions:
        """Raise the revisions of indexes after a request was added, so that other processes read them again."""

        def raised(found: Revisions) -> Revisions:
            return Revisions(open=found.open + open_, in_force=found.in_force + in_force)

        return update_object(self.objects, REVISIONS_KEY, self._revisions, raised, Revisions.to_bytes)

    def _add(self, name: str, indexes: set[str]) -> None:
        for index in sorted(indexes):
            self.objects.put_if_absent(f"{INDEX}{index}/{name}", b"{}")

    def _revisions(self) -> tuple[Revisions, str | None]:
        return self._load(REVISIONS_KEY, Revisions) or (Revisions(), None)

    def _load(self, key: str, model: type[_T]) -> tuple[_T, str] | None:
        try:
            stored = self.objects.get(key, _MAX_BYTES)
        except NotFoundError:
            return None
        try:
            return model.model_validate_json(stored.data), stored.etag
        except ValidationError as error:
            raise IntegrityError(
                f"{key} is not readable by this version", got=stored.data[:100], allowed="schema_version 1",
                remedy="restore it from a copy, or upgrade to the version that wrote it",
            ) from error  # fmt: skip


def load_in_force(store: ObjectStore) -> InForce:
    """Return the holds and policies in force.

    Raises:
        StoreError: The store cannot be read.
    """
    requests = RequestStore(store)
    found = (requests.load(name) for name in requests.names_in("in-force"))
    return InForce(one[0] for one in found if one is not None)


def load_unapproved(store: ObjectStore) -> list[RequestRecord]:
    """Return the requests that wait for a second approver, those that came first at the front.

    Raises:
        StoreError: The store cannot be read.
    """
    requests = RequestStore(store)
    found = (requests.load(name) for name in requests.names_in("unapproved"))
    waiting = (one[0] for one in found if one is not None and one[0].open and one[0].unapproved)
    return sorted(waiting, key=lambda record: record.received_ms)


def load_request(store: ObjectStore, request_id: str) -> RequestRecord | None:
    """Return a request; None where retain has none of that id, or no longer."""
    found = RequestStore(store).load(hash_of(request_id))
    return found[0] if found else None


def load_requests(store: ObjectStore) -> dict[str, RequestRecord]:
    """Return all requests by id; reads every one of them, for tests and for people who look into a store."""
    requests = RequestStore(store)
    found = (requests.load(key.removeprefix(REQUESTS)) for key in store.list(REQUESTS))
    return {one[0].request.request_id: one[0] for one in found if one is not None}
