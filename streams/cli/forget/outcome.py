"""Show what a request did in each adapter, and which replicas confirmed it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from operator import itemgetter
from typing import Final

from rich.console import Console

from perennial.storage.errors import PerennialError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.cli.tables import Column, print_table, short_version
from perennial.streams.events.models import RetentionProgressed
from perennial.streams.retain.ledger import AdapterProgress, RequestRecord
from perennial.streams.retain.request_store import RequestStore, hash_of, load_request
from perennial.streams.retain.rules.dependant_steps import dependant_of
from perennial.streams.settings import Settings

_MAX_SHOWN: Final = 20
_STORED_S: Final = 5.0
_COLUMNS = (
    Column("adapter"),
    Column("phase", 1),
    Column("examples", right=True),
    Column("version", 3, shorten=short_version),
    Column("confirmed by", 2, wraps=True),
    Column("not confirmed by", 2, wraps=True),
)


def print_outcome(settings: Settings, last: RetentionProgressed) -> None:
    """Print what a request did in each adapter, from the store; from its last state where the store cannot be read.

    Args:
        settings: Names the store.
        last: The last state of the request.
    """
    try:
        store = open_store(settings.store.uri, settings.s3) if settings.store.uri else None
        record = _ended(store, last.request_id) if store is not None else None
    except PerennialError:  # the request is carried out, whatever this machine can read
        store = record = None
    if store is not None and record is not None:
        print_adapters(store, record)
        return
    progress = AdapterProgress(
        phase="done", examples=last.examples, version=last.version, acknowledged=last.acknowledged, missing=last.missing
    )
    _print([(last.adapter, progress)], 0)


def _ended(store: ObjectStore, request_id: str) -> RequestRecord | None:
    """Return the request once it has ended in the store, which is a moment after its state was published."""
    deadline = time.monotonic() + _STORED_S
    while True:
        record = load_request(store, request_id)
        if record is None or not record.open or time.monotonic() > deadline:
            return record
        time.sleep(0.1)


def print_adapters(store: ObjectStore, record: RequestRecord) -> None:
    """Print a row for each adapter of a request and for its dependants, the first ones where there are many.

    Args:
        store: The store.
        record: The request.
    """
    pages: Iterable[dict[str, AdapterProgress]] = [record.adapters]
    if record.is_pattern:
        pages = RequestStore(store).pages(hash_of(record.request.request_id))
    rows = list(islice((row for page in pages for row in _rows(page)), _MAX_SHOWN))
    total = sum(record.phases.values()) + sum(len(one.dependants or {}) for one in record.adapters.values())
    if rows:
        _print(rows, total - len(rows))


def _rows(adapters: Mapping[str, AdapterProgress]) -> Iterator[tuple[str, AdapterProgress]]:
    for name, progress in sorted(adapters.items()):
        yield name, progress
        dependants = sorted(
            ((dependant_of(key), one) for key, one in (progress.dependants or {}).items()), key=itemgetter(0)
        )
        yield from ((f"{adapter} (dependant)", one) for (_, adapter), one in dependants)


def _print(progress: list[tuple[str, AdapterProgress]], more: int) -> None:
    rows = [
        (
            name, one.phase, str(one.examples), one.version or "-", ", ".join(one.acknowledged) or "-",
            ", ".join(one.missing) or "-",
        )
        for name, one in progress
    ]  # fmt: skip
    print_table(_COLUMNS, rows)
    if more > 0:
        Console().print(f"... and {more} adapters more", soft_wrap=True, highlight=False)
