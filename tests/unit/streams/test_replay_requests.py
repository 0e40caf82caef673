"""A reconciliation brings every open request of the ledger to its adapters, also one that was cut off and is repeated."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from perennial.storage.registry.quarantine import load_quarantine
from perennial.streams.events.cloudevents import encode
from perennial.streams.events.models import RetentionRequested, Selector
from perennial.streams.observe.metrics import Metrics
from perennial.streams.recovery.replay_requests import ReplayReport, replay_requests
from perennial.streams.retain.ledger import Approval, PageSummary, RequestRecord, page_of
from perennial.streams.retain.request_store import RequestStore, hash_of, load_requests
from perennial.streams.settings import Settings
from tests.memory_store import MemoryStore
from tests.versions import VersionPublisher

NOW = datetime(2026, 3, 1, tzinfo=UTC)
ADAPTERS = ("acme/a", "acme/b")


class Sink:
    """Takes the place of the producer: no broker is needed to see what reaches the store."""

    def send(self, event: object, **_: object) -> None:
        pass

    def flush(self) -> None:
        pass


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    for adapter in ADAPTERS:
        VersionPublisher(made, adapter).publish()
    return made


def erase(adapter: str) -> RetentionRequested:
    return RetentionRequested(
        request_id="r", kind="erase", adapter=adapter, selector=Selector(document_ids=["d1"]), requested_by="ann"
    )


def record_of(request: RetentionRequested) -> SimpleNamespace:
    made = encode(request, event_id="e", source="test", occurred_at=NOW)
    at_ms = int(NOW.timestamp() * 1000)
    return SimpleNamespace(topic="retention", value=made.value, headers=made.headers, timestamp=at_ms)


def replay(store: MemoryStore, records: list[SimpleNamespace], **options) -> ReplayReport:
    return replay_requests(
        Settings.of(clock_settle_s=0.001, env_file=None), store, records, Sink(), Metrics("backup"), **options
    )


def quarantined(store: MemoryStore) -> list[str]:
    return [each for each in ADAPTERS if load_quarantine(store, each).entry("r") is not None]


def approved(request: RetentionRequested) -> list[SimpleNamespace]:
    """Return the records of a request and of its approval by a second person."""
    return [record_of(request), record_of(request.model_copy(update={"approved_by": "bob"}))]


class Stopper:
    """Ends a replay when it has accepted so many records."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_request_over_a_pattern_reaches_its_adapters_in_the_run_after_a_crash(store: MemoryStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        replay(store, approved(erase("acme/*")), on_request=Stopper(2))
    assert quarantined(store) == []
    report = replay(store, approved(erase("acme/*")))
    assert (report.accepted, report.known) == ([], 1)
    assert quarantined(store) == list(ADAPTERS)


def test_a_request_of_the_backup_reaches_its_adapters_although_no_record_is_read(store: MemoryStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        replay(store, approved(erase("*")), on_request=Stopper(2))
    replay(store, [])
    assert quarantined(store) == list(ADAPTERS)


def test_a_request_that_nobody_approved_waits_after_a_restore_too(store: MemoryStore) -> None:
    report = replay(store, [record_of(erase("*"))])
    assert (report.accepted, quarantined(store)) == (["r"], [])
    assert load_requests(store)["r"].state == "unapproved"


def test_a_revocation_is_left_out_with_its_approval(store: MemoryStore) -> None:
    revoke = RetentionRequested(request_id="r", kind="revoke", adapter="acme/*", requested_by="ann")
    request, approval = approved(revoke)
    report = replay(store, [request, approval])
    assert (report.revocations, load_requests(store)) == (["r"], {})
    waiting = RequestRecord(
        request=revoke, received_ms=0, until_ms=0, state="unapproved", approval=Approval(until_ms=2**50)
    )
    RequestStore(store).save(waiting, None, None)
    report = replay(store, [approval])
    assert (report.revocations, load_requests(store)["r"].state) == (["r"], "unapproved")


@pytest.mark.parametrize(("adapter", "wanted"), [("acme/*", list(ADAPTERS)), ("acme/a", ["acme/a"])])
def test_a_request_in_no_index_reaches_its_adapters(store: MemoryStore, adapter: str, wanted: list[str]) -> None:
    """A backup copies the indexes before the requests, so one that came in between is in no index of the copy."""
    received_ms = int(NOW.timestamp() * 1000)
    pages = {page_of(each): PageSummary(phases={"waiting": 1}) for each in wanted} if adapter.endswith("*") else {}
    accepted = RequestRecord(request=erase(adapter), received_ms=received_ms, until_ms=received_ms, pages=pages)
    RequestStore(store).save(accepted, None, None)
    for index in ("open", "patterns"):
        store.delete(f"retention/index/{index}/{hash_of('r')}")
    replay(store, [])
    assert quarantined(store) == wanted
