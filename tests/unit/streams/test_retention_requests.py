"""Retention decisions: what each request comes to, and laws over any order of requests and any setting of clocks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.storage.registry.quarantine import OTHER_ENGINE
from perennial.streams.events.models import (
    RetentionRequested,
)
from perennial.streams.events.wire_error import WireError
from perennial.streams.retain.clock import MAX_GAP_MS, ClockGuard
from perennial.streams.retain.ledger import covers, patterns_over
from perennial.streams.retain.request_store import KEEP_MS, KEEP_OWN_MS
from perennial.streams.retain.rules.jobs import RESEND_MS, job_id_of
from perennial.streams.retain.rules.replica_report import ReplicaReport
from perennial.streams.retain.rules.step_facts import AliasPosition
from tests.retention_world import DAY_MS, V1, V2, A, B, World, doc, example, request


@pytest.fixture
def world():
    made = World()
    made.learn(example(1, subjects=["ann"]), example(2, subjects=["bob"], source="crm"))
    return made


# ---- one request


def test_an_erase_is_quarantined_sent_done_and_closed(world):
    world.step(request("erase", selector=doc(1)))
    assert world.states("erase") == ["accepted", "quarantined"]
    (job,) = world.jobs
    assert (job.request_id, job.adapter, job.until_ms, job.suppress) == ("erase", A, 1000, True)
    assert world.filter(A).blocks(example(1))
    assert not world.filter(A).blocks(example(1, at_ms=1001, text="new"))
    world.work()
    world.step()
    assert world.states("erase")[-1] == "closed"
    assert world.published[-1].version == V2
    assert world.published[-1].examples == 1
    assert sorted(item.example.document_id for item in world.examples(A)) == ["d2"]
    assert world.filter(A).suppresses(example(9, at_ms=10**9, text="text 1"))


def test_a_request_says_at_its_end_that_another_engine_rebuilt_the_updates(world):
    world.step(request("erase", selector=doc(1)))
    world.work(detail=f"{OTHER_ENGINE}: 3 of the rebuilt updates")
    world.step()
    assert world.states("erase")[-1] == "closed"
    assert world.published[-1].detail.endswith("; exact in content, other engine: 3 of the rebuilt updates")


def test_a_redelivery_only_publishes_the_state_again(world):
    world.step(request("erase", selector=doc(1)))
    before, world.jobs = world.requests(), []
    step = world.step(request("erase", selector=doc(1)), received_ms=7777)
    assert world.requests() == before
    assert (step.changes, world.jobs) == ([], [])
    assert world.states("erase")[-1] == "quarantined"


def test_an_id_used_before_for_something_else_is_refused(world):
    world.step(request("erase", "r", selector=doc(1)))
    with pytest.raises(WireError, match="request_id"):
        world.step(request("erase", "r", selector=doc(2)))


def test_it_is_closed_only_when_no_replica_may_serve_a_version_trained_on_it(world):
    world.report = ReplicaReport(behind=("host-1",))
    world.step(request("erase", selector=doc(1)))
    world.work()
    world.step()
    assert world.states("erase")[-1] == "published"
    assert "host-1" in world.published[-1].detail
    world.report = ReplicaReport(acknowledged=("host-1",))
    world.step()
    assert world.states("erase")[-1] == "closed"


def test_an_erase_of_what_no_version_learned_still_blocks_what_is_under_way(world):
    world.step(request("erase", selector=doc(7)))
    world.work()
    world.step()
    assert world.states("erase")[-1] == "closed"
    world.learn(example(7, at_ms=999))
    assert "d7" not in {item.example.document_id for item in world.examples(A)}


def test_what_the_learner_cannot_do_is_failed_with_its_reason(world):
    world.step(request("erase", selector=doc(1)))
    world.work(failure="its earlier state was deleted")
    world.step()
    assert world.states("erase")[-1] == "failed"
    assert "its earlier state was deleted" in world.published[-1].detail


def test_a_pattern_reaches_all_adapters_also_one_made_later(world):
    world.learn(example(3, adapter=B, subjects=["ann"]), example(4, adapter="other", subjects=["ann"]))
    world.step(request("erase", adapter="acme/*", selector={"subjects": ["ann"]}))
    assert sorted(job.adapter for job in world.jobs) == [B, A]
    world.work()
    world.step()
    assert world.states("erase")[-1] == "closed"
    world.learn(example(5, adapter="acme/new", subjects=["ann"]))
    world.step()
    assert [job.adapter for job in world.jobs] == ["acme/new"]
    world.work()
    world.step()
    assert world.states("erase")[-1] == "closed"
    assert {e.document_id for e in world.forgotten} == {"d1", "d3", "d5"}


def test_adapters_that_are_made_for_ever_do_not_keep_a_request_over_a_pattern_for_ever(world):
    world.step(request("erase", adapter="*", selector=doc(1)))
    for number in range(40, 46):
        world.work()
        world.step()
        world.now_ms += KEEP_MS // 4
        world.learn(example(number, at_ms=world.now_ms, adapter=f"acme/a{number}"))
        world.restart()
        world.step()
    made = {job.adapter for job in world.jobs}
    assert world.quarantine("acme/a41").entry("erase")
    assert not world.quarantine("acme/a45").entry("erase")
    assert "acme/a45" not in made
    world.now_ms += KEEP_MS
    world.restart()
    world.step()
    assert world.requests() == {}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (request("erase"), "selector"),
        (request("expire"), "selector"),
        (request("decay", selector=doc(1)), "decay is not supported"),
        (request("decay", half_life="P30D"), "use kind policy"),
        (request("erase", selector=doc(1), half_life="P30D"), "half_life is not supported"),
        *((request("erase", selector=doc(1), assurance=a), "leave it out") for a in ("exact", "behavioural", "ranking")),
        (request("supersede", selector=doc(1)), "superseded_by"),
        (request("supersede", adapter="acme/*", selector=doc(1), superseded_by="d2"), "one adapter"),
        (request("policy", selector={"sources": ["crm"]}, time_to_live="P1D"), "retention_class"),
        (request("policy", selector={"retention_class": "P9D"}), "time_to_live"),
        (request("release", selector=doc(1)), "no hold"),
        (request("revoke", selector=doc(1)), "erase"),
        (request("erase", selector=doc(1), time_to_live="P1D"), "policy"),
        (request("erase", selector=doc(1), superseded_by="d2"), "supersede"),
        (request("hold", selector=doc(1), due_at=datetime(1970, 1, 1, tzinfo=UTC)), "in the past"),
        (
            request("policy", selector={"retention_class": "P9D"}, time_to_live="P1D", due_at=datetime(2030, 1, 1, tzinfo=UTC)),
            "due_at does not apply",
        ),
        (request("release", selector=doc(1), due_at=datetime(2030, 1, 1, tzinfo=UTC)), "due_at does not apply"),
        (request("expire", selector=doc(1), emergency=True), "emergency belongs to kind erase"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_fails_with_a_reason_and_does_nothing(world, bad, reason):
    step = world.step(bad)
    assert world.states(bad.request_id) == ["accepted", "failed"]
    assert reason in world.published[-1].detail
    assert (step.changes, world.jobs) == ([], [])


# ---- holds


def test_an_erase_waits_for_the_hold_and_goes_on_when_it_is_released(world):
    world.step(request("hold", selector={"subjects": ["ann", "eve"]}))
    world.step(request("erase", selector=doc(1, 2)))
    assert world.states("erase")[-1] == "held"
    assert world.jobs == []
    assert not world.filter(A).blocks(example(1, subjects=["ann"]))
    assert world.filter(A).blocks(example(2, subjects=["bob"]))
    world.step(request("release", selector={"subjects": ["eve", "ann"]}))
    assert world.states("hold")[-1] == "closed"
    world.step()
    world.work()
    world.step()
    assert world.states("erase")[-1] == "closed"
    assert world.examples(A) == []
    assert world.quarantine(A).holds == []


def test_a_hold_that_comes_before_the_learner_takes_the_job_wins(world):
    world.step(request("erase", selector=doc(1)))
    world.step(request("hold", selector=doc(1)))
    world.step()
    assert world.states("erase")[-1] == "held"
    world.work()
    assert world.forgotten == []
    world.step(request("release", selector=doc(1)))
    world.step()
    world.work()
    assert [e.document_id for e in world.forgotten] == ["d1"]


def test_a_hold_ends_by_itself_when_it_says_so(world):
    end = datetime.fromtimestamp(5, UTC)
    world.step(request("hold", selector=doc(1), due_at=end), request("erase", selector=doc(1)))
    world.now_ms = 4999
    world.step()
    assert world.jobs == []
    world.now_ms = 5000
    world.step()
    assert len(world.jobs) == 1


def test_a_hold_of_a_pattern_reaches_adapters_made_later(world):
    world.step(request("hold", adapter="*", selector={"subjects": ["eve"]}))
    world.learn(example(5, adapter="acme/new", subjects=["eve"]))
    world.step()
    assert [hold.request_id for hold in world.quarantine("acme/new").holds] == ["hold"]


# ---- calendar


@pytest.mark.parametrize(
    ("fields", "due_ms"),
    [
        ({"retention_class": "P1D"}, 100 + DAY_MS),
        ({"expires_at": datetime.fromtimestamp(60, UTC)}, 60_000),
        ({"retention_class": "P1D", "expires_at": datetime.fromtimestamp(60, UTC)}, 60_000),
        ({"retention_class": "PT1S", "expires_at": datetime.fromtimestamp(60, UTC)}, 1100),
    ],
)
def test_an_example_expires_at_the_earliest_of_its_ends_and_not_before(fields, due_ms):
    world = World(now_ms=due_ms - 1)
    world.learn(example(1, **fields), example(2))
    world.step()
    assert world.jobs == []
    world.now_ms = due_ms
    world.step()
    (job,) = world.jobs
    assert (job.kind, job.example_ids, job.suppress, job.until_ms) == ("expire", [f"{1:032x}"], False, due_ms)
    world.work()
    world.step()
    assert world.states(job.request_id) == ["accepted", "quarantined", "closed"]
    assert [item.example.document_id for item in world.examples(A)] == ["d2"]
    assert world.quarantine(A).entries == []


def test_what_falls_due_while_an_expiry_is_open_goes_with_the_next():
    world = World(now_ms=1200)
    world.learn(example(1, retention_class="PT1S"), example(2, at_ms=200, retention_class="PT1S"))
    world.learn(example(3, at_ms=2900, retention_class="PT1S"))
    world.step()
    world.now_ms = 5000
    world.step()
    assert [len(job.example_ids) for job in world.jobs] == [2]
    world.work()
    world.step()
    world.step()
    assert [job.example_ids for job in world.jobs] == [[f"{3:032x}"]]


def test_permanent_ends_by_a_policy_for_it_alone(world):
    world.learn(example(3, retention_class="P30D"))
    world.step(request("policy", "p1", selector={"retention_class": "P30D"}, time_to_live="P1D", adapter="acme/*"))
    world.now_ms = 100 + DAY_MS
    world.step()
    assert [job.example_ids for job in world.jobs] == [[f"{3:032x}"]]
    world.work()
    world.step(request("policy", "p2", selector={"retention_class": "permanent"}, time_to_live="P1D", adapter="*"))
    world.step()
    assert [len(job.example_ids) for job in world.jobs] == [2]


def test_a_policy_replaces_the_one_with_the_same_selector_and_permanent_ends_it(world):
    selector = {"retention_class": "permanent"}
    world.step(request("policy", "p1", selector=selector, time_to_live="P1D"))
    world.step(request("policy", "p2", selector=selector, time_to_live="P9D"))
    world.now_ms = 100 + DAY_MS
    world.step()
    assert world.jobs == []
    assert world.states("p1")[-1] == "closed"
    world.step(request("policy", "p3", selector=selector, time_to_live="permanent"))
    world.now_ms = 100 + 9 * DAY_MS
    world.step()
    assert world.jobs == []


def test_an_expire_request_waits_for_its_time(world):
    due = datetime.fromtimestamp(9, UTC)
    world.step(request("expire", selector={"sources": ["crm"]}, due_at=due))
    assert world.states("expire") == ["accepted"]
    world.learn(example(3, at_ms=8000, source="crm"))
    world.now_ms = 9000
    world.step()
    world.work()
    assert sorted(e.document_id for e in world.forgotten) == ["d2", "d3"]


def test_held_examples_do_not_expire_until_released():
    world = World(now_ms=1000)
    world.learn(example(1, retention_class="PT1S"))
    world.step(request("hold"))
    world.now_ms = 10_000
    world.step()
    assert world.jobs == []
    world.step(request("release"))
    world.step()
    assert len(world.jobs) == 1


# ---- supersede, revoke


def test_the_old_is_erased_only_after_the_new_is_learned(world):
    world.step(request("supersede", selector=doc(1), superseded_by="d9"))
    assert world.states("supersede") == ["accepted", "accepted"]
    world.learn(example(9, at_ms=2000), learned=False)
    world.step()
    assert world.jobs == []
    world.learn(example(9, at_ms=2000))
    world.step()
    (job,) = world.jobs
    assert (job.kind, job.until_ms) == ("supersede", 1000)
    world.work()
    world.step()
    assert world.states("supersede")[-1] == "closed"
    assert sorted(item.example.document_id for item in world.examples(A)) == ["d2", "d9"]


def test_a_document_that_names_what_it_supersedes_needs_no_request(world):
    world.learn(example(9, at_ms=2000, supersedes=["d1"]), example(1, at_ms=3000))
    world.learn(example(11, at_ms=500, document_id="d1"))
    world.step()
    (job,) = world.jobs
    assert (job.kind, job.until_ms) == ("supersede", 1999)
    assert job.request_id.startswith(f"perennial:supersede:{9:032x}:")
    world.work()
    assert [e.example_id for e in world.forgotten] == [f"{11:032x}"]
    world.step()
    world.step()
    assert world.jobs == []


def test_a_revocation_names_the_live_version_and_ends_when_another_is_live(world):
    world.step(request("revoke"))
    (job,) = world.jobs
    assert (job.revoke, job.version, job.job_id) == (True, V1, job_id_of("revoke", A))
    world.alive[A] = AliasPosition(V2, 2)
    world.step()
    assert world.states("revoke")[-1] == "accepted"
    world.revoked.add(V1)
    world.step()
    assert world.states("revoke")[-1] == "closed"
    assert len(world.jobs) == 1


def test_a_retired_adapter_is_closed_only_when_replicas_have_dropped_it(world):
    world.step(request("revoke"))
    world.alive[A], world.report = AliasPosition(None, 2), ReplicaReport(behind=("host-1",))
    world.revoked.add(V1)
    world.step()
    assert world.states("revoke")[-1] == "published"
    world.report = ReplicaReport(acknowledged=("host-1",))
    world.step()
    assert world.states("revoke")[-1] == "closed"


def test_revoking_where_nothing_is_live_fails(world):
    world.step(request("revoke", adapter="nobody"))
    assert world.states("revoke")[-1] == "failed"


# ---- the ledger


@pytest.mark.parametrize("asked", [request("erase", selector=doc(1)), request("revoke")])
def test_a_job_that_never_came_to_its_end_is_sent_again(world, asked):
    world.step(asked)
    world.now_ms += RESEND_MS - 1
    world.step()
    assert len(world.jobs) == 1
    world.now_ms += 1
    world.step()
    world.step()
    assert [job.job_id for job in world.jobs] == [job_id_of(asked.request_id, A)] * 2


def test_ended_requests_go_after_a_while_and_their_entries_with_them(world):
    world.step(request("erase", selector=doc(1)))
    world.work()
    world.step()
    world.now_ms += KEEP_MS - 1
    world.restart()  # requests are removed once a minute
    world.step()
    assert world.quarantine(A).entries
    world.now_ms += 1
    world.restart()
    world.step()
    assert world.requests() == {}
    assert world.quarantine(A).entries == []
    assert world.quarantine(A).keyed


@pytest.mark.parametrize(
    ("pattern", "adapter", "fits"),
    [("*", "a/b", True), ("acme/*", "acme/x", True), ("acme/*", "acme", False), ("acme/*", "acmes/x", False),
     ("acme/x", "acme/x", True), ("acme/x", "acme/xy", False)],
)  # fmt: skip
def test_patterns(pattern, adapter, fits):
    assert covers(pattern, adapter) is fits
    assert (pattern in patterns_over(adapter)) is fits


# ---- laws


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[object, ...]]:
    some = st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True)
    step = st.one_of(
        st.tuples(st.just("erase"), some),
        st.tuples(st.just("hold"), some),
        st.tuples(st.just("release"), st.integers(0, 5)),
        st.tuples(st.just("learn"), st.integers(0, 5)),
        st.tuples(st.just("tick")),
        st.tuples(st.just("work")),
        st.tuples(st.just("again"), st.integers(0, 9)),
    )
    return draw(st.lists(step, max_size=25))


@settings(max_examples=300, deadline=None)
@given(histories(), st.booleans())
def test_holds_win_in_any_order_and_what_was_asked_for_is_erased_in_the_end(steps, restarts):
    world = World(restarts=restarts)
    world.learn(*(example(n, at_ms=0) for n in range(6)))
    sent: list[RetentionRequested] = []
    holding: list[list[int]] = []
    asked: set[int] = set()

    def check_jobs() -> None:
        held = {n for numbers in holding for n in numbers}
        for job in world.jobs:
            assert job.job_id == job_id_of(job.request_id, job.adapter)
        stored = {item.example.document_id for item in world.examples(A)}
        assert {f"d{n}" for n in held & there} <= stored

    for number, step in enumerate(steps):
        there = {int(item.example.document_id[1:]) for item in world.examples(A)}
        world.now_ms += 10
        match step:
            case ("erase", list(numbers)):
                asked |= set(numbers)
                sent.append(request("erase", f"r{number}", selector=doc(*numbers)))
                world.step(sent[-1])
            case ("hold", list(numbers)):
                holding.append(numbers)
                sent.append(request("hold", f"r{number}", selector=doc(*numbers)))
                world.step(sent[-1])
            case ("release", int(which)) if holding:
                numbers = holding[which % len(holding)]
                holding = [other for other in holding if set(other) != set(numbers)]
                sent.append(request("release", f"r{number}", selector=doc(*numbers)))
                world.step(sent[-1])
            case ("learn", int(which)):
                world.learn(example(which, at_ms=0))
            case ("tick",):
                world.step()
            case ("work",):
                world.work()
            case ("again", int(which)) if sent:
                before, jobs = world.requests(), len(world.jobs)
                again = world.perform(world.worker.receive(sent[which % len(sent)], world.now_ms, world.now_ms))
                assert (again.changes, len(again.events)) == ([], 1)
                assert (world.requests(), len(world.jobs)) == (before, jobs)
        check_jobs()
    for number, numbers in enumerate(holding):
        world.step(request("release", f"last{number}", selector=doc(*numbers)))
    for _ in range(4):
        world.step()
        world.work()
    world.step()
    world.learn(*(example(n, at_ms=0) for n in asked))
    assert {item.example.document_id for item in world.examples(A)}.isdisjoint(f"d{n}" for n in asked)
    for one in sent:
        assert world.states(one.request_id)[-1] in {"closed", "failed"}


SETTLE_MS = 600_000


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 300_000), st.integers(-(10**9), 10**9), st.integers(1, SETTLE_MS // 10_000)),
        max_size=12,
    ),
    st.booleans(),
)
def test_nothing_is_early_whatever_the_clock_is_set_to_for_less_than_the_settling_time(steps, restarts):
    """True time is the monotonic one here; each step is taken back within the settling time."""
    truth = 10**12
    guard = ClockGuard(SETTLE_MS, None, truth, 0)
    mono = 0
    for quiet_ms, step_ms, looks in steps:
        mono += quiet_ms
        assert guard.now_ms(truth + mono, mono) <= truth + mono
        for _ in range(looks):
            mono += 9_000
            assert guard.now_ms(truth + mono + step_ms, mono) <= truth + mono
        if restarts:
            last = guard.now_ms(truth + mono, mono)
            guard = ClockGuard(SETTLE_MS, last, truth + mono + min(step_ms, 0), mono)
            assert guard.now_ms(truth + mono, mono) <= truth + mono
    mono += 1
    guard.now_ms(truth + mono, mono)
    mono += SETTLE_MS
    assert guard.now_ms(truth + mono, mono) == truth + mono


def test_a_step_forward_is_believed_once_it_stood_and_one_back_at_once():
    guard = ClockGuard(SETTLE_MS, None, 0, 0)
    hour = 3_600_000
    assert guard.now_ms(hour, 0) == 0
    assert guard.now_ms(hour + SETTLE_MS - 1, SETTLE_MS - 1) == SETTLE_MS - 1
    assert guard.now_ms(hour + SETTLE_MS, SETTLE_MS) == hour + SETTLE_MS
    assert guard.now_ms(5, SETTLE_MS + 1) == 5


def test_after_a_restart_a_gap_counts_as_a_step():
    guard = ClockGuard(SETTLE_MS, 1000, 1001 + MAX_GAP_MS, 50)
    assert guard.now_ms(1001 + MAX_GAP_MS, 50) == 1000
    assert guard.now_ms(1001 + MAX_GAP_MS + SETTLE_MS, 50 + SETTLE_MS) == 1001 + MAX_GAP_MS + SETTLE_MS
    assert ClockGuard(SETTLE_MS, 1000, 1000 + MAX_GAP_MS, 50).now_ms(1000 + MAX_GAP_MS, 50) == 1000 + MAX_GAP_MS


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 40), max_size=30), st.integers(1, 30))
def test_no_example_expires_before_its_time_however_the_clock_jumps(walls, days):
    """The guarded clock is never ahead of the wall's least in the settling time, so neither is the calendar."""
    world = World()
    world.learn(example(1, at_ms=0, retention_class=f"P{days}D"))
    guard = ClockGuard(SETTLE_MS, None, 0, 0)
    recent: list[int] = [0]
    for look, wall_days in enumerate(walls, 1):
        mono = look * SETTLE_MS // 3
        recent = [*recent[-3:], wall_days * DAY_MS - mono]
        world.now_ms = guard.now_ms(wall_days * DAY_MS, mono)
        world.step()
        if world.jobs:
            assert min(recent) + mono >= days * DAY_MS
            return


def test_expiry_ignores_time_zones():
    moscow = datetime.fromtimestamp(60, UTC) + timedelta(0)
    world = World(now_ms=60_000)
    world.learn(example(1, expires_at=moscow.astimezone()))
    world.step()
    assert len(world.jobs) == 1


def test_a_policy_on_an_endless_stream_does_not_fill_the_store():
    world = World()
    for number in range(20):
        world.now_ms += KEEP_OWN_MS // 4
        world.learn(example(number, at_ms=world.now_ms, retention_class="PT1S"))
        world.now_ms += 5000
        world.restart()
        world.step()
        world.work()
        world.step()
    assert len(world.forgotten) == 20
    assert len(world.requests()) <= 6
