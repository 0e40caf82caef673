"""Requests over a pattern that destroy wait for a second person: who may approve them, until when, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from perennial.storage.signing.trust import Trust
from perennial.streams.events.cloudevents import decode, encode
from perennial.streams.events.models import RetentionRequested
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.event_signatures import signed_request
from perennial.streams.retain.request_store import KEEP_MS, RequestStore, hash_of, load_in_force, load_unapproved
from perennial.streams.retain.rules.approvals import MAX_CLOCK_AHEAD_MS, ApprovalRules
from perennial.streams.retention.kinds import KINDS
from tests.keys import Keys
from tests.retention_world import DAY_MS, A, B, World, doc, example, request

WAIT_MS = 7 * DAY_MS
RULES = ApprovalRules(WAIT_MS)
EVERYTHING = request("erase", "r", adapter="*", selector=doc(1))


def approval(of: RetentionRequested = EVERYTHING, by: str = "bob", **changes: object) -> RetentionRequested:
    return of.model_copy(update={"approved_by": by, **changes})


@pytest.fixture(params=[False, True], ids=["one process", "restarts"])
def world(request):
    made = World(approvals=RULES, restarts=request.param)
    made.learn(example(1), example(1, adapter=B), example(2))
    return made


def test_nothing_is_done_until_another_person_approves(world):
    done = world.step(EVERYTHING)
    for _ in range(3):
        world.now_ms += DAY_MS
        assert not world.step().events
    assert world.states("r") == ["unapproved"]
    assert (done.changes, world.jobs, world.quarantine(A).entries) == ([], [], [])
    assert "ann" in world.published[-1].detail
    assert "perennial forget approve r" in world.published[-1].detail
    world.learn(example(3))
    world.step(approval())
    assert {(job.adapter, job.until_ms) for job in world.jobs} == {(A, 1000), (B, 1000)}
    world.work()
    world.step()
    assert world.states("r")[-1] == "closed"
    assert {e.document_id for e in world.forgotten} == {"d1"}
    approved = world.requests()["r"].approval
    assert (approved.approved_by, approved.approved_ms) == ("bob", 1000 + 3 * DAY_MS)


@pytest.mark.parametrize("kind", [kind for kind, row in KINDS.items() if row.patterns and not row.refused_because])
@pytest.mark.parametrize("adapter", [A, "acme/*", "*"])
def test_the_kinds_that_destroy_wait_where_they_name_a_pattern(kind, adapter):
    row, world = KINDS[kind], World(approvals=RULES)
    world.learn(example(1))
    selector = None if row.selector == "refused" else {"retention_class": "permanent"}
    world.step(request(kind, "r", adapter=adapter, selector=selector, **dict.fromkeys(row.requires, "P1D")))
    waits = world.states("r")[0] == "unapproved"
    assert waits == (kind != "hold" and adapter != A)
    assert waits == bool(load_unapproved(world.objects))


def test_no_request_waits_where_the_operator_wants_no_approver():
    world = World()
    world.learn(example(1))
    world.step(EVERYTHING)
    assert world.states("r")[:2] == ["accepted", "quarantined"]
    with pytest.raises(WireError, match="waits for a second approver"):
        world.step(approval())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (approval(by="ann"), "another person"),
        (approval(by=" ANN "), "another person"),
        (approval(by="\uff41nn"), "another person"),
        (approval(request_id="other"), "waits for a second approver"),
        (approval(adapter="acme/*"), "adapter"),
        (approval(selector=request("erase", selector=doc(2)).selector), "selector"),
        (approval(kind="expire"), "kind"),
        (approval(reason="another"), "reason"),
        (approval(emergency=True), "emergency"),
        (approval(requested_by="carl"), "requested_by"),
        (approval(due_at=datetime(2030, 1, 1, tzinfo=UTC)), "due_at"),
    ],
)
def test_an_approval_by_the_same_person_or_of_another_content_is_refused(given, words, world):
    world.step(EVERYTHING)
    with pytest.raises(WireError, match=words) as caught:
        world.step(given)
    assert caught.value.reason == "bad-approval"
    world.step()
    assert (world.states("r"), world.jobs) == (["unapproved"], [])


def test_a_request_that_names_its_own_approver_is_refused(world):
    with pytest.raises(WireError, match="waits for a second approver"):
        world.step(approval())
    with pytest.raises(WireError, match="waits for a second approver"):
        world.step(approval(request("erase", "one", selector=doc(1))))
    assert world.requests() == {}


def test_a_redelivery_does_nothing_twice_and_a_third_person_cannot_approve_again(world):
    world.step(EVERYTHING, EVERYTHING)
    assert world.states("r") == ["unapproved", "unapproved"]
    world.step(approval(), approval(), EVERYTHING)
    assert len(world.jobs) == 2
    with pytest.raises(WireError, match="bob has approved it"):
        world.step(approval(by="carl"))
    with pytest.raises(WireError, match="id not used before"):
        world.step(EVERYTHING.model_copy(update={"reason": "another"}))
    assert len(world.jobs) == 2


def test_a_request_that_nobody_approves_ends_and_says_why(world):
    world.step(EVERYTHING)
    world.now_ms += WAIT_MS
    world.step()
    assert world.states("r") == ["unapproved"]
    world.now_ms += 1
    world.step()
    assert world.states("r") == ["unapproved", "failed"]
    assert "nobody approved it until 1970-01-08 00:00 UTC" in world.published[-1].detail
    with pytest.raises(WireError, match="came too late"):
        world.step(approval())
    assert load_unapproved(world.objects) == []
    world.now_ms += KEEP_MS + 1
    world.restart()
    world.step()
    assert (world.requests(), list(world.objects.list("retention/index/"))) == ({}, [])


def test_an_approval_in_time_counts_also_where_it_is_read_late(world):
    world.step(EVERYTHING)
    world.now_ms += 2 * WAIT_MS
    world.step()
    world.perform(world.worker.receive(approval(), 1000 + WAIT_MS, world.now_ms))
    world.step()
    assert world.states("r")[-2:] == ["accepted", "quarantined"]
    assert len(world.jobs) == 2


def test_a_request_that_begins_later_ends_without_an_approver_before():
    world = World(approvals=RULES)
    world.step(request("expire", "r", adapter="*", selector=doc(1), due_at=datetime(2030, 1, 1, tzinfo=UTC)))
    world.now_ms += WAIT_MS + 1
    world.step()
    assert world.states("r") == ["unapproved", "failed"]


def test_the_process_with_the_calendar_goes_on_with_what_another_one_saw_approved():
    """Also with an adapter that appears between the approval and the next tick of the other process."""
    here = World(approvals=RULES)
    here.learn(example(1))
    here.step(EVERYTHING)
    there = replace(here)  # the same store and adapters, and a worker of its own
    there.perform(there.worker.receive(approval(), here.now_ms, here.now_ms))
    here.learn(example(1, adapter=B))
    for _ in range(3):
        here.step()
    assert {job.adapter for job in here.jobs} == {A, B}


def test_a_policy_and_a_release_take_effect_when_they_are_approved():
    world = World(approvals=RULES)
    world.learn(example(1))
    world.step(request("hold", "h", adapter="*", selector={"subjects": ["eve"]}))
    world.step(request("release", "l", adapter="*", selector={"subjects": ["eve"]}))
    policy = request("policy", "p", adapter="*", selector={"retention_class": "permanent"}, time_to_live="P1D")
    world.step(policy)
    in_force = load_in_force(world.objects)
    assert [record.request.request_id for record in in_force.everything()] == ["h"]
    assert [hold.request_id for hold in world.quarantine(A).holds] == ["h"]
    world.step(approval(policy), approval(request("release", "l", adapter="*", selector={"subjects": ["eve"]})))
    assert [record.request.request_id for record in load_in_force(world.objects).everything()] == ["p"]
    assert (world.states("l")[-1], world.states("h")[-1], world.quarantine(A).holds) == ("closed", "closed", [])


def test_requests_that_need_no_approver_are_stored_as_an_older_release_reads_them():
    world = World(approvals=RULES)
    world.step(request("erase", "r", selector=doc(1)), EVERYTHING.model_copy(update={"request_id": "all"}))
    stored = {name: json.loads(world.objects.get(f"retention/requests/{hash_of(name)}").data) for name in ("r", "all")}
    assert "approval" in stored["all"]
    for field in ("approval", "approved_by", "requested_at", "signature"):
        assert field not in stored["r"]
        assert field not in stored["r"]["request"]
    assert "unapproved" not in {
        key.split("/")[2] for key in world.objects.list("retention/index/") if hash_of("r") in key
    }


# ---- with the keys of persons


@pytest.fixture
def keys(tmp_path):
    """Return trusted keys of two persons, and a stranger's."""
    ann, bob = Keys(tmp_path / "ann"), Keys(tmp_path / "bob")
    ann.public.write_text(ann.public.read_text("utf-8") + bob.public.read_text("utf-8"), "utf-8")
    return {"ann": ann.owner, "bob": bob.owner, "stranger": ann.stranger, "nobody": Trust()}, ann.readers


@pytest.mark.parametrize(
    ("requester", "approver", "reason"),
    [
        ("ann", "bob", None), ("bob", "ann", None), ("nobody", "bob", "bad-signature"), ("stranger", "bob", "bad-signature"),
        ("ann", "nobody", "bad-signature"), ("ann", "stranger", "bad-signature"), ("ann", "ann", "bad-approval"),
    ],
)  # fmt: skip
def test_two_different_trusted_keys_must_have_signed(keys, requester, approver, reason):
    trusts, readers = keys
    world = World(approvals=ApprovalRules(WAIT_MS, readers))
    world.learn(example(1))
    made = EVERYTHING.model_copy(update={"requested_at": datetime.fromtimestamp(1, UTC)})
    found = None
    try:
        world.step(on_the_wire(signed_request(made, trusts[requester])))
        world.step(on_the_wire(signed_request(approval(made), trusts[approver])))
    except WireError as error:
        found = error.reason
    assert found == reason
    assert bool(world.jobs) == (reason is None)


@pytest.mark.parametrize("field", ["reason", "approved_by", "request_id", "requested_at"])
def test_what_was_changed_after_it_was_signed_is_refused(keys, field):
    trusts, readers = keys
    world = World(approvals=ApprovalRules(WAIT_MS, readers))
    made = EVERYTHING.model_copy(update={"requested_at": datetime.fromtimestamp(1, UTC)})
    world.step(signed_request(made, trusts["ann"]))
    value = datetime.fromtimestamp(2, UTC) if field == "requested_at" else "other"
    forged = signed_request(approval(made), trusts["bob"]).model_copy(update={field: value})
    with pytest.raises(WireError):
        world.step(forged)
    with pytest.raises(WireError):  # nor does the request's own signature approve it
        world.step(approval(signed_request(made, trusts["ann"])))
    assert not world.jobs


@pytest.mark.parametrize(
    ("requested_ms", "accepted"),
    [
        (WAIT_MS, True), (0, True), (-1, False), (WAIT_MS + MAX_CLOCK_AHEAD_MS, True), (None, False),
        (WAIT_MS + MAX_CLOCK_AHEAD_MS + 1, False),
    ],
)  # fmt: skip
def test_a_signed_request_that_somebody_kept_is_refused(keys, requested_ms, accepted):
    """Its id is known for as long as its age is accepted, so that it does not count a second time."""
    trusts, readers = keys
    assert WAIT_MS <= KEEP_MS
    world = World(approvals=ApprovalRules(WAIT_MS, readers), now_ms=WAIT_MS)
    at = None if requested_ms is None else datetime.fromtimestamp(requested_ms / 1000, UTC)
    made = signed_request(EVERYTHING.model_copy(update={"requested_at": at}), trusts["ann"])
    if accepted:
        world.step(made)
        assert world.states("r") == ["unapproved"]
    else:
        with pytest.raises(WireError):
            world.step(made)
        assert RequestStore(world.objects).load(hash_of("r")) is None


def on_the_wire(made: RetentionRequested) -> RetentionRequested:
    """Return a request as retain reads it."""
    record = encode(made, event_id="1", source="/test", occurred_at=datetime(2026, 1, 1, tzinfo=UTC))
    return decode(record.value, record.headers, "retention").event
