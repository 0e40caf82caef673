"""Move the ledger of an earlier release, which was one object, into one object per request."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Annotated, Final

import orjson
from pydantic import Field, ValidationError

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError
from perennial.streams.retain.ledger import AdapterProgress, LedgerPart, ProgressPage, RequestRecord, page_of
from perennial.streams.retain.request_store import RequestStore, hash_of
from perennial.streams.retention.kinds import KINDS

log = logging.getLogger("perennial.retain")

LEDGER_KEY: Final = "retention/state"
_MAX_LEDGER_BYTES: Final = 64 << 20
_ATTEMPTS: Final = 16


class RequestLedger(LedgerPart):
    """All requests in one object, as an earlier release stored them.

    Attributes:
        schema_version: The version of this format.
        revision: Grows with every change.
        records: Requests by id.
    """

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    revision: int = 0
    records: dict[str, RequestRecord] = Field(default_factory=dict)


def migrate_ledger(store: RequestStore) -> int:
    """Store each request of the old ledger as an object of its own, then empty the ledger; return how many there were.

    A request that has an object already is left as it is, so an interrupted migration is simply repeated. The ledger is
    emptied by compare-and-swap: a process of the earlier release that still runs may have written another request.

    Raises:
        IntegrityError: The object is not a ledger of that release.
    """
    moved = 0
    for _ in range(_ATTEMPTS):
        try:
            stored = store.objects.get(LEDGER_KEY, _MAX_LEDGER_BYTES)
        except NotFoundError:
            return moved
        try:
            ledger = RequestLedger.model_validate_json(stored.data)
        except ValidationError as error:
            raise IntegrityError(
                f"{LEDGER_KEY} does not hold a ledger that this version can read", got=stored.data[:100],
                allowed="schema_version 1", remedy="restore it from a copy, or upgrade to the version that wrote it",
            ) from error  # fmt: skip
        if not ledger.records:
            return moved
        log.info("moving %d retention requests out of %s", len(ledger.records), LEDGER_KEY)
        for record in ledger.records.values():
            moved += _move(store, record)
        empty = orjson.dumps({"schema_version": 1, "revision": ledger.revision + 1, "records": {}})
        try:
            store.objects.compare_and_swap(LEDGER_KEY, empty, stored.etag)
        except ConflictError:
            continue
        store.bump(open_=True, in_force=True)
        return moved
    raise ConflictError(f"other writers keep changing {LEDGER_KEY}", remedy="stop the roles of the earlier release")


def _move(store: RequestStore, record: RequestRecord) -> bool:
    """Store one request and its progress; return False where it is stored already."""
    name = hash_of(record.request.request_id)
    if store.load(name) is not None:
        return False
    adapters: dict[str, AdapterProgress] = {}
    if KINDS[record.request.kind].job is not None:
        adapters = dict(record.adapters)
    if record.open and record.state == "published":  # that release had no phase of its own for waiting for replicas
        adapters = {
            adapter: progress.model_copy(update={"phase": "published"}) if progress.phase == "done" else progress
            for adapter, progress in adapters.items()
        }
    pages: dict[str, ProgressPage] = {}
    if record.is_pattern:
        for adapter, progress in adapters.items():
            page = pages.get(page_of(adapter), ProgressPage())
            pages[page_of(adapter)] = page.model_copy(update={"adapters": page.adapters | {adapter: progress}})
        adapters = {}
    for page_name, page in pages.items():
        _, etag = store.load_page(name, page_name)
        if etag is None:  # otherwise an interrupted migration wrote it, or another process that migrates too
            with suppress(ConflictError):
                store.save_page(name, page_name, page, None)
    sums = {page_name: page.summary() for page_name, page in pages.items()}
    record = record.model_copy(update={"adapters": adapters, "pages": sums})
    try:
        store.save(record, None, None)
    except ConflictError:  # another process moves it at the same time
        return False
    return True
