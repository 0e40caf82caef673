"""The retain role on a real store, without a broker: what one adapter or one request does to all the others."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key, digest_of, stored_name
from perennial.storage.registry.history.dependants import record_dependant
from perennial.storage.registry.manifest import BlobRef, LearnedExample
from perennial.storage.registry.quarantine import RequestOutcome, finish_entry
from perennial.storage.registry.registry import Registry
from perennial.streams.events.models import Batch, ExampleAccepted, Origin, RetentionRequested, Selector
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retain import request_worker
from perennial.streams.retain.request_store import load_requests
from perennial.streams.retain.service import RetainService
from perennial.streams.retain.store_facts import StoreFacts
from perennial.streams.settings import Settings
from perennial.testing import small_weights
from tests.keys import Keys
from tests.memory_store import MemoryStore
from tests.versions import VersionPublisher


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path, fsync=False)


@pytest.fixture
def given(store):
    sent = []

    async def send(event: object, _: str) -> None:
        sent.append(event)

    acks = SimpleNamespace(replicas=lambda *_: [])
    settings = Settings.of(clock_settle_s=0.001, env_file=None)
    return RetainService(settings, Metrics("retain"), StoreFacts(settings, store, acks), send), sent


def learn(store, adapter: str) -> str:
    """A version that learned one example whose life is over; the digest of its micro-batch."""
    example = ExampleAccepted(
        adapter=adapter, example_id="0" * 32, kind="document", document_id="d", learn=True, text="secret",
        retention_class="PT1S",
        origin=Origin(cluster_id="c", topic="documents", topic_id="t", partition=0, offset=0, timestamp_ms=1),
    )  # fmt: skip
    versions, weights = VersionPublisher(store, adapter), small_weights(1)
    body = Batch(adapter=adapter, cut=0, examples=[example], skipped=[]).model_dump_json(by_alias=True).encode()
    learned = LearnedExample(example_id=example.example_id, partition="p", offset=0, tokens=1)
    ref = BlobRef(digest=digest_of(body), size_bytes=len(body))
    manifest = versions.manifest(weights).model_copy(update={"batch": ref, "learned": [learned]})
    versions.registry.publish(manifest, [weights, body], lambda _: None)
    return ref.digest


def erase(request_id: str) -> RetentionRequested:
    return RetentionRequested(
        request_id=request_id,
        kind="erase",
        adapter="acme/a",
        selector=Selector(subjects=[request_id]),
        requested_by="ann",
    )


def test_a_damaged_micro_batch_stops_the_calendar_of_no_other_adapter(store, given, caplog):
    retention, sent = given
    digest = learn(store, "acme/a")
    learn(store, "acme/b")
    (store.root / stored_name(blob_key(digest))).write_bytes(b"secret, but damaged")
    asyncio.run(retention.tick())
    assert [event.adapter for event in sent if event.type == "forget.requested"] == ["acme/b"]
    (message,) = caplog.messages
    assert "acme/a" in message
    assert digest in message
    assert "secret" not in message


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"perennial_{name}", {"role": "retain", **labels})


def service(store, metrics: Metrics, acks: object, wall_ms: list[int]) -> RetainService:
    async def send(*_: object) -> None:
        pass

    settings = Settings.of(clock_settle_s=0.001, env_file=None)
    began_ms = time.monotonic_ns() // 1_000_000
    clock = lambda: wall_ms[0] + time.monotonic_ns() // 1_000_000 - began_ms  # noqa: E731
    return RetainService(settings, metrics, StoreFacts(settings, store, acks), send, wall_ms=clock)


def test_metrics_tell_what_is_open_overdue_and_closed_with_exceptions(store):
    metrics, wall_ms = Metrics("retain"), [1_000_000]
    status = SimpleNamespace(
        adapter="acme/a", replica="web-1", generation=1, version=None, failed=True, lease_expires_ms=10**15, left=False
    )
    acks = SimpleNamespace(replicas=lambda *_: [status])
    retention = service(store, metrics, acks, wall_ms)
    versions = VersionPublisher(store, "acme/a")
    before = versions.publish()
    versions.registry.revoke("acme/a", before.version, "learned it")
    after = versions.publish(kind="forget")
    due = datetime.fromtimestamp(2000, UTC)
    asyncio.run(retention.receive(erase("r0").model_copy(update={"due_at": due}), wall_ms[0]))
    asyncio.run(retention.tick())
    assert value(metrics, "forget_requests", state="quarantined") == 1
    assert value(metrics, "forget_overdue_requests") == 0
    wall_ms[0] = 2_000_000
    asyncio.run(retention.tick())
    time.sleep(0.01)  # the guarded clock follows a jump once it has lasted
    asyncio.run(retention.tick())
    assert value(metrics, "forget_overdue_requests") == 1, "it is not carried out, so it is not closed"
    done = RequestOutcome(at_ms=1, examples=1, version=after.version, generation=after.generation)
    finish_entry(store, "acme/a", "r0", done)
    asyncio.run(retention.tick())
    asyncio.run(retention.tick())
    assert value(metrics, "forget_overdue_requests") == 0
    assert value(metrics, "forget_requests", state="closed") == 1
    assert value(metrics, "forget_exceptions_total") == 1


def test_the_event_loop_is_free_while_a_request_over_many_adapters_is_worked_off(store):
    """A request over many adapters was one step of many seconds."""
    objects = MemoryStore()
    for number in range(400):
        objects.put_if_absent(f"state/curate/acme/a{number}", b"{}")
    retention = service(objects, Metrics("retain"), SimpleNamespace(replicas=lambda *_: []), [10**9])
    longest = [0.0]

    async def watch() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            longest[0] = max(longest[0], time.monotonic() - before)

    async def run() -> None:
        watcher = asyncio.create_task(watch())
        request = erase("r").model_copy(update={"adapter": "*"})
        await retention.receive(request, 10**9)
        await retention.receive(request.model_copy(update={"approved_by": "bob"}), 10**9)
        for _ in range(60):  # one tick on a quiet machine; a tick ends when its time is over
            await retention.tick()
            if load_requests(objects)["r"].phases == {"sent": 400}:
                break
        watcher.cancel()

    asyncio.run(run())
    assert load_requests(objects)["r"].phases == {"sent": 400}
    assert longest[0] < 2.0


def test_each_adapter_of_a_pattern_is_counted_once_from_the_first_state_on(monkeypatch):
    """Before the first page was worked on, a request over 400 adapters was shown with 610; several share a page here, too."""
    monkeypatch.setattr(request_worker, "TICK_BUDGET_S", 0.0)  # a tick ends after each slice: about one for each page
    objects = MemoryStore()

    def started() -> RetainService:
        return service(objects, Metrics("retain"), SimpleNamespace(replicas=lambda *_: []), [10**9])

    def phases() -> dict[str, int]:
        return dict(load_requests(objects)["r"].phases)

    async def work_off(retention: RetainService, number: int) -> set[int]:
        counted = set()
        for _ in range(5_000):
            await retention.tick()
            counted.add(sum(phases().values()))
            if phases() == {"sent": number}:
                return counted
        pytest.fail(f"not all are reached: {phases()}")

    async def run() -> None:
        for number in range(80):
            objects.put_if_absent(f"state/curate/acme/a{number}", b"{}")
        retention, request = started(), erase("r").model_copy(update={"adapter": "*"})
        await retention.receive(request, 10**9)
        await retention.receive(request.model_copy(update={"approved_by": "bob"}), 10**9)
        assert phases() == {"waiting": 80}
        assert await work_off(retention, 80) == {80}
        objects.put_if_absent("state/curate/acme/later", b"{}")
        assert await work_off(started(), 81) <= {80, 81}  # a service that just started lists the adapters anew

    asyncio.run(run())


def test_an_acknowledgement_that_cannot_be_read_waits_for_the_broker(store):
    def unreachable(*_: object) -> list[object]:
        raise KafkaUnavailableError("adapter-acks cannot be read")

    metrics = Metrics("retain")
    retention = service(store, metrics, SimpleNamespace(replicas=unreachable), [10**6])
    after = VersionPublisher(store, "acme/a").publish()
    asyncio.run(retention.receive(erase("r0"), 10**6))
    done = RequestOutcome(at_ms=1, examples=1, version=after.version, generation=after.generation)
    finish_entry(store, "acme/a", "r0", done)
    asyncio.run(retention.tick())
    assert load_requests(store)["r0"].state == "quarantined"


def test_case_19_a_revocation_is_carried_out_at_once(store, given):
    """Case 19: the version is out of service when the request is accepted, not when a learner has worked off its queue."""
    retention, sent = given
    versions = VersionPublisher(store, "acme/a")
    made = [versions.publish() for _ in range(3)]
    request = RetentionRequested(request_id="r1", kind="revoke", adapter="acme/a", requested_by="ann", reason="leak")
    asyncio.run(retention.receive(request, 1))
    state = versions.registry.alias("acme/a")
    assert state.kind == "revoked"
    assert versions.registry.manifest("acme/a", state.version).parent == made[1].version
    assert versions.registry.is_revoked("acme/a", 3)
    (job,) = [event for event in sent if event.type == "rollback.requested"]
    assert job.version == made[2].version
    asyncio.run(retention.receive(request, 1))  # redelivered: no further version is taken out of service
    assert versions.registry.alias("acme/a") == state


def test_acknowledgements_of_replicas_that_ended_are_pruned_every_hour(store):
    pruned: list[float] = []
    clock_ms = [0]

    async def send(*_: object) -> None:
        pass

    acks = SimpleNamespace(replicas=lambda *_: [], prune=lambda: pruned.append(clock_ms[0]))
    settings = Settings.of(clock_settle_s=0.001, env_file=None)
    retention = RetainService(
        settings, Metrics("retain"), StoreFacts(settings, store, acks), send, monotonic_ms=lambda: clock_ms[0]
    )
    for hours in (0, 0.5, 1, 1.5, 2):
        clock_ms[0] = int(hours * 3_600_000)
        asyncio.run(retention.tick())
    assert pruned == [3_600_000, 7_200_000]


def test_a_revocation_is_signed_and_one_forged_alias_stops_no_other_adapter(store, tmp_path, caplog):
    """The revocation of a version whose alias somebody forged is recorded, and nothing that they made becomes live."""
    keys, sent = Keys(tmp_path / "keys"), []

    async def send(event, _event_id):
        sent.append(event)

    settings = Settings.of(
        env_file=None, signing_key_file=str(keys.private), trusted_keys=str(keys.public), clock_settle_s=0.001
    )
    acks = SimpleNamespace(replicas=lambda *_: [])
    retention = RetainService(settings, Metrics("retain"), StoreFacts(settings, store, acks), send)
    for name in ("acme/a", "acme/b"):
        made = [VersionPublisher(store, name, trust=keys.owner).publish() for _ in range(2)]
    forged = VersionPublisher(store, "acme/a", trust=keys.stranger).publish()
    for name in ("acme/a", "acme/b"):
        request = RetentionRequested(
            request_id=f"r-{name}", kind="revoke", adapter=name, requested_by="ann", reason="leak"
        )
        asyncio.run(retention.receive(request, 1))
    reader = Registry(store, nonce=str, now=None, trust=keys.readers)
    state = reader.alias("acme/b")
    assert state.kind == "revoked"
    assert reader.manifest("acme/b", state.version).parent == made[0].version
    assert Registry(store, nonce=str, now=None).alias("acme/a").version == forged.version
    assert reader.is_revoked("acme/a", 3)
    assert "left to a learner" in caplog.text
    assert len([event for event in sent if event.type == "rollback.requested"]) == 2


def test_dependants_are_read_from_the_store_where_a_version_is_revoked(store):
    facts = StoreFacts(Settings.of(env_file=None), store, SimpleNamespace(replicas=lambda *_: []))
    record_dependant(store, "acme/fay", "acme/uli")
    assert facts.dependants("acme/fay") == [], "nothing that anybody could depend on is revoked"
    line = VersionPublisher(store, "acme/fay")
    line.registry.revoke("acme/fay", line.publish().version, "test")
    assert facts.dependants("acme/fay") == ["acme/uli"]
    assert facts.dependants("acme/uli") == []
