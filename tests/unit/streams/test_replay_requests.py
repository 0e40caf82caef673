"""A reconciliation brings every open request of the ledger to its adapters, also one that was cut off and is repeated."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from perennial.storage.registry.quarantine import load_quarantine
from perennial.streams.events.cloudevents import encode
from perennial.streams.events.models import RetentionRequested, Selector
from perennial.streams.kafka.event_signatures import signed_request
from perennial.streams.observe.metrics import Metrics
from perennial.streams.recovery.replay_requests import ReplayReport, replay_requests
from perennial.streams.retain.ledger import Approval, PageSummary, RequestRecord, page_of
from perennial.streams.retain.request_store import RequestStore, hash_of, load_requests
from perennial.streams.settings import Settings
from tests.keys import Keys
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


def record_of(request: RetentionRequested, topic: str = "retention") -> SimpleNamespace:
    made = encode(request, event_id="e", source="test", occurred_at=NOW)
    at_ms = int(NOW.timestamp() * 1000)
    return SimpleNamespace(topic=topic, value=made.value, headers=made.headers, timestamp=at_ms)


def replay(
    store: MemoryStore, records: list[SimpleNamespace], settings: Settings | None = None, **options
) -> ReplayReport:
    return replay_requests(
        (settings or Settings.of(env_file=None)).replace(clock_settle_s=0.001), store, records, Sink(),
        Metrics("backup"), **options,
    )  # fmt: skip


def quarantined(store: MemoryStore, request_id: str = "r") -> list[str]:
    return [each for each in ADAPTERS if load_quarantine(store, each).entry(request_id) is not None]


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
    assert (report.unapproved, report.is_whole) == (["r"], False)


# ---- what counted by the settings of that time, and does not by those of today


def test_an_approved_request_that_is_older_than_the_keys_of_persons_is_listed(store: MemoryStore, tmp_path) -> None:
    records = approved(erase("acme/*"))
    assert replay(store, records).is_whole
    lost = MemoryStore()
    VersionPublisher(lost, "acme/a").publish()
    report = replay(lost, records, Settings.of(trusted_request_keys=str(Keys(tmp_path).public), env_file=None))
    assert (report.accepted, report.refused, quarantined(lost)) == ([], 2, [])
    assert (report.unapproved, report.is_whole) == (["r"], False)


@pytest.mark.parametrize("removed", ["ann", "bob", None])
def test_an_approved_request_whose_key_is_not_trusted_now_is_listed(store: MemoryStore, tmp_path, removed) -> None:
    keys = {name: Keys(tmp_path / name) for name in ("ann", "bob")}
    trusted = tmp_path / "trusted"
    trusted.write_text("".join(k.public.read_text("utf-8") for name, k in keys.items() if name != removed), "utf-8")
    made = erase("acme/*").model_copy(update={"requested_at": NOW})
    approval = made.model_copy(update={"approved_by": "bob"})
    records = [
        record_of(signed_request(made, keys["ann"].owner)),
        record_of(signed_request(approval, keys["bob"].owner)),
    ]
    report = replay(store, records, Settings.of(trusted_request_keys=str(trusted), env_file=None))
    assert report.is_whole == (removed is None) == (quarantined(store) == list(ADAPTERS))
    assert report.unapproved == ([] if removed is None else ["r"])


WITH_TENANT = Settings.of(tenants="acme", env_file=None)


def named(request: RetentionRequested, request_id: str, **changes: object) -> RetentionRequested:
    return request.model_copy(update={"request_id": request_id, **changes})


@pytest.mark.parametrize("adapter", ["acme/a", "acme/*"])
def test_a_request_from_before_the_topics_of_its_tenant_is_carried_out(store: MemoryStore, adapter: str) -> None:
    records = approved(named(erase(adapter), "acme:r1"))[: 2 if adapter.endswith("*") else 1]
    for accepted in (["acme:r1"], []):  # the second time as after a crash
        report = replay(store, records, WITH_TENANT)
        assert (report.accepted, report.refused, report.is_whole) == (accepted, 0, True)
        assert quarantined(store, "acme:r1") == [each for each in ADAPTERS if adapter in {each, "acme/*"}]


@pytest.mark.parametrize("tenant_first", [False, True])
def test_an_id_that_a_tenant_and_somebody_else_used_is_listed(store: MemoryStore, *, tenant_first: bool) -> None:
    records = [
        record_of(named(erase("acme/a"), "acme:r1")),
        record_of(named(erase("acme/b"), "r1"), "retention.acme"),
    ]
    report = replay(store, records[::-1] if tenant_first else records, WITH_TENANT)
    assert (report.accepted, report.ambiguous, report.is_whole) == (["acme:r1"], ["acme:r1"], False)


def test_what_came_on_retention_approves_no_request_of_a_tenant_in_a_restore(store: MemoryStore) -> None:
    request = record_of(named(erase("acme/*"), "r1"), "retention.acme")
    report = replay(store, [request, record_of(named(erase("acme/*"), "acme:r1", approved_by="bob"))], WITH_TENANT)
    assert (report.accepted, report.ambiguous, report.unapproved) == (["acme:r1"], ["acme:r1"], ["acme:r1"])
    assert quarantined(store, "acme:r1") == []


def test_a_request_that_a_tenant_sent_twice_is_one(store: MemoryStore) -> None:
    record = record_of(named(erase("acme/a"), "r1"), "retention.acme")
    report = replay(store, [record, record], WITH_TENANT)
    assert (report.accepted, report.known, report.is_whole) == (["acme:r1"], 1, True)
    assert replay(store, [record], WITH_TENANT).is_whole


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
