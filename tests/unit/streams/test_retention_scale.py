"""Retention requests in the store: what they cost, two processes at once, and the ledger of an earlier release."""

from __future__ import annotations

import orjson
import pytest

from perennial.storage.errors import ConflictError, IntegrityError
from perennial.storage.registry.quarantine import QuarantineEntry, load_quarantine, update_quarantine
from perennial.streams.events.models import ExampleAccepted, Selector
from perennial.streams.retain import adapter_calendar, request_worker
from perennial.streams.retain.ledger import AdapterProgress, RequestRecord, StoredExample
from perennial.streams.retain.ledger_migration import LEDGER_KEY, RequestLedger, migrate_ledger
from perennial.streams.retain.request_store import INDEX, REQUESTS, RequestStore, hash_of, load_in_force, load_requests
from perennial.streams.retain.rules.replica_report import ReplicaReport
from perennial.streams.retain.work_slice import SLICE_ADAPTERS
from tests.memory_store import MemoryStore
from tests.retention_world import AT, DAY_MS, A, World, doc, example, request


def largest_object(objects: MemoryStore) -> int:
    return max(len(objects.get(key).data) for key in objects.list(""))


# ---- what it costs


def test_attack_d_a_new_adapter_under_a_thousand_holds_costs_one_write():
    """1,000 holds over a pattern: one new adapter took 30 s and 1,000 writes of its quarantine."""
    world = World()
    world.step(*(request("hold", f"h{n}", adapter="acme/*", selector={"subjects": [f"p{n}"]}) for n in range(1000)))
    world.step(*(request("hold", f"o{n}", adapter="other/*", selector={"subjects": [f"p{n}"]}) for n in range(50)))
    world.learn(example(1, adapter="acme/new"))
    world.objects.calls.clear()
    world.objects.written.clear()
    world.step()
    assert len(world.quarantine("acme/new").holds) == 1000
    assert world.objects.written["quarantine/acme/new"] == 1
    assert sum(world.objects.calls.values()) < 20


def test_attack_d_a_request_over_many_adapters_is_many_small_objects_in_slices():
    """A request over 100,000 adapters was 21 MB of one object, four of them ended the role."""
    world = World()
    names = [f"acme/a{n}" for n in range(1500)]
    world.stored = {name: {} for name in names}
    for piece in world.worker.receive(request("erase", adapter="*", selector=doc(1)), 1000, 1000):
        world.perform(iter([piece]))
        assert len(piece.changes) <= SLICE_ADAPTERS
    assert world.states("erase") == ["accepted"], "the many adapters are for the ticks"
    for _ in range(400):
        for piece in world.worker.tick(world.now_ms):
            world.perform(iter([piece]))
            assert len(piece.changes) <= SLICE_ADAPTERS
        world.work()
        if world.states("erase")[-1] == "closed":
            break
    assert world.states("erase")[-1] == "closed"
    assert len(world.states("erase")) <= 14, "progress is published in steps of ten percent"
    assert all(load_quarantine(world.objects, name).entry("erase") for name in names[::100])
    assert largest_object(world.objects) < 40_000


def test_looking_at_many_adapters_ends_with_the_budget_of_the_tick_and_goes_on_there(monkeypatch):
    world = World()
    world.stored = {f"acme/a{n}": {} for n in range(400)}
    world.step(request("erase", adapter="*", selector=doc(1)))
    while len(world.jobs) < 400:
        world.step()
    looked: list[str] = []
    load = world.quarantine
    world.quarantine = lambda adapter: looked.append(adapter) or load(adapter)
    monkeypatch.setattr(request_worker, "TICK_BUDGET_S", 0.0)
    ticks = 0
    while len(set(looked)) < 400 and ticks < 400:
        before = len(looked)
        world.step()
        assert len(looked) - before <= 2 * SLICE_ADAPTERS
        ticks += 1
    assert len(set(looked)) == 400


def test_a_tick_costs_the_requests_that_can_move():
    world = World()
    world.learn(example(1))
    later = AT.replace(year=2200)
    world.step(*(request("expire", f"e{n}", selector=doc(n), due_at=later) for n in range(100)))
    world.step(*(request("erase", f"r{n}", selector=doc(500 + n)) for n in range(100)))
    for _ in range(100):  # each tick has a budget of time
        world.work()
        world.step()
        if {world.states(f"r{n}")[-1] for n in range(100)} == {"closed"}:
            break
    assert {world.states(f"r{n}")[-1] for n in range(100)} == {"closed"}
    world.step()
    world.objects.calls.clear()
    world.step()
    assert sum(world.objects.calls.values()) < 10


def test_a_sent_job_costs_one_look_per_tick():
    world = World()
    world.learn(example(1))
    world.step(request("erase", selector=doc(1)))
    looks: list[str] = []
    world.examples = lambda adapter: looks.append(adapter) or []
    world.step()
    assert looks == []


def test_an_adapter_that_did_not_change_is_not_read_again():
    world = World()
    world.learn(example(1, retention_class="P30D"), example(2))
    world.step()
    looks: list[str] = []
    world.examples = lambda adapter: looks.append(adapter) or []
    for _ in range(5):
        world.now_ms += DAY_MS
        world.step()
    assert looks == ["acme/support"] * len(looks)
    assert len(looks) <= 5, "at most once a day, to ask the index for what falls due"


def test_rounds_over_many_adapters_pause_and_what_is_due_does_not_wait_for_them(monkeypatch):
    world = World()
    world.stored = {f"acme/a{n}": {} for n in range(100)}
    world.learn(example(1, adapter="acme/z", retention_class="PT1S"))
    world.step()
    looks: list[str] = []
    newest = world.newest
    world.newest = lambda adapter: looks.append(adapter) or newest(adapter)
    world.step()
    assert looks == []
    world.now_ms = 10**5
    world.step()
    assert looks == ["acme/z"]
    assert [job.adapter for job in world.jobs] == ["acme/z"]
    monkeypatch.setattr(adapter_calendar, "ROUND_EVERY_S", 0.0)
    looks.clear()
    world.step()
    assert len(looks) >= 101


# ---- two processes


def test_a_process_that_was_believed_dead_undoes_nothing():
    alive, zombie = World(), World()
    zombie.objects, zombie.stored = alive.objects, alive.stored
    zombie.restart()
    alive.learn(example(1))
    alive.step(request("erase", selector=doc(1)))
    zombie.step()
    stale = zombie.worker.cache.open[hash_of("erase")]
    alive.work()
    alive.step()
    assert alive.states("erase")[-1] == "closed"
    with pytest.raises(ConflictError):
        zombie.worker.cache.save(stale.record.model_copy(update={"detail": "stale"}), stale)
    assert load_requests(alive.objects)["erase"].state == "closed"
    assert zombie.worker.cache.open == {}, "it has the request as it is now"


def test_a_request_that_another_process_accepted_is_carried_on_here():
    here, there = World(), World()
    there.objects, there.stored = here.objects, here.stored
    there.restart()
    here.learn(example(1))
    here.step()
    there.perform(there.worker.receive(request("hold", selector=doc(1)), 1000, 1000))
    there.perform(there.worker.receive(request("erase", adapter="acme/*", selector=doc(1)), 1000, 1000))
    here.step()
    assert here.states("erase")[-1] == "held"


def test_a_stale_view_of_the_holds_takes_none_from_a_quarantine():
    here, there = World(), World()
    there.objects, there.stored = here.objects, here.stored
    there.restart()
    here.learn(example(1), example(2))
    here.step()
    slices = here.worker.receive(request("erase", selector=doc(2)), 1000, 1000)
    pieces = [next(slices)]
    here.perform(iter(pieces))
    pieces = [next(slices)]  # planned before the hold, performed after it
    there.perform(there.worker.receive(request("hold", selector=doc(1)), 1000, 1000))
    assert [change.adapter for change in pieces[0].changes] == [A]
    here.perform(iter(pieces))
    assert [hold.request_id for hold in here.quarantine(A).holds] == ["hold"]


# ---- the ledger of an earlier release


def old_ledger() -> RequestLedger:
    def record(kind: str, request_id: str, **fields: object) -> RequestRecord:
        asked = fields.pop("asked", {})
        return RequestRecord(request=request(kind, request_id, **asked), received_ms=1000, until_ms=1000, **fields)

    sent = AdapterProgress(phase="sent", until_ms=1000, sent_ms=1000)
    done = AdapterProgress(phase="done", until_ms=1000, generation=2)
    hold = {"asked": {"adapter": "acme/*", "selector": {"subjects": ["eve"]}}}
    records = [
        record("hold", "hold", state="executed", adapters={A: AdapterProgress(phase="done")}, **hold),
        record("policy", "p", state="executed",
               asked={"adapter": "*", "selector": {"retention_class": "permanent"}, "time_to_live": "P1D"}),
        record("erase", "sent", state="quarantined", adapters={A: sent}, asked={"selector": doc(1)}),
        record("erase", "lags", state="published", adapters={A: done}, asked={"selector": doc(2)}),
        record("erase", "many", state="closed", ended_ms=1000, adapters={A: done, "acme/sales": done},
               asked={"adapter": "acme/*", "selector": doc(3)}),
        record("expire", "expire-0123", state="quarantined", adapters={A: sent}, example_ids=[f"{9:032x}"],
               asked={"requested_by": "perennial/retain"}),
    ]  # fmt: skip
    return RequestLedger(revision=7, records={one.request.request_id: one for one in records})


def with_old_ledger() -> World:
    world = World()
    old = old_ledger()
    plain = old.model_dump(mode="json")
    for one in plain["records"].values():  # the fields that the earlier release did not know
        for name in ("schema_version", "revision", "pages", "acknowledged", "missing", "exceptions", "ends", "ending"):
            del one[name]
        del one["request"]["emergency"]
        for progress in one["adapters"].values():
            for name in ("acknowledged", "missing", "exceptions"):
                del progress[name]
    world.objects.compare_and_swap(LEDGER_KEY, orjson.dumps(plain, option=orjson.OPT_SORT_KEYS), None)
    world.learn(example(1), example(2), example(3, adapter="acme/sales"))
    for name in ("sent", "lags", "many"):
        entry = QuarantineEntry(request_id=name, job_id=name, kind="erase", selector=doc(1), until_ms=1000)
        for adapter in (A, "acme/sales"):
            update_quarantine(world.objects, adapter, lambda found, entry=entry: found.with_entry(entry))
    return world


def test_the_ledger_of_an_earlier_release_is_moved_once_and_goes_on():
    world = with_old_ledger()
    world.report = ReplicaReport(behind=("host-1",))
    assert migrate_ledger(RequestStore(world.objects)) == 6
    assert migrate_ledger(RequestStore(world.objects)) == 0
    assert RequestLedger.model_validate_json(world.objects.get(LEDGER_KEY).data).records == {}
    assert set(load_requests(world.objects)) == {"hold", "p", "sent", "lags", "many", "expire-0123"}
    in_force = load_in_force(world.objects)
    assert [hold.request_id for hold in in_force.holds_on("acme/later")] == ["hold"]
    assert len(in_force.policies_on("any/adapter")) == 1
    world.step()
    assert world.requests()["lags"].adapters[A].phase == "published"
    assert [hold.request_id for hold in world.quarantine(A).holds] == ["hold"]
    world.report = ReplicaReport(acknowledged=("host-1",))
    world.step()
    assert world.states("lags")[-1] == "closed"
    assert "sent" in {found.record.request.request_id for found in world.worker.cache.open.values()}
    world.learn(example(7, adapter="acme/later", document_id="d3"))
    world.step()
    assert [job.adapter for job in world.jobs if job.request_id == "many"] == ["acme/later"]


def test_a_migration_that_was_interrupted_is_repeated_and_undoes_nothing():
    world = with_old_ledger()
    content = world.objects.get(LEDGER_KEY)
    migrate_ledger(RequestStore(world.objects))
    world.report = ReplicaReport(acknowledged=("host-1",))
    world.step()
    assert world.states("lags")[-1] == "closed"
    emptied = world.objects.get(LEDGER_KEY)
    world.objects.compare_and_swap(LEDGER_KEY, content.data, emptied.etag)  # as if the process had ended before
    assert migrate_ledger(RequestStore(world.objects)) == 0
    assert load_requests(world.objects)["lags"].state == "closed"


def test_a_ledger_that_nobody_can_read_ends_the_role_with_a_remedy():
    objects = MemoryStore()
    objects.compare_and_swap(LEDGER_KEY, b'{"schema_version": 9}', None)
    with pytest.raises(IntegrityError, match="retention/state"):
        migrate_ledger(RequestStore(objects))


def test_an_index_never_misses_a_request_and_may_name_one_too_many():
    """A crash between an index and its request leaves an entry too many; the request decides."""
    world = World()
    world.learn(example(1))
    world.objects.put_if_absent(f"{INDEX}open/{'0' * 40}", b"{}")
    world.objects.put_if_absent(f"{INDEX}in-force/{'0' * 40}", b"{}")
    world.step(request("erase", selector=doc(1)))
    world.work()
    world.step()
    assert world.states("erase")[-1] == "closed"
    world.objects.put_if_absent(f"{INDEX}open/{hash_of('erase')}", b"{}")
    world.restart()
    world.step()
    assert world.worker.cache.open == {}


def test_a_request_that_nobody_can_read_stops_no_other_one(caplog):
    world = World()
    world.learn(example(1), example(2))
    world.step(request("erase", "broken", selector=doc(1)), request("erase", "whole", selector=doc(2)))
    key = f"{REQUESTS}{hash_of('broken')}"
    world.objects.compare_and_swap(key, b"{}", world.objects.get(key).etag)
    world.restart()
    world.work()
    world.step()
    assert world.states("whole")[-1] == "closed"
    assert key in caplog.text


def test_a_hold_that_nobody_can_read_lets_nothing_be_forgotten():
    world = World()
    world.learn(example(1))
    world.step(request("hold", selector=doc(1)))
    key = f"{REQUESTS}{hash_of('hold')}"
    world.objects.compare_and_swap(key, b"{}", world.objects.get(key).etag)
    world.restart()
    with pytest.raises(IntegrityError, match=key):
        world.step(request("erase", selector=doc(1)))
    assert world.jobs == []


def test_what_one_request_breaks_ends_that_request_alone(monkeypatch):
    """A value that decodes and then breaks a pure function ended the role at every start."""
    world = World()
    world.learn(example(1), example(2))
    matches = Selector.matches

    def broken(selector: Selector, one: ExampleAccepted) -> bool:
        if selector.document_ids == ["d7"]:
            raise OverflowError("date value out of range")
        return matches(selector, one)

    monkeypatch.setattr(Selector, "matches", broken)
    world.step(request("erase", "bad", selector=doc(7)), request("erase", "good", selector=doc(1)))
    world.work()
    world.step()
    assert world.states("bad")[-1] == "failed"
    assert "OverflowError" in [event.detail for event in world.published if event.request_id == "bad"][-1]
    assert world.states("good")[-1] == "closed"


def test_what_one_adapter_breaks_stops_the_calendar_of_no_other(monkeypatch, caplog):
    world = World(now_ms=10**6)
    world.learn(example(1, retention_class="PT1S"), example(2, adapter="acme/sales", retention_class="PT1S"))
    examples = world.examples

    def broken(adapter: str) -> list[StoredExample]:
        if adapter == "acme/sales":
            raise OverflowError("date value out of range")
        return examples(adapter)

    monkeypatch.setattr(world, "examples", broken)
    world.step()
    assert [job.adapter for job in world.jobs] == [A]
    assert "acme/sales" in caplog.text
