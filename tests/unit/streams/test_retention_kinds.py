"""The table of retention kinds: complete, equal to the wire's type, and each row carried out by something."""

from __future__ import annotations

from typing import get_args

import pytest

from perennial.streams.events.models import RetentionKind, RetentionRequested, Selector
from perennial.streams.retain.request_worker import RequestWorker
from perennial.streams.retain.rules.transitions import (
    FORGET_TRANSITIONS,
    REQUEST_STATES,
    ROLLBACK_TRANSITIONS,
    Action,
    Observation,
    furthest_behind,
)
from perennial.streams.retention.kinds import KINDS, refusal_of


def test_the_table_and_the_type_on_the_wire_name_the_same_kinds():
    assert tuple(KINDS) == get_args(RetentionKind)
    assert all(row.kind == kind for kind, row in KINDS.items())


def test_every_accepted_kind_without_a_job_is_carried_out_by_retain():
    own = {kind for kind, row in KINDS.items() if row.job is None and not row.refused_because}
    assert own == set(RequestWorker._WITHOUT_JOB)


@pytest.mark.parametrize("row", KINDS.values(), ids=list(KINDS))
def test_a_row_is_consistent(row):
    assert row.summary.endswith(".")
    assert row.job == "forget" or not row.suppresses_text
    assert bool(row.done) != bool(row.refused_because)
    assert set(row.requires) <= set(RetentionRequested.model_fields)


@pytest.mark.parametrize("row", KINDS.values(), ids=list(KINDS))
def test_a_request_by_the_row_is_accepted(row):
    selector = None if row.selector == "refused" else Selector(retention_class="permanent")
    request = RetentionRequested(
        request_id="r", kind=row.kind, adapter="acme/a", selector=selector, requested_by="ann",
        **dict.fromkeys(row.requires, "P1D"),
    )  # fmt: skip
    assert refusal_of(request, 0) == row.refused_because


def test_every_phase_that_is_not_the_end_has_a_way_on():
    waiting = ("gathering", "held", "sent")
    carried_out = (Observation.DONE, Observation.CONFIRMED, Observation.UNCONFIRMED, Observation.FAILED)
    assert {(phase, seen) for phase, seen in FORGET_TRANSITIONS if phase in waiting} >= {
        (phase, seen) for phase in waiting for seen in (Observation.HELD, Observation.READY, *carried_out)
    }
    for table in (FORGET_TRANSITIONS, ROLLBACK_TRANSITIONS):
        assert {transition.phase for transition in table.values()} - {phase for phase, _ in table} == {"done", "failed"}


def test_a_job_is_sent_only_where_no_hold_stands_and_an_entry_is_written_before_the_first():
    for (phase, seen), transition in FORGET_TRANSITIONS.items():
        if Action.SEND_JOB in transition.actions:
            assert seen in {Observation.READY, Observation.OVERDUE, Observation.UNKNOWN}
            assert Action.QUARANTINE in transition.actions or phase == "sent"


def test_what_waits_to_be_gathered_is_quarantined_all_the_while():
    for (phase, _), transition in FORGET_TRANSITIONS.items():
        if transition.phase == "gathering" and phase != "gathering":
            assert {Action.QUARANTINE, Action.SUPPRESS} <= transition.actions


def test_every_phase_of_a_table_gives_the_request_a_state():
    for job, table in (("forget", FORGET_TRANSITIONS), ("rollback", ROLLBACK_TRANSITIONS)):
        for transition in table.values():
            summary = furthest_behind([transition.phase])
            assert (job, summary) in REQUEST_STATES
        assert (job, "no adapters") in REQUEST_STATES
