"""A request to forget also reaches those who began with a start that contains what its adapter taught."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import orjson
import pytest

from perennial.storage.registry.history.dependants import record_dependant
from perennial.storage.registry.quarantine import RequestOutcome, finish_entry, update_quarantine
from perennial.streams.events.models import ForgetRequested, RetentionProgressed
from perennial.streams.retain.ledger import AdapterProgress, RequestRecord
from perennial.streams.retain.request_store import RequestStore
from perennial.streams.retain.rules.dependant_steps import (
    MAX_ROUNDS,
    WINDOW,
    DependantSteps,
    dependant_failures,
    dependant_job,
    dependant_request_id,
    observe_dependants,
)
from perennial.streams.retain.rules.jobs import RESEND_MS, QuarantineChange, job_id_of
from perennial.streams.retain.rules.replica_report import ReplicaReport
from perennial.streams.retain.rules.step_facts import AliasPosition
from perennial.streams.retain.rules.transitions import FORGET_TRANSITIONS, Observation
from perennial.streams.retain.work_slice import Slice
from perennial.streams.retention.kinds import DEPENDANT_PREFIX
from tests.retention_world import V2, World, doc, example, request

F, U1, U2 = "acme/support/fay", "acme/support/uli", "acme/support/uma"


@pytest.fixture
def world():
    made = World()
    made.learn(example(1, adapter=F), example(2, adapter=F), example(3, adapter=U1), example(4, adapter=U2))
    began(made, U1, U2)
    return made


def began(world: World, *users: str) -> None:
    for user in users:
        record_dependant(world.objects, F, user)


def work(world: World, *adapters: str, failure: str = "") -> None:
    """The learner does the jobs of these adapters; the others wait."""
    others = [job for job in world.jobs if job.adapter not in adapters]
    world.jobs = [job for job in world.jobs if job.adapter in adapters]
    world.work(failure)
    world.jobs = others


def erase(**fields: object):
    return request("erase", **{"adapter": F, "selector": doc(1), **fields})


def founder_done(world: World, **fields: object) -> None:
    """The founder's job is carried out, and its dependants have theirs."""
    world.step(erase(**fields))
    work(world, F)
    world.step()


def own_entries(world: World, adapter: str) -> list[str]:
    return [entry.request_id for entry in world.quarantine(adapter).entries]


# ---- when they are looked up, and what they get


def test_they_are_looked_up_only_when_the_outcome_is_known(world):
    world.step(erase())
    world.step()
    assert world.looked_up == []
    assert [job.adapter for job in world.jobs] == [F]
    began(world, "acme/support/late")
    work(world, F)
    world.step()
    assert sorted(job.adapter for job in world.jobs) == ["acme/support/late", U1, U2]
    world.step()
    assert world.looked_up == [F], "once"


@pytest.mark.parametrize("emergency", [False, True])
def test_their_job_names_no_example_and_has_an_id_of_its_own(world, emergency):
    founder_done(world, emergency=emergency)
    job = next(job for job in world.jobs if job.adapter == U1)
    assert isinstance(job, ForgetRequested)
    assert (job.kind, job.selector, job.example_ids, job.suppress) == ("erase", None, [], False)
    assert job.emergency is emergency
    assert job.request_id == dependant_request_id("erase", F)
    assert job.request_id.startswith(DEPENDANT_PREFIX)
    assert job.job_id == job_id_of(job.request_id, U1)
    assert job.reason == f"it depends on what {F} forgets"
    assert own_entries(world, U1) == [job.request_id]
    assert not any(job.matches(item.example) for item in world.examples(U1))
    assert not world.filter(U1).blocks(example(1, adapter=U1)), "it keeps nothing from being learned there"
    assert dependant_request_id("erase", U2) != job.request_id != dependant_request_id("other", F)


def test_a_hold_on_everything_of_theirs_does_not_stop_it(world):
    world.step(request("hold", adapter=U1))
    founder_done(world)
    assert U1 in [job.adapter for job in world.jobs]


def test_an_adapter_that_nobody_began_with_is_closed_at_once_and_older_releases_read_it():
    world = World()
    world.learn(example(1))
    world.step(request("erase", selector=doc(1)))
    world.work()
    world.step()
    assert world.states("erase")[-1] == "closed"
    (record,) = world.requests().values()
    assert b"dependants" not in record.to_bytes()


def test_one_that_waits_for_replicas_since_an_older_release_is_left_as_it_is(world):
    record = RequestRecord.of(erase(), 1000)
    progress = AdapterProgress(phase="published", examples=1, version=V2, generation=2)
    stored = record.model_copy(update={"adapters": {F: progress}, "state": "published"})
    RequestStore(world.objects).save(stored, None, None)
    RequestStore(world.objects).bump(open_=True, in_force=True)
    world.restart()
    world.step()
    assert world.states("erase") == ["closed"]
    assert world.looked_up == []


# ---- those who depend on them in turn


def test_the_next_round_begins_when_all_of_this_one_are_carried_out_and_has_one_job_for_each(world):
    zoe = "acme/support/zoe"
    for user in (U1, U2):
        record_dependant(world.objects, user, zoe)
    record_dependant(world.objects, U1, U2)  # of both rounds
    founder_done(world)
    work(world, U1)
    world.step()
    assert [job.adapter for job in world.jobs] == [U2], "another one of the first round is not rebuilt yet"
    assert world.looked_up == [F, U1]
    work(world, U2)
    world.step()
    world.step()
    assert sorted(job.adapter for job in world.jobs) == [U2, zoe]
    assert {job.request_id for job in world.jobs} == {dependant_request_id("erase", F, 2)}
    assert dependant_request_id("erase", F, 2) != dependant_request_id("erase", F)
    assert world.published[-1].detail.endswith("; 2 of 4 adapters that depend on it are rebuilt")
    work(world, U2, zoe)
    world.step()
    world.step()
    assert [job.adapter for job in world.jobs] == [zoe], "after the second one for U2"
    work(world, zoe)
    world.step()
    world.step()
    assert world.states("erase")[-1] == "closed"
    assert own_entries(world, zoe) == own_entries(world, U2) == []


def test_records_that_go_round_in_a_circle_end(world):
    for one, other in ((U1, U2), (U2, U1), (U1, U1)):
        record_dependant(world.objects, one, other)
    founder_done(world)
    for _ in range(2 * MAX_ROUNDS):
        work(world, U1, U2)
        world.step()
    assert world.states("erase")[-1] == "closed"


def test_a_crash_between_rounds_gives_the_same_jobs(world):
    record_dependant(world.objects, U1, "acme/support/zoe")
    founder_done(world)
    work(world, U1, U2)
    world.restart()
    world.step()
    world.restart()
    world.step()
    assert [job.adapter for job in world.jobs] == ["acme/support/zoe"]


# ---- what the request waits for


def test_it_is_not_published_before_all_of_them_are_rebuilt(world):
    world.report = ReplicaReport(behind=("host-f",))
    founder_done(world)
    assert world.states("erase")[-1] == "quarantined"
    assert world.published[-1].detail.endswith("; 0 of 2 adapters that depend on it are rebuilt")
    work(world, U2)
    world.step()
    assert world.states("erase")[-1] == "quarantined"
    assert world.published[-1].detail.endswith("; 1 of 2 adapters that depend on it are rebuilt")
    work(world, U1)
    world.step()
    assert world.states("erase")[-1] == "published"
    world.report = ReplicaReport(acknowledged=("host-f",))
    world.step()
    assert world.states("erase")[-1] == "closed"
    assert world.published[-1].examples == 1, "of the founder alone"
    assert world.published[-1].version == V2


def test_it_waits_for_their_replicas_as_for_its_own(world):
    world.reports = {F: ReplicaReport(acknowledged=("host-f",)), U1: ReplicaReport(behind=("host-u",))}
    founder_done(world)
    work(world, U1, U2)
    world.step()
    world.step()
    assert world.states("erase")[-1] == "published"
    assert world.published[-1].detail.endswith(": host-u")
    assert own_entries(world, U1) == [dependant_request_id("erase", F)]
    world.reports[U1] = ReplicaReport(acknowledged=("host-u",))
    world.step()
    assert world.states("erase")[-1] == "closed"
    assert world.published[-1].acknowledged == ["host-f", "host-u"]


def test_it_waits_for_the_generation_that_the_rebuild_was_published_as(world):
    asked: list[tuple[str, int]] = []
    world.replicas = lambda adapter, generation: asked.append((adapter, generation)) or ReplicaReport()
    founder_done(world)
    done = RequestOutcome(at_ms=1, version=V2, generation=9)
    finish_entry(world.objects, U1, dependant_request_id("erase", F), done)
    work(world, U2)
    world.step()
    world.step()
    assert (U1, 9) in asked
    (record,) = world.requests().values()
    assert record.adapters[F].dependants[U1].version == V2


def test_where_nothing_was_left_to_do_it_waits_for_what_is_live(world):
    """Another request's job may have rebuilt the adapter a moment ago, and its replicas may not have it yet."""
    world.alive[U1] = AliasPosition(V2, 7)
    asked: list[tuple[str, int]] = []
    world.replicas = lambda adapter, generation: asked.append((adapter, generation)) or ReplicaReport()
    founder_done(world)
    work(world, U1, U2)
    world.step()
    world.step()
    assert (U1, 7) in asked
    assert world.states("erase")[-1] == "closed"


def test_the_due_time_ends_the_wait_for_their_replicas_and_not_the_wait_for_their_jobs(world):
    world.reports = {U1: ReplicaReport(behind=("host-u",))}
    founder_done(world, due_at=datetime.fromtimestamp(5, UTC))
    work(world, U1)
    world.step()
    world.now_ms = 5000
    world.step()
    world.step()
    assert world.states("erase")[-1] == "quarantined", "the job of the other one is open"
    work(world, U2)
    world.step()
    world.step()
    last = world.published[-1]
    assert (last.state, last.exceptions, last.missing) == ("closed", True, ["host-u"])
    assert "with exceptions" in last.detail
    assert own_entries(world, U1) == []


def test_one_that_matched_nothing_also_says_who_did_not_confirm_it(world):
    world.reports = {U1: ReplicaReport(behind=("host-u",))}
    founder_done(world, selector=doc(9), due_at=datetime.fromtimestamp(5, UTC))
    world.work()
    world.step()
    world.now_ms = 5000
    world.step()
    last = world.published[-1]
    assert (last.state, last.examples, last.exceptions) == ("closed", 0, True)
    assert last.detail.startswith("nothing matched")
    assert last.detail.endswith("host-u")


def test_one_that_cannot_be_rebuilt_fails_the_request_when_the_others_are(world):
    founder_done(world)
    work(world, U1, failure="its earlier state was deleted")
    world.step()
    assert world.states("erase")[-1] == "quarantined"
    work(world, U2)
    world.step()
    world.step()
    last = world.published[-1]
    assert last.state == "failed"
    assert last.detail == f"{F}: {U1}, which depends on it: its earlier state was deleted"
    assert own_entries(world, U2) == []


def test_the_founders_own_failure_reaches_nobody(world):
    world.step(erase())
    world.work(failure="no space")
    world.step()
    assert world.states("erase")[-1] == "failed"
    assert world.looked_up == []


def test_their_job_is_sent_again_when_it_may_be_lost(world):
    founder_done(world)
    first = [(job.job_id, job.request_id) for job in world.jobs]
    world.now_ms += RESEND_MS - 1
    world.step()
    assert len(world.jobs) == 2
    world.now_ms += 1
    world.step()
    world.step()
    assert [(job.job_id, job.request_id) for job in world.jobs] == first * 2


def test_an_entry_that_is_gone_is_written_and_its_job_sent_again(world):
    founder_done(world)
    work(world, U1, U2)
    update_quarantine(world.objects, U1, lambda found: found.without([dependant_request_id("erase", F)]))
    world.now_ms += 1
    world.step()
    assert [job.adapter for job in world.jobs] == [U1]
    assert own_entries(world, U1) == [dependant_request_id("erase", F)]


def test_they_are_kept_where_the_founders_own_entry_is_gone(world):
    founder_done(world)
    work(world, U1)
    world.step()
    update_quarantine(world.objects, F, lambda found: found.without(["erase"]))
    world.now_ms += 1
    world.step()
    (record,) = world.requests().values()
    assert {name: one.phase for name, one in record.adapters[F].dependants.items()} == {U1: "published", U2: "sent"}


def test_the_next_expiry_of_the_founder_does_not_wait_for_them():
    world = World(now_ms=5000)
    world.learn(example(1, adapter=F, retention_class="PT1S"))
    began(world, U1)
    world.step()
    work(world, F)
    world.step()
    assert [(job.kind, job.adapter) for job in world.jobs] == [("expire", U1)]
    world.learn(example(2, adapter=F, at_ms=5000, retention_class="PT1S"))
    world.now_ms = 10**5
    world.step()
    assert [job.adapter for job in world.jobs] == [U1, F]
    work(world, F)
    for _ in range(4):
        world.step()
        world.work()
    world.step()
    assert {record.state for record in world.requests().values()} == {"closed"}
    assert own_entries(world, F) == own_entries(world, U1) == []


# ---- patterns


def test_a_pattern_over_founder_and_user_makes_both_jobs(world):
    world.learn(example(1, adapter=U1))
    world.step(erase(adapter="acme/*"))
    work(world, F)
    world.step()
    jobs = [job for job in world.jobs if job.adapter == U1]
    assert {job.request_id for job in jobs} == {"erase", dependant_request_id("erase", F)}
    assert len({job.job_id for job in jobs}) == 2
    world.jobs = [job for job in world.jobs if job.request_id == "erase"]
    world.work()
    world.step()
    world.step()
    assert world.states("erase")[-1] == "quarantined", "the founder waits for its dependants"
    world.now_ms += RESEND_MS
    world.step()
    world.work()
    world.step()
    world.step()
    assert world.states("erase")[-1] == "closed"
    assert world.published[-1].examples == 2
    assert own_entries(world, U1) == ["erase"]


@pytest.mark.parametrize(
    ("report", "state", "words"),
    [
        (ReplicaReport(behind=("host-u",)), "published", "host-u"),
        (ReplicaReport(acknowledged=("host-u",)), "closed", ""),
    ],
)
def test_a_pattern_counts_their_replicas(world, report, state, words):
    world.reports = {U1: report}
    world.step(erase(adapter="acme/*"))
    for _ in range(3):
        world.work()
        world.step()
    assert world.published[-1].state == state
    assert world.published[-1].detail.endswith(words)
    assert world.published[-1].acknowledged == list(report.acknowledged)


def test_a_pattern_fails_where_one_cannot_be_rebuilt(world):
    world.step(erase(adapter="acme/*"))
    world.work()
    world.step()
    work(world, U1, failure="no space")
    for _ in range(3):
        world.work()
        world.step()
    assert world.states("erase")[-1] == "failed"
    assert f"{U1}, which depends on it: no space" in world.published[-1].detail


# ---- what it costs, and what a crash does


def test_entries_go_when_they_are_done(world):
    founder_done(world)
    world.work()
    world.step()
    assert len(own_entries(world, U1)) == 1, "the outcome is stored first"
    world.step()
    assert world.states("erase")[-1] == "closed"
    assert own_entries(world, U1) == own_entries(world, U2) == []
    assert own_entries(world, F) == ["erase"]


@pytest.mark.parametrize("lost", ["saves", "events and saves", "all but the first change"])
def test_a_step_that_is_interrupted_is_taken_again_with_the_same_jobs(world, lost):
    """Each slice is performed in part, the process ends, and another one begins from what is stored."""

    def interrupted(slices: Iterator[Slice]) -> None:
        for piece in slices:
            for change in piece.changes[:1] if lost.startswith("all") else piece.changes:
                world.worker.apply(change)
            if lost == "saves":
                world.jobs += [event for event in piece.events if not isinstance(event, RetentionProgressed)]
            if piece.changes or piece.events or piece.saves:
                return

    sent: set[tuple[str, str]] = set()
    interrupted(world.worker.receive(erase(), 1000, 1000))
    world.restart()
    world.step(erase())
    for _ in range(8):
        interrupted(world.worker.tick(world.now_ms))
        world.restart()
        world.step()
        sent |= {(job.adapter, job.job_id) for job in world.jobs}
        world.work()
    own = dependant_request_id("erase", F)
    assert sent == {(F, job_id_of("erase", F)), (U1, job_id_of(own, U1)), (U2, job_id_of(own, U2))}
    assert world.states("erase")[-1] == "closed"
    assert own_entries(world, U1) == own_entries(world, U2) == []


def names(number: int) -> list[str]:
    return [f"acme/support/u{n:04d}" for n in range(number)]


def test_thousands_are_reached_in_bounded_steps_and_take_little_room():
    world = World()
    world.learn(example(1, adapter=F))
    users = names(1000)
    began(world, *users)
    founder_done(world)
    most, ticks = 0, 0
    while world.states("erase")[-1] != "closed" and ticks < 200:
        most = max(most, len(world.jobs))
        world.work()
        done = world.step()
        assert len(done.changes) <= WINDOW
        world.now_ms += 1000
        ticks += 1
    assert world.states("erase")[-1] == "closed"
    assert most == WINDOW
    assert len(world.published) <= 16, "progress is published in about ten steps"
    assert not any(own_entries(world, user) for user in users)
    (record,) = world.requests().values()
    assert len(record.to_bytes()) < 100 * len(users)
    assert RequestRecord.model_validate_json(record.to_bytes()) == record


def stepper(world: World, now_ms: int = 1000) -> DependantSteps:
    changes: list[QuarantineChange] = []
    return DependantSteps(world, RequestRecord.of(erase(), 1000), F, 1000, now_ms, changes, [])


def test_those_that_wait_for_long_do_not_keep_the_others_from_being_looked_at():
    world = World()
    users = dict.fromkeys(names(3 * WINDOW), AdapterProgress(phase="waiting"))
    sent = users
    for step in range(3):
        steps = stepper(world)
        sent = steps.step(sent)
        assert len(steps.events) == len(steps.changes) == WINDOW, f"step {step}: first those without a job"
        for change in steps.changes:
            world.worker.apply(change)
    assert {one.phase for one in sent.values()} == {"sent"}
    last = names(3 * WINDOW)[-1]
    job = dependant_job(RequestRecord.of(erase(), 1000), F, last, 1000)
    done = RequestOutcome(at_ms=1)
    update_quarantine(world.objects, last, lambda found: found.finished(job.request_id, done))
    for now_ms in range(1000, 100_000, 1000):
        sent = stepper(world, now_ms).step(sent)
    assert sent[last].phase == "done", "the others have no outcome, and come first by name"


# ---- the pure parts


@pytest.mark.parametrize(
    ("phases", "own", "seen"),
    [
        ([], Observation.CONFIRMED, Observation.CONFIRMED),
        ([], Observation.UNCONFIRMED, Observation.UNCONFIRMED),
        (["done"], Observation.DONE, Observation.DONE),
        (["waiting", "done"], Observation.CONFIRMED, Observation.DEPENDANTS_REMAIN),
        (["sent", "failed"], Observation.DONE, Observation.DEPENDANTS_REMAIN),
        (["published", "failed"], Observation.CONFIRMED, Observation.DONE),
        (["done", "failed"], Observation.DONE, Observation.DONE),
        (["done", "failed"], Observation.CONFIRMED, Observation.FAILED),
        (["done"], Observation.UNCONFIRMED, Observation.UNCONFIRMED),
    ],
)
def test_what_is_observed_about_a_founder(phases, own, seen):
    users = {f"u{n}": AdapterProgress(phase=phase) for n, phase in enumerate(phases)}
    assert observe_dependants(users, own) is seen
    for phase in ("gathering", "held", "sent"):
        assert (phase, seen) in FORGET_TRANSITIONS
    if seen is not Observation.DEPENDANTS_REMAIN:
        assert ("published", seen) in FORGET_TRANSITIONS


def test_failures_name_the_first_and_count_the_others():
    failed = {name: AdapterProgress(phase="failed", detail=f"why {name}") for name in ("b", "a", "c")}
    assert dependant_failures(failed) == "a, which depends on it (and 2 more): why a"
    assert dependant_failures({"a": AdapterProgress(phase="done", detail="fine")}) == ""


def test_progress_without_them_has_the_json_that_older_releases_read():
    plain = AdapterProgress(phase="done")
    assert "dependants" not in orjson.loads(plain.to_bytes())
    users = {U1: AdapterProgress(phase="published", generation=3), U2: AdapterProgress(phase="done")}
    with_users = plain.model_copy(update={"dependants": users})
    stored = orjson.loads(with_users.to_bytes())
    assert stored["dependants"] == {U1: {"phase": "published", "generation": 3}, U2: {"phase": "done"}}
    assert AdapterProgress.model_validate_json(with_users.to_bytes()) == with_users
