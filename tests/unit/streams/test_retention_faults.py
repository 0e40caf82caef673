"""Faults that were found in retention requests, each by its case: supersession, gathering, expiry ahead, replicas, ids."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from perennial.storage.registry.quarantine import update_quarantine
from perennial.streams.events.wire_error import WireError
from perennial.streams.retain.ledger import StoredExample
from perennial.streams.retain.request_store import KEEP_OWN_MS, RequestStore
from perennial.streams.retain.rules.calendar import GROUP_MS, expiries, expiry_request, supersessions
from perennial.streams.retain.rules.in_force import InForce
from perennial.streams.retain.rules.replica_report import ReplicaReport, report_of
from perennial.streams.retain.rules.state_machine import DUE_MARGIN_MS
from tests.retention_world import V1, A, World, doc, example, request


def live(world: World) -> list[str]:
    return sorted(f"{item.example.document_id}: {item.example.example_id[-1]}" for item in world.examples(A))


def settled(world: World) -> None:
    for _ in range(3):
        world.step()
        world.work()
    world.step()


@pytest.fixture
def world():
    return World()


# ---- supersession


def test_case_20_a_document_that_goes_back_to_an_earlier_wording_is_learned(world):
    """price-1 A; price-2 B supersedes price-1; price-3 A supersedes price-2: the adapter knew B for good, never A."""
    world.learn(example(1, 100, document_id="price-1", text="A"))
    settled(world)
    world.now_ms = 2000
    world.learn(example(2, 1500, document_id="price-2", text="B", supersedes=["price-1"]))
    settled(world)
    assert live(world) == ["price-2: 2"]
    world.now_ms = 3000
    world.learn(example(3, 2500, document_id="price-3", text="A", supersedes=["price-2"]))
    settled(world)
    assert live(world) == ["price-3: 3"], "A is live and B is forgotten"
    assert not world.quarantine(A).suppresses_texts
    assert {event.state for event in world.published if event.kind == "supersede"} == {
        "accepted",
        "quarantined",
        "closed",
    }


@pytest.mark.parametrize("earlier", [None, "supersede-", "perennial:supersede:"])
def test_case_20_a_document_that_is_published_again_supersedes_again(world, earlier):
    """A, B, A, B: the second B had the request id of the first one, and for 30 days it superseded nothing."""
    for number, at_ms in enumerate((2000, 5000)):
        world.now_ms = at_ms
        old = example(1, at_ms - 900, document_id="price-1", text="A")
        new = example(2, at_ms - 500, document_id="price-2", text="B", supersedes=["price-1"])
        origin = new.origin.model_copy(update={"offset": 10 + number})
        world.stored.clear()  # the owner took B back
        world.learn(old, new.model_copy(update={"origin": origin}))
        settled(world)
        settled(world)
        assert live(world) == ["price-2: 2"]
        made = [record for record in world.requests().values() if record.request.kind == "supersede"]
        assert len(made) == number + 1, "one request for each publication, however often it is looked at"
        if earlier is not None and not number:  # an earlier release named no publication in the id
            RequestStore(world.objects).remove(made[0])
            request = made[0].request.model_copy(update={"request_id": f"{earlier}{2:032x}"})
            RequestStore(world.objects).save(made[0].model_copy(update={"request": request}), None, None)
            world.restart()
            settled(world)


@pytest.mark.parametrize("theirs", [None, "wiki"])
def test_attack_h_a_document_supersedes_only_documents_of_its_own_source(world, theirs):
    """One document superseded ten of another producer: they were erased and their texts banned for good."""
    mine = "crm" if theirs is None else None
    world.learn(*(example(n, 100 + n, document_id=f"d{n}", source=theirs) for n in range(1, 6)))
    world.learn(example(6, 106, document_id="d6", source=mine))
    world.now_ms = 3000
    world.learn(example(9, 2000, document_id="d9", source=mine, supersedes=[f"d{n}" for n in range(1, 7)]))
    settled(world)
    assert [one.document_id for one in world.forgotten] == ["d6"], "documents of another source are untouched"
    world.now_ms = 5000
    world.learn(example(7, 4000, document_id="d6", text="text 6", source=mine))
    settled(world)
    assert "d6: 7" in live(world), "its owner can publish it again"


def test_attack_h_a_request_to_supersede_keeps_to_the_source_of_the_new_document(world):
    world.learn(example(1, source="wiki", document_id="old"), example(2, source="crm", document_id="old"))
    world.step(request("supersede", selector={"document_ids": ["old"]}, superseded_by="d9"))
    world.learn(example(9, 2000, source="crm"))
    settled(world)
    assert [one.source for one in world.forgotten] == ["crm"]
    (entry,) = [one for one in world.quarantine(A).entries if one.request_id == "supersede"]
    assert (entry.selector["sources"], entry.suppress) == (["crm"], False)


def test_attack_h_a_request_that_names_other_sources_than_the_new_document_has_forgets_nothing(world):
    world.learn(example(1, source="wiki", document_id="old"))
    selector = {"document_ids": ["old"], "sources": ["wiki"]}
    world.step(request("supersede", selector=selector, superseded_by="d9"))
    world.learn(example(9, 2000, source="crm"))
    settled(world)
    assert world.forgotten == []
    assert world.published[-1].detail.startswith("nothing matched")


def test_supersession_compares_ids_and_sources_after_normalisation():
    old = StoredExample(example(1, document_id="Rene\u0301", source="cafe\u0301"), None, 1, V1, True)
    new = StoredExample(
        example(2, 200, document_id="n", source="caf\u00e9", supersedes=["Ren\u00e9"]), None, 1, V1, True
    )  # fmt: skip
    (made,) = supersessions(A, [old, new], 1000)
    assert made.request.selector.matches(old.example)


# ---- ids and due times


def test_ids_of_the_calendar_cannot_be_taken_by_anybody_else(world):
    """supersede-<example id> and expire-<hash> could be computed and taken beforehand: what was due never expired."""
    world.learn(example(1, retention_class="PT1S"))
    own = expiry_request(A, (f"{1:032x}",), 1100, 1100).request.request_id
    with pytest.raises(WireError, match="request_id"):
        world.step(request("erase", own, selector=doc(7)))
    world.step(request("erase", "expire-0123456789abcdef", selector=doc(7)))
    world.now_ms = 5000
    world.step()
    assert own in {job.request_id for job in world.jobs}


def test_an_example_that_is_learned_again_after_it_expired_expires_again(world):
    """The request for its first life had the same id, so its second life did not end while that one was kept."""
    world.learn(example(1, retention_class="PT1S"))
    world.now_ms = 5000
    settled(world)
    assert len(world.forgotten) == 1
    world.learn(example(1, 6000, retention_class="PT1S"))
    world.now_ms = 9000
    settled(world)
    assert len(world.forgotten) == 2
    assert len({status.request_id for status in world.published if status.state == "closed"}) == 2


# ---- gathering


def test_requests_are_gathered_so_that_one_rebuild_serves_them():
    world = World(gather_ms=60_000)
    world.learn(example(1), example(2))
    world.step(request("erase", "r1", selector=doc(1)))
    assert world.jobs == []
    assert world.states("r1")[-1] == "quarantined"
    assert world.filter(A).blocks(example(1)), "nothing new is learned from acceptance on"
    world.now_ms += 30_000
    world.step(request("erase", "r2", selector=doc(2)))
    world.now_ms += 30_000
    world.step()
    assert [job.request_id for job in world.jobs] == ["r1"], "the rebuild carries out all that is pending"


def test_a_gathered_request_ends_with_the_rebuild_of_another_one():
    world = World(gather_ms=60_000)
    world.learn(example(1), example(2))
    world.step(request("erase", "r2", selector=doc(2)))
    world.step(request("erase", "now", selector=doc(1), emergency=True))
    (job,) = world.jobs
    assert (job.request_id, job.emergency) == ("now", True), "an emergency waits for nothing"
    world.jobs.append(
        job.model_copy(update={"request_id": "r2", "selector": request("erase", selector=doc(2)).selector})
    )
    world.work()
    world.step()
    assert world.states("r2")[-1] == "closed"
    assert world.jobs == []


def test_gathering_ends_before_the_due_time():
    world = World(gather_ms=10 * DUE_MARGIN_MS)
    world.learn(example(1))
    due_ms = world.now_ms + 3 * DUE_MARGIN_MS
    world.step(request("erase", selector=doc(1), due_at=datetime.fromtimestamp(due_ms / 1000, UTC)))
    world.now_ms = due_ms - DUE_MARGIN_MS - 1
    world.step()
    assert world.jobs == []
    world.now_ms += 1
    world.step()
    assert len(world.jobs) == 1


def test_a_hold_on_what_is_gathered_wins():
    world = World(gather_ms=60_000)
    world.learn(example(1))
    world.step(request("erase", selector=doc(1)))
    world.step(request("hold", selector=doc(1)))
    world.now_ms += 60_000
    world.step()
    assert world.jobs == []
    assert world.states("erase")[-1] == "held"


# ---- expiry ahead of time


def test_attack_g_what_the_calendar_knows_is_prepared_once_and_carried_out_at_its_hour():
    """A time to live took the live adapter out of service for the length of the rebuild, at an hour that was known."""
    world = World(lead_ms=600_000)
    world.learn(*(example(n, at_ms=n, retention_class="PT1H") for n in range(8)), example(9))
    end_ms = 7 + 3_600_000
    world.now_ms = end_ms - 600_001
    world.step()
    assert (world.prepared, world.jobs) == ([], [])
    for now_ms in (end_ms - 600_000, end_ms - 300_000, end_ms - 1):
        world.now_ms = now_ms
        world.step()
        (ahead,) = world.prepared
        assert (ahead.prepare, ahead.suppress, len(ahead.example_ids)) == (True, False, 8)
        assert world.jobs == []
        assert world.quarantine(A).entries == [], "an example whose life has not ended is still learned"
        assert not world.filter(A).blocks(example(1, at_ms=1, retention_class="PT1H"))
    world.now_ms = end_ms
    world.step()
    (job,) = world.jobs
    assert (job.request_id, job.example_ids, job.prepare) == (ahead.request_id, ahead.example_ids, False)
    assert job.job_id != ahead.job_id
    assert len(world.quarantine(A).entries) == 1


def test_nothing_is_prepared_where_the_lead_is_zero():
    world = World(lead_ms=0)
    world.learn(example(1, retention_class="PT1H"))
    world.now_ms = 3_600_099
    world.step()
    assert world.prepared == []


@pytest.mark.parametrize("gap_ms", [GROUP_MS, GROUP_MS + 1])
def test_examples_are_due_together_only_where_their_lives_end_together(gap_ms):
    stored = [
        StoredExample(example(n, at_ms=at_ms, retention_class="PT1S"), None, 1, V1, True)
        for n, at_ms in ((1, 0), (2, gap_ms))
    ]
    found = expiries(InForce(), A, stored, 999)
    assert len(found.upcoming) == (2 if gap_ms == GROUP_MS else 1)
    assert expiries(InForce(), A, stored, found.next_ms - 1).due == ()
    assert expiries(InForce(), A, stored, found.next_ms).due == found.upcoming


# ---- replicas


@dataclass(frozen=True)
class Status:
    """A replica's status as AckReader returns it."""

    replica: str
    generation: int = 1
    version: str | None = V1
    failed: bool = False
    lease_expires_ms: int | None = 10_000
    left: bool = False


@pytest.mark.parametrize(
    ("status", "group"),
    [
        (Status("r", generation=2), "acknowledged"),
        (Status("r", version="sha256:" + "9" * 64), "behind"),  # it may serve a later one, whose record is under way
        (Status("r", version="sha256:" + "9" * 64, lease_expires_ms=5_000), "expired"),
        (Status("r", version="sha256:" + "9" * 64, left=True), "acknowledged"),
        (Status("r"), "behind"),
        (Status("r", lease_expires_ms=None), "behind"),
        (Status("r", lease_expires_ms=5_000), "expired"),
        (Status("r", left=True), "left"),
        (Status("r", generation=2, failed=True), "behind"),
        (Status("r", generation=2, failed=True, lease_expires_ms=5_000), "expired"),
        (Status("r", generation=2, left=True), "acknowledged"),
    ],
)
def test_attack_l_a_replica_is_waited_for_while_its_lease_lasts(status, group):
    """A replica that was scaled down kept every later request open for ever."""
    report = report_of([status], 2, {V1}, 5_000)
    assert {name for name in ("acknowledged", "behind", "expired", "left") if getattr(report, name)} == {group}
    assert report_of([status], 2, set(), 5_000).behind == ()


def test_attack_l_a_request_names_who_confirmed_it_and_who_did_not(world):
    world.learn(example(1))
    world.report = ReplicaReport(acknowledged=("web-1",), behind=("web-2",), expired=("pod-7",), left=("pod-8",))
    world.step(request("erase", selector=doc(1)))
    world.work()
    world.step()
    waiting = world.published[-1]
    assert (waiting.state, waiting.exceptions) == ("published", False)
    assert "web-2" in waiting.detail
    assert "pod-7" not in waiting.detail
    world.report = ReplicaReport(acknowledged=("web-1", "web-2"), expired=("pod-7",), left=("pod-8",))
    world.step()
    closed = world.published[-1]
    assert (closed.state, closed.exceptions) == ("closed", False)
    assert (closed.acknowledged, closed.missing) == (["web-1", "web-2"], ["pod-7", "pod-8"])
    assert "pod-7" in closed.detail


def test_attack_l_at_its_due_time_a_request_is_closed_with_exceptions_and_never_silently(world):
    world.learn(example(1))
    world.report = ReplicaReport(acknowledged=("web-1",), behind=("web-2",))
    due = datetime.fromtimestamp(60, UTC)
    world.step(request("erase", selector=doc(1), due_at=due))
    world.work()
    world.now_ms = 59_999
    world.step()
    assert world.published[-1].state == "published"
    world.now_ms = 60_000
    world.step()
    closed = world.published[-1]
    assert (closed.state, closed.exceptions, closed.missing) == ("closed", True, ["web-2"])
    assert "with exceptions" in closed.detail


def test_attack_l_a_request_that_is_not_carried_out_is_not_closed_at_its_due_time(world):
    world.learn(example(1))
    world.step(request("erase", selector=doc(1), due_at=datetime.fromtimestamp(60, UTC)))
    world.now_ms = 10**9
    world.step()
    assert world.published[-1].state == "quarantined"


def test_attack_l_the_replicas_of_a_request_over_a_pattern_are_those_of_all_its_adapters(world):
    world.learn(example(1), example(2, adapter="acme/sales", document_id="d1"))
    world.report = ReplicaReport(behind=("web-1",))
    world.step(request("erase", adapter="acme/*", selector=doc(1)))
    world.work()
    world.step()
    assert world.published[-1].state == "published"
    assert "web-1" in world.published[-1].detail
    world.report = ReplicaReport(acknowledged=("web-1",), left=("web-0",))
    world.step()
    closed = world.published[-1]
    assert (closed.state, closed.acknowledged, closed.missing) == ("closed", ["web-1"], ["web-0"])


# ---- nothing matched


@pytest.mark.parametrize("adapter", [A, "ft/nobody"])
def test_case_13_a_request_that_matches_nothing_says_so(world, adapter):
    """A typed id that fits nothing was closed as `forgotten`: to a script a typing error read as an erasure."""
    world.learn(example(1))
    world.step(request("erase", adapter=adapter, selector=doc(7)))
    world.work()
    world.step()
    assert (world.published[-1].state, world.published[-1].examples) == ("closed", 0)
    assert world.published[-1].detail.startswith("nothing matched")


def test_an_expiry_in_another_time_zone_is_prepared_for_the_same_hour():
    world = World(lead_ms=60_000, now_ms=3_540_000)
    end = datetime.fromtimestamp(3600, UTC)
    world.learn(example(1, expires_at=(end + timedelta(0)).astimezone()))
    world.step()
    assert [job.until_ms for job in world.prepared] == [3_600_000]


# ---- a crash at the end of an expiry


def expired(world: World) -> None:
    """Bring the world to where the learner has forgotten an expired example and retain has not seen it yet."""
    world.learn(example(1, 100, retention_class="PT1S"), example(2, 100, retention_class="PT20S"))
    world.now_ms = 2000
    world.step()
    world.step()
    world.work()


@pytest.mark.parametrize("saved", [False, True])
def test_a_crash_while_an_expiry_is_closed_leaves_no_request_open(world, saved):
    """The quarantine entry went before the request was stored as closed: it stayed open and stopped the calendar."""
    expired(world)
    for piece in world.worker.tick(world.now_ms):
        for change in piece.changes:
            world.worker.apply(change)
        for save in piece.saves if saved else ():
            save()
        if piece.saves:
            break  # the process is killed here
    world.restart()
    settled(world)
    assert [one.state for one in world.requests().values()] == ["closed"]
    world.now_ms = 30_000
    settled(world)
    assert [one.example_id[-1] for one in world.forgotten] == ["1", "2"], "the calendar goes on"
    world.now_ms += KEEP_OWN_MS + 1
    world.restart()
    settled(world)
    assert world.requests() == {}
    assert world.quarantine(A).entries == [], "an entry without its request would end the next one of the same id"


def test_a_request_whose_quarantine_entry_is_gone_is_sent_again(world):
    expired(world)
    (request_id,) = world.requests()
    update_quarantine(world.objects, A, lambda found: found.without([request_id]))
    settled(world)
    assert world.requests()[request_id].state == "closed"
